// Two sandboxes side by side, with the first difference of their timelines.
import { Field, Link, Problem, go, here, html, useData, useState } from "../lib.js";
import { firstDifference } from "../pure.js";
import { record } from "../recorder.js";
import { Events } from "./sandbox.js";

export default function Compare() {
  const { query } = here();
  const [a, b] = [query.get("a") || "", query.get("b") || ""];
  const [first, setFirst] = useState(a);
  const [second, setSecond] = useState(b);
  const { data, error } = useData(async () => (a && b ? Promise.all([record(a), record(b)]) : null), [a, b]);
  const difference = data ? firstDifference(data[0].events, data[1].events) : -1;
  return html`<div class="title"><h1>Compare two sandboxes</h1></div>
    <form class="tools" onSubmit=${(/** @type {Event} */ e) => { e.preventDefault(); go(`/ui/compare?a=${encodeURIComponent(first)}&b=${encodeURIComponent(second)}`); }}>
      <${Field} label="First sandbox" value=${first} required onInput=${(/** @type {any} */ e) => setFirst(e.target.value)} /><${Field} label="Second sandbox" value=${second} required onInput=${(/** @type {any} */ e) => setSecond(e.target.value)} /><button type="submit">Compare</button></form>
    <${Problem} error=${error} />
    ${data && html`<p role="status">${difference < 0 ? "The timelines are equal, apart from times." : `The first difference is event ${difference + 1}.`}</p>
      <div class="two">${data.map((/** @type {any} */ one, /** @type {number} */ i) => html`<section key=${i}><h2><${Link} to=${`/ui/sandbox/${encodeURIComponent(one.info.sandbox_id)}`}>${one.info.name || one.info.sandbox_id}<//></h2><p>${one.info.image}, ${one.info.state}${one.info.cause ? `, ${one.info.cause}` : ""}</p><${Events} events=${one.events} start=${one.info.created_at} difference=${difference} /></section>`)}</div>`}`;
}
