// The flight recorder: the life of a sandbox from the public API, and its exports.
import { api } from "./lib.js";
import { plainText, timelineOf } from "./pure.js";

const RUNS = 20; // runs of the sandbox, the newest
const CALLS = 1000; // model calls of a run

const OUTPUT = 16384; // bytes of output of one process
const PROCESSES = 100;

/** Collect the events of a sandbox. Output of processes exists while the sandbox runs. */
export async function record(/** @type {string} */ id) {
  const base = `/v1/sandboxes/${encodeURIComponent(id)}`;
  const info = await api("GET", `${base}?usage=1`);
  const none = { items: [] };
  const [connections, processes, runs] = await Promise.all([
    api("GET", `${base}/connections`).catch(() => none),
    info.state === "running" ? api("GET", `${base}/processes`).catch(() => none) : none,
    api("GET", `/v1/runs?sandbox=${encodeURIComponent(id)}&limit=${RUNS}`).catch(() => none),
  ]);
  const recorded = await Promise.all([...runs.items].reverse().map(async (run) => ({
    run, calls: (await api("GET", `/v1/runs/${encodeURIComponent(run.id)}/calls?limit=${CALLS}`).catch(() => none)).items,
  })));
  /** @type {Record<string, string>} */ const outputs = {};
  const shown = processes.items.slice(-PROCESSES);
  for (const process of shown) {
    if (process.running) continue;
    const texts = [];
    for (const stream of ["stdout", "stderr"]) {
      const size = process[`${stream}_size`];
      if (!size) continue;
      const response = await api("GET", `${base}/processes/${encodeURIComponent(process.process_id)}/logs?stream=${stream}&offset=${Math.max(0, size - OUTPUT)}&limit=${OUTPUT}`, { raw: true }).catch(() => null);
      if (response) texts.push(new TextDecoder().decode(await response.arrayBuffer()));
    }
    outputs[process.process_id] = texts.join("");
  }
  return { info, events: timelineOf({ info, processes: shown, connections: connections.items, outputs, runs: recorded }) };
}

const escaped = (/** @type {unknown} */ text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

/** A self-contained document without scripts; its own policy forbids loading anything. */
export function exportHtml(/** @type {any} */ { info, events }) {
  const rows = events.map((/** @type {any} */ e) => `<tr><td>${escaped(new Date(e.at * 1000).toISOString())}</td><td>+${(e.at - info.created_at).toFixed(3)} s</td><td>${escaped(e.kind)}</td><td>${escaped(plainText(e.title))}<pre>${escaped(plainText(e.text))}</pre></td></tr>`).join("\n");
  return `<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>${escaped(info.sandbox_id)}</title>
<style>:root{color-scheme:light dark}body{font:15px system-ui;margin:2rem}td{vertical-align:top;padding:.2rem .8rem;border-bottom:1px solid #8886}pre{white-space:pre-wrap;margin:0;color:GrayText}</style></head>
<body><h1>Sandbox ${escaped(info.sandbox_id)}</h1><p>${escaped(info.image)}, ${escaped(info.state)}${info.cause ? `, ${escaped(info.cause)}: ${escaped(info.reason)}` : ""}</p>
<table><thead><tr><th>time</th><th>since the start</th><th>kind</th><th>event</th></tr></thead><tbody>${rows}</tbody></table></body></html>`;
}

/** One JSON object per line: the sandbox first, then its events. */
export function exportJsonl(/** @type {any} */ { info, events }) {
  return [{ type: "sandbox", ...info }, ...events.map((/** @type {any} */ e) => ({ type: "event", ...e }))].map((line) => JSON.stringify(line)).join("\n") + "\n";
}
