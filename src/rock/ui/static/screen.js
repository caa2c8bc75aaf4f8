// xterm.js under the Content Security Policy of the page, for the terminal and for the read-only view of a process.
import { Terminal } from "./vendor/xterm.js";
import { FitAddon } from "./vendor/xterm-fit.js";

/** xterm writes its rules to <style> elements, which the Content Security Policy refuses. Its elements are replaced by
 * inert ones whose text goes to a stylesheet object, which is not inline. */
function withSheets(/** @type {() => void} */ work) {
  const create = document.createElement;
  /** @type {CSSStyleSheet[]} */ const sheets = [];
  document.createElement = /** @type {any} */ (function (/** @type {string} */ name, /** @type {any} */ options) {
    if (name !== "style") return create.call(document, name, options);
    const element = create.call(document, "rock-style");
    const sheet = new CSSStyleSheet();
    sheets.push(sheet);
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    Object.defineProperty(element, "textContent", { set(text) { sheet.replaceSync(text); }, get() { return ""; } });
    Object.defineProperty(element, "innerText", { set(text) { sheet.replaceSync(text); }, get() { return ""; } });
    Object.defineProperty(element, "sheet", { get() { return sheet; } });
    element.hidden = true;
    return element;
  });
  try { work(); } finally { document.createElement = create; }
  return () => { document.adoptedStyleSheets = document.adoptedStyleSheets.filter((sheet) => !sheets.includes(sheet)); };
}

function loadStyle() {
  const href = new URL("./vendor/xterm.css", import.meta.url).href;
  if (![...document.styleSheets].some((sheet) => sheet.href === href)) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = href;
    document.head.append(link);
  }
}

/** A terminal in an element. readOnly: it has no cursor, and keys have no effect. Links in output open nothing.
 * @param {HTMLElement} box @param {boolean} readOnly @returns {{term: any, fit: any, dispose: () => void}} */
export function openScreen(box, readOnly) {
  loadStyle();
  const style = getComputedStyle(document.documentElement);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const term = new Terminal({ convertEol: readOnly, disableStdin: readOnly, cursorBlink: !readOnly && !still, cursorInactiveStyle: readOnly ? "none" : "outline", fontSize: 14, screenReaderMode: true,
    theme: { background: style.getPropertyValue("--terminal").trim(), foreground: style.getPropertyValue("--terminal-text").trim() }, linkHandler: { activate() { /* text of a sandbox opens no address */ } } });
  const fit = new FitAddon();
  term.loadAddon(fit);
  const unstyle = withSheets(() => term.open(box));
  try { fit.fit(); } catch { /* not visible yet */ }
  return { term, fit, dispose() { term.dispose(); unstyle(); } };
}
