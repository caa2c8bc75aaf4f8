// The table of sandboxes: up to 10,000 rows, live, with filters in the URL in the words of the API and of `rock ps`.
import { Component, Confirm, Dialog, Empty, Field, Link, Problem, Same, StateMark, api, can, go, here, html, session, useEffect, useMemo, useParam, useRef, useState, useWindow } from "../lib.js";
import { useRows } from "../live.js";
import { bytes, duration, matchesSearch, memoryText, orderOf } from "../pure.js";

const ROW = 34; // pixels, as in app.css
const SERVER_FILTERS = ["state", "image", "worker", "user_id", "experiment_id", "namespace", "cause", "name", "label"];
const GROUPS = ["", "image", "experiment_id", "worker", "state", "tenant"];

/** The part of the URL that the server filters by. */
function serverFilter() {
  const { query } = here();
  const kept = new URLSearchParams();
  for (const name of SERVER_FILTERS) for (const value of query.getAll(name)) if (value) kept.append(name, value);
  return kept.toString();
}

export default function Sandboxes() {
  const filter = serverFilter();
  const live = useRows(filter);
  const [search, setSearch] = useParam("q");
  const [group, setGroup] = useParam("group_by");
  const [marked, setMarked] = useState(/** @type {Set<string>} */ (new Set()));
  const [dialog, setDialog] = useState(/** @type {any} */ (null));
  const [measured, setMeasured] = useParam("measure");
  const order = useRef(/** @type {any} */ ({}));
  const rows = useMemo(() => orderOf(order.current, live.rows).filter((row) => matchesSearch(row, search)), [live.stamp, search]);
  const counts = useMemo(() => {
    /** @type {Record<string, number>} */ const found = {};
    for (const row of live.rows.values()) found[row.state] = (found[row.state] || 0) + 1;
    return Object.entries(found).sort();
  }, [live.stamp]);
  const chosen = marked.size ? rows.filter((row) => marked.has(row.sandbox_id)) : [];
  const cli = ["rock", "ps", ...[...new URLSearchParams(filter)].flatMap(([k, v]) => (k === "label" ? ["--label", v] : k === "state" ? ["--all"] : []))];
  return html`<div class="title"><h1>Sandboxes</h1>
      <span class=${`live ${live.connected ? "on" : "off"}`} role="status">${live.connected ? "live" : "reconnecting…"}</span>
      <span class="grow"></span>
      ${can("create") && html`<button type="button" class="primary" onClick=${() => setDialog("start")}>Start a sandbox</button>`}</div>
    <div class="counts" role="group" aria-label="Number of sandboxes in each state">${counts.map(([state, count]) => html`<${Link} key=${state} to=${`/ui/sandboxes?state=${state}`}><${StateMark} state=${state} /> ${count}<//> `)}
      ${filter && html`<${Link} to="/ui/sandboxes">Remove the filters (${[...new URLSearchParams(filter)].map(([k, v]) => `${k}=${v}`).join(", ")})<//>`}</div>
    <div class="tools"><${Field} label="Search" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} />
      <${Filter} name="state" options=${["", "pending", "running", "stopping", "stopped", "archiving", "archived", "deleted"]} />
      <${Filter} name="image" /><${Filter} name="label" hint="KEY=VALUE" />
      <${Field} label="Group by">${(/** @type {string} */ id) => html`<select id=${id} value=${group} onChange=${(/** @type {any} */ e) => setGroup(e.target.value)}>${GROUPS.map((g) => html`<option value=${g}>${g || "none"}</option>`)}</select>`}<//>
      ${!group && html`<label class="check"><input type="checkbox" checked=${measured === "1"} onChange=${(/** @type {any} */ e) => setMeasured(e.target.checked ? "1" : "")} /> Measure the shown rows</label>`}</div>
    <${Problem} error=${live.error} />
    ${!live.complete && html`<p role="status">There are more than 10,000 sandboxes; use filters to see the others.</p>`}
    ${chosen.length > 0 && html`<div class="bulk" role="group" aria-label="Actions for the selected sandboxes"><span>${chosen.length} selected</span>
      ${can("create") && html`<button type="button" onClick=${() => setDialog("stop")}>Stop</button><button type="button" onClick=${() => setDialog("restart")}>Restart</button><button type="button" onClick=${() => setDialog("archive")}>Archive</button>`}
      ${chosen.length === 2 && html`<button type="button" onClick=${() => go(`/ui/compare?a=${encodeURIComponent(chosen[0].sandbox_id)}&b=${encodeURIComponent(chosen[1].sandbox_id)}`)}>Compare</button>`}
      <button type="button" onClick=${() => setMarked(new Set())}>Clear the selection</button></div>`}
    ${group && !rows.some((row) => row[group]) && rows.length ? html`<${Empty}>No sandbox has a value of ${group}.<//>` : null}
    ${!live.loaded && !live.error ? html`<p class="muted" role="status">Loading…</p>`
      : rows.length ? html`<${group ? Grouped : Rows} rows=${rows} by=${group} marked=${marked} setMarked=${setMarked} measure=${measured === "1"} />`
        : live.rows.size || filter ? html`<${Empty}>No sandbox matches. Change the search or remove the filters.<//>`
          : html`<${Empty}>There are no sandboxes. Start one here, or run <code>rock run --image python:3.11 -- python -V</code><//>`}
    <${Same} cli=${cli} http=${`GET /v1/sandboxes${filter ? `?${filter}` : ""}`} />
    ${dialog === "start" && html`<${Start} onClose=${() => setDialog(null)} />`}
    ${["stop", "restart", "archive"].includes(dialog) && html`<${Bulk} verb=${dialog} rows=${chosen} onClose=${() => setDialog(null)} />`}`;
}

function Filter(/** @type {any} */ { name, options, hint }) {
  const [value, set] = useParam(name);
  return options
    ? html`<${Field} label=${name}>${(/** @type {string} */ id) => html`<select id=${id} value=${value} onChange=${(/** @type {any} */ e) => set(e.target.value)}>${options.map((/** @type {string} */ o) => html`<option value=${o}>${o || "all"}</option>`)}</select>`}<//>`
    : html`<${Field} label=${name} placeholder=${hint} defaultValue=${value} onChange=${(/** @type {any} */ e) => set(e.target.value.trim())} />`;
}

