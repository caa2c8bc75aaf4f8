// One job: progress, pass@k, its trials, and the comparison with another job. A window of the trials is in the DOM.
import { Confirm, Empty, Facts, Field, Link, Problem, Same, StateMark, Table, Time, api, can, here, html, useData, useEffect, useMemo, useParam, useRef, useState } from "../lib.js";
import { mergedCalls as merged, textOf } from "../calls.js";
import { compareJobs, finalUpTo, meanOf, passAt, rewardOfTrial, rewardsByTask, slimTrial, valuesOfK } from "../trials.js";
import { Grid } from "../grid.js";
import { duration, plainText } from "../pure.js";
import { Progress } from "./jobs.js";

const PAGE = 1000;
const DIFFERENCES = 500; // tasks in the table of a comparison
const path = (/** @type {string} */ id, rest = "") => `/v1/jobs/${encodeURIComponent(id)}${rest}`;
const estimate = (/** @type {any} */ e) => (e ? `${e.value.toFixed(3)} (95 %: ${e.low.toFixed(3)} to ${e.high.toFixed(3)}; ${e.tasks} tasks)` : "");

/** All trials of a job, slim; those that have not ended are loaded again when the job has changed. */
function useTrials(/** @type {string} */ id, /** @type {any} */ job) {
  const [state, set] = useState(/** @type {any} */ ({ id, trials: [], error: null }));
  const known = useRef(/** @type {any} */ ({ id: "", trials: [] }));
  const stamp = job ? JSON.stringify([job.counts, job.state, job.valid, job.mean_reward]) : "";
  useEffect(() => {
    if (!job) return undefined;
    let live = true;
    if (known.current.id !== id) known.current = { id, trials: [] };
    const mine = known.current;
    (async () => {
      try {
        for (let after = finalUpTo(mine.trials); live && after !== null && after !== undefined;) {
          const page = await api("GET", path(id, `/trials?after=${after}&limit=${PAGE}`));
          if (!live) return;
          mine.trials = merged(mine.trials, page.items.map(slimTrial));
          after = page.next;
          set({ id, trials: mine.trials, error: null });
        }
      } catch (error) { if (live) set((/** @type {any} */ old) => ({ ...old, error })); }
    })();
    return () => { live = false; };
  }, [id, stamp]);
  return state.id === id ? state : { id, trials: [], error: null };
}

