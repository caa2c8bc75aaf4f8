// The output of an agent's process, live and read-only: nothing that is typed here reaches the sandbox.
import { Link, Problem, Same, api, here, html, useEffect, useParam, useRef, useState } from "../lib.js";
import { openScreen } from "../screen.js";
import { plainText, shellWord } from "../pure.js";

const FIRST = 262144; // bytes of earlier output
const PART = 262144; // bytes of one request
const WAIT = 20; // seconds that the server waits for new output

export default function Watch() {
  const id = here().parts[1] || "";
  const [process] = useParam("process");
  const [stream, setStream] = useParam("stream", "stdout");
  const box = useRef(/** @type {any} */ (null));
  const [about, setAbout] = useState(/** @type {any} */ (null));
  const [state, setState] = useState("connecting");
  const [error, setError] = useState(/** @type {any} */ (null));
  const base = `/v1/sandboxes/${encodeURIComponent(id)}/processes/${encodeURIComponent(process)}`;
  useEffect(() => {
    const { term, fit, dispose } = openScreen(box.current, true);
    const stop = new AbortController();
    const observer = new ResizeObserver(() => { try { fit.fit(); } catch { /* not visible */ } });
    observer.observe(box.current);
    // Tab and F6 leave the view: no program receives them.
    term.attachCustomKeyEventHandler(() => false);
    setError(null);
    (async () => {
      try {
        let info = await api("GET", base, { signal: stop.signal });
        let offset = Math.max(0, info[`${stream}_size`] - FIRST), skipped = offset;
        setAbout({ ...info, skipped });
        setState(info.running ? "live" : "ended");
        for (;;) {
          const response = await api("GET", `${base}/logs?stream=${stream}&offset=${offset}&limit=${PART}${info.running ? `&wait=${WAIT}` : ""}`, { raw: true, signal: stop.signal });
          const part = new Uint8Array(await response.arrayBuffer());
          offset += part.length;
          if (part.length) { await new Promise((done) => term.write(part, () => done(null))); continue; }
          const ended = !info.running;
          info = await api("GET", base, { signal: stop.signal });
          setAbout({ ...info, skipped });
          if (ended) break;
        }
        setState(`ended with exit status ${info.exit_code ?? "unknown"}`);
      } catch (problem) { if (!stop.signal.aborted) { setError(problem); setState("disconnected"); } }
    })();
    return () => { stop.abort(); observer.disconnect(); dispose(); };
  }, [id, process, stream]);
  const command = about && (Array.isArray(about.command) ? about.command.map(shellWord).join(" ") : about.command);
  return html`<div class="title"><h1>Watch</h1> <${Link} to=${`/ui/sandbox/${encodeURIComponent(id)}?tab=processes`}>${id}<//><strong class="badge">read-only</strong><span class="grow"></span><span role="status" class="terminal-state">${state}</span></div>
    <p>${command && html`<code>${plainText(command)}</code> `}<label>Stream <select value=${stream} onChange=${(/** @type {any} */ e) => setStream(e.target.value)}><option>stdout</option><option>stderr</option></select></label></p>
    <${Problem} error=${error} />
    <div class="terminal" ref=${box}></div>
    <p class="muted">This view is read-only: keys have no effect on the program.${about && about.skipped ? ` The first ${about.skipped} bytes of the output are left out; the log has them.` : ""}</p>
    <${Same} cli=${["rock", "logs", "--follow", id, process]} http=${`GET ${base}/logs?stream=${stream}&offset=0&wait=${WAIT}`} />`;
}
