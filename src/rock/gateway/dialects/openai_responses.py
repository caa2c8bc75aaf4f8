"""OpenAI Responses."""

from __future__ import annotations

import time
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
    Role,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Usage,
)
from rock.gateway.dialects import fields
from rock.gateway.dialects.fields import DialectError
from rock.gateway.dialects.parts import (
    STATUS,
    check_convertible,
    convertible_tools,
    custom_input,
    custom_names,
    estimate_tokens,
    media_of_url,
    own_body,
    passes_unchanged,
    plain_text,
    refusal,
    schema_of,
    url_of,
)
from rock.gateway.dialects.responses_stream import ResponsesParser, ResponsesRenderer

NAME = "openai-responses"
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_output_tokens"}
_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_OTHER_TOOLS = frozenset({"local_shell", "shell", "apply_patch", "computer", "computer_use_preview", "mcp"})
_UNCONVERTIBLE = ("previous_response_id", "conversation", "background", "prompt")
_HIDDEN = frozenset({"prompt_token_ids", "token_ids", "generation_token_ids", "generation_log_probs"})
_ERROR_TYPES = {"unauthorized": "authentication_error", "budget": "budget_exceeded", "ended": "permission_error"}


class OpenAIResponses:
    """The dialect "openai-responses"."""

    name = NAME

    # ---- requests ----

    def parse_request(
        self, body: dict[str, Any], model_of_path: str | None = None, stream: bool | None = None
    ) -> ModelRequest:
        fields.checked(body)
        given = body.get("input")
        if isinstance(given, str):
            messages = [Message("user", (Text(given),))]
        elif isinstance(given, list) or (given is None and any(body.get(key) for key in _UNCONVERTIBLE)):
            items = fields.rows(body, "input", "the body", fields.MAX_MESSAGES)
            messages = _messages(items, "input")
        else:
            raise DialectError("input is neither a text nor a list")
        system = [text] if (text := fields.text(body, "instructions", "the body", "")) else []
        while messages and messages[0].role == "system" and all(isinstance(p, Text) for p in messages[0].parts):
            system.append(plain_text(messages.pop(0).parts))
        unconvertible = next((f"the field {key!r}" for key in _UNCONVERTIBLE if body.get(key)), None)
        reasoning = fields.mapping(body, "reasoning", "the body")
        return ModelRequest(
            NAME, fields.model_name(body, model_of_path), tuple(messages), "\n\n".join(system) if system else None,
            tuple(_tool(row) for row in fields.rows(body, "tools", "the body", fields.MAX_TOOLS)), _choice(body),
            _sampling(body), bool(body.get("stream")) if stream is None else stream, body, _format(body),
            fields.optional_text(reasoning, "effort", "reasoning"), unconvertible,
        )  # fmt: skip

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool = False) -> dict[str, Any]:
        if request.dialect == NAME and request.raw:
            body = dict(request.raw)
            before = _sampling(body)
            for ours, theirs in _SAMPLING.items():
                if before.get(ours) == request.sampling.get(ours):
                    continue
                if request.sampling.get(ours) is None:
                    body.pop(theirs, None)
                else:
                    body[theirs] = request.sampling[ours]
        else:
            body = _converted(request)
        if request.model:
            body["model"] = request.model
        body["stream"] = stream
        if token_fields:
            body |= {"return_token_ids": True}
        return body

    # ---- responses ----

    def parse_response(self, body: dict[str, Any]) -> ModelResponse:
        own_body(body)
        if not isinstance(body.get("output"), list):
            raise DialectError("output is not a list")
        status = fields.text(body, "status", "the response", "completed")
        if status not in ("completed", "incomplete"):
            raise DialectError(f"the status of the response is {status[:40]!r}, not completed")
        items = fields.rows(body, "output", "the response", fields.MAX_MESSAGES)
        parts = tuple(part for message in _messages(items, "output") for part in message.parts)
        reason = fields.mapping(body, "incomplete_details", "the response").get("reason")
        finish: FinishReason = "stop"
        if status == "incomplete":
            finish = "content_filter" if reason == "content_filter" else "length"
        elif any(isinstance(part, ToolCall) for part in parts):
            finish = "tool_calls"
        elif any(isinstance(part, Refusal) for part in parts):
            finish = "refusal"
        tokens = next((item for item in items if item.get("generation_token_ids") is not None), {})
        ids = fields.token_ids(tokens.get("generation_token_ids", body.get("token_ids")), "generation_token_ids")
        prompt = tokens.get("prompt_token_ids", body.get("prompt_token_ids"))
        logprobs = fields.logprob_values(tokens.get("generation_log_probs"), "generation_log_probs")
        if logprobs is not None and len(logprobs) != len(ids or ()):
            logprobs = None
        return ModelResponse(
            fields.text(body, "id", "the response", ""), fields.text(body, "model", "the response", ""),
            Message("assistant", parts), finish, _usage(body.get("usage")),
            fields.token_ids(prompt, "prompt_token_ids"), ids, logprobs, raw=body, dialect=NAME,
        )  # fmt: skip

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        if passes_unchanged(response, NAME):
            return self.strip_token_fields(cast("dict[str, Any]", response.raw), request)
        items = rendered_items(response.message.parts, custom_names(request), response=True)
        return {**response_head(request, response.id, response.model), **response_end(response), "output": items}

    def stream_parser(self) -> ResponsesParser:
        return ResponsesParser(self.parse_response)

    def stream_renderer(self, request: ModelRequest) -> ResponsesRenderer:
        return ResponsesRenderer(request, self.render_response, response_head, self.render_error)

    # ---- the rest ----

    def render_error(self, kind: str, message: str) -> tuple[int, dict[str, Any]]:
        status = STATUS.get(kind, 500)
        name = _ERROR_TYPES.get(kind, "invalid_request_error" if status < 500 else "server_error")
        return status, {"error": {"message": message, "type": name, "param": None, "code": kind}}

    def strip_token_fields(self, body: dict[str, Any], request: ModelRequest | None = None) -> dict[str, Any]:
        kept = {key: value for key, value in body.items() if key not in _HIDDEN}
        for key in ("response", "item"):  # of a stream's event
            if isinstance(inner := kept.get(key), dict):
                kept[key] = self.strip_token_fields(inner, request)
        if isinstance(items := kept.get("output"), list):
            kept["output"] = [
                {key: value for key, value in item.items() if key not in _HIDDEN} if isinstance(item, dict) else item
                for item in items
            ]
        return kept

    def count_tokens(self, request: ModelRequest) -> int:
        return estimate_tokens(request)

    def upstream_path(self, model: str, stream: bool) -> str:
        return "/v1/responses"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}


