"""The prefix tree of a run's calls: which call continues which.

A request repeats the messages of its conversation. The parent of a call is the earlier call with the longest prefix of
these messages; among calls with the same prefix, the one whose response the next message repeats, else the latest one.
A call without a parent is a root: a new conversation, a sub-agent, or a conversation that was compacted.

    1 ─ 2 ─ 4          3 was made by a sub-agent, with another system prompt; 5 continues 2 in another way than 4,
    3       └ (2) ─ 5  as parallel calls and edited histories do

Messages are equal when their roles, texts, media and tool calls are. Ids of tool calls, reasoning and the format of
arguments are ignored: agents leave them out or change them when they repeat a response.
"""

from __future__ import annotations

from hashlib import blake2b

import orjson

from rock.gateway.call import Message, ModelRequest, ModelResponse, Part, Reasoning, Refusal, Text, ToolCall, ToolResult

_DIGEST = 16  # bytes


def message_key(message: Message) -> bytes:
    """A hash of a message, equal for a response and its repetition in a later request."""
    return blake2b(_form(message), digest_size=_DIGEST).digest()


def _form(message: Message) -> bytes:
    """The bytes by which messages are compared."""
    parts = message.parts
    if len(parts) == 1 and type(parts[0]) is Text:  # the most common message
        text = parts[0].text.strip()
        return canonical([message.role, [text] if text else []])
    values = [value for part in parts if (value := _value(part)) is not None]
    if message.role == "assistant":
        values = _joined(values)
    return canonical([message.role, values])


def canonical(value: object) -> bytes:
    """JSON with sorted keys; another unique form of a value that JSON cannot express, such as a lone surrogate."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return repr(value).encode("utf-8", "backslashreplace")


def _value(part: Part) -> object:
    match part:
        case Text(text) | Refusal(text):
            stripped = text.strip()
            return stripped or None
        case Reasoning():
            return None
        case ToolCall(name=name, arguments=arguments):
            return ["call", name, _arguments(arguments)]
        case ToolResult(parts=parts):
            return ["result", [value for inner in parts if (value := _value(inner)) is not None]]
    return part


def _arguments(text: str) -> object:
    try:
        return orjson.loads(text) if text.strip() else {}
    except orjson.JSONDecodeError:
        return text


def _joined(values: list[object]) -> list[object]:
    """Consecutive texts as one, because dialects divide them differently."""
    found: list[object] = []
    for value in values:
        if isinstance(value, str) and found and isinstance(found[-1], str):
            found[-1] += value
        else:
            found.append(value)
    return found


def prefix_keys(request: ModelRequest) -> list[bytes]:
    """Hashes of the prefixes of a request: entry i has the system prompt and the first i messages."""
    at = blake2b((request.system or "").strip().encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
    keys = [at]
    for message in request.messages:
        at = blake2b(at + _form(message), digest_size=_DIGEST).digest()
        keys.append(at)
    return keys


class Prefixes:
    """The tree of one run. Memory: two hashes of 16 bytes for each call."""

    def __init__(self) -> None:
        self._requests: dict[bytes, int] = {}  # all messages of a request: the latest call
        self._answered: dict[bytes, int] = {}  # and its response
        self._ends: dict[int, bytes] = {}

    def add(self, number: int, request: ModelRequest) -> int | None:
        """Add a call; returns its parent. Calls are added in the order of arrival."""
        keys = prefix_keys(request)
        self._ends[number] = keys[-1]
        parent = None
        for length in range(len(keys) - 2, 0, -1):
            parent = self._answered.get(keys[length + 1]) or self._requests.get(keys[length])
            if parent is not None:
                break
        self._requests[keys[-1]] = number
        return parent

    def answered(self, number: int, response: ModelResponse) -> None:
        """The response of a call, by which later calls recognize it among calls with the same messages."""
        end = self._ends.pop(number, None)
        if end is not None:
            self._answered[blake2b(end + _form(response.message), digest_size=_DIGEST).digest()] = number


def branches(parents: dict[int, int | None]) -> list[list[int]]:
    """The paths from roots to leaves, in the order of their leaves. parents: by number of the call."""
    inner = set(parents.values())
    found: list[list[int]] = []
    for leaf in sorted(number for number in parents if number not in inner):
        path, at, seen = [leaf], parents[leaf], {leaf}
        while at is not None and at in parents and at not in seen:
            path.append(at)
            seen.add(at)
            at = parents[at]
        found.append(path[::-1])
    return found
