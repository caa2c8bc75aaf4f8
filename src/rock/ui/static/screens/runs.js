// Runs of agents: the list, newest first, with filters in the URL in the words of the API and of `rock runs ls`.
import { Field, Link, Problem, Same, Table, Time, api, here, html, useData, useParam, useState } from "../lib.js";
import { plainText } from "../pure.js";

const FILTERS = ["state", "sandbox", "upstream", "tag", "name"];

/** The reward of a run, as text. */
export function rewardOf(/** @type {any} */ run) {
  if (run.reward_valid === false) return "not valid";
  if (run.reward !== null && run.reward !== undefined) return String(run.reward);
  return Object.entries(run.rewards || {}).map(([name, value]) => `${name}=${value}`).join(", ");
}
export function RunState(/** @type {{run: any}} */ { run }) {
  return html`<span class=${`state ${run.state === "active" ? "state-running" : "state-stopped"}`}><span aria-hidden="true">${run.state === "active" ? "●" : "○"}</span> ${run.state}</span>${run.incomplete ? html` <span class="cause">incomplete</span>` : null}`;
}
export function Tags(/** @type {{tags: Record<string, string>, to: string}} */ { tags, to }) {
  return Object.entries(tags || {}).map(([name, value]) => html`<${Link} key=${name} to=${`/ui/${to}=${encodeURIComponent(`${name}=${value}`)}`}><code>${plainText(`${name}=${value}`)}</code><//> `);
}

export default function Runs() {
  const values = Object.fromEntries(FILTERS.map((name) => [name, useParam(name)]));
  const [after, setAfter] = useState("");
  const query = new URLSearchParams();
  for (const name of FILTERS) for (const value of here().query.getAll(name)) if (value) query.append(name, value);
  const filter = query.toString();
  const [of, setOf] = useState(filter);
  if (of !== filter) { setOf(filter); setAfter(""); }
  const { data, error } = useData(() => api("GET", `/v1/runs?limit=100${filter ? `&${filter}` : ""}${after ? `&after=${encodeURIComponent(after)}` : ""}`), [filter, after], 3);
  const input = (/** @type {string} */ name, hint = "") => html`<${Field} label=${name} placeholder=${hint} key=${`${name}${values[name][0]}`} defaultValue=${values[name][0]} onChange=${(/** @type {any} */ e) => values[name][1](e.target.value.trim())} />`;
  return html`<div class="title"><h1>Runs</h1></div>
    <div class="tools"><${Field} label="state">${(/** @type {string} */ id) => html`<select id=${id} value=${values.state[0]} onChange=${(/** @type {any} */ e) => values.state[1](e.target.value)}>${["", "active", "ended"].map((s) => html`<option value=${s}>${s || "all"}</option>`)}</select>`}<//>
      ${input("tag", "NAME=VALUE")}${input("sandbox")}${input("upstream")}${input("name")}
      ${filter && html`<${Link} to="/ui/runs">Remove the filters<//>`}</div>
    <${Problem} error=${error} />
    ${data ? html`<${Table} label="Runs" rows=${data.items} empty=${filter ? "No run matches. Change or remove the filters." : html`There are no runs. A run is one agent on one task; create one with <code>client.runs.create()</code> or start a job with a model.`} columns=${[
      ["Run", (/** @type {any} */ r) => html`<${Link} to=${`/ui/run/${encodeURIComponent(r.id)}`}>${plainText(r.name || r.id)}<//>`],
      ["State", (/** @type {any} */ r) => html`<${RunState} run=${r} />`],
      ["Source", (/** @type {any} */ r) => (r.upstream ? html`<${Link} to=${`/ui/runs?upstream=${encodeURIComponent(r.upstream)}`}>${r.upstream}<//>` : r.source)],
      ["Calls", (/** @type {any} */ r) => html`${r.counts.calls}${r.counts.failed ? html` <span class="cause">${r.counts.failed} failed</span>` : null}`],
      ["Tokens", (/** @type {any} */ r) => r.counts.prompt_tokens + r.counts.completion_tokens],
      ["Reward", (/** @type {any} */ r) => rewardOf(r)],
      ["Created", (/** @type {any} */ r) => html`<${Time} at=${r.created_at} />`],
      ["Sandbox", (/** @type {any} */ r) => r.sandbox && html`<${Link} to=${`/ui/sandbox/${encodeURIComponent(r.sandbox)}`}>${r.sandbox}<//>`],
      ["Tags", (/** @type {any} */ r) => html`<${Tags} tags=${r.tags} to="runs?tag" />`],
    ]} />` : !error && html`<p class="muted" role="status">Loading…</p>`}
    <div class="row">${after && html`<button type="button" onClick=${() => setAfter("")}>Newest</button>`}${data && data.after && html`<button type="button" onClick=${() => setAfter(data.after)}>Older</button>`}</div>
    <${Same} cli=${["rock", "runs", "ls", ...[...query].flatMap(([name, value]) => (name === "name" ? [] : [`--${name}`, value]))]} http=${`GET /v1/runs${filter ? `?${filter}` : ""}`} />`;
}
