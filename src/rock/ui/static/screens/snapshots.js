// Snapshots: their lineage as a tree, the details of one, and the actions: take, roll back, fork, delete.
import { Component, Confirm, Dialog, Empty, Facts, Field, Link, Problem, Same, Time, api, can, html, session, useData, useEffect, useMemo, useParam, useRef, useState, useWindow } from "../lib.js";
import { bytes, duration, plainText } from "../pure.js";
import { lineageOf, nameOf, shortId, treeKey } from "../lineage.js";

const ROW = 34; // pixels, as in app.css
const INDENTED = 12; // levels: deeper ones are not moved further to the right
const MANY = 500; // snapshots; above, the list is loaded again once a minute
const sandboxPath = (/** @type {string} */ id, rest = "") => `/v1/sandboxes/${encodeURIComponent(id)}${rest}`;
/** The owner of the server names the tenant of a snapshot; a tenant has only its own. */
const foreign = (/** @type {any} */ one) => (session && session.tenant === null ? one.tenant : "");
const snapshotPath = (/** @type {any} */ one) => `/v1/snapshots/${encodeURIComponent(one.snapshot_id)}${foreign(one) ? `?tenant=${encodeURIComponent(foreign(one))}` : ""}`;
const command = (/** @type {string} */ verb, /** @type {any} */ one) => ["rock", "snapshot", verb, one.snapshot_id, ...(foreign(one) ? ["--tenant", foreign(one)] : [])];
const listPath = (/** @type {string} */ sandbox) => `/v1/snapshots${sandbox ? `?sandbox=${encodeURIComponent(sandbox)}` : ""}`;
const rowId = (/** @type {any} */ one) => `snapshot-${one.snapshot_id}`;

/** The snapshots of a sandbox, or all, loaded again while the tab is visible. */
function useSnapshots(/** @type {string} */ sandbox) {
  const found = useData(() => api("GET", listPath(sandbox)), [sandbox]);
  useEffect(() => {
    const timer = setInterval(() => { if (!document.hidden) found.reload(); }, found.data && found.data.items.length > MANY ? 60000 : 4000);
    return () => clearInterval(timer);
  }, [found.data]);
  return found;
}

