// Jobs: tasks x attempts, newest first, with filters in the URL.
import { Field, Link, Problem, Same, StateMark, Table, Time, api, html, useData, useParam } from "../lib.js";
import { plainText } from "../pure.js";

const STATES = ["", "pending", "running", "completed", "failed", "cancelled"];

/** Ended trials of all, as a bar and as text. */
export function Progress(/** @type {{job: any}} */ { job }) {
  const { completed, failed, cancelled } = job.counts;
  const ended = completed + failed + cancelled;
  return html`<progress max=${job.trials} value=${ended} aria-label=${`Ended trials of ${plainText(job.name)}`}></progress> ${ended} of ${job.trials}${failed ? html` <span class="cause">${failed} failed</span>` : null}`;
}

export default function Jobs() {
  const [state, setState] = useParam("state");
  const [label, setLabel] = useParam("label");
  const [search, setSearch] = useParam("q");
  const { data, error } = useData(() => api("GET", `/v1/jobs?limit=1000${label ? `&label=${encodeURIComponent(label)}` : ""}`), [label], 3);
  const rows = (data ? data.items : []).filter((/** @type {any} */ job) => (!state || job.state === state) && `${job.name} ${job.job_id}`.toLowerCase().includes(search.toLowerCase()));
  return html`<div class="title"><h1>Jobs</h1></div>
    <div class="tools"><${Field} label="Search" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} />
      <${Field} label="state">${(/** @type {string} */ id) => html`<select id=${id} value=${state} onChange=${(/** @type {any} */ e) => setState(e.target.value)}>${STATES.map((s) => html`<option value=${s}>${s || "all"}</option>`)}</select>`}<//>
      <${Field} label="label" placeholder="NAME=VALUE" key=${label} defaultValue=${label} onChange=${(/** @type {any} */ e) => setLabel(e.target.value.trim())} />
      ${(state || label || search) && html`<${Link} to="/ui/jobs">Remove the filters<//>`}</div>
    <${Problem} error=${error} />
    ${data ? html`<${Table} label="Jobs" rows=${rows} empty=${data.items.length || label ? "No job matches. Change or remove the filters." : html`There are no jobs. Start one: <code>rock job run tasks/ --agent oracle --attempts 4</code>`} columns=${[
      ["Job", (/** @type {any} */ j) => html`<${Link} to=${`/ui/job/${encodeURIComponent(j.job_id)}`}>${plainText(j.name)}<//>`],
      ["State", (/** @type {any} */ j) => html`<${StateMark} state=${j.state} />${j.cancelling && !j.finished_at ? " (is being cancelled)" : ""}`],
      ["Trials", (/** @type {any} */ j) => html`<${Progress} job=${j} />`],
      ["Mean reward", (/** @type {any} */ j) => (j.mean_reward === null || j.mean_reward === undefined ? "" : `${j.mean_reward.toFixed(3)} (${j.valid} valid)`)],
      ["Created", (/** @type {any} */ j) => html`<${Time} at=${j.created_at} />`],
      ["Labels", (/** @type {any} */ j) => Object.entries(j.labels || {}).map(([name, value]) => html`<${Link} key=${name} to=${`/ui/jobs?label=${encodeURIComponent(`${name}=${value}`)}`}><code>${plainText(`${name}=${value}`)}</code><//> `)],
    ]} />` : !error && html`<p class="muted" role="status">Loading…</p>`}
    <${Same} cli=${["rock", "job", "ls"]} http=${`GET /v1/jobs${label ? `?label=${label}` : ""}`} />`;
}
