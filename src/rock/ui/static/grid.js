// A table of many rows: a window of them is in the DOM, and a row renders when its values change.
import { Component, html, useEffect, useRef, useWindow } from "./lib.js";

const ROW = 34; // pixels, as in app.css

class GridRow extends Component {
  shouldComponentUpdate(/** @type {any} */ next) {
    const old = /** @type {any} */ (this.props);
    return next.row !== old.row || next.index !== old.index || next.chosen !== old.chosen || next.context !== old.context;
  }
  render() {
    const { row, index, chosen, context, cells } = /** @type {any} */ (this.props);
    return html`<div role="row" aria-rowindex=${index + 2} class=${`tr${chosen ? " chosen" : ""}`} style=${{ top: `${index * ROW}px` }}>${cells(row, context, chosen).map((/** @type {any} */ cell) => html`<div role="cell" class="td">${cell}</div>`)}</div>`;
  }
}

/** rows: objects with `number`; cells: (row, context, chosen) to the contents of a row, which depend on nothing else;
 * chosen: the number of the marked row, which is scrolled into the view; height: in pixels at most. */
export function Grid(/** @type {any} */ { label, kind, columns, rows, cells, context, chosen, height }) {
  const box = useRef(/** @type {any} */ (null));
  const { first, last, onScroll } = useWindow(box, ROW, rows.length);
  useEffect(() => {
    const at = rows.findIndex((/** @type {any} */ row) => row.number === chosen) * ROW;
    const { scrollTop, clientHeight } = box.current;
    if (at >= 0 && (at < scrollTop || at > scrollTop + clientHeight - 2 * ROW)) box.current.scrollTop = at - 3 * ROW;
  }, [chosen, rows.length > 0]);
  return html`<div class=${`rows ${kind}`} ref=${box} tabindex="0" role="region" aria-label=${`Table of ${label.toLowerCase()}`} style=${{ height: `${Math.min(height, (rows.length + 1) * ROW + 20)}px` }} onScroll=${onScroll}>
    <div role="table" aria-label=${label} aria-rowcount=${rows.length + 1} class="grid"><div role="row" aria-rowindex="1" class="tr head">${columns.map((/** @type {string} */ name) => html`<div role="columnheader" class="td">${name}</div>`)}</div>
      <div role="rowgroup" class="space" style=${{ height: `${rows.length * ROW}px` }}>${rows.slice(first, last).map((/** @type {any} */ row, /** @type {number} */ i) => html`<${GridRow} key=${row.number} row=${row} index=${first + i} chosen=${row.number === chosen} context=${context} cells=${cells} />`)}</div></div></div>`;
}