export default function Snapshots() {
  const [sandbox, setSandbox] = useParam("sandbox");
  const [text, setText] = useParam("q");
  const { data, error, reload } = useSnapshots(sandbox);
  const filtered = sandbox || text;
  return html`<div class="title"><h1>Snapshots</h1></div>
    <div class="tools"><${Field} label="Search" type="search" value=${text} onInput=${(/** @type {any} */ e) => setText(e.target.value)} />
      <${Field} label="sandbox" key=${sandbox} defaultValue=${sandbox} placeholder="id" onChange=${(/** @type {any} */ e) => setSandbox(e.target.value.trim())} />
      ${filtered && html`<${Link} to="/ui/snapshots">Remove the filters<//>`}</div>
    <${Problem} error=${error} />
    ${!data ? !error && html`<p class="muted" role="status">Loading…</p>`
      : data.items.length ? html`<${Lineage} items=${data.items} text=${text} reload=${reload} />`
        : sandbox ? html`<${Empty}>There are no snapshots of the sandbox ${plainText(sandbox)}. Check its id, remove the filters, or take one: <code>rock checkpoint SANDBOX</code><//>`
          : html`<${Empty}>There are no snapshots. Open a running sandbox and take one in its part “Snapshots”, or run <code>rock checkpoint SANDBOX</code><//>`}
    <${Same} cli=${["rock", "snapshot", "tree", ...(sandbox ? ["--sandbox", sandbox] : [])]} http=${`GET ${listPath(sandbox)}`} />`;
}

/** The part of a sandbox's screen: the snapshots of one sandbox, with the actions on the sandbox. */
export function SandboxSnapshots(/** @type {any} */ { id, info }) {
  const [dialog, setDialog] = useState("");
  const [started, setStarted] = useState(/** @type {any} */ (null));
  const { data, error, reload } = useSnapshots(id);
  const running = info.state === "running";
  const close = () => { setDialog(""); reload(); };
  return html`${running && can("create") && html`<div class="row"><button type="button" onClick=${() => setDialog("take")}>Take a snapshot</button><button type="button" onClick=${() => setDialog("fork")}>Fork</button></div>`}
    ${!running && html`<p class="muted">The sandbox is ${info.state}. Snapshots are taken of running sandboxes; those that exist start new sandboxes until their retention ends.</p>`}
    ${started && html`<p role="status">${started.group.sandboxes.length} sandboxes started from ${nameOf(started.snapshot)}: <${Link} to=${`/ui/sandboxes?q=${encodeURIComponent(started.group.group_id)}`}>show them<//>${started.group.missing ? ` (${started.group.missing} did not fit)` : ""}</p>`}
    <${Problem} error=${error} />
    ${!data ? !error && html`<p class="muted" role="status">Loading…</p>`
      : data.items.length ? html`<${Lineage} items=${data.items} text="" reload=${reload} rollback=${running && can("create") ? id : ""} />`
        : html`<${Empty}>There are no snapshots of this sandbox. ${running ? html`Take one here, or run <code>rock checkpoint ${id}</code>` : "Start it again to take one."}<//>`}
    <${Same} cli=${["rock", "snapshot", "tree", "--sandbox", id]} http=${`GET ${listPath(id)}`} />
    ${dialog && html`<${Take} id=${id} fork=${dialog === "fork"} onClose=${close} onForked=${setStarted} />`}`;
}

/** The dialog of a checkpoint, or of a fork. */
function Take(/** @type {any} */ { id, fork, onClose, onForked }) {
  const [form, set] = useState({ name: "", memory: "auto", count: "2", best: false });
  const [taken, setTaken] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const body = { memory: form.memory, ...(form.name ? { name: form.name } : {}), ...(fork ? { count: Number(form.count), best_effort: form.best } : {}) };
  const path = sandboxPath(id, fork ? "/fork" : "/checkpoint");
  const input = (/** @type {any} */ name) => ({ value: form[/** @type {keyof typeof form} */ (name)], onInput: (/** @type {any} */ e) => set({ ...form, [name]: e.target.value }) });
  if (taken) return html`<${Dialog} title="The snapshot was taken" onClose=${onClose}><${Facts} rows=${factsOf(taken)} /><${LeftOut} lines=${taken.left_out} />
    <div class="row end"><button type="button" class="primary" onClick=${onClose}>Done</button></div><//>`;
  return html`<${Dialog} title=${fork ? "Fork the sandbox" : "Take a snapshot"} onClose=${onClose}><form onSubmit=${async (/** @type {Event} */ e) => {
    e.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const made = await api("POST", path, { json: body, idempotent: true });
      if (fork) { onForked(made); onClose(); } else setTaken(made);
    } catch (problem) { setError(problem); }
    setBusy(false);
  }}><p>${fork ? "The server takes one snapshot, and starts sandboxes from it with the config of this one." : "Processes are stopped for a moment. A running command is waited for up to 5 seconds."}</p>
    <div class="form">${fork && html`<${Field} label="Number of sandboxes" type="number" min="1" max="1000" required ...${input("count")} />`}
      <${Field} label="Name of the snapshot (optional)" pattern="[A-Za-z0-9][A-Za-z0-9_.\\-]*" maxlength="63" title="letters, digits, and _ . -" ...${input("name")} />
      <${Field} label="What is taken beside the files">${(/** @type {string} */ field) => html`<select id=${field} ...${input("memory")}>${["auto", "files", "session", "processes"].map((level) => html`<option>${level}</option>`)}</select>`}<//></div>
    ${fork && html`<label class="check"><input type="checkbox" checked=${form.best} onChange=${(/** @type {any} */ e) => set({ ...form, best: e.target.checked })} /> Start as many as fit, instead of all or none</label>`}
    <${Problem} error=${error} />
    <${Same} cli=${["rock", fork ? "fork" : "checkpoint", id, ...(fork ? ["-n", form.count] : []), ...(form.best ? ["--best-effort"] : []), ...(form.name ? ["--name", form.name] : []), ...(form.memory === "auto" ? [] : ["--memory", form.memory])]} http=${`POST ${path} ${JSON.stringify(body)}`} />
    <div class="row end"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${busy}>${busy ? "Working…" : fork ? "Fork" : "Take the snapshot"}</button></div></form><//>`;
}

function LeftOut(/** @type {{lines: string[]}} */ { lines }) {
  if (!lines.length) return html`<p class="muted">Nothing was left out.</p>`;
  return html`<h3>Not in the snapshot</h3><ul class="left-out">${lines.map((line) => html`<li>${plainText(line)}</li>`)}</ul>`;
}

