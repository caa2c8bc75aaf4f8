// Start of the page: session, navigation, and the screen of the URL.
import { ApiError, Field, Link, Problem, api, can, go, here, html, onSignedOut, render, session, setSession, useEffect, useRef, useState } from "./lib.js";

/** name of the URL -> [title, module, scope that it needs] */
const SCREENS = {
  sandboxes: ["Sandboxes", () => import("./screens/sandboxes.js"), "read"],
  snapshots: ["Snapshots", () => import("./screens/snapshots.js"), "read"],
  runs: ["Runs", () => import("./screens/runs.js"), "read"],
  jobs: ["Jobs", () => import("./screens/jobs.js"), "read"],
  environments: ["Environments", () => import("./screens/environments.js"), "read"],
  training: ["Training sets", () => import("./screens/training.js"), "read"],
  images: ["Images", () => import("./screens/images.js"), "read"],
  workers: ["Workers", () => import("./screens/workers.js"), "admin"],
  keys: ["Tenants and keys", () => import("./screens/keys.js"), "admin"],
  audit: ["Audit", () => import("./screens/audit.js"), "read"],
  cluster: ["Cluster", () => import("./screens/cluster.js"), "read"],
};
/** screens without an entry in the navigation */
const OTHERS = {
  sandbox: ["Sandbox", () => import("./screens/sandbox.js"), "sandboxes"],
  run: ["Run", () => import("./screens/run.js"), "runs"],
  job: ["Job", () => import("./screens/job.js"), "jobs"],
  terminal: ["Terminal", () => import("./screens/terminal.js"), "sandboxes"],
  watch: ["Watch", () => import("./screens/watch.js"), "sandboxes"],
  compare: ["Compare", () => import("./screens/compare.js"), "sandboxes"],
};

const THEMES = { "": "Automatic", light: "Light", dark: "Dark" };
function applyTheme() {
  let theme = "";
  try { theme = localStorage.getItem("rock-theme") || ""; } catch { /* storage is off */ }
  document.documentElement.dataset.theme = theme;
  return theme;
}

function Theme() {
  const [theme, set] = useState(applyTheme);
  return html`<label class="theme">Theme <select value=${theme} onChange=${(/** @type {any} */ e) => {
    try { localStorage.setItem("rock-theme", e.target.value); } catch { /* storage is off */ }
    set(applyTheme());
    document.documentElement.dataset.theme = e.target.value;
  }}>${Object.entries(THEMES).map(([value, name]) => html`<option value=${value}>${name}</option>`)}</select></label>`;
}

function Login(/** @type {any} */ { done, note }) {
  const [key, setKey] = useState("");
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  useEffect(() => { document.title = "Sign in · ROCK"; }, []);
  return html`<main class="login" id="main"><h1>ROCK</h1><p>${note || "Sign in with an API key of this server."}</p>
    <form onSubmit=${async (/** @type {Event} */ e) => {
      e.preventDefault();
      setBusy(true);
      try {
        const about = await api("POST", "/ui/api/login", { json: { key } });
        setKey("");
        done(about);
      } catch (problem) { setError(problem); setBusy(false); }
    }}>
      <${Field} label="API key" type="password" name="key" autocomplete="current-password" required value=${key} onInput=${(/** @type {any} */ e) => setKey(e.target.value)} />
      <${Problem} error=${error} />
      <button type="submit" class="primary" disabled=${busy}>${busy ? "Signing in…" : "Sign in"}</button>
    </form>
    <p class="muted">Without typing a key: run <code>rock ui</code> where the command line is configured for this server.</p></main>`;
}

function Screen(/** @type {{name: string, stamp: number}} */ { name }) {
  const [loaded, set] = useState(/** @type {any} */ ({ name: "", view: null, error: null }));
  const entry = /** @type {any} */ ({ ...SCREENS, ...OTHERS })[name];
  useEffect(() => {
    let live = true;
    if (!entry) return undefined;
    entry[1]().then(
      (/** @type {any} */ module) => live && set({ name, view: module.default, error: null }),
      () => live && set({ name, view: null, error: new ApiError(0, { message: "A file of the page was not loaded.", hint: "Reload the page." }) }),
    );
    return () => { live = false; };
  }, [name]);
  if (!entry) return html`<h1>Not found</h1><p>There is no screen at this address. <${Link} to="/ui/sandboxes">Show the sandboxes<//></p>`;
  if (loaded.error) return html`<h1>${entry[0]}</h1><${Problem} error=${loaded.error} />`;
  if (loaded.name !== name) return html`<p class="muted" role="status">Loading…</p>`;
  const { parts, query } = here();
  return html`<${loaded.view} parts=${parts} query=${query} />`;
}

