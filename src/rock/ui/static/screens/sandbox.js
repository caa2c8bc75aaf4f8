// One sandbox: state, limits, charts, processes, files, logs, ports, connections, timeline.
import { Confirm, Empty, Facts, Field, Link, Problem, Same, StateMark, Table, Time, api, can, go, here, html, save, session, useData, useEffect, useParam, useRef, useState } from "../lib.js";
import { bytes, duration, plainText, shellWord } from "../pure.js";
import { Chart } from "../chart.js";
import { exportHtml, exportJsonl, record } from "../recorder.js";
import { SandboxSnapshots } from "./snapshots.js";

const TABS = { overview: "Overview", processes: "Processes and logs", files: "Files", network: "Network", snapshots: "Snapshots", timeline: "Timeline" };
const VERBS = { stop: "Stop", restart: "Restart", archive: "Archive" };
const path = (/** @type {string} */ id, rest = "") => `/v1/sandboxes/${encodeURIComponent(id)}${rest}`;

export default function Sandbox() {
  const id = here().parts[1] || "";
  const [tab] = useParam("tab", "overview");
  const [dialog, setDialog] = useState("");
  const { data: info, error, reload } = useData(() => api("GET", path(id, "?usage=1")), [id], 2);
  const title = html`<div class="title"><h1>${info?.name || id}</h1>${info && html`<${StateMark} state=${info.state} />`}<span class="grow"></span>
    ${info?.state === "running" && can("run") && html`<${Link} to=${`/ui/terminal/${encodeURIComponent(id)}`}>Open the terminal<//>`}
    ${info?.state === "running" && can("create") && html`<button type="button" class="danger" onClick=${() => setDialog("stop")}>Stop</button>`}
    ${info && ["stopped", "archived"].includes(info.state) && (info.kept || info.archive) && can("create") && html`<button type="button" onClick=${() => setDialog("restart")}>Restart</button>`}
    ${info?.state === "stopped" && info.kept && can("create") && html`<button type="button" onClick=${() => setDialog("archive")}>Archive</button>`}
    ${info && can("images") && ["running", "stopped"].includes(info.state) && html`<button type="button" onClick=${() => setDialog("commit")}>Commit</button>`}</div>`;
  if (error && !info) return html`${title}<${Problem} error=${error} /><p><${Link} to="/ui/sandboxes">Show all sandboxes<//></p>`;
  if (!info) return html`${title}<p class="muted" role="status">Loading…</p>`;
  const View = { overview: Overview, processes: Processes, files: Files, network: Network, snapshots: SandboxSnapshots, timeline: Timeline }[tab] || Overview;
  return html`${title}<${Problem} error=${error} />
    ${info.cause && html`<p class="cause">${info.cause}: ${info.reason}</p>`}
    <nav class="tabs" aria-label="Parts of this sandbox">${Object.entries(TABS).map(([key, name]) => html`<${Link} key=${key} to=${`/ui/sandbox/${encodeURIComponent(id)}${key === "overview" ? "" : `?tab=${key}`}`} aria-current=${tab === key ? "page" : undefined}>${name}<//>`)}</nav>
    <${View} id=${id} info=${info} />
    ${VERBS[/** @type {keyof typeof VERBS} */ (dialog)] && html`<${Confirm} title=${`${VERBS[/** @type {keyof typeof VERBS} */ (dialog)]} ${info.name || id}`} action=${VERBS[/** @type {keyof typeof VERBS} */ (dialog)]} text=${dialog === "stop" ? (info.auto_delete_at || info.kept ? "Its written files are retained." : "Files that it wrote are deleted, unless the sandbox was started with retention.") : "The server does this now."}
      same=${html`<${Same} cli=${["rock", dialog, id]} http=${`POST ${path(id, `/${dialog}`)}`} />`} onClose=${() => { setDialog(""); reload(); }} run=${() => api("POST", path(id, `/${dialog}`), { idempotent: true })} />`}
    ${dialog === "commit" && html`<${Commit} id=${id} onClose=${() => { setDialog(""); reload(); }} />`}`;
}

function Commit(/** @type {any} */ { id, onClose }) {
  const [tag, setTag] = useState("");
  return html`<${Confirm} title="Commit to an image" action="Commit" onClose=${onClose} text=${html`<${Field} label="Name of the image" value=${tag} onInput=${(/** @type {any} */ e) => setTag(e.target.value)} />`}
    same=${html`<${Same} cli=${["rock", "commit", id, tag]} http=${`POST ${path(id, "/commit")} ${JSON.stringify({ image_tag: tag })}`} />`}
    run=${() => api("POST", path(id, "/commit?wait=60"), { json: { image_tag: tag } })} />`;
}

function Overview(/** @type {any} */ { id, info }) {
  const history = useRef(/** @type {{id: string, cpu: number[][], memory: number[][], disk: number[][], network: number[][], last: number[]|null}} */ ({ id, cpu: [], memory: [], disk: [], network: [], last: null }));
  const now = Date.now() / 1000;
  if (history.current.id !== id) history.current = { id, cpu: [], memory: [], disk: [], network: [], last: null };
  const seen = history.current;
  const usage = info.usage;
  useEffect(() => {
    if (!usage) return;
    const at = Date.now() / 1000;
    if (usage.cpu_seconds !== null) {
      if (seen.last && at > seen.last[0]) seen.cpu.push([at, Math.max(0, (usage.cpu_seconds - seen.last[1]) / (at - seen.last[0]))]);
      seen.last = [at, usage.cpu_seconds];
    }
    if (usage.memory_bytes !== null) seen.memory.push([at, usage.memory_bytes]);
    if (usage.disk_bytes !== null) seen.disk.push([at, usage.disk_bytes]);
    for (const points of [seen.cpu, seen.memory, seen.disk]) if (points.length > 900) points.shift();
  }, [info]);
  // Only the network nat has a log of connections, which counts their bytes.
  const logged = info.network === "nat" && info.state === "running";
  const { data: connections } = useData(async () => (logged ? api("GET", path(id, "/connections")) : null), [id, logged], 4);
  useEffect(() => {
    if (!connections) return;
    seen.network.push([Date.now() / 1000, connections.items.reduce((/** @type {number} */ sum, /** @type {any} */ c) => sum + c.sent + c.received, 0)]);
    if (seen.network.length > 900) seen.network.shift();
  }, [connections]);
  const left = (/** @type {number|null} */ at) => at && html`<${Time} at=${at} /> (in ${duration(at - now)})`;
  return html`
    ${info.state === "running" ? html`<div class="charts"><${Chart} title="CPU" points=${seen.cpu} format=${(/** @type {number} */ v) => `${v.toFixed(2)} cores`} /><${Chart} title="Memory" points=${seen.memory} format=${bytes} />
      ${usage && usage.disk_bytes !== null && html`<${Chart} title="Disk" points=${seen.disk} format=${bytes} />`}${logged && html`<${Chart} title="Network, bytes of the logged connections" points=${seen.network} format=${bytes} />`}</div>` : null}
    <h2>State and timers</h2><${Facts} rows=${[["State", html`<${StateMark} state=${info.state} />`], ["Id", info.sandbox_id], ["Image", info.image], ["Created", html`<${Time} at=${info.created_at} />`], ["Started", info.started_at && html`<${Time} at=${info.started_at} />`],
      ["Last activity", info.last_activity_at && html`<${Time} at=${info.last_activity_at} />`], ["Stops", left(info.auto_stop_at)], ["Is archived", left(info.auto_archive_at)], ["Files are deleted", left(info.auto_delete_at)], ["Stopped", info.stopped_at && html`<${Time} at=${info.stopped_at} />`],
      ["Exit status", info.exit_code], ["Worker", info.worker], ["Runtime", info.runtime], ["Isolation", info.isolation], ["Tenant", info.tenant || "server owner"], ["User", info.user_id], ["Experiment", info.experiment_id], ["Group", info.group && html`<${Link} to=${`/ui/sandboxes?q=${encodeURIComponent(info.group)}`}>${info.group}<//>`], ["Labels", Object.entries(info.labels || {}).map(([k, v]) => html`<code>${k}=${v}</code> `)]]} />
    <h2>Limits</h2><${Table} label="Limits and their enforcement" empty="The sandbox has no limits." columns=${[["Limit", (/** @type {any} */ r) => r[0]], ["Value", (/** @type {any} */ r) => r[1]], ["Enforced by", (/** @type {any} */ r) => r[2]], ["Now", (/** @type {any} */ r) => r[3]]]}
      rows=${limits(info)} />
    ${info.egress && html`<p>Allowed destinations: ${info.egress.map((/** @type {string} */ e) => html`<code>${e}</code> `)}</p>`}
    <${Same} cli=${["rock", "inspect", id]} http=${`GET ${path(id, "?usage=1")}`} />`;
}

function limits(/** @type {any} */ info) {
  const usage = info.usage || {};
  const known = /** @type {Record<string, [any, any]>} */ ({ memory: [info.memory, usage.memory_bytes !== undefined ? `${bytes(usage.memory_bytes)} (peak ${bytes(usage.memory_peak_bytes)})` : ""], cpus: [info.cpus, usage.cpu_seconds ? `${usage.cpu_seconds.toFixed(1)} s used` : ""], pids: ["", usage.pids ?? ""], disk: ["", bytes(usage.disk_bytes)], network: [info.network, ""] });
  return [...new Set(["memory", "cpus", ...Object.keys(info.enforced || {}), "network"])].map((name) => [name, known[name]?.[0] ?? "", info.enforced?.[name] || "", known[name]?.[1] ?? ""]);
}

function Processes(/** @type {any} */ { id, info }) {
  const [shown, setShown] = useParam("process");
  const [command, setCommand] = useState("");
  const [result, setResult] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const running = info.state === "running";
  const { data, error, reload } = useData(async () => (running ? Promise.all([api("GET", path(id, "/processes")), api("GET", path(id, "/sessions"))]) : [{ items: [] }, { items: [] }]), [id, running], 3);
  const run = async (/** @type {boolean} */ background) => {
    setBusy(true);
    try {
      if (background) { const made = await api("POST", path(id, "/processes"), { json: { command } }); setResult(null); setShown(made.process_id); reload(); } else setResult(await api("POST", path(id, "/execute"), { json: { command, timeout: 60, max_output_bytes: 200000 } }));
    } catch (problem) { setResult({ problem }); }
    setBusy(false);
  };
  if (!running) return html`<${Empty}>The sandbox is ${info.state}. Processes are shown while it runs.<//>`;
  return html`${can("run") && html`<form class="tools" onSubmit=${(/** @type {Event} */ e) => { e.preventDefault(); run(false); }}><${Field} label="Command" size="48" value=${command} onInput=${(/** @type {any} */ e) => setCommand(e.target.value)} required />
      <button type="submit" disabled=${busy || !command}>Run</button><button type="button" disabled=${busy || !command} onClick=${() => run(true)}>Run in the background</button></form>`}
    ${result && (result.problem ? html`<${Problem} error=${result.problem} />` : html`<p role="status">Exit status ${result.exit_code ?? "unknown"}</p><pre class="output" tabindex="0" aria-label="Output of the command">${plainText((result.stdout || "") + (result.stderr || "")) || "no output"}</pre>`)}
    <${Problem} error=${error} />
    <h2>Background processes</h2><${Table} label="Background processes" empty="There are no background processes." rows=${data ? data[0].items : []} columns=${[["Id", (/** @type {any} */ p) => html`<button type="button" class="small" aria-label=${`Show the log of ${p.process_id}`} onClick=${() => setShown(p.process_id)}>${p.process_id}</button>`], ["Command", (/** @type {any} */ p) => html`<code>${Array.isArray(p.command) ? p.command.map(shellWord).join(" ") : p.command}</code>`], ["State", (/** @type {any} */ p) => (p.running ? "running" : `exit ${p.exit_code ?? p.signal ?? "unknown"}`)], ["Output", (/** @type {any} */ p) => bytes(p.stdout_size + p.stderr_size)], ["Started", (/** @type {any} */ p) => html`<${Time} at=${p.started_at} />`], ["Live", (/** @type {any} */ p) => html`<${Link} to=${`/ui/watch/${encodeURIComponent(id)}?process=${encodeURIComponent(p.process_id)}`} aria-label=${`Watch ${p.process_id}`}>Watch<//>`]]} />
    ${shown && html`<${Log} id=${id} process=${shown} key=${shown} />`}
    <h2>Sessions</h2><${Table} label="Sessions" empty="There are no sessions." rows=${data ? data[1].items : []} columns=${[["Name", (/** @type {any} */ s) => s.session], ["Shell", (/** @type {any} */ s) => s.shell], ["State", (/** @type {any} */ s) => (s.busy ? "runs a command" : "idle")], ["Process", (/** @type {any} */ s) => s.pid]]} />
    <${Same} cli=${["rock", "processes", id]} http=${`GET ${path(id, "/processes")}`} />`;
}

const PAGE = 65536;

/** A log by byte range from the worker: one page is in memory. */
function Log(/** @type {any} */ { id, process }) {
  const [stream, setStream] = useParam("stream", "stdout");
  const [offset, setOffset] = useParam("offset", "end");
  const { data, error } = useData(async () => {
    const about = await api("GET", path(id, `/processes/${encodeURIComponent(process)}`));
    const size = stream === "stdout" ? about.stdout_size : about.stderr_size;
    const start = offset === "end" ? Math.max(0, size - PAGE) : Math.max(0, Number(offset) || 0);
    const response = await api("GET", path(id, `/processes/${encodeURIComponent(process)}/logs?stream=${stream}&offset=${start}&limit=${PAGE}`), { raw: true });
    return { size, start, text: new TextDecoder().decode(await response.arrayBuffer()) };
  }, [id, process, stream, offset], offset === "end" ? 2 : 0);
  const end = data ? data.start + PAGE : 0;
  return html`<h2>Log of ${process}</h2><div class="tools"><${Field} label="Stream">${(/** @type {string} */ field) => html`<select id=${field} value=${stream} onChange=${(/** @type {any} */ e) => { setStream(e.target.value); }}><option>stdout</option><option>stderr</option></select>`}<//>
      <button type="button" disabled=${!data || data.start === 0} onClick=${() => setOffset(String(Math.max(0, data.start - PAGE)))}>Earlier</button><button type="button" disabled=${!data || end >= data.size} onClick=${() => setOffset(String(end))}>Later</button><button type="button" onClick=${() => setOffset("end")}>End</button>
      ${data && html`<span class="muted">bytes ${data.start} to ${Math.min(end, data.size)} of ${data.size}</span>`}</div>
    <${Problem} error=${error} />${data && html`<pre class="output" tabindex="0" aria-label="Log">${plainText(data.text) || "no output"}</pre>`}
    <${Same} cli=${["rock", "logs", id, process]} http=${`GET ${path(id, `/processes/${process}/logs?stream=${stream}&offset=${data ? data.start : 0}&limit=${PAGE}`)}`} />`;
}

const VIEWED = 262144;

function Files(/** @type {any} */ { id, info }) {
  const [folder, setFolder] = useParam("path", "/");
  const [file, setFile] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const [said, setSaid] = useState("");
  const running = info.state === "running";
  const [page, setPage] = useState(0);
  const { data, error: failed, reload } = useData(async () => (running ? api("GET", path(id, `/files/list?path=${encodeURIComponent(folder)}&offset=${page}&limit=500`)) : { items: [] }), [id, folder, running, page]);
  useEffect(() => { setFile(null); setPage(0); }, [folder]);
  if (!running) return html`<${Empty}>The sandbox is ${info.state}. Its files are shown while it runs.<//>`;
  const parts = folder.split("/").filter(Boolean);
  const fetched = (/** @type {string} */ name, rest = "") => api("GET", path(id, `/files/content?path=${encodeURIComponent(name)}${rest}`), { raw: true });
  const view = async (/** @type {any} */ entry) => {
    setError(null);
    try { setFile({ entry, text: new TextDecoder().decode(await (await fetched(entry.path, `&offset=0&length=${VIEWED}`)).arrayBuffer()) }); } catch (e) { setError(e); }
  };
  const get = async (/** @type {any} */ entry) => {
    setError(null);
    try { save(await (entry.kind === "directory" ? await api("GET", path(id, `/files/archive?path=${encodeURIComponent(entry.path)}`), { raw: true }) : await fetched(entry.path)).blob(), entry.kind === "directory" ? `${entry.name}.tar` : entry.name); } catch (e) { setError(e); }
  };
  const put = async (/** @type {any} */ event) => {
    setError(null);
    const chosen = [...event.target.files];
    try {
      for (const one of chosen) await api("PUT", path(id, `/files/content?path=${encodeURIComponent(`${folder.replace(/\/$/, "")}/${one.name}`)}`), { body: one });
      setSaid(`${chosen.length} uploaded to ${folder}`);
      event.target.value = "";
      reload();
    } catch (e) { setError(e); }
  };
  return html`<nav class="crumbs" aria-label="Folder"><button type="button" class="small" onClick=${() => setFolder("/")}>/</button>${parts.map((name, i) => html`<button type="button" class="small" onClick=${() => setFolder(`/${parts.slice(0, i + 1).join("/")}`)}>${name}</button>`)}</nav>
    ${can("run") && html`<${Field} label="Upload files to this folder" type="file" multiple onChange=${put} />`}<p role="status">${said}</p>
    <${Problem} error=${error || failed} />
    ${data && html`<${Table} label=${`Files of ${folder}`} empty="The folder is empty." rows=${data.items} columns=${[["Name", (/** @type {any} */ f) => (f.kind === "directory" ? html`<button type="button" class="small" onClick=${() => setFolder(f.path)}>${f.name}/</button>` : f.kind === "file" ? html`<button type="button" class="small" onClick=${() => view(f)}>${f.name}</button>` : `${f.name}${f.target ? ` → ${f.target}` : ""}`)], ["Kind", (/** @type {any} */ f) => f.kind], ["Size", (/** @type {any} */ f) => (f.kind === "file" ? bytes(f.size) : "")], ["Mode", (/** @type {any} */ f) => (f.mode & 0o7777).toString(8)], ["Changed", (/** @type {any} */ f) => html`<${Time} at=${f.mtime} />`], ["Download", (/** @type {any} */ f) => (["file", "directory"].includes(f.kind) ? html`<button type="button" class="small" aria-label=${`Download ${f.name}`} onClick=${() => get(f)}>Download</button>` : "")]]} />
      <div class="row">${page > 0 && html`<button type="button" onClick=${() => setPage(Math.max(0, page - 500))}>Earlier</button>`}${data.next !== null && data.next !== undefined && html`<button type="button" onClick=${() => setPage(data.next)}>Later</button>`}</div>`}
    ${file && html`<h2>${file.entry.path}</h2>${file.entry.size > VIEWED && html`<p class="muted">The first ${bytes(VIEWED)} of ${bytes(file.entry.size)}; download the file for all.</p>`}<pre class="file" tabindex="0" aria-label="Content of the file">${plainText(file.text)}</pre>`}
    <${Same} cli=${["rock", "cp", `${id}:${file ? file.entry.path : folder}`, "."]} http=${`GET ${path(id, `/files/list?path=${folder}`)}`} />`;
}