const COLUMNS = ["Sandbox", "State", "Image", "Owner", "Age", "Deadline", "CPU", "Memory", "Worker", "Isolation"];

function cells(/** @type {any} */ row, /** @type {number} */ now, /** @type {any} */ usage) {
  return [
    html`<${Link} to=${`/ui/sandbox/${encodeURIComponent(row.sandbox_id)}`} title=${row.sandbox_id}>${row.name || row.sandbox_id}<//>`,
    html`<${StateMark} state=${row.state} />${row.cause && row.cause !== "stopped_by_user" ? html` <span class="cause" title=${row.cause}>${row.cause}</span>` : null}`,
    row.image, row.user_id || row.tenant || "owner", duration(now - row.created_at),
    row.deadline && row.state === "running" ? duration(row.deadline - now) : "",
    usage && usage.cpu !== null ? html`<span class="measured">${usage.cpu.toFixed(2)} of ${row.cpus}</span>` : row.cpus,
    usage && usage.memory !== null ? html`<span class="measured">${bytes(usage.memory)} of ${memoryText(row.memory)}</span>` : row.memory,
    row.worker || "", row.isolation || "",
  ];
}

/** One row of the table. It renders when its values change, not with each change of the table. */
class Row extends Component {
  shouldComponentUpdate(/** @type {any} */ next) {
    const old = /** @type {any} */ (this.props);
    return next.row !== old.row || next.index !== old.index || next.picked !== old.picked || next.now !== old.now || next.usage !== old.usage || next.mark !== old.mark;
  }
  render() {
    const { row, index, picked, now, usage, mark } = /** @type {any} */ (this.props);
    return html`<div role="row" aria-rowindex=${index + 2} class="tr" style=${{ top: `${index * ROW}px` }}>
      <div role="cell" class="td pick"><input type="checkbox" aria-label=${`Select ${row.name || row.sandbox_id}`} checked=${picked} onChange=${(/** @type {any} */ e) => mark(row.sandbox_id, e.target.checked)} /></div>
      ${cells(row, now, usage).map((cell) => html`<div role="cell" class="td">${cell}</div>`)}</div>`;
  }
}

const MEASURE = 5000; // milliseconds between two measurements
const MEASURED = 40; // rows

/** CPU and memory of the shown running sandboxes, by id. One request at a time for each of two, so that a worker has
 * little to do for a tab. */
