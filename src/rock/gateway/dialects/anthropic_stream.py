"""Streams of Anthropic Messages: events to deltas and a whole body, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rock.gateway.call import Delta, ModelRequest, ModelResponse
from rock.gateway.dialects import fields
from rock.gateway.dialects.blocks import Block, Blocks, Step
from rock.gateway.dialects.fields import DialectError, Truncated
from rock.gateway.dialects.parts import error_text, event
from rock.gateway.sse import SSEEvent

_REDACTED = "redacted:"
_TEXT_OF = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature",
            "input_json_delta": "partial_json"}  # fmt: skip


class AnthropicParser:
    """Assembles the body of a message. Complete with message_stop."""

    def __init__(self, parse: Callable[[dict[str, Any]], ModelResponse]) -> None:
        self._parse = parse
        self._body: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._stopped = False

    def feed(self, event: SSEEvent) -> list[Delta]:
        row = fields.event_object(event.data)
        kind = fields.text(row, "type", "the event", event.event)
        match kind:
            case "error":
                raise DialectError(f"the upstream sent an error in the stream: {error_text(row.get('error'))}")
            case "message_start":
                self._body = dict(fields.mapping(row, "message", "message_start"))
                return [Delta("start", id=fields.text(self._body, "id", "message_start", ""),
                              name=fields.text(self._body, "model", "message_start", ""))]  # fmt: skip
            case "content_block_start":
                return self._start(fields.index(row, "index"), fields.mapping(row, "content_block", kind))
            case "content_block_delta":
                return self._delta(fields.index(row, "index"), fields.mapping(row, "delta", kind))
            case "content_block_stop":
                return self._stop(fields.index(row, "index"))
            case "message_delta":
                self._body |= fields.mapping(row, "delta", kind)
                usage = {key: value for key, value in fields.mapping(row, "usage", kind).items() if value is not None}
                self._body["usage"] = {**fields.mapping(self._body, "usage", "message_start"), **usage}
            case "message_stop":
                self._stopped = True
        return []

    def _start(self, index: int, block: dict[str, Any]) -> list[Delta]:
        self._blocks[index] = dict(block)
        match block.get("type"):
            case "tool_use":
                return [Delta("tool", index, id=fields.name(block, "id", "content_block"),
                              name=fields.name(block, "name", "content_block"))]  # fmt: skip
            case "redacted_thinking":
                return [Delta("signature", index, _REDACTED + fields.text(block, "data", "content_block"))]
            case "text" if text := fields.text(block, "text", "content_block", ""):
                return [Delta("text", index, text)]
            case "thinking" if text := fields.text(block, "thinking", "content_block", ""):
                return [Delta("reasoning", index, text)]
        return []

    def _delta(self, index: int, delta: dict[str, Any]) -> list[Delta]:
        block = self._blocks.get(index)
        if block is None:
            raise DialectError(f"the stream has a delta of block {index}, which did not begin")
        kind = fields.text(delta, "type", "delta")
        key = _TEXT_OF.get(kind)
        if key is None:
            if kind == "citations_delta":
                if not isinstance(block.get("citations"), list):
                    block["citations"] = []
                block["citations"].append(delta.get("citation"))
            return []
        text = fields.text(delta, key, "delta")
        if not text:
            return []
        self._texts.setdefault((index, key), []).append(text)
        match kind, block.get("type"):
            case "text_delta", _:
                return [Delta("text", index, text)]
            case "thinking_delta", _:
                return [Delta("reasoning", index, text)]
            case "signature_delta", _:
                return [Delta("signature", index, text)]
            case "input_json_delta", "tool_use":
                return [Delta("arguments", index, text)]
        return []

    def _stop(self, index: int) -> list[Delta]:
        block = self._blocks.get(index)
        if block is None or block.get("type") != "tool_use" or (index, "partial_json") in self._texts:
            return []
        return [Delta("arguments", index, fields.arguments(block.get("input"), "content_block.input"))]

    def finish(self) -> ModelResponse:
        if not self._stopped:
            raise Truncated("the stream ended without message_stop")
        for (index, key), texts in self._texts.items():
            block, text = self._blocks[index], "".join(texts)
            if key == "partial_json":
                block["input"] = fields.argument_object(text)
            else:
                block[key] = fields.text(block, key, "content_block", "") + text
        return self._parse({**self._body, "content": [self._blocks[index] for index in sorted(self._blocks)]})


class AnthropicRenderer:
    """Renders events. message_start is sent with the first delta."""

    def __init__(
        self, request: ModelRequest, render: Callable[[ModelResponse, ModelRequest], dict[str, Any]],
        error_of: Callable[[str, str], tuple[int, dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._request = request
        self._render = render
        self._error_of = error_of
        self._blocks = Blocks()
        self._id = "msg_rock"
        self._started = False

    def begin(self) -> bytes:
        return b""

    def feed(self, delta: Delta) -> bytes:
        if delta.kind == "start":
            self._id = delta.id or self._id
            return self._start({"input_tokens": 0, "output_tokens": 0}, delta.name)
        data = b"" if self._started else self._start({"input_tokens": 0, "output_tokens": 0}, "")
        return data + b"".join(map(_rendered, self._blocks.feed(delta)))

    def end(self, response: ModelResponse) -> bytes:
        body = self._render(response, self._request)
        usage = found if isinstance(found := body.get("usage"), dict) else {}
        if not self._blocks.blocks:
            self._id = response.id or self._id
            data = b"" if self._started else self._start({**usage, "output_tokens": 0}, response.model)
            for place, block in enumerate(body["content"]):
                data += _whole(place, block)
        else:
            data = b"".join(map(_rendered, self._blocks.finish()))
        delta = {"stop_reason": body.get("stop_reason"), "stop_sequence": body.get("stop_sequence")}
        data += event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        return data + event({"type": "message_stop"}, "message_stop")

    def error(self, kind: str, message: str) -> bytes:
        return event(self._error_of(kind, message)[1], "error")

    def _start(self, usage: dict[str, Any], model: str) -> bytes:
        self._started = True
        return event({"type": "message_start", "message": {
            "id": self._id, "type": "message", "role": "assistant", "model": self._request.model or model,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
        }}, "message_start")  # fmt: skip


def _begun(place: int, block: dict[str, Any]) -> bytes:
    return event({"type": "content_block_start", "index": place, "content_block": block}, "content_block_start")


def _piece(place: int, delta: dict[str, Any]) -> bytes:
    return event({"type": "content_block_delta", "index": place, "delta": delta}, "content_block_delta")


def _stopped(place: int) -> bytes:
    return event({"type": "content_block_stop", "index": place}, "content_block_stop")


def _rendered(step: Step) -> bytes:
    what, block, text = step
    match what:
        case "open":
            return _begun(block.place, _empty(block))
        case "close":
            return _stopped(block.place)
        case "signature":
            redacted = text.startswith(_REDACTED) or block.kind != "reasoning"
            return b"" if redacted else _piece(block.place, {"type": "signature_delta", "signature": text})
    match block.kind:
        case "tool":
            return _piece(block.place, {"type": "input_json_delta", "partial_json": text})
        case "reasoning":
            return _piece(block.place, {"type": "thinking_delta", "thinking": text})
    return _piece(block.place, {"type": "text_delta", "text": text})


def _empty(block: Block) -> dict[str, Any]:
    match block.kind:
        case "tool":
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
        case "reasoning":
            if block.opened_by.startswith(_REDACTED):
                return {"type": "redacted_thinking", "data": block.opened_by[len(_REDACTED) :]}
            return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole(place: int, block: dict[str, Any]) -> bytes:
    """The events of a complete block."""
    match block.get("type"):
        case "text":
            inner = [{"type": "text_delta", "text": block.get("text", "")}]
            empty = {**block, "text": ""}
        case "thinking":
            inner = [{"type": "thinking_delta", "thinking": block.get("thinking", "")},
                     {"type": "signature_delta", "signature": block.get("signature") or ""}]  # fmt: skip
            empty = {"type": "thinking", "thinking": "", "signature": ""}
        case "tool_use" | "server_tool_use":
            inner = [{"type": "input_json_delta", "partial_json": fields.dumps(block.get("input") or {})}]
            empty = {**block, "input": {}}
        case _:
            inner, empty = [], block
    return _begun(place, empty) + b"".join(_piece(place, delta) for delta in inner) + _stopped(place)
