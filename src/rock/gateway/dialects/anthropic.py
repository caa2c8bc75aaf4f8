"""Anthropic Messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from rock.gateway.call import (
    FinishReason,
    Media,
    Message,
    ModelRequest,
    ModelResponse,
    Other,
    Part,
    Reasoning,
    Refusal,
    ResponseFormat,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Usage,
)
from rock.gateway.dialects import fields
from rock.gateway.dialects.anthropic_stream import AnthropicParser, AnthropicRenderer
from rock.gateway.dialects.fields import DialectError
from rock.gateway.dialects.parts import (
    STATUS,
    add_turn,
    as_base64,
    check_convertible,
    convertible_tools,
    estimate_tokens,
    media_of_url,
    own_body,
    passes_unchanged,
    plain_text,
    refusal,
    schema_of,
)

NAME = "anthropic"
DEFAULT_MAX_TOKENS = 8192  # for requests of other dialects without a limit; the field is required
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens",
             "stop": "stop_sequences"}  # fmt: skip
_FINISH: Mapping[str, FinishReason] = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_use": "tool_calls", "refusal": "refusal", "pause_turn": "pause",
}  # fmt: skip
_FINISH_OUT = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "refusal": "refusal",
               "content_filter": "refusal", "pause": "pause_turn"}  # fmt: skip
_ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                504: "timeout_error", 529: "overloaded_error"}  # fmt: skip
_PROVIDER_TOOLS = ("web_search_", "web_fetch_", "code_execution_", "tool_search_", "mcp_toolset", "advisor_")
_REDACTED = "redacted:"
# A line that Claude Code adds to the system prompt for its provider; it differs between calls.
_BILLING = "x-anthropic-billing-header:"


class Anthropic:
    """The dialect "anthropic"."""

    name = NAME

    # ---- requests ----

    def parse_request(
        self, body: dict[str, Any], model_of_path: str | None = None, stream: bool | None = None
    ) -> ModelRequest:
        fields.checked(body)
        if not isinstance(body.get("messages"), list):
            raise DialectError("messages is not a list")
        messages: list[Message] = []
        for place, row in enumerate(fields.rows(body, "messages", "the body", fields.MAX_MESSAGES)):
            _message(row, f"messages[{place}]", messages)
        system = [
            part.text for part in _content(body.get("system"), "system")
            if isinstance(part, Text) and not part.text.startswith(_BILLING)
        ]  # fmt: skip
        unconvertible = next((f"the field {key!r}" for key in ("mcp_servers", "container") if body.get(key)), None)
        output = fields.mapping(body, "output_config", "the body")
        return ModelRequest(
            NAME, fields.model_name(body, model_of_path), tuple(messages), "\n\n".join(system) if system else None,
            tuple(_tool(row) for row in fields.rows(body, "tools", "the body", fields.MAX_TOOLS)), _choice(body),
            _sampling(body), bool(body.get("stream")) if stream is None else stream, body, _format(body, output),
            fields.optional_text(output, "effort", "output_config"), unconvertible,
        )  # fmt: skip

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool = False) -> dict[str, Any]:
        if request.dialect == NAME and request.raw:
            body = dict(request.raw)
            _replace_sampling(body, _sampling(body), request.sampling)
        else:
            body = _converted(request)
        if request.model:
            body["model"] = request.model
        body["stream"] = stream
        return body

    # ---- responses ----

    def parse_response(self, body: dict[str, Any]) -> ModelResponse:
        own_body(body)
        if not isinstance(body.get("content"), list):
            raise DialectError("content is not a list")
        parts = tuple(_content(body["content"], "content"))
        finish = _FINISH.get(fields.text(body, "stop_reason", "the response", ""))
        return ModelResponse(
            fields.text(body, "id", "the response", ""), fields.text(body, "model", "the response", ""),
            Message("assistant", parts), finish, _usage(body.get("usage")),
            fields.token_ids(body.get("prompt_token_ids"), "prompt_token_ids"),
            fields.token_ids(body.get("token_ids"), "token_ids"), raw=body, dialect=NAME,
            stop_sequence=fields.optional_text(body, "stop_sequence", "the response"),
        )  # fmt: skip

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        if passes_unchanged(response, NAME):
            return self.strip_token_fields(cast("dict[str, Any]", response.raw), request)
        return {
            "id": response.id or "msg_rock", "type": "message", "role": "assistant",
            "model": request.model or response.model, "content": _blocks(response.message.parts),
            "stop_reason": stop_reason(response), "stop_sequence": response.stop_sequence,
            "usage": rendered_usage(response.usage),
        }  # fmt: skip

    def stream_parser(self) -> AnthropicParser:
        return AnthropicParser(self.parse_response)

    def stream_renderer(self, request: ModelRequest) -> AnthropicRenderer:
        return AnthropicRenderer(request, self.render_response, self.render_error)

    # ---- the rest ----

    def render_error(self, kind: str, message: str) -> tuple[int, dict[str, Any]]:
        status = 529 if kind == "overloaded" else STATUS.get(kind, 500)
        return status, {"type": "error", "error": {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}}

    def strip_token_fields(self, body: dict[str, Any], request: ModelRequest | None = None) -> dict[str, Any]:
        return {key: value for key, value in body.items() if key not in _HIDDEN}

    def count_tokens(self, request: ModelRequest) -> int:
        return estimate_tokens(request)

    def upstream_path(self, model: str, stream: bool) -> str:
        return "/v1/messages"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}


_HIDDEN = frozenset({"prompt_token_ids", "token_ids", "logprobs", "kv_transfer_params"})


# ---- requests ----


def _message(row: Mapping[str, Any], where: str, messages: list[Message]) -> None:
    """Append the messages of one: tool results and the rest of a user's message are separate messages."""
    role = fields.text(row, "role", where)
    parts = _content(row.get("content"), f"{where}.content")
    if role in ("assistant", "system"):
        messages.append(Message("assistant" if role == "assistant" else "system", tuple(parts)))
        return
    if role != "user":
        raise DialectError(f"{where}.role is {role[:40]!r}; it is user or assistant")
    if parts:
        add_turn(messages, parts)
    else:
        messages.append(Message("user", ()))