function Network(/** @type {any} */ { id, info }) {
  const [port, setPort] = useState("8080");
  const { data, error } = useData(() => api("GET", path(id, "/connections")), [id], 3);
  return html`<h2>Ports</h2>${info.state === "running" ? html`<div class="tools"><${Field} label="Port inside" type="number" min="1" max="65535" value=${port} onInput=${(/** @type {any} */ e) => setPort(e.target.value)} />
      ${session && session.keyless ? html`<a href=${`/v1/sandboxes/${encodeURIComponent(id)}/ports/${Number(port) || 0}/`} target="_blank" rel="noopener noreferrer">Open in a new tab</a>` : null}</div>
      <p>Forward the port to your machine: <code>rock port-forward ${shellWord(id)} ${Number(port) || 0}</code></p>` : html`<p class="muted">The sandbox does not run.</p>`}
    <h2>Connections to outside</h2><p class="muted">Network: ${info.network}. ${data ? `${data.total} connections, ${data.dropped} of them no longer stored.` : ""}</p><${Problem} error=${error} />
    <${Table} label="Connections" empty="No connection was made. Only the network nat is logged." rows=${data ? [...data.items].reverse() : []} columns=${[["Time", (/** @type {any} */ c) => html`<${Time} at=${c.at} />`], ["Host", (/** @type {any} */ c) => c.host || c.address], ["Port", (/** @type {any} */ c) => c.port], ["Protocol", (/** @type {any} */ c) => c.protocol], ["Allowed", (/** @type {any} */ c) => (c.allowed ? "yes" : html`<span class="cause">no: ${c.reason}</span>`)], ["Sent", (/** @type {any} */ c) => bytes(c.sent)], ["Received", (/** @type {any} */ c) => bytes(c.received)]]} />
    <${Same} cli=${["rock", "connections", id]} http=${`GET ${path(id, "/connections")}`} />`;
}

