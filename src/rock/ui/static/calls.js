// Pure functions for model calls: the branches of a run, and one call as a readable conversation. Bodies come from agents
// and model servers, so that each value can have any type.

/** @typedef {Record<string, any>} Row */
/** @typedef {{kind: "text"|"reasoning"|"call"|"result"|"media", name: string, text: string}} Part */
/** @typedef {{role: string, parts: Part[], answer: boolean}} Message */

/** Any value as text. @param {unknown} value @returns {string} */
export function textOf(value) {
  if (typeof value === "string") return value;
  if (value === undefined || value === null) return "";
  return JSON.stringify(value, null, 2) ?? "";
}

/** JSON in a string as indented JSON; other text as it is. @param {unknown} value */
function indented(value) {
  if (typeof value !== "string") return textOf(value);
  try { return JSON.stringify(JSON.parse(value), null, 2); } catch { return value; }
}

/** @param {unknown} content @param {"text"|"result"} kind @param {string} name @returns {Part[]} */
function contentParts(content, kind, name) {
  if (content === undefined || content === null) return [];
  if (!Array.isArray(content)) return [{ kind, name, text: textOf(content) }];
  return content.map((part) => {
    if (part && typeof part === "object" && typeof part.text === "string") return { kind, name, text: part.text };
    if (typeof part === "string") return { kind, name, text: part };
    return { kind: "media", name: textOf(part && part.type).slice(0, 100) || "part", text: textOf(part).slice(0, 2000) };
  });
}

/** @param {any} message @param {boolean} answer @returns {Message} */
function messageOf(message, answer) {
  const m = message && typeof message === "object" ? message : { content: message };
  const role = textOf(m.role).slice(0, 40) || (answer ? "assistant" : "unknown");
  /** @type {Part[]} */ const parts = [];
  const reasoning = m.reasoning_content ?? m.reasoning;
  if (reasoning) parts.push({ kind: "reasoning", name: "", text: textOf(reasoning) });
  parts.push(...contentParts(m.content, role === "tool" ? "result" : "text", textOf(m.tool_call_id)));
  if (m.refusal) parts.push({ kind: "text", name: "refusal", text: textOf(m.refusal) });
  for (const call of Array.isArray(m.tool_calls) ? m.tool_calls : []) {
    const known = (call && (call.function || call.custom)) || {};
    parts.push({ kind: "call", name: textOf(known.name) || "unnamed tool", text: indented(known.arguments ?? known.input ?? "") });
  }
  return { role, parts: parts.filter((part) => part.text !== "" || part.kind === "call"), answer };
}

/** The messages of a call in the dialect openai-chat: those of the request, then the answers.
 * @param {any} request @param {any} response @returns {Message[]} */
export function messagesOf(request, response) {
  const found = [];
  for (const one of request && Array.isArray(request.messages) ? request.messages : []) found.push(messageOf(one, false));
  for (const choice of response && Array.isArray(response.choices) ? response.choices : []) {
    if (choice && choice.message) found.push(messageOf(choice.message, true));
  }
  return found;
}

/** The branch and the children of each call. The first call that continues another one is in its branch; each other one,
 * and each call without a parent, begins a branch. Branches are numbered from 1.
 * @param {Row[]} calls in the order of their numbers
 * @returns {Map<number, {branch: number, children: number[]}>} by number */
export function branchesOf(calls) {
  /** @type {Map<number, {branch: number, children: number[]}>} */ const found = new Map();
  let branches = 0;
  for (const call of calls) {
    const parent = call.parent ? found.get(call.parent) : undefined;
    const branch = parent && !parent.children.length ? parent.branch : ++branches;
    if (parent) parent.children.push(call.number);
    found.set(call.number, { branch, children: [] });
  }
  return found;
}

/** Known calls with a page of newer ones. @param {Row[]} known in the order of numbers @param {Row[]} page */
export function mergedCalls(known, page) {
  if (!page.length) return known;
  return [...known.filter((call) => call.number < page[0].number), ...page];
}

/** The number after which calls can have changed: the one before the first call that has not ended. @param {Row[]} calls */
export function settledUpTo(calls) {
  const open = calls.find((call) => call.state === "running" || call.state === "waiting");
  return open ? open.number - 1 : calls.length ? calls[calls.length - 1].number : 0;
}