def _content(value: Any, where: str) -> list[Part]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [Text(value)]
    if not isinstance(value, list):
        raise DialectError(f"{where} is neither a text nor a list")
    if len(value) > fields.MAX_PARTS:
        raise DialectError(f"{where} has {len(value)} blocks; the limit is {fields.MAX_PARTS}")
    return [_part(row, f"{where}[{place}]") for place, row in enumerate(value)]


def _part(row: Any, where: str) -> Part:
    if not isinstance(row, dict):
        raise DialectError(f"{where} is not an object")
    kind = fields.text(row, "type", where)
    match kind:
        case "text":
            return Text(fields.text(row, "text", where))
        case "thinking":
            signature = fields.optional_text(row, "signature", where)
            return Reasoning(fields.text(row, "thinking", where), signature or None)
        case "redacted_thinking":
            return Reasoning("", _REDACTED + fields.text(row, "data", where))
        case "tool_use":
            return ToolCall(fields.name(row, "id", where), fields.name(row, "name", where),
                            fields.arguments(row.get("input"), f"{where}.input"))  # fmt: skip
        case "tool_result":
            content = tuple(_content(row.get("content"), f"{where}.content"))
            return ToolResult(fields.name(row, "tool_use_id", where), content, bool(row.get("is_error")))
        case "image" | "document":
            media = _media(row, kind, where)
            if media is not None:
                return media
    return Other(NAME, kind[:100], row)


def _media(row: Mapping[str, Any], kind: str, where: str) -> Part | None:
    source = fields.mapping(row, "source", where)
    part = "image" if kind == "image" else "file"
    name = fields.optional_text(row, "title", where)
    media_type = fields.text(source, "media_type", f"{where}.source", "")
    match source.get("type"):
        case "base64":
            return Media(cast(Any, part), media_type, fields.text(source, "data", f"{where}.source"), name=name)
        case "url":
            return media_of_url(part, fields.text(source, "url", f"{where}.source"), name=name)
        case "text":
            data = as_base64(fields.text(source, "data", f"{where}.source"))
            return Media("file", media_type or "text/plain", data, name=name)
    return None


def _tool(row: Mapping[str, Any]) -> Tool:
    kind = fields.text(row, "type", "tools", "custom")
    if kind == "custom":
        return Tool(fields.name(row, "name", "tools"), fields.text(row, "description", "tools", ""),
                    fields.mapping(row, "input_schema", "tools"))  # fmt: skip
    provider = kind.startswith(_PROVIDER_TOOLS)
    return Tool(fields.name(row, "name", "tools", kind[:100]), kind="provider" if provider else "other")


def _choice(body: Mapping[str, Any]) -> ToolChoice | None:
    row = fields.mapping(body, "tool_choice", "the body")
    if not row:
        return None
    disabled = row.get("disable_parallel_tool_use")
    parallel = None if not isinstance(disabled, bool) else not disabled
    match row.get("type"):
        case "any":
            return ToolChoice("required", parallel=parallel)
        case "tool":
            return ToolChoice("named", fields.name(row, "name", "tool_choice"), parallel)
        case "auto" | "none" as mode:
            return ToolChoice(mode, parallel=parallel)
    raise DialectError("tool_choice.type is none of auto, any, tool and none")


