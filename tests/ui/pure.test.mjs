// `node --test tests/ui/pure.test.mjs`: the pure functions of the page.
import assert from "node:assert/strict";
import { test } from "node:test";
import { applyChanges, bytes, firstDifference, fromColumns, matchesSearch, parseMetrics, plainText, quantile, shellWord, timelineOf, windowOf } from "../../src/rock/ui/static/pure.js";

const NAMES = ["sandbox_id", "state", "version"];

test("columns become rows", () => {
  const columns = { a: { plain: [1, 2] }, b: { same: null }, c: { times: [1700000000500, -250] }, d: { distinct: ["x", {}], at: [1, 0] } };
  assert.deepEqual(fromColumns(columns, 2), [{ a: 1, b: null, c: 1700000000.5, d: {} }, { a: 2, b: null, c: 1700000000.25, d: "x" }]);
  assert.deepEqual(fromColumns({ a: { same: null } }, 0), []);
});

test("changes are applied, and an older version is ignored", () => {
  const rows = new Map();
  assert.equal(applyChanges(rows, { changed: [["a", "running", 2]] }, NAMES), true);
  assert.equal(applyChanges(rows, { changed: [["a", "pending", 1]] }, NAMES), false);
  assert.equal(rows.get("a").state, "running");
  assert.equal(applyChanges(rows, { gone: ["unknown"] }, NAMES), false);
  assert.equal(applyChanges(rows, { gone: ["a"] }, NAMES), true);
  assert.equal(applyChanges(rows, {}, NAMES), false);
});

test("a search finds all words in any field", () => {
  const row = { sandbox_id: "abc", image: "python:3.11", labels: { task: "One" }, state: "running" };
  assert.ok(matchesSearch(row, "python task=one"));
  assert.ok(matchesSearch(row, "  "));
  assert.ok(!matchesSearch(row, "python stopped"));
});

test("the window contains what is visible, at the ends too", () => {
  assert.deepEqual(windowOf(0, 340, 34, 10000, 2), { first: 0, last: 12 });
  assert.deepEqual(windowOf(340000 - 340, 340, 34, 10000, 2), { first: 9988, last: 10000 });
  assert.deepEqual(windowOf(1e9, 340, 34, 5), { first: 5, last: 5 });
});

test("text without terminal sequences and without invisible direction marks", () => {
  assert.equal(plainText("\u001b[31mred\u001b[0m\r\n\u001b]0;title\u0007x\u202ey"), "red\nx\ufffdy");
  assert.equal(plainText("<b>"), "<b>");
});

test("words of a shell are quoted", () => {
  assert.equal(shellWord("a b'c"), "'a b'\\''c'");
  assert.equal(shellWord("plain-1.2:x"), "plain-1.2:x");
  assert.equal(shellWord(""), "''");
});

test("a timeline is ordered, and the first difference is found", () => {
  const info = { created_at: 10, image: "i", phases: {}, state_history: [{ from_state: "pending", to_state: "running", event: "launched", timestamp: 12 }] };
  const of = (code) => timelineOf({ info, connections: [{ at: 11, allowed: false, host: "h", port: 1, reason: "policy" }], outputs: { p: "text" },
    processes: [{ process_id: "p", command: ["a", "b c"], started_at: 13, ended_at: 14, exit_code: code, running: false }] });
  const one = of(0);
  assert.deepEqual(one.map((e) => e.at), [10, 11, 12, 13, 14]);
  assert.equal(one[4].title, "exit 0: a 'b c'");
  assert.equal(firstDifference(one, of(0)), -1);
  assert.equal(firstDifference(one, of(1)), 4);
  assert.equal(firstDifference(one, one.slice(0, 2)), 2);
});

test("metrics and sizes", () => {
  const found = parseMetrics('# HELP x\nx_bucket{le="0.1",route="a\\"b"} 5\nx_bucket{le="+Inf",route="c"} 9\ny 2.5\nbroken');
  assert.deepEqual(found.map((m) => [m.name, m.value]), [["x_bucket", 5], ["x_bucket", 9], ["y", 2.5]]);
  assert.equal(quantile([[0.1, 5], [Infinity, 9]], 0.5), 0.1);
  assert.equal(quantile([], 0.5), null);
  assert.equal(bytes(1536), "1.5 KiB");
  assert.equal(bytes(null), "");
});
