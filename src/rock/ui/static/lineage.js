// Pure functions for the lineage of snapshots: the rows of a tree. Names come from users, and parents can be gone.
import { matchesWords } from "./pure.js";

/** @typedef {Record<string, any>} Snapshot */
/** @typedef {{snapshot: Snapshot, level: number, children: number, open: boolean, at: number, of: number, parent: number}} TreeRow */

/** The start of an id that tables show; a name that the user chose is shown whole. @param {string} id */
export function shortId(id) { return /^[0-9a-f]{16,}$/.test(id) ? id.slice(0, 12) : id; }
/** @param {Snapshot} snapshot @returns {string} */
export function nameOf(snapshot) { return snapshot.name || shortId(snapshot.snapshot_id); }

/** The visible rows of the tree in the order of the screen: children below their parents, siblings in the given order. A
 * snapshot without a known parent is a root. With a text, the rows that match it and their ancestors, all open.
 * at, of: position among the siblings, from 1; parent: index of the row of the parent, -1 for a root.
 * @param {Snapshot[]} items oldest first @param {{text?: string, closed?: Set<string>}} [options]
 * @returns {{rows: TreeRow[], matches: number}} */
export function lineageOf(items, { text = "", closed = new Set() } = {}) {
  const known = new Map(items.map((item) => [item.snapshot_id, item]));
  const parentOf = (/** @type {Snapshot} */ item) => (item.parent !== item.snapshot_id && known.has(item.parent) ? item.parent : "");
  /** @type {Set<string> | null} */ let shown = null;
  let matches = items.length;
  if (text.trim()) {
    shown = new Set();
    matches = 0;
    for (const item of items) {
      if (!matchesWords([item.name, item.snapshot_id, item.sandbox_id, item.image, item.memory, item.worker, item.tenant], text)) continue;
      matches++;
      for (let id = item.snapshot_id; id && !shown.has(id); id = parentOf(/** @type {Snapshot} */ (known.get(id)))) shown.add(id);
    }
  }
  /** @type {Map<string, Snapshot[]>} */ const below = new Map();
  for (const item of items) {
    if (shown && !shown.has(item.snapshot_id)) continue;
    const parent = parentOf(item);
    const siblings = below.get(parent);
    if (siblings) siblings.push(item); else below.set(parent, [item]);
  }
  /** @type {TreeRow[]} */ const rows = [];
  /** @type {{siblings: Snapshot[], next: number, parent: number}[]} */ const stack = [{ siblings: below.get("") || [], next: 0, parent: -1 }];
  while (stack.length) {
    const top = stack[stack.length - 1];
    if (top.next >= top.siblings.length) { stack.pop(); continue; }
    const snapshot = top.siblings[top.next++];
    const children = below.get(snapshot.snapshot_id) || [];
    const open = children.length > 0 && (shown !== null || !closed.has(snapshot.snapshot_id));
    rows.push({ snapshot, level: stack.length, children: children.length, open, at: top.next, of: top.siblings.length, parent: top.parent });
    if (open) stack.push({ siblings: children, next: 0, parent: rows.length - 1 });
  }
  return { rows, matches };
}

/** The row after a key, and whether the row opens or closes: as the pattern for trees of the WAI-ARIA practices.
 * @param {TreeRow[]} rows @param {number} index of the active row @param {string} key @param {number} page rows of a page
 * @returns {{index: number, toggle?: boolean} | null} null for other keys */
export function treeKey(rows, index, key, page) {
  const last = rows.length - 1, row = rows[index];
  if (!row) return null;
  if (key === "ArrowDown") return { index: Math.min(last, index + 1) };
  if (key === "ArrowUp") return { index: Math.max(0, index - 1) };
  if (key === "PageDown") return { index: Math.min(last, index + page) };
  if (key === "PageUp") return { index: Math.max(0, index - page) };
  if (key === "Home") return { index: 0 };
  if (key === "End") return { index: last };
  if (key === "ArrowRight") return row.children && !row.open ? { index, toggle: true } : { index: row.open ? index + 1 : index };
  if (key === "ArrowLeft") return row.open ? { index, toggle: true } : { index: row.parent >= 0 ? row.parent : index };
  return null;
}