# ---- requests ----


def _messages(items: list[dict[str, Any]], where: str) -> list[Message]:
    """Messages of items: consecutive items of the assistant are one message, and consecutive tool results too."""
    found: list[tuple[Role, list[Part]]] = []
    for place, item in enumerate(items):
        role, parts = _item(item, f"{where}[{place}]")
        if role in ("assistant", "tool") and found and found[-1][0] == role:
            found[-1][1].extend(parts)
        else:
            found.append((role, parts))
    return [Message(role, tuple(parts)) for role, parts in found]


def _item(item: Mapping[str, Any], where: str) -> tuple[Role, list[Part]]:
    kind = fields.text(item, "type", where, "message")
    match kind:
        case "message":
            role = _ROLES.get(fields.text(item, "role", where))
            if role is None:
                raise DialectError(f"{where}.role is {str(item['role'])[:40]!r}, which is no role")
            return role, _content(item.get("content"), f"{where}.content")
        case "function_call":
            arguments = fields.arguments(item.get("arguments"), f"{where}.arguments")
            return "assistant", [ToolCall(_call_id(item, where), fields.name(item, "name", where), arguments)]
        case "custom_tool_call":
            arguments = fields.dumps({"input": fields.text(item, "input", where, "")})
            return "assistant", [ToolCall(_call_id(item, where), fields.name(item, "name", where), arguments)]
        case "function_call_output" | "custom_tool_call_output":
            output = tuple(_content(item.get("output"), f"{where}.output"))
            return "tool", [ToolResult(_call_id(item, where), output)]
        case "reasoning":
            return "assistant", [_reasoning(item, where)]
    role = "tool" if kind.endswith("_output") else "assistant"
    return role, [Other(NAME, kind[:100], item)]


def _call_id(item: Mapping[str, Any], where: str) -> str:
    return fields.name(item, "call_id", where, "") or fields.name(item, "id", where)


def _reasoning(item: Mapping[str, Any], where: str) -> Reasoning:
    texts = [
        fields.text(row, "text", f"{where}.{key}", "")
        for key in ("content", "summary") for row in fields.rows(item, key, where, fields.MAX_PARTS)[: _most(item, key)]
    ]  # fmt: skip
    signature = fields.optional_text(item, "encrypted_content", where)
    return Reasoning("\n\n".join(texts), signature or None, fields.optional_text(item, "id", where))


def _most(item: Mapping[str, Any], key: str) -> int | None:
    """The summary is read only without the reasoning itself."""
    return 0 if key == "summary" and item.get("content") else None


def _content(value: Any, where: str) -> list[Part]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [Text(value)]
    if not isinstance(value, list):
        raise DialectError(f"{where} is neither a text nor a list")
    if len(value) > fields.MAX_PARTS:
        raise DialectError(f"{where} has {len(value)} parts; the limit is {fields.MAX_PARTS}")
    return [_part(row, f"{where}[{place}]") for place, row in enumerate(value)]


