"""Streams of OpenAI Responses: events to deltas and a whole body, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rock.gateway.call import Delta, ModelRequest, ModelResponse
from rock.gateway.dialects import fields
from rock.gateway.dialects.blocks import Block, Blocks, Step
from rock.gateway.dialects.fields import DialectError, Truncated
from rock.gateway.dialects.parts import custom_input, custom_names, error_text, event
from rock.gateway.sse import SSEEvent

_CALLS = ("function_call", "custom_tool_call")


class ResponsesParser:
    """Takes the body of response.completed or response.incomplete, with items of earlier events if it has none."""

    def __init__(self, parse: Callable[[dict[str, Any]], ModelResponse]) -> None:
        self._parse = parse
        self._body: dict[str, Any] | None = None
        self._items: dict[int, dict[str, Any]] = {}
        self._sent: dict[int, str] = {}  # kind of the text that was sent, by Delta.index
        self._begun: set[int] = set()
        self._started = False

    def feed(self, event: SSEEvent) -> list[Delta]:
        if event.data == "[DONE]":
            return []
        row = fields.event_object(event.data)
        kind = fields.text(row, "type", "the event", event.event)
        match kind:
            case "error":
                raise DialectError(f"the upstream sent an error in the stream: {error_text(row.get('error') or row)}")
            case "response.failed" | "response.cancelled":
                failed = fields.mapping(row, "response", kind)
                raise DialectError(f"the response failed: {error_text(failed.get('error') or kind)}")
            case "response.created" | "response.in_progress":
                return self._start(fields.mapping(row, "response", kind))
            case "response.completed" | "response.incomplete" | "response.done":
                self._body = fields.mapping(row, "response", kind)
                return self._start(self._body)
            case "response.output_item.added":
                return self._added(_index(row), fields.mapping(row, "item", kind))
            case "response.output_item.done":
                place = fields.index(row, "output_index")
                item = fields.mapping(row, "item", kind)
                self._items[place] = item
                return [*self._added(_index(row), item), *self._done(place, item)]
            case "response.reasoning_summary_part.added":
                later = fields.index(row, "summary_index") > 0
                return self._text("reasoning", kind, _index(row), "\n\n") if later else []
            case "response.reasoning_summary_text.delta":
                return self._text("reasoning", "summary", _index(row), fields.text(row, "delta", kind))
            case "response.reasoning_text.delta":
                return self._text("reasoning", "content", _index(row), fields.text(row, "delta", kind))
            case "response.output_text.delta":
                return self._text("text", "text", _index(row, "content_index"), fields.text(row, "delta", kind))
            case "response.refusal.delta":
                return self._text("refusal", "text", _index(row, "content_index"), fields.text(row, "delta", kind))
            case "response.function_call_arguments.delta":
                return self._text("arguments", "text", _index(row), fields.text(row, "delta", kind))
        return []

    def _start(self, body: dict[str, Any]) -> list[Delta]:
        if self._started:
            return []
        self._started = True
        return [Delta("start", id=fields.text(body, "id", "the response", ""),
                      name=fields.text(body, "model", "the response", ""))]  # fmt: skip

    def _text(self, kind: Any, source: str, index: int, text: str) -> list[Delta]:
        """The delta, unless another form of the same reasoning was sent before."""
        if source.endswith(".added"):
            source = "summary"
        if not text or self._sent.setdefault(index, source) != source:
            return []
        return [Delta(kind, index, text)]

    def _added(self, index: int, item: dict[str, Any]) -> list[Delta]:
        if item.get("type") not in _CALLS or index in self._begun:
            return []
        self._begun.add(index)
        call_id = fields.name(item, "call_id", "the item", "") or fields.name(item, "id", "the item")
        return [Delta("tool", index, id=call_id, name=fields.name(item, "name", "the item"))]

    def _done(self, place: int, item: dict[str, Any]) -> list[Delta]:
        """What the deltas of an item did not have."""
        index = place * fields.MAX_PARTS
        match item.get("type"):
            case "function_call":
                if index in self._sent:
                    return []
                return self._text("arguments", "text", index, fields.arguments(item.get("arguments"), "arguments"))
            case "custom_tool_call":
                given = {"input": fields.text(item, "input", "the item", "")}
                return self._text("arguments", "text", index, fields.dumps(given))
            case "reasoning":
                signature = fields.optional_text(item, "encrypted_content", "the item")
                found = [Delta("signature", index, signature)] if signature else []
                if index not in self._sent:
                    key = "content" if item.get("content") else "summary"
                    rows = fields.rows(item, key, "the item", fields.MAX_PARTS)
                    text = "\n\n".join(fields.text(row, "text", "the item", "") for row in rows)
                    return [*self._text("reasoning", key, index, text), *found]
                return found
            case "message":
                found = []
                for offset, row in enumerate(fields.rows(item, "content", "the item", fields.MAX_PARTS)):
                    kind, key = ("refusal", "refusal") if row.get("type") == "refusal" else ("text", "text")
                    if index + offset not in self._sent:
                        found += self._text(kind, "text", index + offset, fields.text(row, key, "the item", ""))
                return found
        return []

    def finish(self) -> ModelResponse:
        if self._body is None:
            raise Truncated("the stream ended without response.completed")
        body = self._body
        if not body.get("output") and self._items:
            body = {**body, "output": [self._items[place] for place in sorted(self._items)]}
        return self._parse(body)


def _index(row: dict[str, Any], inner: str = "") -> int:
    """Delta.index of an event: the place of its item, and within a message that of its part."""
    return fields.index(row, "output_index") * fields.MAX_PARTS + (fields.index(row, inner) if inner else 0)


class ResponsesRenderer:
    """Renders events with sequence numbers."""

    def __init__(
        self, request: ModelRequest, render: Callable[[ModelResponse, ModelRequest], dict[str, Any]],
        head_of: Callable[[ModelRequest, str, str], dict[str, Any]],
        error_of: Callable[[str, str], tuple[int, dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._request = request
        self._render = render
        self._head_of = head_of
        self._error_of = error_of
        self._custom = custom_names(request)
        self._blocks = Blocks()
        self._items: list[dict[str, Any]] = []
        self._head: dict[str, Any] | None = None
        self._sequence = 0

    def begin(self) -> bytes:
        return b""

    def feed(self, delta: Delta) -> bytes:
        if delta.kind == "start":
            return self._start(delta.id, delta.name)
        data = b"" if self._head is not None else self._start("", "")
        return data + b"".join(map(self._step, self._blocks.feed(delta)))

    def end(self, response: ModelResponse) -> bytes:
        body = self._render(response, self._request)
        streamed = bool(self._blocks.blocks)
        data = b"" if self._head is not None else self._start(response.id, response.model)
        if streamed:
            data += b"".join(map(self._step, self._blocks.finish()))
            body = {**body, "output": self._items}
        else:
            for place, item in enumerate(body.get("output") or ()):
                data += self._whole(place, item)
        assert self._head is not None
        body = {**body, "id": self._head["id"]}
        kind = "response.incomplete" if body.get("status") == "incomplete" else "response.completed"
        return data + self._event(kind, response=body)

    def error(self, kind: str, message: str) -> bytes:
        data = b"" if self._head is not None else self._start("", "")
        assert self._head is not None
        error = self._error_of(kind, message)[1]["error"]
        failed = {**self._head, "status": "failed", "error": {"code": error["code"], "message": message}}
        return data + self._event("response.failed", response=failed)

    def _event(self, kind: str, **fields_: Any) -> bytes:
        row = {"type": kind, "sequence_number": self._sequence, **fields_}
        self._sequence += 1
        return event(row, kind)

    def _start(self, id: str, model: str) -> bytes:
        self._head = head = self._head_of(self._request, id, model)
        return self._event("response.created", response=head) + self._event("response.in_progress", response=head)

    # ---- items ----

    def _step(self, step: Step) -> bytes:
        what, block, text = step
        match what:
            case "open":
                return self._open(block)
            case "piece":
                return self._piece(block, text)
            case "close":
                return self._close(block)
        return b""

    def _open(self, block: Block) -> bytes:
        item = self._item(block, done=False)
        data = self._event("response.output_item.added", output_index=block.place, item=item)
        at = {"item_id": item["id"], "output_index": block.place}
        match block.kind:
            case "text" | "refusal":
                part = _empty_part(block.kind)
                data += self._event("response.content_part.added", **at, content_index=0, part=part)
            case "reasoning":
                part = {"type": "summary_text", "text": ""}
                data += self._event("response.reasoning_summary_part.added", **at, summary_index=0, part=part)
        return data

    def _piece(self, block: Block, text: str) -> bytes:
        at = {"item_id": _id_of(block, self._custom), "output_index": block.place}
        match block.kind:
            case "tool" if block.name in self._custom:
                return b""  # the text is known when the arguments are complete
            case "tool":
                return self._event("response.function_call_arguments.delta", **at, delta=text)
            case "reasoning":
                return self._event("response.reasoning_summary_text.delta", **at, summary_index=0, delta=text)
            case "refusal":
                return self._event("response.refusal.delta", **at, content_index=0, delta=text)
        return self._event("response.output_text.delta", **at, content_index=0, delta=text, logprobs=[])

    def _close(self, block: Block) -> bytes:
        item = self._item(block, done=True)
        self._items.append(item)
        return self._closing(block.place, item)

    def _closing(self, place: int, item: dict[str, Any]) -> bytes:
        """The events after the last piece of an item."""
        at = {"item_id": item.get("id"), "output_index": place}
        data = b""
        match item.get("type"):
            case "message":
                for index, part in enumerate(item.get("content") or ()):
                    if part.get("type") == "refusal":
                        data += self._event("response.refusal.done", **at, content_index=index, refusal=part["refusal"])
                    else:
                        data += self._event("response.output_text.done", **at, content_index=index,
                                            text=part.get("text", ""), logprobs=[])  # fmt: skip
                    data += self._event("response.content_part.done", **at, content_index=index, part=part)
            case "reasoning":
                for index, part in enumerate(item.get("summary") or ()):
                    data += self._event("response.reasoning_summary_text.done", **at, summary_index=index,
                                        text=part.get("text", ""))  # fmt: skip
                    data += self._event("response.reasoning_summary_part.done", **at, summary_index=index, part=part)
            case "function_call":
                data += self._event("response.function_call_arguments.done", **at, name=item.get("name"),
                                    arguments=item.get("arguments", ""))  # fmt: skip
            case "custom_tool_call":
                given = item.get("input", "")
                data += self._event("response.custom_tool_call_input.delta", **at, delta=given)
                data += self._event("response.custom_tool_call_input.done", **at, input=given)
        return data + self._event("response.output_item.done", output_index=place, item=item)

    def _whole(self, place: int, item: dict[str, Any]) -> bytes:
        """The events of a complete item."""
        if isinstance(text := item.get("content"), str):  # a short form that some servers send
            item = {**item, "content": [{"type": "output_text", "text": text, "annotations": []}]}
        at = {"item_id": item.get("id"), "output_index": place}
        empty = {**item, **_EMPTY.get(str(item.get("type")), {})}
        added = self._event("response.output_item.added", output_index=place, item=empty)
        inner = b""
        match item.get("type"):
            case "message":
                for index, part in enumerate(item.get("content") or ()):
                    kind = "refusal" if part.get("type") == "refusal" else "text"
                    more: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
                    inner += self._event("response.content_part.added", **at, content_index=index,
                                         part=_empty_part(kind))  # fmt: skip
                    inner += self._event(_PIECES[kind], **at, content_index=index, delta=part.get(kind, ""), **more)
            case "reasoning":
                for index, part in enumerate(item.get("summary") or ()):
                    inner += self._event("response.reasoning_summary_part.added", **at, summary_index=index,
                                         part={"type": "summary_text", "text": ""})  # fmt: skip
                    inner += self._event("response.reasoning_summary_text.delta", **at, summary_index=index,
                                         delta=part.get("text", ""))  # fmt: skip
            case "function_call":
                inner = self._event("response.function_call_arguments.delta", **at, delta=item.get("arguments", ""))
        return added + inner + self._closing(place, item)

    def _item(self, block: Block, *, done: bool) -> dict[str, Any]:
        item: dict[str, Any] = {"id": _id_of(block, self._custom), "status": "completed" if done else "in_progress"}
        match block.kind:
            case "tool" if block.name in self._custom:
                given = custom_input(block.text) if done else ""
                return {**item, "type": "custom_tool_call", "call_id": block.id, "name": block.name, "input": given}
            case "tool":
                arguments = (block.text or "{}") if done else ""
                return {**item, "type": "function_call", "call_id": block.id, "name": block.name,
                        "arguments": arguments}  # fmt: skip
            case "reasoning":
                summary = [{"type": "summary_text", "text": block.text}] if done and block.text else []
                return {**item, "type": "reasoning", "summary": summary, "encrypted_content": block.signature or None}
        part = _empty_part(block.kind)
        part["refusal" if block.kind == "refusal" else "text"] = block.text
        return {**item, "type": "message", "role": "assistant", "content": [part] if done else []}


_EMPTY: dict[str, dict[str, Any]] = {
    "message": {"content": [], "status": "in_progress"}, "reasoning": {"summary": [], "encrypted_content": None},
    "function_call": {"arguments": "", "status": "in_progress"},
    "custom_tool_call": {"input": "", "status": "in_progress"},
}  # fmt: skip
_PIECES = {"text": "response.output_text.delta", "refusal": "response.refusal.delta"}


def _empty_part(kind: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": "refusal", "refusal": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _id_of(block: Block, custom: frozenset[str]) -> str:
    prefix = {"tool": "fc", "reasoning": "rs"}.get(block.kind, "msg")
    return f"{'ctc' if block.kind == 'tool' and block.name in custom else prefix}_{block.place}"
