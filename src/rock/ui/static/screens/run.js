// One run of an agent: budget, reward, calls as a table, and the conversation of one call. Bodies are loaded for the shown
// call only, and a window of the table is in the DOM.
import { Confirm, Empty, Facts, Field, Link, Problem, Same, Time, api, can, here, html, save, useData, useEffect, useMemo, useParam, useRef, useState } from "../lib.js";
import { branchesOf, mergedCalls, messagesOf, settledUpTo, textOf } from "../calls.js";
import { Grid } from "../grid.js";
import { bytes, duration, plainText } from "../pure.js";
import { RunState, Tags, rewardOf } from "./runs.js";

const PAGE = 1000; // calls of one request, without bodies
const SHOWN = 20; // messages that are rendered at first
const FOLDED = 1500; // characters of a part that are rendered at first
const FORMATS = { atif: "ATIF", openai: "messages", chains: "chains", rock: "all fields" };
const path = (/** @type {string} */ id, rest = "") => `/v1/runs/${encodeURIComponent(id)}${rest}`;

/** All calls without bodies: pages are loaded once, and those with calls that have not ended again. */
function useCalls(/** @type {string} */ id, /** @type {any} */ run) {
  const [calls, setCalls] = useState(/** @type {any[]} */ ([]));
  const [error, setError] = useState(/** @type {any} */ (null));
  const known = useRef(/** @type {{id: string, calls: any[], busy: boolean}} */ ({ id, calls: [], busy: false }));
  const stamp = run ? JSON.stringify(run.counts) + run.state : "";
  useEffect(() => {
    if (!run) return undefined;
    let live = true;
    if (known.current.id !== id) known.current = { id, calls: [], busy: false };
    const mine = known.current;
    const load = async () => {
      try {
        let after = settledUpTo(mine.calls), more = true;
        while (more && live) {
          const page = await api("GET", path(id, `/calls?after=${after}&limit=${PAGE}`));
          if (!live) return;
          mine.calls = mergedCalls(mine.calls, page.items);
          more = page.after !== null && page.after !== undefined;
          after = page.after;
          setCalls(mine.calls);
        }
        setError(null);
      } catch (problem) { if (live) setError(problem); }
    };
    load();
    return () => { live = false; };
  }, [id, stamp]);
  return { calls: known.current.id === id ? calls : [], error };
}