/** @returns {[string, any][]} */
function factsOf(/** @type {any} */ one) {
  return [["Id", one.snapshot_id], ["Name", one.name], ["State", one.state], ["Sandbox", one.sandbox_id && html`<${Link} to=${`/ui/sandbox/${encodeURIComponent(one.sandbox_id)}?tab=snapshots`}>${plainText(one.sandbox_id)}<//>`],
    ["Parent", one.parent && shortId(one.parent)], ["Image", plainText(one.image)], ["Level", one.memory], ["Files taken by", one.files], ["Size of its layer", one.bytes === null ? "not measured" : bytes(one.bytes)], ["Layers", one.layers],
    ["Processes were stopped for", `${one.paused_ms.toFixed(1)} ms`], ["Created", html`<${Time} at=${one.created_at} />`], ["Last use", html`<${Time} at=${one.used_at} />`], ["Retention after the last use", duration(one.ttl_seconds)], ["Worker", one.worker], ["Tenant", one.tenant || "server owner"]];
}

/** The columns of a row after its name. */
function columnsOf(/** @type {any} */ one, /** @type {number} */ now) {
  return [plainText(shortId(one.sandbox_id)), plainText(one.image), one.memory, bytes(one.bytes), one.layers, one.state, duration(now - one.created_at)];
}
const COLUMNS = ["Snapshot", "Sandbox", "Image", "Level", "Size", "Layers", "State", "Age"];

/** One item of the tree. It renders when its values change. */
class Item extends Component {
  shouldComponentUpdate(/** @type {any} */ next) {
    const old = /** @type {any} */ (this.props);
    return next.row !== old.row || next.index !== old.index || next.chosen !== old.chosen || next.active !== old.active || next.now !== old.now;
  }
  render() {
    const { row, index, chosen, active, now, choose, toggle } = /** @type {any} */ (this.props);
    const one = row.snapshot;
    return html`<div role="treeitem" id=${rowId(one)} class=${`tr${chosen ? " chosen" : ""}${active ? " active" : ""}`} style=${{ top: `${index * ROW}px` }}
      aria-level=${row.level} aria-posinset=${row.at} aria-setsize=${row.of} aria-selected=${chosen ? "true" : "false"} aria-expanded=${row.children ? String(row.open) : undefined} onClick=${() => choose(index)}>
      <div class="td name" style=${{ paddingLeft: `${Math.min(row.level - 1, INDENTED) * 16 + 8}px` }} title=${one.snapshot_id}><span class="twist" aria-hidden="true" onClick=${(/** @type {Event} */ e) => { e.stopPropagation(); toggle(index); }}>${row.children ? (row.open ? "▾" : "▸") : "·"}</span> ${plainText(nameOf(one))}</div>
      ${columnsOf(one, now).map((cell, at) => html`<div class="td"><span class="hidden">${COLUMNS[at + 1]} </span>${cell}</div>`)}</div>`;
  }
}

/** The tree and the details of the chosen snapshot. A window of rows is in the DOM; the tree has the focus, and
 * aria-activedescendant is the active row. rollback: id of the sandbox that can be rolled back; "" for none. */
