// Environments: the list, and one to play by hand: make, reset, step; frames and rewards live.
import { Empty, Field, Link, Problem, Same, Table, api, can, html, useData, useParam, useEffect, useRef, useState } from "../lib.js";
import { plainText } from "../pure.js";
import { Chart } from "../chart.js";

const base = (/** @type {string} */ id) => `/v1/sandboxes/${encodeURIComponent(id)}/envs`;

export default function Environments() {
  const [env, setEnv] = useParam("env");
  const [search, setSearch] = useParam("q");
  const { data, error } = useData(() => api("GET", "/v1/envs"), []);
  if (env) return html`<${Play} env=${env} key=${env} />`;
  const rows = data ? data.items.filter((/** @type {any} */ e) => e.protocol !== "task" && `${e.id} ${e.note || ""} ${e.description || ""}`.toLowerCase().includes(search.toLowerCase())) : [];
  return html`<div class="title"><h1>Environments</h1></div><div class="tools"><${Field} label="Search" type="search" value=${search} onInput=${(/** @type {any} */ e) => setSearch(e.target.value)} /></div>
    <form class="tools" onSubmit=${(/** @type {any} */ e) => { e.preventDefault(); setEnv(e.target.elements.env.value.trim()); }}><${Field} label="Play another one (id of GEM or Gymnasium)" name="env" placeholder="gym:CartPole-v1" required /><button type="submit">Play</button></form>
    <${Problem} error=${error} />${data ? html`<${Table} label="Environments" empty="No environment matches." rows=${rows} columns=${[["Id", (/** @type {any} */ e) => e.id], ["Protocol", (/** @type {any} */ e) => e.protocol], ["Description", (/** @type {any} */ e) => e.note || e.description || ""], ["Play", (/** @type {any} */ e) => html`<${Link} to=${`/ui/environments?env=${encodeURIComponent(`${e.protocol === "gym" ? "gym:" : ""}${e.id}`)}`} aria-label=${`Play ${e.id}`}>Play<//>`]]} />` : html`<p class="muted" role="status">Loading…</p>`}
    <${Same} cli=${["rock", "env", "ls"]} http="GET /v1/envs" />`;
}

/** An array of the wire: {"__ndarray__"...}, nested lists of numbers, or base64 of an image. */
function pixelsOf(/** @type {any} */ value) {
  if (!Array.isArray(value) || !Array.isArray(value[0]) || !Array.isArray(value[0][0]) || value[0][0].length < 3) return null;
  const height = value.length, width = value[0].length;
  if (height * width > 4000000) return null;
  const data = new Uint8ClampedArray(height * width * 4);
  let at = 0;
  for (const row of value) for (const pixel of row) { data[at++] = pixel[0]; data[at++] = pixel[1]; data[at++] = pixel[2]; data[at++] = 255; }
  return new ImageData(data, width, height);
}

function Frame(/** @type {any} */ { value }) {
  const canvas = useRef(/** @type {any} */ (null));
  const image = pixelsOf(value);
  useEffect(() => {
    if (!image || !canvas.current) return;
    canvas.current.width = image.width;
    canvas.current.height = image.height;
    canvas.current.getContext("2d").putImageData(image, 0, 0);
  }, [value]);
  if (image) return html`<canvas class="frame" ref=${canvas} role="img" aria-label=${`Frame of ${image.width} by ${image.height} pixels`}></canvas>`;
  return html`<pre class="observation" tabindex="0" aria-label="Observation">${plainText(typeof value === "string" ? value : JSON.stringify(value, null, 1))}</pre>`;
}

