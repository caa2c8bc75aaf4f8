// A terminal: xterm over the WebSocket of the API.
import { Link, Problem, Same, here, html, useEffect, useRef, useState } from "../lib.js";
import { closeQuietly } from "../live.js";
import { openScreen } from "../screen.js";

export default function Shell() {
  const { parts, query } = here();
  const id = parts[1] || "";
  const box = useRef(/** @type {any} */ (null));
  const [state, setState] = useState("connecting");
  const [error, setError] = useState(/** @type {any} */ (null));
  const [attempt, setAttempt] = useState(0);
  useEffect(() => {
    const { term, fit, dispose } = openScreen(box.current, false);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const command = query.get("command");
    const socket = new WebSocket(`${scheme}//${location.host}/ui/v1/sandboxes/${encodeURIComponent(id)}/terminal?rows=${term.rows}&columns=${term.cols}&term=xterm-256color${command ? `&command=${encodeURIComponent(command)}` : ""}`);
    socket.binaryType = "arraybuffer";
    let ended = false;
    socket.onopen = () => { setState("connected"); resize(); term.focus(); };
    socket.onmessage = (event) => {
      if (ended) return;
      if (typeof event.data !== "string") { term.write(new Uint8Array(event.data)); return; }
      const message = JSON.parse(event.data);
      ended = true;
      if ("exit" in message) setState(`ended with exit status ${message.exit}`);
      else { setError(message.error || message); setState("ended"); }
    };
    socket.onclose = () => { if (!ended) setState("disconnected"); };
    const resize = () => {
      try { fit.fit(); } catch { return; }
      if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ resize: [term.rows, term.cols] }));
    };
    const encoder = new TextEncoder();
    const typed = term.onData((/** @type {string} */ text) => { if (socket.readyState === WebSocket.OPEN) socket.send(encoder.encode(text)); });
    // Programs inside receive Tab; F6 leaves the terminal.
    term.attachCustomKeyEventHandler((/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "F6") return true;
      if (event.type === "keydown") /** @type {HTMLElement|null} */ (document.getElementById("after-terminal"))?.focus();
      return false;
    });
    const observer = new ResizeObserver(resize);
    observer.observe(box.current);
    return () => { ended = true; observer.disconnect(); typed.dispose(); closeQuietly(socket); dispose(); };
  }, [id, attempt]);
  return html`<div class="title"><h1>Terminal</h1> <${Link} to=${`/ui/sandbox/${encodeURIComponent(id)}`}>${id}<//><span class="grow"></span><span role="status" class="terminal-state">${state}</span>
    ${state !== "connected" && state !== "connecting" && html`<button type="button" onClick=${() => { setError(null); setState("connecting"); setAttempt(attempt + 1); }}>Connect again</button>`}</div>
    <${Problem} error=${error} />
    <div class="terminal" ref=${box}></div>
    <p class="muted" id="after-terminal" tabindex="-1">The program inside receives all keys; F6 leaves the terminal.</p>
    <${Same} cli=${["rock", "shell", id]} http=${`WebSocket /v1/sandboxes/${id}/terminal?rows=24&columns=80`} />`;
}
