"""Streams of Gemini: chunks to deltas and a whole body, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rock.gateway.call import Delta, ModelRequest, ModelResponse
from rock.gateway.dialects import fields
from rock.gateway.dialects.blocks import Block, Blocks, Step
from rock.gateway.dialects.fields import DialectError, Truncated
from rock.gateway.dialects.parts import error_text, event
from rock.gateway.sse import SSEEvent


class GeminiParser:
    """Assembles the body of a response. Complete once the first candidate has a finishReason, or the prompt was
    blocked."""

    def __init__(
        self, parse: Callable[[dict[str, Any]], ModelResponse], prefix_of: Callable[[Mapping[str, Any]], str]
    ) -> None:
        self._parse = parse
        self._prefix_of = prefix_of
        self._body: dict[str, Any] = {}
        self._candidate: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []
        self._texts: list[list[str]] = []  # of each part
        self._chosen: list[Any] = []
        self._calls = 0
        self._started = False

    def feed(self, event: SSEEvent) -> list[Delta]:
        if event.data == "[DONE]":
            return []
        chunk = fields.event_object(event.data)
        if chunk.get("error"):
            raise DialectError(f"the upstream sent an error in the stream: {error_text(chunk['error'])}")
        found: list[Delta] = []
        self._body |= {key: value for key, value in chunk.items() if key != "candidates" and value is not None}
        if not self._started:
            self._started = True
            found.append(Delta("start", id=fields.text(chunk, "responseId", "the chunk", ""),
                               name=fields.text(chunk, "modelVersion", "the chunk", "")))  # fmt: skip
        for row in fields.rows(chunk, "candidates", "the chunk", fields.MAX_CHOICES):
            if fields.index(row, "index") == 0:
                self._add(row, found)
        return found

    def _add(self, row: dict[str, Any], found: list[Delta]) -> None:
        for key, value in row.items():
            if key == "logprobsResult" and isinstance(value, dict):
                self._chosen += fields.rows(value, "chosenCandidates", key, fields.MAX_TOKENS)
            elif key != "content" and value is not None:
                self._candidate[key] = value
        content = fields.mapping(row, "content", "the candidate")
        for part in fields.rows(content, "parts", "the candidate", fields.MAX_PARTS):
            self._part(part, found)

    def _part(self, part: dict[str, Any], found: list[Delta]) -> None:
        text = fields.optional_text(part, "text", "the part")
        thought = bool(part.get("thought"))
        signature = fields.optional_text(part, "thoughtSignature", "the part")
        if text is not None:
            last = self._parts[-1] if self._parts else {}
            if "text" in last and bool(last.get("thought")) == thought and "thoughtSignature" not in last:
                last |= {key: value for key, value in part.items() if key != "text"}
                self._texts[-1].append(text)
            else:
                self._parts.append(dict(part))
                self._texts.append([text])
            place = len(self._parts) - 1
            if text:
                found.append(Delta("reasoning" if thought else "text", place, text))
            if signature and thought:
                found.append(Delta("signature", place, signature))
            return
        self._parts.append(part)
        self._texts.append([])
        call = part.get("functionCall")
        if isinstance(call, dict) and call:
            place = len(self._parts) - 1
            id = fields.name(call, "id", "functionCall", "") or f"{self._prefix_of(self._body)}{self._calls}"
            self._calls += 1
            found += [Delta("tool", place, id=id, name=fields.name(call, "name", "functionCall")),
                      Delta("arguments", place, fields.arguments(call.get("args"), "functionCall.args"))]  # fmt: skip
            if signature:
                found.append(Delta("signature", place, signature))

    def finish(self) -> ModelResponse:
        feedback = self._body.get("promptFeedback")
        blocked = isinstance(feedback, dict) and feedback.get("blockReason")
        if not self._candidate.get("finishReason") and not blocked:
            raise Truncated("the stream ended without a finishReason")
        for part, texts in zip(self._parts, self._texts, strict=True):
            if texts:
                part["text"] = "".join(texts)
        body = dict(self._body)
        if self._candidate:
            candidate = {**self._candidate, "content": {"role": "model", "parts": self._parts}}
            if self._chosen:
                candidate["logprobsResult"] = {"chosenCandidates": self._chosen}
            body["candidates"] = [candidate]
        return self._parse(body)


class GeminiRenderer:
    """Renders chunks. A tool call is sent when its arguments are complete."""

    def __init__(
        self, request: ModelRequest, render: Callable[[ModelResponse, ModelRequest], dict[str, Any]],
        error_of: Callable[[str, str], tuple[int, dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._request = request
        self._render = render
        self._error_of = error_of
        self._blocks = Blocks()
        self._id = "rock"
        self._model = request.model

    def begin(self) -> bytes:
        return b""

    def feed(self, delta: Delta) -> bytes:
        if delta.kind == "start":
            self._id = delta.id or self._id
            self._model = self._request.model or delta.name
            return b""
        return b"".join(map(self._step, self._blocks.feed(delta)))

    def end(self, response: ModelResponse) -> bytes:
        body = self._render(response, self._request)
        if not self._blocks.blocks:
            return event(body)
        data = b"".join(map(self._step, self._blocks.finish()))
        candidates = body.get("candidates") or [{}]
        last = {**candidates[0], "content": {"role": "model", "parts": [{"text": ""}]}}
        return data + event({**body, "candidates": [last], "responseId": self._id})

    def error(self, kind: str, message: str) -> bytes:
        return event(self._error_of(kind, message)[1])

    def _step(self, step: Step) -> bytes:
        what, block, text = step
        match what, block.kind:
            case "piece", "text" | "refusal":
                return self._chunk({"text": text})
            case "piece", "reasoning":
                return self._chunk({"text": text, "thought": True})
            case "signature", "reasoning":
                return self._chunk({"text": "", "thought": True, "thoughtSignature": text})
            case "close", "tool":
                return self._chunk(_call(block))
        return b""

    def _chunk(self, part: dict[str, Any]) -> bytes:
        content = {"role": "model", "parts": [part]}
        return event({"candidates": [{"content": content, "index": 0}], "modelVersion": self._model,
                      "responseId": self._id})  # fmt: skip


def _call(block: Block) -> dict[str, Any]:
    call = {"id": block.id, "name": block.name, "args": fields.argument_object(block.text)}
    return {"functionCall": call} | ({"thoughtSignature": block.signature} if block.signature else {})
