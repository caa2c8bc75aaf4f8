// Images: what workers report, and which sandboxes use them.
import { Field, Link, Problem, Same, Table, Time, api, can, html, useData, useParam } from "../lib.js";

export default function Images() {
  const [search, setSearch] = useParam("q");
  const { data, error } = useData(async () => Promise.all([api("GET", "/v1/server"), api("GET", "/v1/sandboxes?limit=2000")]), [], 10);
  /** @type {Map<string, any>} */ const images = new Map();
  const of = (/** @type {string} */ name) => { if (!images.has(name)) images.set(name, { name, workers: [], running: 0, all: 0, last: 0, progress: "" }); return images.get(name); };
  for (const worker of data ? data[0].workers : []) {
    for (const name of worker.images) of(name).workers.push(worker.host_name);
    for (const [name, progress] of Object.entries(worker.fetching || {})) of(name).progress = progress;
  }
  for (const info of data ? data[1].items : []) {
    const image = of(info.image);
    image.all++;
    if (info.state === "running") image.running++;
    image.last = Math.max(image.last, info.created_at);
  }
  const rows = [...images.values()].filter((i) => i.name.toLowerCase().includes(search.toLowerCase())).sort((a, b) => b.last - a.last || (a.name < b.name ? -1 : 1));
  return html`<div class="title"><h1>Images</h1></div><div class="tools"><${Field} label="Search" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} /></div>
    <${Problem} error=${error} />${!can("admin") && html`<p class="muted">Your key sees the images of your own sandboxes.</p>`}
    ${data ? html`<${Table} label="Images" empty=${html`There are no images. Pull one on a worker: <code>rock image pull python:3.11</code>`} rows=${rows} columns=${[["Image", (/** @type {any} */ i) => i.name], ["On workers", (/** @type {any} */ i) => i.workers.join(", ") || i.progress], ["Sandboxes", (/** @type {any} */ i) => (i.all ? html`<${Link} to=${`/ui/sandboxes?image=${encodeURIComponent(i.name)}`}>${i.all} (${i.running} running)<//>` : "0")], ["Last used", (/** @type {any} */ i) => i.last ? html`<${Time} at=${i.last} />` : ""]]} />` : html`<p class="muted" role="status">Loading…</p>`}
    <p class="muted">Images are pulled, built and pruned on their worker: <code>rock image pull NAME</code>, <code>rock image prune</code></p><${Same} cli=${["rock", "image", "ls"]} http="GET /v1/server" />`;
}