function Timeline(/** @type {any} */ { id }) {
  const [other, setOther] = useState("");
  const { data, error } = useData(() => record(id), [id], 5);
  return html`<div class="tools"><button type="button" disabled=${!data} onClick=${() => save(new Blob([exportHtml(data)], { type: "text/html" }), `${id}.html`)}>Export HTML</button><button type="button" disabled=${!data} onClick=${() => save(new Blob([exportJsonl(data)], { type: "application/x-ndjson" }), `${id}.jsonl`)}>Export JSONL</button>
      <form class="tools" onSubmit=${(/** @type {Event} */ e) => { e.preventDefault(); go(`/ui/compare?a=${encodeURIComponent(id)}&b=${encodeURIComponent(other)}`); }}><${Field} label="Compare with the sandbox" value=${other} onInput=${(/** @type {any} */ e) => setOther(e.target.value)} required /><button type="submit">Compare</button></form></div>
    <${Problem} error=${error} />${data && html`<${Events} events=${data.events} start=${data.info.created_at} />`}`;
}

export function Events(/** @type {any} */ { events, start, difference = -1 }) {
  return html`<ol class="timeline">${events.map((/** @type {any} */ e, /** @type {number} */ i) => html`<li class=${`kind-${e.kind}${i === difference ? " difference" : ""}`} key=${i}>${i === difference && html`<strong>First difference. </strong>`}<span class="muted">+${(e.at - start).toFixed(2)} s</span> ${plainText(e.title)}${e.text && (e.text.length > 120 || e.text.includes("\n") ? html`<pre tabindex="0" aria-label="Output">${plainText(e.text)}</pre>` : html` <span class="muted">${plainText(e.text)}</span>`)}</li>`)}</ol>`;
}
