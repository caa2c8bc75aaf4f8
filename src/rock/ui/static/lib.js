// What all screens share: rendering, the API, navigation, and the common parts of a screen.
import { h, render, Component, Fragment } from "./vendor/preact.js";
import { useState, useEffect, useRef, useMemo, useCallback } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { shellWord, windowOf } from "./pure.js";

export const html = htm.bind(h);
export { h, render, Component, Fragment, useState, useEffect, useRef, useMemo, useCallback };

// ---- API ----

/** @type {{signed_in: boolean, csrf: string, keyless: boolean, tenant: string|null, scopes: string[], version: string, key_id: string} | null} */
export let session = null;
const signedOut = new Set();
export function onSignedOut(/** @type {() => void} */ call) { signedOut.add(call); return () => signedOut.delete(call); }
export function setSession(/** @type {any} */ value) { session = value; }
export function can(/** @type {string} */ scope) { return !!session && session.scopes.includes(scope); }

/** An error of the server: what, why, and what to do. */
export class ApiError extends Error {
  constructor(/** @type {number} */ status, /** @type {any} */ body) {
    const found = body.error || body;
    super(found.message || `HTTP ${status}`);
    this.status = status;
    this.code = found.code || "";
    this.hint = found.hint || "";
  }
}

/** Call the API. path: "/v1/..." @param {string} method @param {string} path
 * @param {{json?: any, body?: BodyInit, raw?: boolean, idempotent?: boolean, signal?: AbortSignal}} [options] */
export async function api(method, path, options = {}) {
  /** @type {Record<string, string>} */ const headers = {};
  if (session && session.csrf) headers["x-rock-csrf"] = session.csrf;
  if (options.json !== undefined) headers["content-type"] = "application/json";
  if (options.idempotent) headers["idempotency-key"] = crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;
  let response;
  try {
    response = await fetch(path.startsWith("/ui/") ? path : `/ui${path}`, {
      method, headers, body: options.json !== undefined ? JSON.stringify(options.json) : options.body,
      signal: options.signal, credentials: "same-origin", cache: "no-store",
    });
  } catch (error) {
    if (options.signal && options.signal.aborted) throw error;
    throw new ApiError(0, { message: "The server cannot be reached.", hint: "The page tries again; check that the server runs." });
  }
  if (!response.ok) {
    let body = {};
    try { body = await response.json(); } catch { /* not of ROCK */ }
    if (response.status === 401) { session = null; signedOut.forEach((call) => call()); }
    throw new ApiError(response.status, body);
  }
  if (options.raw) return response;
  const text = await response.text();
  return text ? JSON.parse(text) : {};
}

// ---- URL ----