function App() {
  const [about, setAbout] = useState(/** @type {any} */ (undefined));
  const [note, setNote] = useState("");
  const [error, setError] = useState(/** @type {any} */ (null));
  const [stamp, setStamp] = useState(0);
  const main = useRef(/** @type {any} */ (null));
  const shown = useRef("");
  const take = (/** @type {any} */ value) => { setSession(value.signed_in ? value : null); setAbout(value.signed_in ? value : null); };
  useEffect(() => {
    const load = async () => {
      const link = /^#link=([\w-]+)$/.exec(location.hash);
      try {
        let value = await api("GET", "/ui/api/session");
        if (link) {
          history.replaceState(null, "", location.pathname + location.search);
          if (!value.signed_in) {
            try { value = await api("POST", "/ui/api/login", { json: { link: link[1] } }); } catch (problem) { setNote(`${/** @type {any} */ (problem).message} ${/** @type {any} */ (problem).hint}`); }
          }
        }
        setError(null);
        take(value);
      } catch (problem) {
        if (/** @type {any} */ (problem).status === 401) { setNote(/** @type {any} */ (problem).message); setAbout(null); return; }
        setError(problem);
        setTimeout(load, 2000);
      }
    };
    load();
    const moved = () => setStamp((n) => n + 1);
    window.addEventListener("popstate", moved);
    const off = onSignedOut(() => { setNote("You are signed out: the session has ended, or its key was revoked."); setAbout(null); });
    return () => { window.removeEventListener("popstate", moved); off(); };
  }, []);
  const name = here().parts[0] || "sandboxes";
  useEffect(() => {
    const entry = /** @type {any} */ ({ ...SCREENS, ...OTHERS })[name];
    if (about && entry) document.title = `${here().parts[1] ? `${here().parts[1]} · ` : ""}${entry[0]} · ROCK`;
    if (shown.current && shown.current !== location.pathname && main.current) main.current.focus();
    shown.current = location.pathname;
  }, [stamp, about]);
  if (about === undefined) return error ? html`<main id="main"><h1>ROCK</h1><${Problem} error=${error} /></main>` : html`<main id="main"><h1 class="hidden">ROCK</h1><p class="muted" role="status">Loading…</p></main>`;
  if (!about || !session) return html`<${Login} note=${note} done=${(/** @type {any} */ value) => { setNote(""); take(value); }} />`;
  const current = OTHERS[/** @type {keyof typeof OTHERS} */ (name)]?.[2] || name;
  return html`<a class="skip" href="#main" onClick=${(/** @type {Event} */ e) => { e.preventDefault(); main.current.focus(); }}>Skip to the content</a>
    <header><${Link} to="/ui/sandboxes" class="brand">ROCK<//>
      <nav aria-label="Screens"><ul>${Object.entries(SCREENS).filter(([, entry]) => can(/** @type {string} */ (entry[2]))).map(([key, entry]) => html`<li key=${key}><${Link} to=${`/ui/${key}`} aria-current=${current === key ? "page" : undefined}>${entry[0]}<//></li>`)}</ul></nav>
      <div class="who"><span>${session.keyless ? "owner" : session.tenant === null ? "server owner" : `tenant ${session.tenant}`}</span> <${Theme} />
      ${!session.keyless && html`<button type="button" class="small" onClick=${async () => {
        try { await api("POST", "/ui/api/logout"); } finally { setSession(null); setNote("You are signed out."); setAbout(null); }
      }}>Sign out</button>`}</div></header>
    <main id="main" tabindex="-1" ref=${main}><${Screen} name=${name} stamp=${stamp} /></main>`;
}

applyTheme();
if (location.pathname === "/ui/" || location.pathname === "/ui") history.replaceState(null, "", `/ui/sandboxes${location.search}${location.hash}`);
const root = /** @type {HTMLElement} */ (document.getElementById("app"));
render(html`<${App} />`, root);
window.addEventListener("unhandledrejection", (event) => { if (event.reason instanceof ApiError) event.preventDefault(); });
export { go };