def _part(row: Any, where: str) -> Part:
    if not isinstance(row, dict):
        raise DialectError(f"{where} is not an object")
    match row.get("type"):
        case "input_text" | "output_text" | "text" | "summary_text":
            return Text(fields.text(row, "text", where))
        case "refusal":
            return Refusal(fields.text(row, "refusal", where))
        case "input_image" if row.get("image_url") is not None:
            detail = fields.optional_text(row, "detail", where)
            return media_of_url("image", fields.text(row, "image_url", where), detail)
        case "input_file" if row.get("file_data") is not None or row.get("file_url") is not None:
            url = fields.text(row, "file_data" if row.get("file_data") is not None else "file_url", where)
            return media_of_url("file", url, name=fields.optional_text(row, "filename", where))
        case "input_audio":
            audio = fields.mapping(row, "input_audio", where)
            form = fields.text(audio, "format", where, "wav")
            return Media("audio", "audio/mpeg" if form == "mp3" else f"audio/{form}", fields.text(audio, "data", where))
    return Other(NAME, str(row.get("type"))[:100], row)


def _tool(row: Mapping[str, Any]) -> Tool:
    kind = fields.text(row, "type", "tools")
    if kind not in ("function", "custom"):
        return Tool(fields.name(row, "name", "tools", kind[:100]), kind="other" if kind in _OTHER_TOOLS else "provider")
    strict = row.get("strict")
    return Tool(
        fields.name(row, "name", "tools"), fields.text(row, "description", "tools", ""),
        fields.mapping(row, "parameters", "tools") if kind == "function" else None, cast(Any, kind),
        strict if isinstance(strict, bool) else None,
    )  # fmt: skip


def _choice(body: Mapping[str, Any]) -> ToolChoice | None:
    value, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    parallel = parallel if isinstance(parallel, bool) else None
    if value is None:
        return None if parallel is None else ToolChoice(parallel=parallel)
    if value in ("auto", "none", "required"):
        return ToolChoice(value, parallel=parallel)
    if isinstance(value, dict) and value.get("name") is not None:
        return ToolChoice("named", fields.name(value, "name", "tool_choice"), parallel)
    if isinstance(value, dict):
        return ToolChoice("required" if value.get("mode") == "required" else "auto", parallel=parallel)
    raise DialectError("tool_choice is no known choice")


def _format(body: Mapping[str, Any]) -> ResponseFormat | None:
    row = fields.mapping(fields.mapping(body, "text", "the body"), "format", "text")
    if row.get("type") == "json_object":
        return ResponseFormat()
    if row.get("type") != "json_schema":
        return None
    strict = row.get("strict")
    return ResponseFormat(fields.mapping(row, "schema", "text.format"),
                          fields.name(row, "name", "text.format", "response"),
                          strict if isinstance(strict, bool) else None)  # fmt: skip


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found = {ours: body[theirs] for ours, theirs in _SAMPLING.items() if body.get(theirs) is not None}
    for key, value in found.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise DialectError(f"{_SAMPLING[key]} is not a number")
    return found


def _converted(request: ModelRequest) -> dict[str, Any]:
    check_convertible(request, NAME)
    if request.sampling.get("stop"):
        raise refusal("a request with stop sequences", NAME)
    items: list[dict[str, Any]] = []
    for message in request.messages:
        items += _rendered(message, custom_names(request))
    body: dict[str, Any] = {"model": request.model, "input": items, "store": False}
    if request.system:
        body["instructions"] = request.system
    tools = convertible_tools(request, NAME)
    if tools:
        body["tools"] = [
            {"type": "function", "name": tool.name, "description": tool.description, "parameters": schema_of(tool),
             "strict": bool(tool.strict)} for tool in tools
        ]  # fmt: skip
    choice = request.tool_choice
    if choice is not None and tools:
        named = {"type": "function", "name": choice.name}
        body["tool_choice"] = named if choice.mode == "named" else choice.mode
        if choice.parallel is not None:
            body["parallel_tool_calls"] = choice.parallel
    form = request.response_format
    if form is not None and form.schema is None:
        body["text"] = {"format": {"type": "json_object"}}
    elif form is not None:
        row = {"type": "json_schema", "name": form.name, "schema": dict(form.schema or {}), "strict": form.strict}
        body["text"] = {"format": {key: value for key, value in row.items() if value is not None}}
    if request.effort is not None and request.dialect == "openai-chat":
        body["reasoning"] = {"effort": request.effort}
    return body | {theirs: request.sampling[ours] for ours, theirs in _SAMPLING.items() if ours in request.sampling}