function Lineage(/** @type {any} */ { items, text, reload, rollback = "" }) {
  const [chosen, setChosen] = useParam("snapshot");
  const [closed, setClosed] = useState(/** @type {Set<string>} */ (new Set()));
  const [active, setActive] = useState(chosen);
  const box = useRef(/** @type {any} */ (null));
  const { rows, matches } = useMemo(() => lineageOf(items, { text, closed }), [items, text, closed]);
  const now = useMemo(() => Date.now() / 1000, [items]);
  const { first, last, onScroll } = useWindow(box, ROW, rows.length);
  const at = Math.max(0, rows.findIndex((row) => row.snapshot.snapshot_id === active));
  const into = (/** @type {number} */ index) => {
    const { scrollTop, clientHeight } = box.current, top = index * ROW;
    if (top < scrollTop) box.current.scrollTop = top;
    else if (top > scrollTop + clientHeight - 2 * ROW) box.current.scrollTop = top - clientHeight + 2 * ROW + 4;
  };
  useEffect(() => { if (chosen && rows.length) into(at); }, []);
  const move = (/** @type {number} */ index) => { setActive(rows[index].snapshot.snapshot_id); into(index); };
  const choose = (/** @type {number} */ index) => { move(index); setChosen(rows[index].snapshot.snapshot_id); };
  const toggle = (/** @type {number} */ index) => {
    const id = rows[index].snapshot.snapshot_id, next = new Set(closed);
    if (!next.delete(id)) next.add(id);
    setClosed(next);
    setActive(id);
  };
  const latest = useRef(/** @type {any} */ (null)); // a row that was not rendered again calls the functions of now
  latest.current = { choose, toggle };
  const calls = useMemo(() => ({ choose: (/** @type {number} */ i) => latest.current.choose(i), toggle: (/** @type {number} */ i) => latest.current.toggle(i) }), []);
  const onKey = (/** @type {KeyboardEvent} */ e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if ((e.key === "Enter" || e.key === " ") && rows[at]) { e.preventDefault(); choose(at); return; }
    const found = treeKey(rows, at, e.key, Math.max(1, Math.floor(box.current.clientHeight / ROW) - 2));
    if (!found) return;
    e.preventDefault();
    if (found.toggle) { if (!text.trim()) toggle(found.index); } else move(found.index);
  };
  // The active row is in the DOM also when it is scrolled out of the window.
  const indices = rows.slice(first, last).map((_, i) => first + i);
  if (rows.length && (at < first || at >= last)) indices.push(at);
  const one = chosen && items.find((/** @type {any} */ item) => item.snapshot_id === chosen);
  return html`<p class="muted" role="status">${text.trim() ? `${matches} of ${items.length} snapshots match` : `${items.length} snapshots`}</p>
    ${!rows.length && html`<${Empty}>No snapshot matches. Change the search or remove the filters.<//>`}
    <div class="rows snapshots" ref=${box} hidden=${!rows.length} style=${{ height: `${Math.min(one ? 420 : 640, (rows.length + 1) * ROW + 20)}px` }} onScroll=${onScroll}>
      <div class="grid"><div class="tr head" aria-hidden="true">${COLUMNS.map((name) => html`<div class="td">${name}</div>`)}</div>
        <div role="tree" tabindex="0" aria-label="Lineage of snapshots" aria-activedescendant=${rows.length ? rowId(rows[at].snapshot) : undefined} class="space" style=${{ height: `${rows.length * ROW}px` }} onKeyDown=${onKey}>
          ${indices.map((index) => html`<${Item} key=${rows[index].snapshot.snapshot_id} row=${rows[index]} index=${index} chosen=${rows[index].snapshot.snapshot_id === chosen} active=${index === at} now=${now} ...${calls} />`)}</div></div></div>
    ${one ? html`<${Details} key=${chosen} one=${one} rollback=${rollback} reload=${reload} />` : chosen ? html`<p class="muted" role="status">The chosen snapshot is not in this list: it was deleted, its retention has ended, or a filter hides it.</p>` : null}`;
}

function Details(/** @type {any} */ { one, rollback, reload }) {
  const [dialog, setDialog] = useState("");
  const [users, setUsers] = useState(/** @type {any} */ (null));
  const path = snapshotPath(one), close = () => { setDialog(""); reload(); };
  return html`<section aria-label="Chosen snapshot"><div class="title"><h2>${plainText(nameOf(one))}</h2><span class="grow"></span>
      ${rollback && one.state === "ready" && html`<button type="button" onClick=${() => setDialog("rollback")}>Roll back to it</button>`}
      ${can("create") && html`<button type="button" class="danger" onClick=${() => setDialog("delete")}>Delete</button>`}</div>
    <${Facts} rows=${factsOf(one)} /><${LeftOut} lines=${one.left_out} />
    <div class="row"><button type="button" onClick=${async () => { try { setUsers(await api("GET", path)); } catch (error) { setUsers({ error }); } }}>Show the sandboxes that run on it</button>
      ${users && (users.error ? html`<${Problem} error=${users.error} />` : html`<span role="status">${users.users.length ? users.users.map((/** @type {string} */ id) => html`<${Link} class="pad" key=${id} to=${`/ui/sandbox/${encodeURIComponent(id)}`}>${plainText(id)}<//>`) : "No sandbox runs on it."}</span>`)}</div>
    <${Same} cli=${command("show", one)} http=${`GET ${path}`} />
    ${dialog === "delete" && html`<${Confirm} title="Delete the snapshot" action="Delete" onClose=${close} text=${`${plainText(nameOf(one))} can no longer be used. Files that sandboxes or other snapshots use stay until these are gone.`}
      same=${html`<${Same} cli=${command("rm", one)} http=${`DELETE ${path}`} />`} run=${() => api("DELETE", path)} />`}
    ${dialog === "rollback" && html`<${Confirm} title="Roll back the sandbox" action="Roll back" onClose=${close} text=${`The sandbox returns to ${plainText(nameOf(one))}: its processes end, its files of now are lost, and its sessions are opened again. Take a snapshot first to keep them.`}
      same=${html`<${Same} cli=${["rock", "rollback", rollback, one.snapshot_id]} http=${`POST ${sandboxPath(rollback, "/rollback")} ${JSON.stringify({ snapshot: one.snapshot_id })}`} />`} run=${() => api("POST", sandboxPath(rollback, "/rollback"), { json: { snapshot: one.snapshot_id } })} />`}</section>`;
}
