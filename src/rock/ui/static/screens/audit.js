// The audit log: which key performed which call that changes something.
import { Field, Link, Problem, Same, Table, Time, api, html, save, session, useData, useParam, useState } from "../lib.js";

const NAMES = ["tenant", "key_id", "action", "target"];

export default function Audit() {
  const filters = Object.fromEntries(NAMES.map((name) => [name, useParam(name)]));
  const [before, setBefore] = useState(/** @type {number|null} */ (null));
  const text = new URLSearchParams(NAMES.filter((name) => filters[name][0]).map((name) => [name, filters[name][0]])).toString();
  const { data, error } = useData(() => api("GET", `/v1/audit?limit=200${text ? `&${text}` : ""}${before ? `&before=${before}` : ""}`), [text, before], before ? 0 : 5);
  const rows = data ? data.items : [];
  return html`<div class="title"><h1>Audit</h1><span class="grow"></span><button type="button" disabled=${!rows.length} onClick=${async () => {
      const all = [];
      let at = null;
      for (let page = 0; page < 50; page++) { const found = await api("GET", `/v1/audit?limit=2000${text ? `&${text}` : ""}${at ? `&before=${at}` : ""}`); all.push(...found.items); at = found.next; if (!at) break; }
      save(new Blob([all.map((e) => JSON.stringify(e)).join("\n") + "\n"], { type: "application/x-ndjson" }), "audit.jsonl");
    }}>Export JSONL</button></div>
    <div class="tools">${NAMES.filter((name) => name !== "tenant" || (session && session.tenant === null)).map((name) => html`<${Field} key=${name} label=${name} value=${filters[name][0]} onChange=${(/** @type {any} */ e) => { setBefore(null); filters[name][1](e.target.value.trim()); }} />`)}</div>
    <${Problem} error=${error} />${data ? html`<${Table} label="Audit log" empty="No entry matches. Calls that change something appear here." rows=${rows} columns=${[["Time", (/** @type {any} */ e) => html`<${Time} at=${e.at} />`], ["Tenant", (/** @type {any} */ e) => e.tenant || "server owner"], ["Key", (/** @type {any} */ e) => e.key_id && html`<${Link} to=${`/ui/audit?key_id=${encodeURIComponent(e.key_id)}`}>${e.key_id}<//>`], ["Action", (/** @type {any} */ e) => html`<${Link} to=${`/ui/audit?action=${encodeURIComponent(e.action)}`}>${e.action}<//>`], ["Target", (/** @type {any} */ e) => e.target && html`<${Link} to=${`/ui/audit?target=${encodeURIComponent(e.target)}`}>${e.target}<//>`], ["Status", (/** @type {any} */ e) => (e.status >= 400 ? html`<span class="cause">${e.status}</span>` : e.status)], ["Address", (/** @type {any} */ e) => e.address], ["Request", (/** @type {any} */ e) => html`<code>${e.request_id}</code>`]]} />` : html`<p class="muted" role="status">Loading…</p>`}
    <div class="row">${before && html`<button type="button" onClick=${() => setBefore(null)}>Newest</button>`}${data && data.next && html`<button type="button" onClick=${() => setBefore(data.next)}>Older</button>`}</div>
    <${Same} cli=${["rock", "audit", ...NAMES.flatMap((name) => (filters[name][0] ? [`--${name.replace("_id", "")}`, filters[name][0]] : []))]} http=${`GET /v1/audit${text ? `?${text}` : ""}`} />`;
}
