"""OpenAI chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from rock.gateway.call import Message, ModelRequest, ModelResponse, Text, ToolCall, ToolResult, Usage
from rock.gateway.sse import SSEEvent


class DialectError(ValueError):
    """The data is not valid in the dialect."""


class Truncated(DialectError):
    """A stream ended early."""


_STATUS = {"budget": 400, "bad_request": 400, "unauthorized": 401, "ended": 409, "upstream": 502, "overloaded": 503,
           "timeout": 504, "unsupported": 400}  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty")


class OpenAIChat:
    name = "openai-chat"

    def parse_request(self, body: Mapping[str, Any], model: str | None, stream: bool | None) -> ModelRequest:
        if not isinstance(body.get("messages"), list):
            raise DialectError("messages: it is not a list")
        messages = tuple(_message(row) for row in body["messages"])
        sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
        return ModelRequest(self.name, str(body.get("model") or model or ""), messages,
                            sampling=sampling, stream=bool(body.get("stream", stream)), raw=body)  # fmt: skip

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool) -> dict[str, Any]:
        body = {**request.raw, "model": request.model, **request.sampling, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        if token_fields:
            body |= {"logprobs": True, "return_token_ids": True}
        return body

    def parse_response(self, body: Mapping[str, Any]) -> ModelResponse:
        try:
            choice = body["choices"][0]
            message = _message(choice["message"])
        except (KeyError, IndexError, TypeError):
            raise DialectError("choices: there is no message") from None
        usage = body.get("usage") or {}
        logs = (choice.get("logprobs") or {}).get("content")
        return ModelResponse(
            str(body.get("id", "")), str(body.get("model", "")), message, choice.get("finish_reason"),
            Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)),
            body.get("prompt_token_ids"), choice.get("token_ids"), [row["logprob"] for row in logs] if logs else None,
            raw=body,
        )  # fmt: skip

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _text(response.message)}
        calls = [{"id": p.id, "type": "function", "function": {"name": p.name, "arguments": p.arguments}}
                 for p in response.message.parts if isinstance(p, ToolCall)]  # fmt: skip
        if calls:
            message["tool_calls"] = calls
        usage = response.usage
        return {"id": response.id, "object": "chat.completion", "created": 0, "model": response.model,
                "choices": [{"index": 0, "message": message, "finish_reason": response.finish_reason}],
                "usage": {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
                          "total_tokens": usage.prompt + usage.completion}}  # fmt: skip

    def stream_parser(self) -> StreamParser:
        return StreamParser()

    def stream_renderer(self, request: ModelRequest) -> StreamRenderer:
        return StreamRenderer(self, request)

    def render_error(self, kind: str, message: str) -> tuple[int, dict[str, Any]]:
        return _STATUS[kind], {"error": {"message": message, "type": kind, "param": None, "code": kind}}

    def strip_token_fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        choices = [{k: v for k, v in c.items() if k not in ("token_ids", "logprobs")} for c in body.get("choices", ())]
        kept = {k: v for k, v in body.items() if k not in ("prompt_token_ids", "prompt_logprobs")}
        return {**kept, "choices": choices}

    def count_tokens(self, request: ModelRequest) -> int:
        return len(orjson.dumps(request.raw)) // 4

    def upstream_path(self, model: str, stream: bool) -> str:
        return "/v1/chat/completions"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}


def _message(row: Any) -> Message:
    if not isinstance(row, dict) or not isinstance(row.get("role"), str):
        raise DialectError("messages: one has no role")
    content = row.get("content")
    text = content if isinstance(content, str) else "".join(p.get("text", "") for p in content or ())
    if row["role"] == "tool":
        return Message("tool", (ToolResult(str(row.get("tool_call_id")), (Text(text),)),))
    calls = tuple(ToolCall(str(c.get("id")), c["function"]["name"], c["function"]["arguments"])
                  for c in row.get("tool_calls") or ())  # fmt: skip
    return Message(row["role"], (*((Text(text),) if text else ()), *calls))


def _text(message: Message) -> str | None:
    return "".join(p.text for p in message.parts if isinstance(p, Text)) or None


class StreamParser:
    def __init__(self) -> None:
        self._body: dict[str, Any] = {}
        self._text = ""
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish: str | None = None
        self._done = False
        self._ids: list[int] = []

    def feed(self, event: SSEEvent) -> list[dict[str, Any]]:
        if event.data == "[DONE]":
            self._done = True
            return []
        try:
            body = orjson.loads(event.data)
        except orjson.JSONDecodeError as error:
            raise DialectError(f"an event is not JSON: {error}") from None
        self._body.setdefault("id", body.get("id"))
        self._body.setdefault("model", body.get("model"))
        for name in ("usage", "prompt_token_ids"):
            if body.get(name):
                self._body[name] = body[name]
        deltas = []
        for choice in body.get("choices") or ():
            delta = choice.get("delta") or {}
            self._text += delta.get("content") or ""
            self._ids += choice.get("token_ids") or []
            self._finish = choice.get("finish_reason") or self._finish
            for call in delta.get("tool_calls") or ():
                known = self._calls.setdefault(call.get("index", 0), {"id": "", "name": "", "arguments": ""})
                known["id"] = call.get("id") or known["id"]
                known["name"] += call.get("function", {}).get("name") or ""
                known["arguments"] += call.get("function", {}).get("arguments") or ""
            deltas.append(delta)
        return deltas

    def finish(self) -> ModelResponse:
        if self._finish is None and not self._done:
            raise Truncated("the stream ended before its last event")
        calls = [{"id": c["id"], "function": {"name": c["name"], "arguments": c["arguments"]}}
                 for c in self._calls.values()]  # fmt: skip
        choice = {"message": {"role": "assistant", "content": self._text, "tool_calls": calls},
                  "finish_reason": self._finish, "token_ids": self._ids or None}  # fmt: skip
        return OpenAIChat().parse_response({**self._body, "choices": [choice]})


class StreamRenderer:
    def __init__(self, dialect: OpenAIChat, request: ModelRequest) -> None:
        self._dialect = dialect
        self._model = request.model
        self._fed = False

    def _chunk(self, delta: Any, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return b"data: " + orjson.dumps({"id": "rock", "object": "chat.completion.chunk", "created": 0,
                                         "model": self._model, "choices": [choice]}) + b"\n\n"  # fmt: skip

    def begin(self) -> bytes:
        return b""

    def feed(self, delta: Any) -> bytes:
        self._fed = True
        return self._chunk(delta)

    def end(self, response: ModelResponse) -> bytes:
        data = b""
        if not self._fed:
            delta = self._dialect.render_response(response, None)["choices"][0]["message"]  # type: ignore[arg-type]
            delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(delta.get("tool_calls", ()))]
            data = self._chunk(delta)
        return data + self._chunk({}, response.finish_reason) + b"data: [DONE]\n\n"

    def error(self, kind: str, message: str) -> bytes:
        return b"data: " + orjson.dumps(self._dialect.render_error(kind, message)[1]) + b"\n\n"
