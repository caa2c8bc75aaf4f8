"""Streams of OpenAI chat completions: chunks to deltas and a whole body, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rock.gateway.call import Delta, ModelRequest, ModelResponse, Usage
from rock.gateway.dialects import fields
from rock.gateway.dialects.fields import DialectError, Truncated
from rock.gateway.dialects.parts import error_text, event
from rock.gateway.sse import SSEEvent

_TEXT, _REASONING, _REFUSAL, _FIRST_CALL = 0, 1, 2, 3  # Delta.index
_ORDER = {"reasoning_content": 0, "reasoning": 0, "content": 1, "refusal": 1, "tool_calls": 2}  # within a chunk


class ChatParser:
    """Assembles the body of a chat completion. Complete once the first choice has a finish_reason.

    ended: whether the stream had [DONE], or a usage with or after the finish_reason. A stream whose request asked for
    the usage is cut without both.
    """

    def __init__(self, parse: Callable[[dict[str, Any]], ModelResponse]) -> None:
        self._parse = parse
        self._body: dict[str, Any] = {"object": "chat.completion"}
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._calls: dict[tuple[int, int], dict[str, Any]] = {}
        self._arguments: dict[tuple[int, int], list[str]] = {}
        self._started = False
        self.ended = False

    def feed(self, event: SSEEvent) -> list[Delta]:
        if event.data == "[DONE]":
            self.ended = True
            return []
        chunk = fields.event_object(event.data)
        if chunk.get("error"):
            raise DialectError(f"the upstream sent an error in the stream: {error_text(chunk['error'])}")
        found: list[Delta] = []
        for key, value in chunk.items():
            if value is not None and key not in ("choices", "object"):
                self._body[key] = value
        if not self._started:
            self._started = True
            found.append(Delta("start", id=fields.text(chunk, "id", "the chunk", ""),
                               name=fields.text(chunk, "model", "the chunk", "")))  # fmt: skip
        for row in fields.rows(chunk, "choices", "the chunk", fields.MAX_CHOICES):
            self._choice(row, found)
        if chunk.get("usage") is not None and self._choices.get(0, {}).get("finish_reason"):
            self.ended = True
        return found

    def _choice(self, row: dict[str, Any], found: list[Delta]) -> None:
        which = fields.index(row, "index")
        choice = self._choices.setdefault(which, {"index": which, "finish_reason": None, "message": {}})
        delta = fields.mapping(row, "delta", "the chunk")
        for key, value in sorted(delta.items(), key=lambda field: _ORDER.get(field[0], 3)):
            if key == "tool_calls":
                for call in fields.rows(delta, key, "delta", fields.MAX_PARTS):
                    self._call(which, call, found)
            elif key in _ORDER:
                if value is not None and not isinstance(value, str):
                    raise DialectError(f"delta.{key} is not a text")
                if value:
                    self._texts.setdefault((which, key), []).append(value)
                    if which == 0:
                        found.append(_text_delta(key, value))
            elif value is not None:
                choice["message"][key] = value
        for key, value in row.items():
            if key == "token_ids":
                choice.setdefault(key, []).extend(fields.token_ids(value, key) or [])
            elif key == "logprobs" and isinstance(value, dict):
                logs = choice.setdefault(key, {"content": []})
                logs["content"] += fields.rows(value, "content", "logprobs", fields.MAX_TOKENS)
            elif value is not None and key not in ("index", "delta"):
                choice[key] = value

    def _call(self, which: int, row: dict[str, Any], found: list[Delta]) -> None:
        place = fields.index(row, "index", len(self._calls) if row.get("id") else max(0, len(self._calls) - 1))
        function = fields.mapping(row, "function", "delta.tool_calls")
        key = (which, place)
        call = self._calls.get(key)
        if call is None:
            name = fields.name(function, "name", "delta.tool_calls.function", "")
            call = {"id": fields.name(row, "id", "delta.tool_calls", "") or f"call_{place}", "type": "function",
                    "function": {"name": name}}  # fmt: skip
            if row.get("extra_content") is not None:
                call["extra_content"] = row["extra_content"]
            self._calls[key], self._arguments[key] = call, []
            if which == 0 and name:
                found.append(Delta("tool", _FIRST_CALL + place, id=call["id"], name=name))
        elif not call["function"]["name"] and function.get("name"):
            call["function"]["name"] = fields.name(function, "name", "delta.tool_calls.function")
            if which == 0:
                found.append(Delta("tool", _FIRST_CALL + place, id=call["id"], name=call["function"]["name"]))
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            raise DialectError("delta.tool_calls.function.arguments is not a text")
        if arguments:
            self._arguments[key].append(arguments)
            if which == 0:
                found.append(Delta("arguments", _FIRST_CALL + place, arguments))

    def finish(self) -> ModelResponse:
        first = self._choices.get(0)
        if first is None or not first["finish_reason"]:
            raise Truncated("the stream ended without a finish_reason")
        for (which, key), texts in self._texts.items():
            self._choices[which]["message"][key] = "".join(texts)
        for (which, place), call in sorted(self._calls.items()):
            call["function"]["arguments"] = "".join(self._arguments[which, place])
            self._choices[which]["message"].setdefault("tool_calls", []).append(call)
        for choice in self._choices.values():
            choice["message"] = {"role": "assistant", "content": None, **choice["message"]}
        return self._parse({**self._body, "choices": [self._choices[which] for which in sorted(self._choices)]})


def _text_delta(key: str, text: str) -> Delta:
    if key == "content":
        return Delta("text", _TEXT, text)
    return Delta("refusal", _REFUSAL, text) if key == "refusal" else Delta("reasoning", _REASONING, text)


class ChatRenderer:
    """Renders chunks. Usage is sent when the request has stream_options.include_usage."""

    def __init__(
        self, request: ModelRequest, message_of: Callable[[ModelResponse], dict[str, Any]],
        finish_of: Callable[[ModelResponse], str], usage_of: Callable[[Usage], dict[str, Any]],
        error_of: Callable[[str, str], tuple[int, dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._request = request
        self._message_of = message_of
        self._finish_of = finish_of
        self._usage_of = usage_of
        self._error_of = error_of
        self._base: dict[str, Any] = {
            "id": "chatcmpl-rock", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": request.model,
        }  # fmt: skip
        self._places: dict[int, int] = {}
        self._role_sent = False

    def begin(self) -> bytes:
        return b""

    def feed(self, delta: Delta) -> bytes:
        match delta.kind:
            case "start":
                self._base["id"] = delta.id or self._base["id"]
                self._base["model"] = self._request.model or delta.name
                return b""
            case "text":
                return self._chunk({"content": delta.text})
            case "reasoning":
                return self._chunk({"reasoning_content": delta.text})
            case "refusal":
                return self._chunk({"refusal": delta.text})
            case "tool":
                place = self._places.setdefault(delta.index, len(self._places))
                function = {"name": delta.name, "arguments": ""}
                row = {"index": place, "id": delta.id, "type": "function", "function": function}
                return self._chunk({"tool_calls": [row]})
            case "arguments" if delta.index in self._places:
                row = {"index": self._places[delta.index], "function": {"arguments": delta.text}}
                return self._chunk({"tool_calls": [row]})
        return b""

    def end(self, response: ModelResponse) -> bytes:
        data = b"" if self._role_sent else self._whole(response)
        data += self._chunk({}, self._finish_of(response))
        options = self._request.raw.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            data += event({**self._base, "choices": [], "usage": self._usage_of(response.usage)})
        return data + b"data: [DONE]\n\n"

    def _whole(self, response: ModelResponse) -> bytes:
        self._base["id"] = response.id or self._base["id"]
        self._base["model"] = self._request.model or response.model
        message = {key: value for key, value in self._message_of(response).items() if value is not None}
        message.pop("role", None)
        if "tool_calls" in message:
            message["tool_calls"] = [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]
        return self._chunk(message)

    def error(self, kind: str, message: str) -> bytes:
        return event(self._error_of(kind, message)[1])

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        if not self._role_sent:
            self._role_sent = True
            delta = {"role": "assistant", **delta}
        return event({**self._base, "choices": [{"index": 0, "delta": delta, "logprobs": None,
                                                 "finish_reason": finish}]})  # fmt: skip
