// Tenants and their API keys.
import { Confirm, Dialog, Field, Link, Problem, Same, Table, Time, api, html, session, useData, useState } from "../lib.js";

export default function Keys() {
  const { data, error, reload } = useData(async () => Promise.all([api("GET", "/v1/keys"), api("GET", "/v1/sandboxes?state=running&limit=2000")]), [], 5);
  const [dialog, setDialog] = useState(/** @type {any} */ (null));
  const keys = data ? data[0].items : [];
  const tenants = new Map();
  for (const key of keys) { const t = tenants.get(key.tenant) || { name: key.tenant, keys: 0, running: 0, quota: key.quota }; if (!key.revoked_at) t.keys++; tenants.set(key.tenant, t); }
  for (const info of data ? data[1].items : []) { const t = tenants.get(info.tenant); if (t) t.running++; }
  const limits = (/** @type {any} */ quota) => Object.entries(quota).filter(([, v]) => v !== null).map(([k, v]) => `${v} ${k}`).join(", ") || "no limit";
  return html`<div class="title"><h1>Tenants and keys</h1><span class="grow"></span><button type="button" class="primary" onClick=${() => setDialog({ kind: "create" })}>Create a key</button></div><${Problem} error=${error} />
    ${session && session.keyless ? html`<p class="muted">This server recognizes its owner without a key. Start it with <code>ROCK_API_KEY</code> to create keys for tenants.</p>` : null}
    <h2>Tenants</h2><${Table} label="Tenants" empty="There are no tenants. Create a key for one." rows=${[...tenants.values()]} columns=${[["Tenant", (/** @type {any} */ t) => t.name], ["Valid keys", (/** @type {any} */ t) => t.keys], ["Running sandboxes", (/** @type {any} */ t) => `${t.running}${t.quota.sandboxes !== null ? ` of ${t.quota.sandboxes}` : ""}`], ["Audit", (/** @type {any} */ t) => html`<${Link} to=${`/ui/audit?tenant=${encodeURIComponent(t.name)}`} aria-label=${`Show the audit log of ${t.name}`}>Show<//>`]]} />
    <h2>Keys</h2><${Table} label="API keys" empty="There are no keys." rows=${keys} columns=${[["Id", (/** @type {any} */ k) => html`<code>${k.id}</code>`], ["Name", (/** @type {any} */ k) => k.name], ["Tenant", (/** @type {any} */ k) => k.tenant], ["Scopes", (/** @type {any} */ k) => k.scopes.join(", ")], ["Quota", (/** @type {any} */ k) => limits(k.quota)], ["Created", (/** @type {any} */ k) => html`<${Time} at=${k.created_at} />`], ["State", (/** @type {any} */ k) => (k.revoked_at ? "revoked" : html`<button type="button" class="small danger" onClick=${() => setDialog({ kind: "revoke", key: k })}>Revoke <span class="hidden">${k.name}</span></button>`)]]} />
    <${Same} cli=${["rock", "key", "ls", "--all"]} http="GET /v1/keys" />
    ${dialog?.kind === "create" && html`<${Create} onClose=${() => { setDialog(null); reload(); }} />`}
    ${dialog?.kind === "revoke" && html`<${Confirm} title=${`Revoke ${dialog.key.name}`} action="Revoke" text="Requests with this key are rejected at once, and its sessions end. The sandboxes of its tenant stay." same=${html`<${Same} cli=${["rock", "key", "revoke", dialog.key.id]} http=${`DELETE /v1/keys/${dialog.key.id}`} />`} onClose=${() => { setDialog(null); reload(); }} run=${() => api("DELETE", `/v1/keys/${encodeURIComponent(dialog.key.id)}`)} />`}`;
}

function Create(/** @type {any} */ { onClose }) {
  const [form, set] = useState({ name: "", tenant: "", sandboxes: "", scopes: ["read", "run", "create"] });
  const [made, setMade] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  if (made) return html`<${Dialog} title="The new key" onClose=${onClose}><p>The key is shown only once: the server stores its digest.</p><${Field} label="API key">${(/** @type {string} */ id) => html`<input id=${id} readonly value=${made.key} onFocus=${(/** @type {any} */ e) => e.target.select()} />`}<//><div class="row end"><button type="button" class="primary" onClick=${onClose}>Done</button></div><//>`;
  const body = () => ({ name: form.name, scopes: form.scopes, ...(form.tenant ? { tenant: form.tenant } : {}), ...(form.sandboxes ? { quota: { sandboxes: Number(form.sandboxes) } } : {}) });
  return html`<${Dialog} title="Create a key" onClose=${onClose}><form onSubmit=${async (/** @type {Event} */ e) => { e.preventDefault(); try { setMade(await api("POST", "/v1/keys", { json: body() })); } catch (problem) { setError(problem); } }}>
    <div class="form"><${Field} label="Name" required value=${form.name} onInput=${(/** @type {any} */ e) => set({ ...form, name: e.target.value })} /><${Field} label="Tenant (new when empty)" pattern="[a-z][a-z0-9]*" value=${form.tenant} onInput=${(/** @type {any} */ e) => set({ ...form, tenant: e.target.value })} /><${Field} label="Most sandboxes at once" type="number" min="0" value=${form.sandboxes} onInput=${(/** @type {any} */ e) => set({ ...form, sandboxes: e.target.value })} /></div>
    <fieldset><legend>Scopes</legend>${["read", "run", "create", "images", "admin"].map((scope) => html`<label class="pad"><input type="checkbox" checked=${form.scopes.includes(scope)} onChange=${(/** @type {any} */ e) => set({ ...form, scopes: e.target.checked ? [...form.scopes, scope] : form.scopes.filter((s) => s !== scope) })} /> ${scope}</label>`)}</fieldset>
    <${Problem} error=${error} /><${Same} cli=${["rock", "key", "create", form.name, ...(form.tenant ? ["--tenant", form.tenant] : []), ...form.scopes.flatMap((s) => ["--scope", s])]} http=${`POST /v1/keys ${JSON.stringify(body())}`} /><div class="row end"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary">Create</button></div></form><//>`;
}
