// Training sets: task suites that the server can host.
import { Field, Problem, Same, Table, api, html, useData, useParam } from "../lib.js";

export default function Training() {
  const [search, setSearch] = useParam("q");
  const { data, error } = useData(() => api("GET", "/v1/envs"), []);
  const rows = data ? data.items.filter((/** @type {any} */ e) => e.protocol === "task" && `${e.id} ${e.note || ""}`.toLowerCase().includes(search.toLowerCase())) : [];
  return html`<div class="title"><h1>Training sets</h1></div><div class="tools"><${Field} label="Search" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} /></div>
    <${Problem} error=${error} />${data ? html`<${Table} label="Training sets" empty="No training set matches." rows=${rows} columns=${[["Name", (/** @type {any} */ e) => e.id], ["Image", (/** @type {any} */ e) => html`<code>${e.image || ""}</code>`], ["Description", (/** @type {any} */ e) => e.note || ""], ["Other names", (/** @type {any} */ e) => (e.aliases || []).join(", ")]]} />` : html`<p class="muted" role="status">Loading…</p>`}
    <p class="muted">A set is used from Python: <code>rock.training</code>; its first use installs its packages.</p><${Same} cli=${["rock", "env", "ls"]} http="GET /v1/envs" />`;
}
