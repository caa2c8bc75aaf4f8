// Pure functions of the page: no DOM, no network. tests/ui/pure.test.mjs tests them with `node --test`.

/** @typedef {Record<string, any>} Row */

/** Rows from columns as the server encodes them: see encode in live.py.
 * @param {Record<string, any>} columns @param {number} count @returns {Row[]} */
export function fromColumns(columns, count) {
  const rows = Array.from({ length: count }, () => /** @type {Row} */ ({}));
  for (const [name, column] of Object.entries(columns)) {
    let time = 0;
    for (let i = 0; i < count; i++) {
      if (column.times) rows[i][name] = (time += column.times[i]) / 1000;
      else if (column.distinct) rows[i][name] = column.distinct[column.at[i]];
      else rows[i][name] = column.plain ? column.plain[i] : column.same;
    }
  }
  return rows;
}

/** Apply a message of the push channel. A row of an older version than the known one is ignored.
 * @param {Map<string, Row>} rows @param {{changed?: any[][], gone?: string[]}} message @param {string[]} names
 * @returns {boolean} whether something changed */
export function applyChanges(rows, message, names) {
  let changed = false;
  const version = names.indexOf("version");
  for (const values of message.changed || []) {
    const known = rows.get(values[0]);
    if (known && known.version > values[version]) continue;
    /** @type {Row} */ const row = {};
    names.forEach((name, i) => { row[name] = values[i]; });
    rows.set(values[0], row);
    changed = true;
  }
  for (const id of message.gone || []) changed = rows.delete(id) || changed;
  return changed;
}

/** Whether fields contain every word of a search text. @param {any[]} fields @param {string} text */
export function matchesWords(fields, text) {
  const all = fields.filter(Boolean).join(" ").toLowerCase();
  return text.toLowerCase().split(/\s+/).every((word) => all.includes(word));
}

/** Whether a row of a sandbox contains every word of a search text, in its visible fields.
 * @param {Row} row @param {string} text */
export function matchesSearch(row, text) {
  if (!text) return true;
  const labels = Object.entries(row.labels || {}).map(([k, v]) => `${k}=${v}`).join(" ");
  return matchesWords([row.sandbox_id, row.name, row.state, row.cause, row.image, row.tenant, row.worker, row.user_id,
    row.experiment_id, row.group, labels], text);
}

/** Rows, newest first. The order is kept: it is made again when rows have come or gone, not when rows have changed.
 * @param {{ids?: string[]}} kept @param {Map<string, Row>} rows @returns {Row[]} */
export function orderOf(kept, rows) {
  if (!kept.ids || kept.ids.length !== rows.size || !kept.ids.every((id) => rows.has(id))) {
    kept.ids = [...rows.values()].sort((a, b) => b.created_at - a.created_at || (a.sandbox_id < b.sandbox_id ? 1 : -1)).map((row) => row.sandbox_id);
  }
  return kept.ids.map((id) => /** @type {Row} */ (rows.get(id)));
}

/** A memory limit of a configuration, as people read it: "512m" is "512 MiB". @param {string|null|undefined} text */
export function memoryText(text) {
  const found = /^(\d+(?:\.\d+)?)([kmgt])?(?:i?b)?$/i.exec(text || "");
  return found && found[2] ? `${found[1]} ${found[2].toUpperCase()}iB` : text || "";
}

/** The window of rows to render. @returns {{first: number, last: number}} of rows, last exclusive
 * @param {number} scroll @param {number} height @param {number} rowHeight @param {number} count */
export function windowOf(scroll, height, rowHeight, count, extra = 6) {
  const first = Math.max(0, Math.min(count, Math.floor(scroll / rowHeight) - extra));
  return { first, last: Math.min(count, Math.ceil((scroll + height) / rowHeight) + extra) };
}