export default function Run() {
  const id = here().parts[1] || "";
  const { data: run, error, reload } = useData(() => api("GET", path(id)), [id], 2);
  const { calls, error: failed } = useCalls(id, run);
  const [chosen, choose] = useParam("call");
  const [hidden] = useParam("hide");
  const [dialog, setDialog] = useState(false);
  const [exported, setExported] = useState(/** @type {any} */ (null));
  const branches = useMemo(() => branchesOf(calls), [calls]);
  const context = useMemo(() => ({ branches }), [branches, hidden]); // links of rows contain the other parameters
  const title = html`<div class="title"><h1>${run ? plainText(run.name || run.id) : id}</h1>${run && html`<${RunState} run=${run} />`}<span class="grow"></span>
    ${run && run.state === "active" && can("create") && html`<button type="button" class="danger" onClick=${() => setDialog(true)}>End the run</button>`}</div>`;
  if (error && !run) return html`${title}<${Problem} error=${error} /><p><${Link} to="/ui/runs">Show all runs<//></p>`;
  if (!run) return html`${title}<p class="muted" role="status">Loading…</p>`;
  const number = Number(chosen) || (calls.length ? calls[calls.length - 1].number : 0);
  const call = calls.find((one) => one.number === number);
  const download = async (/** @type {string} */ format) => {
    setExported(null);
    try { save(await (await api("GET", path(id, `/trajectory?format=${format}`), { raw: true })).blob(), `${id}.${format}.json`); } catch (e) { setExported(e); }
  };
  return html`${title}<${Problem} error=${error || failed} />
    ${run.reason && html`<p>Ended because: ${plainText(run.reason)}</p>`}
    ${run.incomplete && html`<p class="cause">A call was interrupted or could not be recorded. Do not train on this run.</p>`}
    <${Facts} rows=${[["Id", run.id], ["Source", run.upstream ? html`<${Link} to=${`/ui/runs?upstream=${encodeURIComponent(run.upstream)}`}>${run.upstream}<//>` : run.source], ["Model", run.model && plainText(run.model)], ["Sandbox", run.sandbox && html`<${Link} to=${`/ui/sandbox/${encodeURIComponent(run.sandbox)}`}>${run.sandbox}<//>`],
      ["Calls", callCounts(run.counts)], ["Tokens", `${run.counts.prompt_tokens} prompt (${run.counts.cached_tokens} cached), ${run.counts.completion_tokens} completion`], ["Cost", run.counts.cost ? run.counts.cost.toFixed(4) : ""],
      ["Budget left", html`<span class="budget">${budget(run)}</span>`], ["Reward", html`<span class="reward">${rewardOf(run) || "none"}</span>`], ["Reward valid", run.reward_valid === null || run.reward_valid === undefined ? "" : run.reward_valid ? "yes" : html`<span class="cause">no: an infrastructure error prevented it</span>`],
      ["Named rewards", Object.entries(run.rewards || {}).map(([name, value]) => html`<code>${plainText(name)}=${value}</code> `)], ["Weight version", run.weight_version && plainText(run.weight_version)], ["Tenant", run.tenant || "server owner"], ["Created", html`<${Time} at=${run.created_at} />`], ["Ended", run.ended_at && html`<${Time} at=${run.ended_at} />`], ["Tags", Object.keys(run.tags || {}).length ? html`<${Tags} tags=${run.tags} to="runs?tag" />` : ""]]} />
    <div class="row" role="group" aria-label="Export of the run">Export: ${Object.entries(FORMATS).map(([format, name]) => html`<button type="button" class="small" key=${format} onClick=${() => download(format)}>${name}</button>`)}</div><${Problem} error=${exported} />
    <h2>Calls</h2>${calls.length ? html`<${Grid} label="Calls" kind="calls" columns=${COLUMNS} rows=${calls} cells=${callCells} context=${context} chosen=${number} height=${360} />` : html`<${Empty}>${run.counts.calls ? "Loading…" : "The agent has made no call. It calls the model at the address of the run with the secret of the run."}<//>`}
    ${call && html`<${Conversation} id=${id} call=${call} about=${branches.get(number)} choose=${choose} key=${number} />`}
    <${Same} cli=${["rock", "runs", "calls", id]} http=${`GET ${path(id, "/calls")}`} /><${Same} cli=${["rock", "runs", "export", id]} http=${`GET ${path(id, "/trajectory?format=atif")}`} />
    ${dialog && html`<${End} id=${id} onClose=${() => { setDialog(false); reload(); }} />`}`;
}

function callCounts(/** @type {any} */ counts) {
  return ["calls", "running", "waiting", "failed", "cancelled", "retried", "refused"].filter((name) => name === "calls" || counts[name]).map((name) => `${counts[name]}${name === "calls" ? "" : ` ${name}`}`).join(", ");
}

function budget(/** @type {any} */ run) {
  const limits = Object.keys(run.budget || {}).filter((name) => run.budget[name] !== null && run.budget[name] !== undefined);
  if (!limits.length) return "no limit";
  return limits.map((name) => (name === "seconds" ? `${duration(run.left[name] ?? 0)} of ${duration(run.budget[name])}` : `${run.left[name] ?? 0} of ${run.budget[name]} ${name}`)).join(", ");
}

function End(/** @type {any} */ { id, onClose }) {
  const [reward, setReward] = useState("");
  const [valid, setValid] = useState(true);
  const [reason, setReason] = useState("");
  const body = { ...(valid && reward !== "" ? { reward: Number(reward) } : {}), ...(valid ? {} : { valid: false }), ...(reason ? { reason } : {}) };
  return html`<${Confirm} title="End the run" action="End the run" onClose=${onClose} run=${() => api("POST", path(id, "/end"), { json: body })}
    text=${html`Running calls are cancelled, and later calls are refused. The calls stay.
      <${Field} label="Reward (optional)" type="number" step="any" disabled=${!valid} value=${reward} onInput=${(/** @type {any} */ e) => setReward(e.target.value)} />
      <label class="check"><input type="checkbox" checked=${!valid} onChange=${(/** @type {any} */ e) => setValid(!e.target.checked)} /> An infrastructure error prevented a reward</label>
      <${Field} label="Reason (optional)" maxlength="2000" value=${reason} onInput=${(/** @type {any} */ e) => setReason(e.target.value)} />`}
    same=${html`<${Same} cli=${["rock", "runs", "end", id, ...(body.reward !== undefined ? ["--reward", String(body.reward)] : []), ...(valid ? [] : ["--invalid"]), ...(reason ? ["--reason", reason] : [])]} http=${`POST ${path(id, "/end")} ${JSON.stringify(body)}`} />`} />`;
}

// ---- the table of calls ----

const COLUMNS = ["Call", "Branch", "Continues", "State", "Model", "Finish", "Tokens", "First byte", "Latency", "Error"];
const milliseconds = (/** @type {number|null|undefined} */ end, /** @type {number} */ start) => (end ? `${Math.max(0, Math.round((end - start) * 1000))} ms` : "");

const target = (/** @type {number} */ n) => { const { parts, query } = here(); query.set("call", String(n)); return `/ui/run/${encodeURIComponent(parts[1])}?${query}`; };

function callCells(/** @type {any} */ c, /** @type {any} */ { branches }, /** @type {boolean} */ chosen) {
  return [html`<${Link} to=${target(c.number)} aria-current=${chosen ? "true" : undefined}>${c.number}<//>`, branches.get(c.number)?.branch ?? "", c.parent ? `${c.parent}${branches.get(c.parent)?.children.length > 1 ? " (branches)" : ""}` : "",
    html`<span class=${c.state === "failed" ? "cause" : ""}>${c.state}</span>`, plainText(c.upstream_model || c.model || ""), c.finish_reason || "", `${c.usage.prompt}${c.usage.cached ? ` (${c.usage.cached} cached)` : ""} + ${c.usage.completion}`,
    milliseconds(c.first_byte, c.started), milliseconds(c.ended, c.started), c.error ? html`<span class="cause" title=${plainText(c.error)}>${c.error_kind || "error"}: ${plainText(c.error).slice(0, 200)}</span>` : c.retries ? `${c.retries} retries` : ""];
}

