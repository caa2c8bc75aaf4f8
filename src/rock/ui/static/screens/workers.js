// Workers: resources, state, images; drain and undrain.
import { Confirm, Problem, Same, StateMark, Table, api, html, useData, useState } from "../lib.js";
import { bytes, duration } from "../pure.js";

export default function Workers() {
  const { data, error, reload } = useData(() => api("GET", "/v1/workers"), [], 3);
  const { data: server } = useData(() => api("GET", "/v1/server"), [], 3);
  const [dialog, setDialog] = useState(/** @type {any} */ (null));
  const joined = data ? data.items : [];
  const local = server && !joined.length ? server.workers.map((/** @type {any} */ status) => ({ name: "local", state: "ready", status, version: server.version, age: 0 })) : [];
  return html`<div class="title"><h1>Workers</h1></div><${Problem} error=${error} />
    ${data ? html`<${Table} label="Workers" empty=${html`No worker has joined. Start one: <code>rocklet --join URL</code>`} rows=${[...joined, ...local]} columns=${[
      ["Worker", (/** @type {any} */ w) => html`<strong>${w.name}</strong>${w.status && html`<br /><span class="muted">${w.status.host_name} ${w.status.host_ip}</span>`}`],
      ["State", (/** @type {any} */ w) => html`<${StateMark} state=${w.state} />`], ["Heartbeat", (/** @type {any} */ w) => (w.url ? `${duration(w.age)} ago` : "this process")],
      ["Sandboxes", (/** @type {any} */ w) => w.status && `${w.status.sandboxes} of ${w.status.sandbox_limit}`], ["Memory free", (/** @type {any} */ w) => w.status && `${bytes(w.status.memory_free)} of ${bytes(w.status.memory_total)}`],
      ["Load", (/** @type {any} */ w) => w.status && `${w.status.load.toFixed(1)} of ${w.status.cpus} cores`], ["Memory pressure", (/** @type {any} */ w) => (w.status && w.status.memory_pressure !== null ? `${w.status.memory_pressure.toFixed(0)} %` : "")],
      ["Runtime", (/** @type {any} */ w) => w.status && `${w.status.runtime}, ${w.status.isolation}`], ["GPUs", (/** @type {any} */ w) => (w.status && w.status.gpus ? `${w.status.gpus_free} of ${w.status.gpus}` : "")], ["Images", (/** @type {any} */ w) => w.status && w.status.images.length], ["Version", (/** @type {any} */ w) => w.version],
      ["Actions", (/** @type {any} */ w) => (w.url ? html`<button type="button" class="small" onClick=${() => setDialog({ worker: w.name, verb: w.draining ? "undrain" : "drain" })}>${w.draining ? "Undrain" : "Drain"} <span class="hidden">${w.name}</span></button>` : "")]]} />` : html`<p class="muted" role="status">Loading…</p>`}
    <${Same} cli=${["rock", "worker", "ls"]} http="GET /v1/workers" />
    ${dialog && html`<${Confirm} title=${`${dialog.verb} ${dialog.worker}`} action=${dialog.verb} text=${dialog.verb === "drain" ? "The worker keeps its sandboxes and gets no more." : "The worker gets sandboxes again."} same=${html`<${Same} cli=${["rock", "worker", dialog.verb, dialog.worker]} http=${`POST /v1/workers/${dialog.worker}/${dialog.verb}`} />`} onClose=${() => { setDialog(null); reload(); }} run=${() => api("POST", `/v1/workers/${encodeURIComponent(dialog.worker)}/${dialog.verb}`)} />`}`;
}