export default function Job() {
  const id = here().parts[1] || "";
  const { data: job, error, reload } = useData(() => api("GET", path(id, "?tasks=0")), [id], 2);
  const { trials, error: failed } = useTrials(id, job);
  const [state, setState] = useParam("state");
  const [kind, setKind] = useParam("error");
  const [search, setSearch] = useParam("q");
  const [chosen] = useParam("trial");
  const [against, setAgainst] = useParam("against");
  const [other, setOther] = useState(against);
  const [dialog, setDialog] = useState(false);
  const rewards = useMemo(() => rewardsByTask(trials), [trials]);
  const figures = useMemo(() => (job ? { mean: meanOf(rewards), pass: valuesOfK(job.attempts).map((k) => ({ k, found: passAt(rewards, k) })) } : null), [rewards, job?.attempts]);
  const kinds = useMemo(() => {
    /** @type {Record<string, number>} */ const found = {};
    for (const trial of trials) if (trial.error) found[trial.error.kind] = (found[trial.error.kind] || 0) + 1;
    return Object.entries(found).sort();
  }, [trials]);
  const shown = useMemo(() => trials.filter((/** @type {any} */ t) => (!state || t.state === state) && (!kind || t.error?.kind === kind) && (!search || t.task.toLowerCase().includes(search.toLowerCase()))), [trials, state, kind, search]);
  const now = Math.round(Date.now() / 5000) * 5;
  const context = useMemo(() => ({ now }), [now, state, kind, search, against]); // links of rows contain the filters
  const ended = job && job.finished_at !== null && job.finished_at !== undefined;
  const title = html`<div class="title"><h1>${job ? plainText(job.name) : id}</h1>${job && html`<${StateMark} state=${job.state} />`}<span class="grow"></span>
    ${job && !ended && !job.cancelling && can("create") && html`<button type="button" class="danger" onClick=${() => setDialog(true)}>Cancel the job</button>`}</div>`;
  if (error && !job) return html`${title}<${Problem} error=${error} /><p><${Link} to="/ui/jobs">Show all jobs<//></p>`;
  if (!job || !figures) return html`${title}<p class="muted" role="status">Loading…</p>`;
  return html`${title}<${Problem} error=${error || failed} />
    ${job.cancelling && !ended && html`<p role="status">The job is being cancelled: its runners stop the running trials.</p>`}
    <${Facts} rows=${[["Progress", html`<span class="progress"><${Progress} job=${job} /></span>`], ["Trials by state", Object.entries(job.counts).filter(([, n]) => n).map(([name, n]) => html`<span class="pad"><${StateMark} state=${name} /> ${n}</span>`)], ["Id", job.job_id], ["Tasks and attempts", `${job.tasks} tasks, ${job.attempts} attempts each`],
      ["Mean reward", estimate(figures.mean)], ...figures.pass.map(({ k, found }) => [`pass@${k}`, found && html`<span class="pass">${estimate(found)}</span>`]), ["Trials without a valid reward", trials.filter((/** @type {any} */ t) => !["pending", "running"].includes(t.state) && rewardOfTrial(t) === null).length || ""],
      ["Errors by class", kinds.map(([name, n]) => html`<${Link} key=${name} class="pad" to=${`/ui/job/${encodeURIComponent(id)}?error=${encodeURIComponent(name)}`}>${name}: ${n}<//> `)], ["Tenant", job.tenant || "server owner"], ["Created", html`<${Time} at=${job.created_at} />`], ["Duration", job.started_at && duration((job.finished_at || Date.now() / 1000) - job.started_at)], ["Labels", Object.entries(job.labels || {}).map(([name, value]) => html`<code>${plainText(`${name}=${value}`)}</code> `)]].filter(([, value]) => !Array.isArray(value) || value.length)} />
    <form class="tools" onSubmit=${(/** @type {Event} */ e) => { e.preventDefault(); setAgainst(other.trim()); }}><${Field} label="Compare with the job" value=${other} onInput=${(/** @type {any} */ e) => setOther(e.target.value)} required /><button type="submit">Compare</button>${against && html`<button type="button" onClick=${() => { setOther(""); setAgainst(""); }}>End the comparison</button>`}</form>
    ${against && html`<${Comparison} a=${job} rewards=${rewards} other=${against} key=${against} />`}
    <h2>Trials</h2><div class="tools"><${Field} label="Search a task" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} />
      <${Field} label="state">${(/** @type {string} */ field) => html`<select id=${field} value=${state} onChange=${(/** @type {any} */ e) => setState(e.target.value)}>${["", "pending", "running", "completed", "failed", "cancelled"].map((s) => html`<option value=${s}>${s || "all"}</option>`)}</select>`}<//>
      <${Field} label="error class">${(/** @type {string} */ field) => html`<select id=${field} value=${kind} onChange=${(/** @type {any} */ e) => setKind(e.target.value)}>${["", ...new Set([...kinds.map(([name]) => name), ...(kind ? [kind] : [])])].map((s) => html`<option value=${s}>${s || "all"}</option>`)}</select>`}<//></div>
    ${shown.length ? html`<${Grid} label="Trials" kind="trials" columns=${COLUMNS} rows=${shown} cells=${trialCells} context=${context} chosen=${Number(chosen)} height=${480} />` : html`<${Empty}>${trials.length ? "No trial matches. Change the search or the filters." : "Loading…"}<//>`}
    ${chosen && html`<${Trial} id=${id} number=${Number(chosen)} key=${chosen} version=${trials.find((/** @type {any} */ t) => t.number === Number(chosen))?.state} />`}
    <${Same} cli=${["rock", "job", "show", id]} http=${`GET ${path(id, "/trials")}`} />
    ${dialog && html`<${Confirm} title="Cancel the job" action="Cancel the trials" text="Pending trials are cancelled now. Running trials are stopped by their runners." onClose=${() => { setDialog(false); reload(); }} run=${() => api("POST", path(id, "/cancel"))} same=${html`<${Same} cli=${["rock", "job", "cancel", id]} http=${`POST ${path(id, "/cancel")}`} />`} />`}`;
}

// ---- the table of trials ----

const COLUMNS = ["Trial", "Task", "Attempt", "State", "Reward", "Tries", "Duration", "Error", "Sandbox", "Run"];

const target = (/** @type {number} */ n) => { const { parts, query } = here(); query.set("trial", String(n)); return `/ui/job/${encodeURIComponent(parts[1])}?${query}`; };

function trialCells(/** @type {any} */ t, /** @type {any} */ { now }) {
  const reward = rewardOfTrial(t);
  return [html`<${Link} to=${target(t.number)}>${t.number}<//>`, plainText(t.task), t.attempt, html`<${StateMark} state=${t.state} />`,
    reward === null ? "" : html`<span class=${reward >= 1 ? "good" : ""}>${Number(reward.toFixed(4))}${reward >= 1 ? " ✓" : ""}</span>`, t.tries || "", t.started_at ? duration((t.finished_at || now) - t.started_at) : "",
    t.error ? html`<span class="cause" title=${plainText(t.error.message)}>${t.error.kind}: ${plainText(t.error.type)}</span>` : t.earlier ? `${t.earlier} earlier errors` : "",
    t.sandbox && html`<${Link} to=${`/ui/sandbox/${encodeURIComponent(t.sandbox)}`}>${t.sandbox}<//>`, t.run && html`<${Link} to=${`/ui/run/${encodeURIComponent(t.run)}`}>${t.run}<//>`];
}