function Play(/** @type {any} */ { env }) {
  const protocol = env.startsWith("gym:") ? "gym" : "gem";
  const id = env.replace(/^(gym|gem):/, "");
  const [sandbox, setSandbox] = useParam("sandbox");
  const [made, setMade] = useState(/** @type {any} */ (null));
  const [state, setState] = useState(/** @type {any} */ (null));
  const [steps, setSteps] = useState(/** @type {any[]} */ ([]));
  const [action, setAction] = useState("");
  const [seed, setSeed] = useState("");
  const [busy, setBusy] = useState("");
  const [frame, setFrame] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const current = useRef(/** @type {any} */ (null));
  current.current = made && { sandbox: made.sandbox_id, env: made.env };
  useEffect(() => () => { const c = current.current; if (c) api("DELETE", `${base(c.sandbox)}/${c.env}`).catch(() => {}); }, []);
  const doing = async (/** @type {string} */ name, /** @type {() => Promise<void>} */ work) => {
    setBusy(name);
    setError(null);
    try { await work(); } catch (e) { setError(e); }
    setBusy("");
  };
  const draw = async (/** @type {string} */ where, /** @type {any} */ number) => {
    if (protocol !== "gym") return;
    try { setFrame((await api("POST", `${base(where)}/${number}/call`, { json: { what: "render" } })).result); } catch { setFrame(null); }
  };
  const reset = async (/** @type {any} */ about) => {
    const found = await api("POST", `${base(about.sandbox_id)}/${about.env}/reset`, { json: seed === "" ? {} : { seed: Number(seed) } });
    setState({ ...found, reward: null, done: false });
    setSteps([]);
    await draw(about.sandbox_id, about.env);
  };
  const make = () => doing("make", async () => {
    let where = sandbox;
    if (!where) {
      const info = await api("POST", "/v1/envs?wait=600", { json: { env_id: id, protocol }, idempotent: true });
      where = info.sandbox_id;
      setSandbox(where);
    }
    const spec = { env_id: id, protocol, kwargs: protocol === "gym" ? { render_mode: "rgb_array" } : {}, idle: 1800 };
    let info;
    try { info = await api("POST", base(where), { json: spec }); } catch (problem) {
      if (protocol !== "gym") throw problem;
      info = await api("POST", base(where), { json: { ...spec, kwargs: {} } }); // an environment without rendering
    }
    const about = { ...info, sandbox_id: where };
    setMade(about);
    await reset(about);
  });
  const step = () => doing("step", async () => {
    /** @type {any} */ let value = action;
    if (protocol === "gym") { try { value = JSON.parse(action); } catch { throw new Error("The action of a Gymnasium environment is JSON, as in 1 or [0.5]."); } }
    const found = await api("POST", `${base(made.sandbox_id)}/${made.env}/step`, { json: { action: value } });
    setSteps((old) => [...old, { number: old.length + 1, action, reward: found.reward, total: (old.length ? old[old.length - 1].total : 0) + found.reward, done: found.terminated || found.truncated, at: Date.now() / 1000 }]);
    setState({ ...found, done: found.terminated || found.truncated });
    await draw(made.sandbox_id, made.env);
  });
  const rate = steps.length > 1 ? (steps.length - 1) / (steps[steps.length - 1].at - steps[0].at) : null;
  return html`<div class="title"><h1>${id}</h1><span class="muted">${protocol}</span><span class="grow"></span><${Link} to="/ui/environments">All environments<//></div>
    ${!can("run") && html`<p class="problem">This key may not run environments; it needs the scope run.</p>`}
    <div class="tools"><${Field} label="Seed" type="number" value=${seed} onInput=${(/** @type {any} */ e) => setSeed(e.target.value)} />
      ${made ? html`<button type="button" disabled=${!!busy} onClick=${() => doing("reset", () => reset(made))}>Reset</button>` : html`<button type="button" class="primary" disabled=${!!busy || !can("run")} onClick=${make}>${busy ? "Making…" : "Make"}</button>`}
      ${made && html`<span class="muted">in <${Link} to=${`/ui/sandbox/${encodeURIComponent(made.sandbox_id)}`}>${made.sandbox_id}<//></span>`}</div>
    <${Problem} error=${error} />
    ${!made && !busy && html`<${Empty}>Make the environment to play it. The first one of its packages may take minutes.<//>`}
    ${state && html`<div class="two"><section><h2>Observation</h2>${frame && html`<${Frame} value=${frame} />`}<${Frame} value=${state.observation} />
        <form class="tools" onSubmit=${(/** @type {Event} */ e) => { e.preventDefault(); step(); }}><${Field} label="Action" value=${action} onInput=${(/** @type {any} */ e) => setAction(e.target.value)} required /><button type="submit" class="primary" disabled=${!!busy || state.done}>Step</button></form>
        ${state.done && html`<p role="status"><strong>The episode has ended${state.truncated ? " (truncated)" : ""}.</strong> Reset to start another.</p>`}</section>
      <section><h2>Rewards</h2><p role="status">Step ${steps.length}, last reward <strong class="reward">${state.reward ?? "none"}</strong>, total <strong class="total">${steps.length ? steps[steps.length - 1].total : 0}</strong>${rate ? `, ${rate.toFixed(1)} steps per second` : ""}</p>
        <${Chart} title="Total reward" steps=${true} points=${steps.map((s) => [s.number, s.total])} format=${(/** @type {number} */ v) => String(Math.round(v * 1000) / 1000)} />
        <${Table} label="Steps" empty="No step was made." rows=${[...steps].reverse().slice(0, 200)} columns=${[["Step", (/** @type {any} */ s) => s.number], ["Action", (/** @type {any} */ s) => html`<code>${s.action}</code>`], ["Reward", (/** @type {any} */ s) => s.reward], ["Total", (/** @type {any} */ s) => s.total]]} /></section></div>`}
    <${Same} cli=${["rock", "env", "play", env]} http=${`POST /v1/envs ${JSON.stringify({ env_id: id, protocol })}; POST /v1/sandboxes/{sandbox_id}/envs, .../{env}/reset, .../{env}/step`} />`;
}