// ---- the conversation of one call ----

function Conversation(/** @type {any} */ { id, call, about, choose }) {
  const [hidden, setHidden] = useParam("hide");
  const [all, setAll] = useState(false);
  const [raw, setRaw] = useState(/** @type {any} */ (null));
  const [problem, setProblem] = useState(/** @type {any} */ (null));
  const { data, error } = useData(async () => {
    try { return await api("GET", path(id, `/calls/${call.number}?dialect=openai-chat`)); } catch (e) {
      if (/** @type {any} */ (e).status !== 400) throw e;
      return { unreadable: /** @type {any} */ (e).message }; // no body of its dialect: only the raw JSON shows it
    }
  }, [id, call.number, call.state]);
  const messages = useMemo(() => (data && !data.unreadable ? messagesOf(data.request, data.response) : []), [data]);
  const kinds = hidden.split(",").filter(Boolean);
  const shown = all ? messages : messages.slice(-SHOWN);
  const toggle = (/** @type {string} */ kind, /** @type {string} */ label) => html`<label class="check"><input type="checkbox" checked=${!kinds.includes(kind)} onChange=${() => setHidden((kinds.includes(kind) ? kinds.filter((k) => k !== kind) : [...kinds, kind]).join(","))} /> ${label}</label>`;
  return html`<h2>Conversation up to call ${call.number}</h2>
    <div class="tools">${call.parent && html`<button type="button" onClick=${() => choose(String(call.parent))}>Earlier call ${call.parent}</button>`}${(about?.children || []).slice(0, 12).map((/** @type {number} */ n) => html`<button type="button" key=${n} onClick=${() => choose(String(n))}>Later call ${n}</button>`)}
      ${toggle("tools", "Tool calls and results")}${toggle("reasoning", "Reasoning")}${toggle("system", "System prompt")}
      <button type="button" onClick=${async () => { setProblem(null); try { setRaw(raw ? null : await api("GET", path(id, `/calls/${call.number}`))); } catch (e) { setProblem(e); } }}>${raw ? "Hide the raw JSON" : "Show the raw JSON"}</button></div>
    ${call.error && html`<p class="cause">${call.error_kind}: ${plainText(call.error)}</p>`}<${Problem} error=${error || problem} />
    ${data && data.unreadable && html`<p class="muted">The call has no readable form: ${plainText(data.unreadable)}</p>`}
    ${messages.length > shown.length && html`<p><button type="button" onClick=${() => setAll(true)}>Show ${messages.length - shown.length} earlier messages</button></p>`}
    ${!data && !error ? html`<p class="muted" role="status">Loading…</p>` : html`<ol class="conversation">${shown.filter((m) => !(m.role === "system" && kinds.includes("system"))).map((m, i) => {
      const parts = m.parts.filter((part) => !(kinds.includes("tools") && (part.kind === "call" || part.kind === "result")) && !(kinds.includes("reasoning") && part.kind === "reasoning"));
      return parts.length || m.answer ? html`<li class=${`message role-${["system", "user", "assistant", "tool"].includes(m.role) ? m.role : "other"}${m.answer ? " answer" : ""}`} key=${messages.length - shown.length + i}><h3>${plainText(m.role)}${m.answer ? " (answer of this call)" : ""}</h3>${parts.map((part, n) => html`<${PartView} part=${part} key=${n} />`)}</li>` : null;
    })}</ol>`}
    ${raw && html`<h3>Raw JSON</h3><${Raw} value=${raw} />`}
    <${Same} cli=${["rock", "runs", "calls", id, "--bodies", "--json"]} http=${`GET ${path(id, `/calls/${call.number}?dialect=openai-chat`)}`} />`;
}

const NAMES = { call: "tool call", result: "tool result", reasoning: "reasoning", media: "media", text: "" };

function PartView(/** @type {any} */ { part }) {
  const [whole, setWhole] = useState(false);
  const text = plainText(part.text);
  const name = [NAMES[/** @type {keyof typeof NAMES} */ (part.kind)], part.name && plainText(part.name)].filter(Boolean).join(" ");
  return html`<div class=${`part part-${part.kind}`}>${name && html`<div class="muted">${name}</div>`}<div class="words">${whole ? text : text.slice(0, FOLDED)}</div>
    ${text.length > FOLDED && html`<button type="button" class="small" onClick=${() => setWhole(!whole)}>${whole ? "Fold" : `Show all ${bytes(text.length)}`}</button>`}</div>`;
}

function Raw(/** @type {any} */ { value }) {
  const text = useMemo(() => plainText(textOf(value)), [value]);
  return html`<pre class="output raw" tabindex="0" aria-label="Raw JSON of the call">${text.slice(0, 500000)}</pre>${text.length > 500000 && html`<p class="muted">The first 500,000 of ${text.length} characters.</p>`}`;
}
