// The server: counts, start times, event loop, store; from /v1/server and /metrics.
import { Problem, Same, StateMark, Table, Time, api, can, html, useData, useEffect, useRef } from "../lib.js";
import { bytes, parseMetrics, quantile } from "../pure.js";
import { Chart } from "../chart.js";

const KEPT = 450; // points: 15 minutes at two seconds

export default function Cluster() {
  const admin = can("admin");
  const { data, error } = useData(async () => {
    const server = await api("GET", "/v1/server");
    const metrics = admin ? parseMetrics(await (await api("GET", "/metrics", { raw: true })).text()) : [];
    return { server, metrics, at: Date.now() / 1000 };
  }, [], 2);
  const seen = useRef(/** @type {any} */ ({ requests: [], running: [], memory: [], last: null }));
  const sum = (/** @type {string} */ name) => data.metrics.filter((/** @type {any} */ m) => m.name === name).reduce((/** @type {number} */ n, /** @type {any} */ m) => n + m.value, 0);
  useEffect(() => {
    if (!data) return;
    const s = seen.current;
    s.running.push([data.at, data.server.sandboxes.running || 0]);
    if (admin) {
      const total = sum("rock_http_requests_total");
      if (s.last) s.requests.push([data.at, Math.max(0, (total - s.last[1]) / (data.at - s.last[0]))]);
      s.last = [data.at, total];
      s.memory.push([data.at, sum("process_resident_memory_bytes")]);
    }
    for (const list of [s.running, s.requests, s.memory]) if (list.length > KEPT) list.shift();
  }, [data]);
  const s = seen.current;
  return html`<div class="title"><h1>Cluster</h1></div><${Problem} error=${error} />
    ${data && html`<p>Version ${data.server.version}, started <${Time} at=${data.server.started_at} />, roles ${data.server.roles.join(", ")}.</p><p class="counts">${Object.entries(data.server.sandboxes).map(([state, count]) => html`<span class="pad"><${StateMark} state=${state} /> ${count}</span>`)}</p>
      <div class="charts"><${Chart} title="Running sandboxes" points=${s.running} format=${(/** @type {number} */ v) => String(Math.round(v))} />${admin && html`<${Chart} title="Requests per second" points=${s.requests} format=${(/** @type {number} */ v) => v.toFixed(1)} /><${Chart} title="Memory of the server" points=${s.memory} format=${bytes} />`}</div>
      ${admin && html`<h2>Durations</h2><${Table} label="Durations" empty="There are no measurements yet." rows=${durations(data.metrics)} columns=${[["Metric", (/** @type {any} */ r) => html`<code>${r.name}</code>`], ["Count", (/** @type {any} */ r) => r.count], ["Median at most", (/** @type {any} */ r) => seconds(r.p50)], ["95 % at most", (/** @type {any} */ r) => seconds(r.p95)]]} />`}`}
    <${Same} cli=${["rock", "version"]} http="GET /v1/server, GET /metrics" />`;
}

function seconds(/** @type {number|null} */ value) {
  if (value === null) return "";
  if (!Number.isFinite(value)) return "over the largest bucket";
  return value < 1 ? `${Number((value * 1000).toPrecision(3))} ms` : `${value} s`;
}

function durations(/** @type {any[]} */ metrics) {
  /** @type {Map<string, Map<number, number>>} */ const found = new Map();
  for (const { name, labels, value } of metrics) {
    if (!name.endsWith("_seconds_bucket")) continue;
    const buckets = found.get(name.slice(0, -7)) || new Map();
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    buckets.set(bound, (buckets.get(bound) || 0) + value);
    found.set(name.slice(0, -7), buckets);
  }
  return [...found].map(([name, map]) => {
    const buckets = /** @type {[number, number][]} */ ([...map].sort((a, b) => a[0] - b[0]));
    return { name, count: buckets[buckets.length - 1][1], p50: quantile(buckets, 0.5), p95: quantile(buckets, 0.95) };
  }).filter((row) => row.count);
}
