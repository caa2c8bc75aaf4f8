// The rows of sandboxes: loaded once as columns, then changed by messages of one WebSocket.
import { api, useEffect, useState } from "./lib.js";
import { applyChanges, fromColumns } from "./pure.js";

const SILENT = 40000; // milliseconds after which a silent server counts as gone

/** One connection for this tab, while a screen uses it. */
export class LiveRows {
  constructor(/** @type {string} */ filter, /** @type {(state: any) => void} */ tell) {
    this.filter = filter;
    this.tell = tell;
    /** @type {Map<string, any>} */ this.rows = new Map();
    /** @type {string[]} */ this.names = [];
    this.open = true;
    this.failures = 0;
    this.heard = 0;
    this.complete = true;
    this.asked = 0;
    this.queued = false;
    this.connected = false;
    this.error = null;
    this.loaded = false;
    this.connect();
    this.watch = setInterval(() => {
      if (this.socket && this.heard && Date.now() - this.heard > SILENT) this.socket.close();
    }, 5000);
  }
  connect() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/ui/api/live`);
    this.socket = socket;
    socket.onopen = () => { this.failures = 0; this.heard = Date.now(); this.connected = true; this.load(); };
    socket.onmessage = (event) => { this.heard = Date.now(); this.receive(JSON.parse(event.data)); };
    socket.onclose = () => {
      if (!this.open) return;
      this.connected = false;
      this.changed();
      const wait = Math.min(10000, 250 * 2 ** this.failures++) * (0.75 + Math.random() / 2);
      this.timer = setTimeout(async () => {
        // A WebSocket reports no reason: a request shows whether the session has ended.
        try { await api("GET", "/v1/server"); } catch (error) { if (/** @type {any} */ (error).status === 401) return; }
        if (this.open) this.connect();
      }, wait);
    };
  }
  async load() {
    const asked = ++this.asked;
    try {
      const data = await api("GET", `/ui/api/rows${this.filter ? `?${this.filter}` : ""}`);
      if (!this.open || asked !== this.asked) return;
      this.names = Object.keys(data.columns);
      this.rows = new Map(fromColumns(data.columns, data.count).map((row) => [row.sandbox_id, row]));
      this.complete = data.complete;
      this.error = null;
      this.loaded = true;
      if (this.socket && this.socket.readyState === WebSocket.OPEN) {
        this.socket.send(JSON.stringify({ filter: this.filter, version: data.version, start: data.start }));
      }
    } catch (error) {
      if (asked !== this.asked) return;
      this.error = error;
    }
    this.changed();
  }
  receive(/** @type {any} */ message) {
    if (message.error || message.message) { this.error = message.error || message; this.changed(); return; }
    if (message.reset) { this.load(); return; }
    if (this.loaded && applyChanges(this.rows, message, this.names)) this.changed();
  }
  changed() {
    if (this.queued || !this.open) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      if (this.open) this.tell({ rows: this.rows, connected: this.connected, error: this.error, loaded: this.loaded, complete: this.complete, stamp: performance.now() });
    });
  }
  close() {
    this.open = false;
    clearTimeout(this.timer);
    clearInterval(this.watch);
    if (this.socket) closeQuietly(this.socket);
  }
}

/** Close a WebSocket; one that is still connecting is closed once it is open, because browsers report the other. */
export function closeQuietly(/** @type {WebSocket} */ socket) {
  if (socket.readyState === WebSocket.CONNECTING) socket.onopen = () => socket.close();
  else socket.close();
}

export function useRows(/** @type {string} */ filter) {
  const [state, set] = useState({ rows: new Map(), connected: false, error: null, loaded: false, complete: true, stamp: 0 });
  useEffect(() => {
    const live = new LiveRows(filter, set);
    return () => live.close();
  }, [filter]);
  return state;
}
