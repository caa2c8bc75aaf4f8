// `node --test tests/ui/pure.test.mjs`: the pure functions of the page.
import assert from "node:assert/strict";
import { test } from "node:test";
import { applyChanges, bytes, firstDifference, fromColumns, matchesSearch, parseMetrics, plainText, quantile, shellWord, timelineOf, windowOf } from "../../src/rock/ui/static/pure.js";
import { lineageOf, treeKey } from "../../src/rock/ui/static/lineage.js";

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

test("calls of a run: branches, merged pages, messages of any type", async () => {
  const { branchesOf, mergedCalls, messagesOf, settledUpTo } = await import("../../src/rock/ui/static/calls.js");
  const calls = [[1], [2, 1], [3], [4, 2], [5, 2], [6, 5]].map(([number, parent]) => ({ number, parent: parent ?? null, state: "done" }));
  const found = branchesOf(calls);
  assert.deepEqual(calls.map((c) => found.get(c.number).branch), [1, 1, 2, 1, 3, 3]);
  assert.deepEqual(found.get(2).children, [4, 5]);
  assert.equal(settledUpTo([]), 0);
  assert.equal(settledUpTo([{ number: 1, state: "done" }, { number: 2, state: "running" }, { number: 3, state: "done" }]), 1);
  assert.deepEqual(mergedCalls(calls.slice(0, 3), [{ number: 3, state: "new" }, { number: 4 }]).map((c) => c.state), ["done", "done", "new", undefined]);
  const tool = { id: "c", type: "function", function: { name: "sh", arguments: '{"command":"ls"}' } };
  const messages = messagesOf({ messages: [{ role: "system", content: "s" }, { role: "user", content: [{ type: "text", text: "a" }, { type: "image_url", image_url: { url: "https://x.test/" } }] },
    { role: "assistant", content: null, tool_calls: [tool] }, { role: "tool", tool_call_id: "c", content: "out" }] }, { choices: [{ message: { role: "assistant", reasoning_content: "why", content: "answer" } }] });
  assert.deepEqual(messages.map((m) => m.parts.map((p) => p.kind)), [["text"], ["text", "media"], ["call"], ["result"], ["reasoning", "text"]]);
  assert.equal(messages[2].parts[0].text, '{\n  "command": "ls"\n}');
  assert.ok(messages[4].answer);
  for (const odd of [null, 5, "text", [], [null, 5, { text: 5 }], { constructor: 1 }, { type: "div", props: {}, __v: 1 }]) {
    for (const m of messagesOf({ messages: [odd, { role: odd, content: odd, tool_calls: odd, reasoning: odd, tool_call_id: odd }] }, { choices: [odd, { message: odd }] })) {
      assert.equal(typeof m.role, "string");
      for (const part of m.parts) assert.ok([part.kind, part.name, part.text].every((value) => typeof value === "string"));
    }
  }
  messagesOf(null, null);
  messagesOf({ messages: "x" }, { choices: "x" });
});

test("the order of rows, memory as text, and model calls on a timeline", async () => {
  const { memoryText, orderOf, timelineOf } = await import("../../src/rock/ui/static/pure.js");
  const kept = {};
  const rows = new Map([["a", { sandbox_id: "a", created_at: 1 }], ["b", { sandbox_id: "b", created_at: 3 }]]);
  assert.deepEqual(orderOf(kept, rows).map((r) => r.sandbox_id), ["b", "a"]);
  const { ids } = kept;
  rows.set("a", { sandbox_id: "a", created_at: 1, state: "stopped" });
  assert.equal(orderOf(kept, rows)[1].state, "stopped");
  assert.equal(kept.ids, ids);
  rows.delete("b");
  rows.set("c", { sandbox_id: "c", created_at: 9 });
  assert.deepEqual(orderOf(kept, rows).map((r) => r.sandbox_id), ["c", "a"]);
  assert.deepEqual(["512m", "1.5g", "2GiB", "123", "", null].map(memoryText), ["512 MiB", "1.5 GiB", "2 GiB", "123", "", ""]);
  const events = timelineOf({ info: { created_at: 1, image: "i" }, processes: [], connections: [], outputs: {}, runs: [
    { run: { reward: 0, reward_valid: true, ended_at: 9, rewards: { style: 1 } }, calls: [{ number: 1, started: 2, state: "failed", error: "broken" }] },
    { run: { reward: null, reward_valid: false, ended_at: 8, reason: "lost" }, calls: [] }, { run: { ended_at: null }, calls: [] }] });
  assert.deepEqual(events.map((e) => e.title), ["created", "model call 1 of run 1: failed", "no valid reward of run 2", "reward 0, style=1 of run 1"]);
  assert.equal(events[1].text, "broken");
});

