// Charts by uPlot, loaded by the screens that have one.
import { html, useEffect, useRef } from "./lib.js";
import uPlot from "./vendor/uplot.js";

let styled = false;
function style() {
  if (styled) return;
  styled = true;
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./vendor/uplot.css", import.meta.url).href;
  document.head.append(link);
}

function colour(/** @type {string} */ name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

/** A line chart. points: [[time in seconds, value], ...]; format: of a value. The last value is also text. */
export function Chart(/** @type {any} */ { title, points, format, steps = false }) {
  const box = useRef(/** @type {any} */ (null));
  const plot = useRef(/** @type {any} */ (null));
  useEffect(() => {
    style();
    const make = () => {
      if (plot.current) plot.current.destroy();
      const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
      plot.current = new uPlot({
        width: Math.max(220, box.current.clientWidth), height: 150, legend: { show: false }, cursor: { show: false },
        scales: { x: { time: !steps }, y: { range: (/** @type {any} */ _u, /** @type {number} */ low, /** @type {number} */ high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
        axes: [axis, { ...axis, size: 84, values: (/** @type {any} */ _u, /** @type {number[]} */ found) => found.map(format) }],
        series: [{}, { stroke: colour("--accent"), width: 2, fill: `${colour("--accent")}22`, points: { show: points.length < 3 } }],
      }, data(), box.current);
    };
    make();
    const observer = new ResizeObserver(() => plot.current && box.current && plot.current.setSize({ width: Math.max(220, box.current.clientWidth), height: 150 }));
    observer.observe(box.current);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", make);
    return () => { observer.disconnect(); dark.removeEventListener("change", make); plot.current.destroy(); plot.current = null; };
  }, []);
  const data = () => [points.map((/** @type {number[]} */ p) => p[0]), points.map((/** @type {number[]} */ p) => p[1])];
  useEffect(() => { if (plot.current) plot.current.setData(data()); }, [points.length, points[points.length - 1]]);
  const last = points.length ? format(points[points.length - 1][1]) : "no data";
  return html`<figure class="chart"><figcaption>${title}: <strong>${last}</strong></figcaption><div ref=${box} role="img" aria-label=${`Chart of ${title}, ${points.length} points, now ${last}`}></div></figure>`;
}