function useUsage(/** @type {any[]} */ rows, /** @type {boolean} */ on) {
  const [usage, set] = useState(/** @type {Record<string, any>} */ ({}));
  const shown = useRef(rows);
  shown.current = rows;
  useEffect(() => {
    if (!on) { set({}); return undefined; }
    let live = true, timer = 0;
    /** @type {Map<string, number[]>} */ const before = new Map();
    const run = async () => {
      const wanted = document.hidden ? [] : shown.current.filter((row) => row.state === "running").slice(0, MEASURED).map((row) => row.sandbox_id);
      /** @type {Record<string, any>} */ const found = {};
      await Promise.all([0, 1].map(async () => {
        for (let id = wanted.shift(); id !== undefined && live; id = wanted.shift()) {
          try {
            const { usage: now } = await api("GET", `/v1/sandboxes/${encodeURIComponent(id)}?usage=1`);
            if (!now) continue;
            const at = performance.now() / 1000, last = before.get(id);
            found[id] = { memory: now.memory_bytes ?? null, cpu: last && now.cpu_seconds !== null && at > last[0] ? Math.max(0, (now.cpu_seconds - last[1]) / (at - last[0])) : null };
            if (now.cpu_seconds !== null) before.set(id, [at, now.cpu_seconds]);
          } catch { /* it has ended */ }
        }
      }));
      if (!live) return;
      set(found);
      timer = window.setTimeout(run, MEASURE);
    };
    run();
    return () => { live = false; clearTimeout(timer); };
  }, [on]);
  return usage;
}

/** A window of rows: about 30 are in the DOM. */
function Rows(/** @type {any} */ { rows, marked, setMarked, measure }) {
  const box = useRef(/** @type {any} */ (null));
  const [now, setNow] = useState(Date.now() / 1000);
  const { first, last, onScroll } = useWindow(box, ROW, rows.length);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now() / 1000), 5000);
    return () => clearInterval(timer);
  }, []);
  const shown = rows.slice(first, last);
  const usage = useUsage(shown, measure);
  const mark = useMemo(() => (/** @type {string} */ id, /** @type {boolean} */ on) => { const next = new Set(marked); if (on) next.add(id); else next.delete(id); setMarked(next); }, [marked]);
  const all = marked.size > 0 && rows.length > 0 && rows.every((/** @type {any} */ r) => marked.has(r.sandbox_id));
  return html`<div class="rows" ref=${box} tabindex="0" role="region" aria-label="Table of sandboxes" style=${{ height: `${Math.min(640, (rows.length + 1) * ROW + 20)}px` }} onScroll=${onScroll}>
    <div role="table" aria-label="Sandboxes" aria-rowcount=${rows.length + 1} class="grid">
      <div role="row" aria-rowindex="1" class="tr head"><div role="columnheader" class="td pick"><input type="checkbox" aria-label="Select all sandboxes" checked=${all} onChange=${(/** @type {any} */ e) => setMarked(new Set(e.target.checked ? rows.map((/** @type {any} */ r) => r.sandbox_id) : []))} /></div>
        ${COLUMNS.map((name) => html`<div role="columnheader" class="td">${name}</div>`)}</div>
      <div role="rowgroup" class="space" style=${{ height: `${rows.length * ROW}px` }}>
        ${shown.map((/** @type {any} */ row, /** @type {number} */ i) => html`<${Row} key=${row.sandbox_id} row=${row} index=${first + i} picked=${marked.has(row.sandbox_id)} now=${now} usage=${usage[row.sandbox_id]} mark=${mark} />`)}
      </div></div></div>`;
}