// ---- lineage ----

const snap = (id, parent = null, rest = {}) => ({ snapshot_id: id, parent, name: null, sandbox_id: "box", image: "python:3.11", memory: "files", worker: "w", tenant: "", ...rest });
const shape = (rows) => rows.map((row) => [row.snapshot.snapshot_id, row.level, row.at, row.of, row.parent]);

test("snapshots become a tree; one whose parent is gone is a root", () => {
  const items = [snap("a"), snap("b", "a"), snap("orphan", "gone"), snap("c", "b"), snap("d", "a")];
  assert.deepEqual(shape(lineageOf(items).rows), [["a", 1, 1, 2, -1], ["b", 2, 1, 2, 0], ["c", 3, 1, 1, 1], ["d", 2, 2, 2, 0], ["orphan", 1, 2, 2, -1]]);
  assert.deepEqual(lineageOf(items, { closed: new Set(["a"]) }).rows.map((row) => row.snapshot.snapshot_id), ["a", "orphan"]);
  assert.deepEqual(lineageOf([snap("self", "self")]).rows.length, 1);
});

test("a search keeps the ancestors of its matches, also closed ones", () => {
  const items = [snap("a"), snap("b", "a"), snap("c", "b", { name: "Best one" }), snap("d", "a")];
  const found = lineageOf(items, { text: " best ", closed: new Set(["a"]) });
  assert.deepEqual(found.rows.map((row) => row.snapshot.snapshot_id), ["a", "b", "c"]);
  assert.equal(found.matches, 1);
  assert.deepEqual(lineageOf(items, { text: "nothing" }), { rows: [], matches: 0 });
});

test("a chain of 10,000 snapshots needs no recursion", () => {
  const items = Array.from({ length: 10000 }, (_, n) => snap(`s${n}`, n ? `s${n - 1}` : null));
  const { rows } = lineageOf(items);
  assert.equal(rows.length, 10000);
  assert.equal(rows[9999].level, 10000);
});

test("keys move in the tree", () => {
  const { rows } = lineageOf([snap("a"), snap("b", "a"), snap("c", "b"), snap("d", "a")], { closed: new Set(["b"]) });
  assert.deepEqual(rows.map((row) => row.snapshot.snapshot_id), ["a", "b", "d"]);
  assert.deepEqual(treeKey(rows, 0, "ArrowDown", 10), { index: 1 });
  assert.deepEqual(treeKey(rows, 2, "ArrowDown", 10), { index: 2 });
  assert.deepEqual(treeKey(rows, 1, "ArrowRight", 10), { index: 1, toggle: true });
  assert.deepEqual(treeKey(rows, 0, "ArrowRight", 10), { index: 1 });
  assert.deepEqual(treeKey(rows, 2, "ArrowRight", 10), { index: 2 });
  assert.deepEqual(treeKey(rows, 2, "ArrowLeft", 10), { index: 0 });
  assert.deepEqual(treeKey(rows, 0, "ArrowLeft", 10), { index: 0, toggle: true });
  assert.deepEqual([treeKey(rows, 1, "End", 10), treeKey(rows, 1, "Home", 10), treeKey(rows, 0, "PageDown", 10)], [{ index: 2 }, { index: 0 }, { index: 2 }]);
  assert.equal(treeKey(rows, 0, "x", 10), null);
  assert.equal(treeKey([], 0, "End", 10), null);
});