/** The screen and the parameters of the URL: the state of a screen is in its URL. */
export function here() {
  const parts = location.pathname.replace(/^\/ui\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
  return { parts, query: new URLSearchParams(location.search) };
}
export function go(/** @type {string} */ path, replace = false) {
  history[replace ? "replaceState" : "pushState"](null, "", path);
  window.dispatchEvent(new PopStateEvent("popstate"));
}
export function Link(/** @type {any} */ { to, children, ...rest }) {
  return html`<a href=${to} ...${rest} onClick=${(/** @type {MouseEvent} */ e) => {
    if (e.ctrlKey || e.metaKey || e.shiftKey || e.button) return;
    e.preventDefault();
    go(to);
  }}>${children}</a>`;
}
/** A parameter of the URL as state. @returns {[string, (value: string) => void]} */
export function useParam(/** @type {string} */ name, initial = "") {
  const value = here().query.get(name) ?? initial;
  return [value, (next) => {
    const { query } = here();
    if (next === initial) query.delete(name); else query.set(name, next);
    const text = query.toString();
    go(location.pathname + (text ? `?${text}` : ""), true);
  }];
}

// ---- data ----

/** Load data, and load it again every `seconds` while the tab is visible. */
export function useData(/** @type {() => Promise<any>} */ load, /** @type {any[]} */ deps, seconds = 0) {
  const [state, set] = useState({ data: /** @type {any} */ (null), error: /** @type {any} */ (null), loading: true });
  const again = useRef(() => {});
  useEffect(() => {
    let live = true, timer = 0;
    const run = async () => {
      clearTimeout(timer);
      try {
        const data = await load();
        if (live) set({ data, error: null, loading: false });
      } catch (error) {
        if (live) set((old) => ({ data: old.data, error, loading: false }));
      }
      if (live && seconds) timer = window.setTimeout(tick, seconds * 1000);
    };
    const tick = () => { if (document.hidden) timer = window.setTimeout(tick, 1000); else run(); };
    again.current = run;
    set({ data: null, error: null, loading: true });
    run();
    return () => { live = false; clearTimeout(timer); };
  }, deps);
  return { ...state, reload: () => again.current() };
}

// ---- parts ----

export function Problem(/** @type {{error: any}} */ { error }) {
  if (!error) return null;
  return html`<div class="problem" role="alert"><strong>${String(error.message || error)}</strong>${error.hint && html`<br />${error.hint}`}</div>`;
}

export function Empty(/** @type {any} */ { children }) { return html`<p class="empty">${children}</p>`; }

const SHAPES = { running: "●", pending: "◔", stopping: "◑", stopped: "○", archiving: "◓", archived: "▣", deleted: "×", ready: "●", draining: "◑", unreachable: "△", lost: "×", completed: "✓", failed: "!", cancelled: "–" };
export function StateMark(/** @type {{state: string}} */ { state }) {
  return html`<span class=${`state state-${state}`}><span aria-hidden="true">${SHAPES[/** @type {keyof typeof SHAPES} */ (state)] || "•"}</span> ${state}</span>`;
}

/** The same action by the command line and by HTTP. */
export function Same(/** @type {{cli: (string|undefined)[], http: string}} */ { cli, http }) {
  const command = cli.filter(Boolean).map((word) => shellWord(String(word))).join(" ");
  return html`<details class="same"><summary>Command and HTTP call</summary>
    <dl><dt>CLI</dt><dd><code>${command}</code> <${Copy} text=${command} what="the command" /></dd><dt>HTTP</dt><dd><code>${http}</code> <${Copy} text=${http} what="the HTTP call" /></dd></dl></details>`;
}
export function Copy(/** @type {{text: string, what: string}} */ { text, what }) {
  const [done, set] = useState(false);
  return html`<button type="button" class="small" onClick=${async () => {
    try { await navigator.clipboard.writeText(text); set(true); setTimeout(() => set(false), 1500); } catch { set(false); }
  }} aria-label=${`Copy ${what}`}>${done ? "Copied" : "Copy"}</button>`;
}

/** A modal dialog: focus stays inside, Escape closes it, focus returns. */
export function Dialog(/** @type {any} */ { title, onClose, children }) {
  const ref = useRef(/** @type {any} */ (null));
  useEffect(() => {
    const before = /** @type {HTMLElement|null} */ (document.activeElement);
    ref.current.showModal();
    return () => { if (before && before.isConnected) before.focus(); };
  }, []);
  return html`<dialog ref=${ref} aria-label=${title} onClose=${onClose} onCancel=${onClose}>
    <div class="dialog-head"><h2>${title}</h2><button type="button" class="small" onClick=${onClose} aria-label="Close">✕</button></div>${children}</dialog>`;
}

/** A dialog that asks before an action. */
export function Confirm(/** @type {any} */ { title, text, action, run, onClose, same }) {
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  return html`<${Dialog} title=${title} onClose=${onClose}><p>${text}</p>${same}<${Problem} error=${error} />
    <div class="row end"><button type="button" onClick=${onClose}>Cancel</button>
    <button type="button" class="danger" disabled=${busy} onClick=${async () => {
      setBusy(true);
      try { await run(); onClose(); } catch (e) { setError(e); setBusy(false); }
    }}>${busy ? "Working…" : action}</button></div><//>`;
}

/** A table of plain rows. columns: [title, row => content]. */
export function Table(/** @type {any} */ { label, columns, rows, empty }) {
  if (!rows.length) return html`<${Empty}>${empty}<//>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}><table><caption class="hidden">${label}</caption>
    <thead><tr>${columns.map((/** @type {any} */ c) => html`<th scope="col">${c[0]}</th>`)}</tr></thead>
    <tbody>${rows.map((/** @type {any} */ row) => html`<tr>${columns.map((/** @type {any} */ c) => html`<td>${c[1](row)}</td>`)}</tr>`)}</tbody></table></div>`;
}

/** Names and values; rows without a value are left out. */
export function Facts(/** @type {{rows: [string, any][]}} */ { rows }) {
  return html`<dl class="facts">${rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

/** The window of rows of a scrolled box. It renders when the window changes, which is not each scroll event.
 * @param {{current: any}} box @param {number} rowHeight @param {number} count */
export function useWindow(box, rowHeight, count) {
  const [view, setView] = useState({ first: 0, last: 24 });
  const onScroll = () => {
    if (!box.current) return;
    const found = windowOf(box.current.scrollTop, box.current.clientHeight, rowHeight, Number.MAX_SAFE_INTEGER);
    setView((old) => (old.first === found.first && old.last === found.last ? old : found));
  };
  useEffect(() => {
    onScroll();
    const observer = new ResizeObserver(onScroll);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  return { first: Math.min(view.first, count), last: Math.min(view.last, count), onScroll };
}

export function Field(/** @type {any} */ { label, hint, children, ...rest }) {
  const id = useMemo(() => `f${Math.random().toString(36).slice(2)}`, []);
  return html`<div class="field"><label for=${id}>${label}</label>${children ? children(id) : html`<input id=${id} ...${rest} />`}${hint && html`<small id=${`${id}h`}>${hint}</small>`}</div>`;
}

/** The time of an event, in the time zone of the browser. */
export function Time(/** @type {{at: number|null|undefined}} */ { at }) {
  if (!at) return null;
  const date = new Date(at * 1000);
  return html`<time dateTime=${date.toISOString()} title=${date.toISOString()}>${date.toLocaleString()}</time>`;
}

export function save(/** @type {Blob} */ blob, /** @type {string} */ name) {
  const url = URL.createObjectURL(blob);
  const a = document.createElement("a");
  a.href = url;
  a.download = name.replace(/[^\w.-]+/g, "_") || "file";
  a.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