function Grouped(/** @type {any} */ { rows, by }) {
  const groups = new Map();
  for (const row of rows) {
    const name = row[by] || "none";
    const group = groups.get(name) || { total: 0, states: {} };
    group.total++;
    group.states[row.state] = (group.states[row.state] || 0) + 1;
    groups.set(name, group);
  }
  const key = by === "tenant" ? null : by;
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Groups"><table><caption class="hidden">Sandboxes by ${by}</caption><thead><tr><th scope="col">${by}</th><th scope="col">Sandboxes</th><th scope="col">States</th></tr></thead>
    <tbody>${[...groups].map(([name, group]) => html`<tr key=${name}><td>${key && name !== "none" ? html`<${Link} to=${`/ui/sandboxes?${key}=${encodeURIComponent(name)}`}>${name}<//>` : name}</td><td>${group.total}</td>
      <td>${Object.entries(group.states).map(([state, count]) => html`<span class="pad"><${StateMark} state=${state} /> ${count}</span>`)}</td></tr>`)}</tbody></table></div>`;
}

/** One action for many sandboxes; failed ones stay listed with their errors. */
function Bulk(/** @type {any} */ { verb, rows, onClose }) {
  const [failures, setFailures] = useState(/** @type {string[]} */ ([]));
  const ids = rows.map((/** @type {any} */ r) => r.sandbox_id);
  const name = verb[0].toUpperCase() + verb.slice(1);
  return html`<${Confirm} title=${`${name} ${ids.length} sandboxes`} action=${name} onClose=${onClose}
    text=${html`${ids.slice(0, 8).join(", ")}${ids.length > 8 ? ` and ${ids.length - 8} more` : ""}${failures.map((f) => html`<br /><span class="cause">${f}</span>`)}`}
    same=${html`<${Same} cli=${["rock", verb, ...ids.slice(0, 8)]} http=${`POST /v1/sandboxes/{sandbox_id}/${verb}`} />`}
    run=${async () => {
      const failed = /** @type {string[]} */ ([]);
      const queue = [...ids];
      await Promise.all(Array.from({ length: 8 }, async () => {
        for (let id = queue.shift(); id !== undefined; id = queue.shift()) {
          try { await api("POST", `/v1/sandboxes/${encodeURIComponent(id)}/${verb}`, { idempotent: true }); } catch (e) { failed.push(`${id}: ${/** @type {any} */ (e).message}`); }
        }
      }));
      setFailures(failed);
      if (failed.length) throw new Error(`${failed.length} of ${ids.length} failed`);
    }} />`;
}

const NUMBERS = ["cpus", "auto_clear_seconds", "timeout", "size"];

function Start(/** @type {any} */ { onClose }) {
  const [form, set] = useState(/** @type {Record<string, string>} */ ({ image: "python:3.11", memory: "1g", cpus: "1", network: "none", size: "1" }));
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const input = (/** @type {string} */ name, /** @type {string} */ label, rest = {}) => html`<${Field} label=${label} name=${name} value=${form[name] || ""} onInput=${(/** @type {any} */ e) => set({ ...form, [name]: e.target.value })} ...${rest} />`;
  const config = () => {
    /** @type {Record<string, any>} */ const found = {};
    for (const [name, value] of Object.entries(form)) {
      if (value === "" || name === "labels" || name === "size") continue;
      found[name] = NUMBERS.includes(name) ? Number(value) : value;
    }
    if (form.labels) found.labels = Object.fromEntries(form.labels.split(/[\s,]+/).filter(Boolean).map((pair) => { const [k, ...v] = pair.split("="); return [k, v.join("=")]; }));
    return found;
  };
  const size = Number(form.size || 1);
  return html`<${Dialog} title="Start a sandbox" onClose=${onClose}><form onSubmit=${async (/** @type {Event} */ e) => {
    e.preventDefault();
    setBusy(true);
    setError(null);
    try {
      if (size > 1) {
        await api("POST", "/v1/groups", { json: { config: config(), size }, idempotent: true });
        onClose();
      } else {
        const info = await api("POST", "/v1/sandboxes", { json: config(), idempotent: true });
        onClose();
        go(`/ui/sandbox/${encodeURIComponent(info.sandbox_id)}`);
      }
    } catch (problem) { setError(problem); setBusy(false); }
  }}><div class="form">
    ${input("image", "Image", { required: true })}${input("name", "Name (optional)")}
    ${input("memory", "Memory", { required: true })}${input("cpus", "CPUs", { type: "number", min: "0.1", step: "any", required: true })}
    <${Field} label="Network">${(/** @type {string} */ id) => html`<select id=${id} value=${form.network} onChange=${(/** @type {any} */ e) => set({ ...form, network: e.target.value })}><option>none</option><option>nat</option>${session && session.tenant === null ? html`<option>host</option>` : null}</select>`}<//>
    ${input("auto_clear_seconds", "Idle timeout in seconds", { type: "number", min: "0", placeholder: "300" })}
    ${input("timeout", "Lifetime in seconds", { type: "number", min: "1", placeholder: "no limit" })}
    ${input("labels", "Labels", { placeholder: "KEY=VALUE KEY=VALUE" })}
    ${input("size", "Number of sandboxes", { type: "number", min: "1", max: "10000" })}</div>
    <${Problem} error=${error} />
    <${Same} cli=${["rock", "run", "-d", "--image", form.image, "--memory", form.memory, "--cpus", form.cpus, ...(form.name ? ["--name", form.name] : [])]} http=${size > 1 ? `POST /v1/groups ${JSON.stringify({ config: config(), size })}` : `POST /v1/sandboxes ${JSON.stringify(config())}`} />
    <div class="row end"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${busy}>${busy ? "Starting…" : "Start"}</button></div></form><//>`;
}