def _rendered(message: Message, custom: frozenset[str]) -> list[dict[str, Any]]:
    match message.role:
        case "assistant":
            return rendered_items(message.parts, custom)
        case "tool":
            return [_result(part) for part in message.parts]
    content = [_rendered_part(part) for part in message.parts]
    role = "developer" if message.role == "system" else "user"
    return [{"type": "message", "role": role, "content": content}]


def _result(part: Part) -> dict[str, Any]:
    if not isinstance(part, ToolResult):
        raise refusal("a part of a tool message that is no tool result", NAME)
    only_text = all(isinstance(inner, Text) for inner in part.parts)
    output = plain_text(part.parts, "\n") if only_text else [_rendered_part(inner) for inner in part.parts]
    return {"type": "function_call_output", "call_id": part.call_id, "output": output}


def _rendered_part(part: Part) -> dict[str, Any]:
    match part:
        case Text(text) | Refusal(text):
            return {"type": "input_text", "text": text}
        case Media(kind="image"):
            return {"type": "input_image", "image_url": url_of(part), "detail": part.detail or "auto"}
        case Media(kind="file", url=None):
            return {"type": "input_file", "filename": part.name or "file", "file_data": url_of(part)}
        case Media(kind="file"):
            return {"type": "input_file", "file_url": part.url}
        case Other(dialect=dialect) if dialect == NAME:
            return dict(part.raw)
        case Other():
            raise refusal(part, NAME)
    raise refusal(f"a part of kind {type(part).__name__}", NAME)


def rendered_items(parts: Iterable[Part], custom: frozenset[str], *, response: bool = False) -> list[dict[str, Any]]:
    """Items of an assistant's message. custom: names of custom tools. response: with ids and status, as a response has
    them."""
    items: list[dict[str, Any]] = []
    for place, part in enumerate(parts):
        item = _rendered_item(part, place, custom)
        if response:
            item.setdefault("id", f"{_PREFIXES.get(item['type'], 'item')}_{place}")
            item["status"] = "completed"
        items.append(item)
    return items


_PREFIXES = {"message": "msg", "function_call": "fc", "custom_tool_call": "ctc", "reasoning": "rs"}


def _rendered_item(part: Part, place: int, custom: frozenset[str]) -> dict[str, Any]:
    match part:
        case Text(text):
            content = [{"type": "output_text", "text": text, "annotations": []}]
            return {"type": "message", "role": "assistant", "content": content}
        case Refusal(text):
            return {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": text}]}
        case ToolCall() if part.name in custom:
            return {"type": "custom_tool_call", "call_id": part.id, "name": part.name,
                    "input": custom_input(part.arguments)}  # fmt: skip
        case ToolCall():
            return {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": part.arguments or "{}"}
        case Reasoning(text, signature):
            summary = [{"type": "summary_text", "text": text}] if text else []
            return {"type": "reasoning", "id": part.id or f"rs_{place}", "summary": summary,
                    "encrypted_content": signature}  # fmt: skip
        case Other(dialect=dialect) if dialect == NAME:
            return dict(part.raw)
        case Other():
            raise refusal(part, NAME)
    raise refusal(f"a part of kind {type(part).__name__} in a message of the assistant", NAME)


# ---- responses ----


def response_head(request: ModelRequest, id: str, model: str) -> dict[str, Any]:
    """A response that has begun."""
    raw = request.raw if request.dialect == NAME else {}
    return {
        "id": id or "resp_rock", "object": "response", "created_at": int(time.time()), "status": "in_progress",
        "model": request.model or model, "output": [], "error": None, "incomplete_details": None,
        "instructions": raw.get("instructions"), "metadata": raw.get("metadata") or {},
        "parallel_tool_calls": raw.get("parallel_tool_calls", True), "temperature": raw.get("temperature"),
        "tool_choice": raw.get("tool_choice") or "auto", "tools": raw.get("tools") or [], "top_p": raw.get("top_p"),
        "usage": None,
    }  # fmt: skip


def response_end(response: ModelResponse) -> dict[str, Any]:
    """The fields of a response that change at its end."""
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(response.finish_reason or "")
    usage = response.usage
    return {
        "status": "incomplete" if reason else "completed", "incomplete_details": {"reason": reason} if reason else None,
        "usage": {
            "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion, "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        },
    }  # fmt: skip


def _usage(value: Any) -> Usage:
    row = value if isinstance(value, dict) else {}
    inputs, outputs = row.get("input_tokens_details"), row.get("output_tokens_details")
    return Usage(
        fields.count(row, "input_tokens"), fields.count(row, "output_tokens"),
        fields.count(inputs, "cached_tokens") if isinstance(inputs, dict) else 0,
        fields.count(outputs, "reasoning_tokens") if isinstance(outputs, dict) else 0,
    )  # fmt: skip