/** @param {number | null | undefined} n */
export function bytes(n) {
  if (n === null || n === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return `${i && n < 10 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}

/** @param {number} seconds */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** A word of a POSIX shell. @param {string} word */
export function shellWord(word) {
  return /^[A-Za-z0-9_@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, `'\\''`)}'`;
}

/** Lines of text without control characters of a terminal, which hide text in a document. @param {string} text */
export function plainText(text) {
  return text
    .replace(/\u001b\][^\u0007\u001b]*(?:\u0007|\u001b\\)/g, "")
    .replace(/\u001b\[[0-?]*[ -/]*[@-~]/g, "")
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u202a-\u202e\u2066-\u2069]/g, "\ufffd")
    .replace(/\r\n?/g, "\n");
}

/** The events of a sandbox's life, oldest first, from responses of the API.
 * @param {{info: Row, processes: Row[], connections: Row[], outputs: Record<string, string>, runs?: {run: Row, calls: Row[]}[]}} data
 * @returns {{at: number, kind: string, title: string, text: string}[]} */
export function timelineOf({ info, processes, connections, outputs, runs = [] }) {
  /** @type {{at: number, kind: string, title: string, text: string}[]} */ const events = [];
  const add = (/** @type {number|null|undefined} */ at, /** @type {string} */ kind, /** @type {string} */ title, text = "") => {
    if (at) events.push({ at, kind, title, text });
  };
  add(info.created_at, "state", "created", `image ${info.image}`);
  for (const [name, phase] of Object.entries(info.phases || {})) {
    add(phase.completed_at || phase.started_at, "phase", `start phase ${name}: ${phase.status}`, phase.message || "");
  }
  for (const change of info.state_history || []) {
    add(change.timestamp, "state", `${change.from_state} to ${change.to_state}`, change.event);
  }
  for (const p of processes) {
    const words = Array.isArray(p.command) ? p.command.map(shellWord).join(" ") : p.command;
    add(p.started_at, "command", `process ${words}`, "");
    if (!p.running) add(p.ended_at, "command", `exit ${p.exit_code ?? "unknown"}: ${words}`, outputs[p.process_id] || "");
  }
  for (const c of connections) {
    add(c.at, "egress", `${c.allowed ? "connection" : "refused connection"} to ${c.host || c.address}:${c.port}`,
      c.allowed ? `${c.sent} bytes sent, ${c.received} bytes received` : c.reason || "");
  }
  runs.forEach(({ run, calls }, place) => {
    const of = runs.length > 1 ? ` of run ${place + 1}` : ""; // ids of runs differ between sandboxes that did the same
    for (const call of calls) {
      const used = call.usage || {};
      add(call.started, "model", `model call ${call.number}${of}${call.model ? ` of ${call.model}` : ""}: ${call.state}${call.finish_reason ? `, ${call.finish_reason}` : ""}`,
        call.error || `${used.prompt ?? 0} prompt tokens, ${used.completion ?? 0} completion tokens`);
    }
    const named = Object.entries(run.rewards || {}).map(([name, value]) => `${name}=${value}`).join(", ");
    if (run.reward_valid === false) add(run.ended_at, "reward", `no valid reward${of}`, run.reason || "");
    else if ((run.reward !== null && run.reward !== undefined) || named) add(run.ended_at, "reward", `reward ${[run.reward ?? "", named].filter((v) => v !== "").join(", ")}${of}`, run.reason || "");
    else if (run.ended_at) add(run.ended_at, "model", `end of the run${of}`, run.reason || "");
  });
  if (info.commit) add(info.commit.completed_at || info.commit.started_at, "commit", `commit ${info.commit.image_tag}: ${info.commit.phase}`);
  if (info.stopped_at) add(info.stopped_at, "end", info.cause || "stopped", info.reason || "");
  return events.map((e, i) => ({ e, i })).sort((a, b) => a.e.at - b.e.at || a.i - b.i).map(({ e }) => e);
}

/** The index of the first event in which two timelines differ, times left out; -1 when they are equal.
 * @param {{kind: string, title: string, text: string}[]} a @param {{kind: string, title: string, text: string}[]} b */
export function firstDifference(a, b) {
  for (let i = 0; i < Math.max(a.length, b.length); i++) {
    if (!a[i] || !b[i] || a[i].kind !== b[i].kind || a[i].title !== b[i].title || a[i].text !== b[i].text) return i;
  }
  return -1;
}

/** Samples of Prometheus text: [{name, labels, value}]. @param {string} text */
export function parseMetrics(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    /** @type {Record<string, string>} */ const labels = {};
    for (const part of (match[2] || "").matchAll(/([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g)) labels[part[1]] = part[2];
    found.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return found;
}

/** A percentile from cumulative buckets [[upper bound, count]]. @param {[number, number][]} buckets @param {number} q */
export function quantile(buckets, q) {
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!total) return null;
  const found = buckets.find(([, count]) => count >= total * q);
  return found ? found[0] : null;
}