def _format(body: Mapping[str, Any], output: Mapping[str, Any]) -> ResponseFormat | None:
    row = fields.mapping(output, "format", "output_config") or fields.mapping(body, "output_format", "the body")
    if row.get("type") != "json_schema":
        return None
    return ResponseFormat(fields.mapping(row, "schema", "output_config.format"), strict=True)


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found = {ours: body[theirs] for ours, theirs in _SAMPLING.items() if body.get(theirs) is not None}
    for key, value in found.items():
        wanted = list if key == "stop" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise DialectError(f"{_SAMPLING[key]} is not a {'list of texts' if key == 'stop' else 'number'}")
    return found


def _replace_sampling(body: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Change the parameters of a body that differ; those that the dialect does not have are left out."""
    for ours, theirs in _SAMPLING.items():
        if before.get(ours) == after.get(ours):
            continue
        if after.get(ours) is not None:
            body[theirs] = after[ours]
        elif ours != "max_tokens":
            body.pop(theirs, None)


def _converted(request: ModelRequest) -> dict[str, Any]:
    check_convertible(request, NAME)
    body: dict[str, Any] = {"model": request.model, "max_tokens": DEFAULT_MAX_TOKENS, "messages": _turns(request)}
    if request.system:
        body["system"] = request.system
    tools = convertible_tools(request, NAME)
    if tools:
        body["tools"] = [
            {"name": tool.name, "description": tool.description, "input_schema": schema_of(tool)} for tool in tools
        ]
    choice = request.tool_choice
    if choice is not None and tools:
        mode = {"required": "any", "named": "tool"}.get(choice.mode, choice.mode)
        row: dict[str, Any] = {"type": mode}
        if choice.mode == "named":
            row["name"] = choice.name
        if choice.parallel is not None and choice.mode != "none":
            row["disable_parallel_tool_use"] = not choice.parallel
        body["tool_choice"] = row
    form = request.response_format
    if form is not None:
        if form.schema is None:
            raise refusal("a response format without a schema (json_object)", NAME)
        body["output_config"] = {"format": {"type": "json_schema", "schema": dict(form.schema)}}
    body |= {theirs: request.sampling[ours] for ours, theirs in _SAMPLING.items() if ours in request.sampling}
    if body.get("temperature", 0) > 1:
        body["temperature"] = 1.0  # the largest value of this dialect
    return body


def _turns(request: ModelRequest) -> list[dict[str, Any]]:
    """Alternating messages of the user and the assistant. System messages within are texts of the user."""
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message.parts)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _blocks(parts: Iterable[Part]) -> list[dict[str, Any]]:
    return [block for part in parts if (block := rendered_part(part)) is not None]


def rendered_part(part: Part) -> dict[str, Any] | None:
    """A content block; None for an empty text, which the dialect does not allow."""
    match part:
        case Text(text) | Refusal(text):
            return {"type": "text", "text": text} if text else None
        case Reasoning(text, signature):
            if signature is not None and signature.startswith(_REDACTED):
                return {"type": "redacted_thinking", "data": signature[len(_REDACTED) :]}
            return {"type": "thinking", "thinking": text, "signature": signature or ""}
        case ToolCall():
            return {"type": "tool_use", "id": part.id, "name": part.name,
                    "input": fields.argument_object(part.arguments)}  # fmt: skip
        case ToolResult():
            row: dict[str, Any] = {"type": "tool_result", "tool_use_id": part.call_id}
            if part.parts:
                only_text = all(isinstance(inner, Text) for inner in part.parts)
                row["content"] = plain_text(part.parts) if only_text and len(part.parts) == 1 else _blocks(part.parts)
            if part.is_error:
                row["is_error"] = True
            return row
        case Media():
            return _rendered_media(part)
        case Other(dialect=dialect) if dialect == NAME:
            return dict(part.raw)
    raise refusal(part, NAME)


def _rendered_media(media: Media) -> dict[str, Any]:
    if media.kind == "audio":
        raise refusal("audio", NAME)
    if media.url is not None:
        source: dict[str, Any] = {"type": "url", "url": media.url}
    else:
        source = {"type": "base64", "media_type": media.media_type or "image/png", "data": media.data or ""}
    row: dict[str, Any] = {"type": "image" if media.kind == "image" else "document", "source": source}
    if media.kind == "file" and media.name:
        row["title"] = media.name
    return row


# ---- responses ----


def _usage(value: Any) -> Usage:
    row = value if isinstance(value, dict) else {}
    cached = fields.count(row, "cache_read_input_tokens")
    prompt = fields.count(row, "input_tokens") + fields.count(row, "cache_creation_input_tokens") + cached
    return Usage(prompt, fields.count(row, "output_tokens"), cached)


def rendered_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": max(0, usage.prompt - usage.cached), "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached, "output_tokens": usage.completion,
    }  # fmt: skip


def stop_reason(response: ModelResponse) -> str:
    """stop_reason; "end_turn" for a response without one."""
    if response.finish_reason == "stop" and response.stop_sequence is not None:
        return "stop_sequence"
    return _FINISH_OUT[response.finish_reason or "stop"]