function Trial(/** @type {any} */ { id, number, version }) {
  const { data: trial, error } = useData(async () => {
    const page = await api("GET", path(id, `/trials?after=${number - 1}&limit=1`));
    return page.items.find((/** @type {any} */ t) => t.number === number) || null;
  }, [id, number, version]);
  if (!trial) return html`<${Problem} error=${error} />`;
  const phases = trial.result && typeof trial.result.phases === "object" && trial.result.phases ? Object.entries(trial.result.phases) : [];
  return html`<h2>Trial ${number}: ${plainText(trial.task)}, attempt ${trial.attempt}</h2><${Facts} rows=${[["State", html`<${StateMark} state=${trial.state} />`], ["Rewards", trial.rewards ? Object.entries(trial.rewards).map(([name, value]) => html`<code>${plainText(name)}=${value}</code> `) : "none"], ["Runner", plainText(trial.holder || "")], ["Claims", trial.token], ["Started", trial.started_at && html`<${Time} at=${trial.started_at} />`], ["Ended", trial.finished_at && html`<${Time} at=${trial.finished_at} />`],
      ...phases.filter(([, times]) => Array.isArray(times) && times.length === 2).map(([name, times]) => [plainText(name), duration(Number(times[1]) - Number(times[0]))])]} />
    ${[...(trial.error ? [trial.error] : []), ...[...(trial.history || [])].reverse()].map((e, i) => html`<details key=${i} open=${i === 0 && !!trial.error}><summary class="cause">${e.kind}: ${plainText(e.type)}${i || !trial.error ? " (an earlier try)" : ""}</summary><pre tabindex="0" aria-label="Message of the error">${plainText(`${e.message}${e.traceback ? `\n${e.traceback}` : ""}`)}</pre></details>`)}
    <details><summary>Result</summary><pre class="output result" tabindex="0" aria-label="Result of the trial">${plainText(textOf(trial.result))}</pre></details>`;
}

// ---- two jobs ----

function Comparison(/** @type {any} */ { a, rewards, other }) {
  const { data: b, error } = useData(() => api("GET", path(other, "?tasks=0")), [other], 5);
  const { trials, error: failed } = useTrials(other, b);
  const found = useMemo(() => compareJobs(rewards, rewardsByTask(trials)), [rewards, trials]);
  const changed = found.rows.filter((row) => Math.abs(row.b - row.a) > 1e-12).sort((x, y) => (x.b - x.a) - (y.b - y.a) || (x.task < y.task ? -1 : 1));
  if (!b) return html`<${Problem} error=${error} />`;
  return html`<h2>Comparison with <${Link} to=${`/ui/job/${encodeURIComponent(other)}`}>${plainText(b.name)}<//></h2><${Problem} error=${error || failed} />
    <p role="status" class="comparison">${found.rows.length} tasks have valid rewards in both. ${plainText(b.name)} is better in ${found.better}, worse in ${found.worse}, equal in ${found.same}.${found.difference ? ` Difference of the mean reward: ${estimate(found.difference)}, p = ${found.pValue.toFixed(3)}.` : ""}${found.onlyA + found.onlyB ? ` ${found.onlyA + found.onlyB} tasks have a valid reward in one job only.` : ""}</p>
    <${Table} label="Tasks with different rewards" rows=${changed.slice(0, DIFFERENCES)} empty="No task has different mean rewards." columns=${[["Task", (/** @type {any} */ r) => plainText(r.task)], [plainText(a.name), (/** @type {any} */ r) => r.a.toFixed(3)], [plainText(b.name), (/** @type {any} */ r) => r.b.toFixed(3)], ["Difference", (/** @type {any} */ r) => html`<span class=${r.b < r.a ? "cause" : "good"}>${r.b < r.a ? "" : "+"}${(r.b - r.a).toFixed(3)}</span>`]]} />
    ${changed.length > DIFFERENCES && html`<p class="muted">The first ${DIFFERENCES} of ${changed.length} tasks.</p>`}<${Same} cli=${["rock", "job", "compare", a.job_id, other]} http=${`GET ${path(other, "/trials")}`} />`;
}
