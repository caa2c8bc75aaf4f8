"""OpenAI chat completions, with the extensions of vLLM and SGLang: reasoning, token ids, log probabilities."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from rock.gateway.dialects.chat_stream import ChatParser, ChatRenderer
from rock.gateway.dialects.fields import DialectError
from rock.gateway.dialects.parts import (
    STATUS,
    check_convertible,
    convertible_tools,
    estimate_tokens,
    media_of_url,
    own_body,
    passes_unchanged,
    plain_text,
    refusal,
    schema_of,
    url_of,
)

NAME = "openai-chat"
_SAMPLING = ("temperature", "top_p", "top_k", "stop", "seed", "presence_penalty", "frequency_penalty")
_ROLES: Mapping[str, Role] = {
    "user": "user", "assistant": "assistant", "tool": "tool", "system": "system", "developer": "system",
    "function": "tool",
}  # fmt: skip
_FINISH: Mapping[str, FinishReason] = {
    "stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls",
    "content_filter": "content_filter",
}  # fmt: skip
_FINISH_OUT = {"refusal": "stop", "pause": "stop"}
_ERROR_TYPES = {"unauthorized": "authentication_error", "budget": "budget_exceeded", "ended": "permission_error"}
_AUDIO_FORMATS = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/mpeg": "mp3", "audio/mp3": "mp3"}
_CALL = "tool_calls."  # before the type of a tool call of another type than function
# Without a form in other dialects.
_UNCONVERTIBLE = ("functions", "function_call", "audio", "prediction", "web_search_options")


class OpenAIChat:
    """The dialect "openai-chat"."""

    name = NAME

    # ---- requests ----

    def parse_request(
        self, body: dict[str, Any], model_of_path: str | None = None, stream: bool | None = None
    ) -> ModelRequest:
        fields.checked(body)
        if not isinstance(body.get("messages"), list):
            raise DialectError("messages is not a list")
        system: list[str] = []
        messages: list[Message] = []
        for place, row in enumerate(fields.rows(body, "messages", "the body", fields.MAX_MESSAGES)):
            where = f"messages[{place}]"
            message = _message(row, where)
            if message.role == "system" and not messages and all(isinstance(part, Text) for part in message.parts):
                system.append(plain_text(message.parts))
            elif message.role == "tool" and messages and messages[-1].role == "tool":
                messages[-1] = Message("tool", messages[-1].parts + message.parts)
            else:
                messages.append(message)
        return ModelRequest(
            NAME, fields.model_name(body, model_of_path), tuple(messages), "\n\n".join(system) if system else None,
            tuple(_tool(row) for row in fields.rows(body, "tools", "the body", fields.MAX_TOOLS)), _choice(body),
            sampling_of(body), bool(body.get("stream")) if stream is None else stream, body, _format(body),
            fields.optional_text(body, "reasoning_effort", "the body"), _unconvertible(body),
        )  # fmt: skip

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool = False) -> dict[str, Any]:
        if request.dialect == NAME and request.raw:
            body = dict(request.raw)
            replace_sampling(body, sampling_of(body), request.sampling)
        else:
            body = _converted(request)
        if request.model:
            body["model"] = request.model
        body.pop("stream_options", None) if not stream else None
        body["stream"] = stream
        if stream:
            options = body.get("stream_options")
            body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        if token_fields:
            body |= {"logprobs": True, "return_token_ids": True, "return_prompt_token_ids": True}
        return body

    # ---- responses ----

    def parse_response(self, body: dict[str, Any]) -> ModelResponse:
        own_body(body)
        choices = fields.rows(body, "choices", "the response", fields.MAX_CHOICES)
        if not choices:
            raise DialectError("choices: the response has none")
        choice = choices[0]
        row = choice.get("message")
        if not isinstance(row, dict):
            raise DialectError("choices[0].message is not an object")
        message = _message({**row, "role": "assistant"}, "choices[0].message")
        finish = _FINISH.get(fields.text(choice, "finish_reason", "choices[0]", ""))
        if finish == "stop" and any(isinstance(part, Refusal) for part in message.parts):
            finish = "refusal"
        if finish == "stop" and any(isinstance(part, ToolCall) for part in message.parts):
            finish = "tool_calls"  # of a forced tool
        prompt_ids, ids, logprobs = _tokens(body, choice)
        sequence = choice.get("stop_reason")
        metadata = body.get("metadata")
        version = metadata.get("weight_version") if isinstance(metadata, dict) else None
        return ModelResponse(
            fields.text(body, "id", "the response", ""), fields.text(body, "model", "the response", ""), message,
            finish, usage_of(body.get("usage")), prompt_ids, ids, logprobs,
            version if isinstance(version, str) else None, body, NAME, sequence if isinstance(sequence, str) else None,
        )  # fmt: skip

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        if passes_unchanged(response, NAME):
            return self.strip_token_fields(cast("dict[str, Any]", response.raw), request)
        message = rendered_message(response)
        return {
            "id": response.id or "chatcmpl-rock", "object": "chat.completion", "created": int(time.time()),
            "model": request.model or response.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_of(response)}],
            "usage": rendered_usage(response.usage),
        }  # fmt: skip

    def stream_parser(self) -> ChatParser:
        return ChatParser(self.parse_response)

    def stream_renderer(self, request: ModelRequest) -> ChatRenderer:
        return ChatRenderer(request, rendered_message, finish_of, rendered_usage, self.render_error)

    # ---- the rest ----

    def render_error(self, kind: str, message: str) -> tuple[int, dict[str, Any]]:
        status = STATUS.get(kind, 500)
        name = _ERROR_TYPES.get(kind, "invalid_request_error" if status < 500 else "server_error")
        return status, {"error": {"message": message, "type": name, "param": None, "code": kind}}

    def strip_token_fields(self, body: dict[str, Any], request: ModelRequest | None = None) -> dict[str, Any]:
        hidden = _HIDDEN_CHOICE if not (request and request.raw.get("logprobs")) else _HIDDEN_CHOICE - {"logprobs"}
        kept = {key: value for key, value in body.items() if key not in _HIDDEN}
        choices = body.get("choices")
        if isinstance(choices, list):
            kept["choices"] = [
                {key: value for key, value in choice.items() if key not in hidden} if isinstance(choice, dict)
                else choice for choice in choices
            ]  # fmt: skip
        return kept

    def count_tokens(self, request: ModelRequest) -> int:
        return estimate_tokens(request)

    def upstream_path(self, model: str, stream: bool) -> str:
        return "/v1/chat/completions"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}


_HIDDEN = frozenset({"prompt_token_ids", "prompt_logprobs", "kv_transfer_params", "sglext"})
_HIDDEN_CHOICE = frozenset({"token_ids", "prompt_token_ids", "logprobs", "meta_info", "hidden_states",
                            "routed_experts"})  # fmt: skip


# ---- requests ----

_PLAIN = {"role", "content"}
_PLAIN_ROLES: Mapping[str, Role] = {name: role for name, role in _ROLES.items() if role != "tool"}


def _message(row: Mapping[str, Any], where: str) -> Message:
    if row.keys() == _PLAIN and type(content := row["content"]) is str and content:
        plain = _PLAIN_ROLES.get(row["role"]) if type(row["role"]) is str else None
        if plain is not None:  # the most common message
            return Message(plain, (Text(content),))
    role = _ROLES.get(fields.text(row, "role", where))
    if role is None:
        raise DialectError(f"{where}.role is {str(row['role'])[:40]!r}, which is no role")
    content = _content(row.get("content"), f"{where}.content")
    if role == "tool":
        call_id = fields.name(row, "tool_call_id", where, "") or fields.name(row, "name", where, "")
        return Message(role, (ToolResult(call_id, tuple(content), name=fields.optional_text(row, "name", where)),))
    if role != "assistant":
        return Message(role, tuple(content))
    parts: list[Part] = []
    reasoning = row.get("reasoning_content") or row.get("reasoning")
    if isinstance(reasoning, str):
        parts.append(Reasoning(reasoning))
    parts += content
    if declined := fields.optional_text(row, "refusal", where):
        parts.append(Refusal(declined))
    calls = fields.rows(row, "tool_calls", where, fields.MAX_PARTS)
    parts += [_tool_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]
    old = row.get("function_call")
    if isinstance(old, dict):
        parts.append(_function(old, fields.text(old, "name", where, ""), f"{where}.function_call"))
    return Message(role, tuple(parts))


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
    if isinstance(row, str):
        return Text(row)
    if not isinstance(row, dict):
        raise DialectError(f"{where} is not an object")
    match row.get("type"):
        case "text" | "input_text" | "output_text":
            return Text(fields.text(row, "text", where))
        case "refusal":
            return Refusal(fields.text(row, "refusal", where))
        case "image_url":
            source = row.get("image_url")
            source = {"url": source} if isinstance(source, str) else source
            if not isinstance(source, dict):
                raise DialectError(f"{where}.image_url is not an object")
            detail = fields.optional_text(source, "detail", where)
            return media_of_url("image", fields.text(source, "url", f"{where}.image_url"), detail)
        case "input_audio":
            audio = fields.mapping(row, "input_audio", where)
            kind = fields.text(audio, "format", where, "wav")
            media_type = "audio/mpeg" if kind == "mp3" else f"audio/{kind}"
            return Media("audio", media_type, fields.text(audio, "data", f"{where}.input_audio"))
        case "file":
            file = fields.mapping(row, "file", where)
            data = fields.optional_text(file, "file_data", where)
            if data is not None and data.startswith("data:"):
                return media_of_url("file", data, name=fields.optional_text(file, "filename", where))
    return Other(NAME, str(row.get("type"))[:100], row)


def _tool_call(row: Mapping[str, Any], where: str) -> Part:
    if row.get("type") not in (None, "function"):
        return Other(NAME, f"{_CALL}{str(row['type'])[:100]}", row)
    call = _function(fields.mapping(row, "function", where), fields.name(row, "id", where, ""), where)
    google = row.get("extra_content")
    google = google.get("google") if isinstance(google, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    if isinstance(signature, str):
        return ToolCall(call.id, call.name, call.arguments, signature)
    return call


def _function(row: Mapping[str, Any], id: str, where: str) -> ToolCall:
    return ToolCall(id, fields.name(row, "name", where), fields.arguments(row.get("arguments"), f"{where}.arguments"))


def _tool(row: Mapping[str, Any]) -> Tool:
    kind = fields.text(row, "type", "tools", "function")
    if kind == "custom":
        row = fields.mapping(row, "custom", "tools")
        return Tool(fields.name(row, "name", "tools"), fields.text(row, "description", "tools", ""), kind="custom")
    if kind != "function":
        return Tool(fields.name(row, "name", "tools", kind), kind="provider")
    function = fields.mapping(row, "function", "tools")
    strict = function.get("strict")
    return Tool(
        fields.name(function, "name", "tools.function"), fields.text(function, "description", "tools.function", ""),
        fields.mapping(function, "parameters", "tools.function"), strict=strict if isinstance(strict, bool) else None,
    )  # fmt: skip


def _choice(body: Mapping[str, Any]) -> ToolChoice | None:
    value, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    parallel = parallel if isinstance(parallel, bool) else None
    if value is None:
        return None if parallel is None else ToolChoice(parallel=parallel)
    if value in ("auto", "none", "required"):
        return ToolChoice(value, parallel=parallel)
    if isinstance(value, dict) and isinstance(function := value.get("function") or value.get("custom"), dict):
        return ToolChoice("named", fields.name(function, "name", "tool_choice.function"), parallel)
    if isinstance(value, dict):
        return ToolChoice("auto", parallel=parallel)
    raise DialectError("tool_choice is no known choice")


def _format(body: Mapping[str, Any]) -> ResponseFormat | None:
    value = fields.mapping(body, "response_format", "the body")
    if value.get("type") == "json_object":
        return ResponseFormat()
    if value.get("type") != "json_schema":
        return None
    schema = fields.mapping(value, "json_schema", "response_format")
    strict = schema.get("strict")
    return ResponseFormat(fields.mapping(schema, "schema", "response_format"),
                          fields.name(schema, "name", "response_format", "response"),
                          strict if isinstance(strict, bool) else None)  # fmt: skip


def _unconvertible(body: Mapping[str, Any]) -> str | None:
    if body.get("n") not in (None, 1):
        return "a request for several choices (n)"
    found = next((key for key in _UNCONVERTIBLE if body.get(key)), None)
    return None if found is None else f"the field {found!r}"


def sampling_of(body: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: body[key] for key in _SAMPLING if body.get(key) is not None}
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is not None:
        found["max_tokens"] = limit
    for key, value in found.items():
        wanted = list if key == "stop" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise DialectError(f"{key} is not a {'list of texts' if key == 'stop' else 'number'}")
    return found


def replace_sampling(body: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Change the parameters of a body that differ."""
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    for key in {*before, *after}:
        if before.get(key) == after.get(key):
            continue
        field = limit if key == "max_tokens" else key
        if after.get(key) is None:
            body.pop(field, None)
        else:
            body[field] = after[key]


def _converted(request: ModelRequest) -> dict[str, Any]:
    check_convertible(request, NAME)
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": request.system})
    for message in request.messages:
        messages += _rendered(message)
    body: dict[str, Any] = {"model": request.model, "messages": messages}
    tools = convertible_tools(request, NAME)
    if tools:
        body["tools"] = [_rendered_tool(tool) for tool in tools]
    choice = request.tool_choice
    if choice is not None and tools:
        named = {"type": "function", "function": {"name": choice.name}}
        body["tool_choice"] = named if choice.mode == "named" else choice.mode
        if choice.parallel is not None:
            body["parallel_tool_calls"] = choice.parallel
    form = request.response_format
    if form is not None and form.schema is None:
        body["response_format"] = {"type": "json_object"}
    elif form is not None:
        schema = {"name": form.name, "schema": dict(form.schema or {}), "strict": form.strict}
        schema = {key: value for key, value in schema.items() if value is not None}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.effort is not None and request.dialect == "openai-responses":
        body["reasoning_effort"] = request.effort
    return body | dict(request.sampling)


def _rendered_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": schema_of(tool)}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _rendered(message: Message) -> list[dict[str, Any]]:
    """The messages of one; several for tool results, followed by their images, which tool messages cannot have."""
    if message.role == "assistant":
        return [_assistant(message)]
    if message.role != "tool":
        parts = [_rendered_part(part) for part in message.parts]
        only_text = all(part["type"] == "text" for part in parts)
        return [{"role": message.role, "content": plain_text(message.parts) if only_text and len(parts) < 2 else parts}]
    results: list[dict[str, Any]] = []
    media: list[dict[str, Any]] = []
    for result in message.parts:
        if not isinstance(result, ToolResult):
            raise refusal("a part of a tool message that is no tool result", NAME)
        texts = [part for part in result.parts if isinstance(part, Text)]
        others = [_rendered_part(part) for part in result.parts if not isinstance(part, Text)]
        content = plain_text(texts, "\n")
        if others and not content:
            content = "(the content follows)"
        results.append({"role": "tool", "tool_call_id": result.call_id, "content": content})
        media += others
    return [*results, {"role": "user", "content": media}] if media else results


def _assistant(message: Message) -> dict[str, Any]:
    content: list[Part] = []
    calls: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {"reasoning_content": [], "refusal": []}
    for part in message.parts:
        match part:
            case ToolCall():
                calls.append(_rendered_call(part))
            case Other(dialect=dialect, kind=kind) if dialect == NAME and kind.startswith(_CALL):
                calls.append(dict(part.raw))
            case Reasoning(text):
                texts["reasoning_content"].append(text)
            case Refusal(text):
                texts["refusal"].append(text)
            case _:
                content.append(part)
    only_text = all(isinstance(part, Text) for part in content)
    row: dict[str, Any] = {"role": "assistant", "content": (plain_text(content) or None) if only_text
                           else [_rendered_part(part) for part in content]}  # fmt: skip
    row |= {key: text for key, parts in texts.items() if (text := "".join(parts))}
    return row | ({"tool_calls": calls} if calls else {})


def _rendered_call(call: ToolCall) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"},
    }  # fmt: skip
    if call.signature is not None:
        row["extra_content"] = {"google": {"thought_signature": call.signature}}
    return row


def _rendered_part(part: Part) -> dict[str, Any]:
    match part:
        case Text(text) | Refusal(text):
            return {"type": "text", "text": text}
        case Media(kind="image"):
            image = {"url": url_of(part)} | ({"detail": part.detail} if part.detail else {})
            return {"type": "image_url", "image_url": image}
        case Media(kind="audio", data=str(data)) if part.media_type in _AUDIO_FORMATS:
            return {"type": "input_audio", "input_audio": {"data": data, "format": _AUDIO_FORMATS[part.media_type]}}
        case Media(kind="file", data=str()):
            return {"type": "file", "file": {"filename": part.name or "file", "file_data": url_of(part)}}
        case Other(dialect=dialect) if dialect == NAME:
            return dict(part.raw)
        case Other():
            raise refusal(part, NAME)
    raise refusal(f"a part of kind {type(part).__name__}", NAME)


# ---- responses ----


def usage_of(value: Any) -> Usage:
    """Usage of a chat completion; numbers that are missing or wrong are 0."""
    row = value if isinstance(value, dict) else {}
    prompt, completion = row.get("prompt_tokens_details"), row.get("completion_tokens_details")
    return Usage(
        fields.count(row, "prompt_tokens"), fields.count(row, "completion_tokens"),
        fields.count(prompt, "cached_tokens") if isinstance(prompt, dict) else 0,
        fields.count(completion, "reasoning_tokens") if isinstance(completion, dict) else 0,
    )  # fmt: skip


def rendered_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion, "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }  # fmt: skip


def rendered_message(response: ModelResponse) -> dict[str, Any]:
    return {"refusal": None, **_assistant(response.message)}


def finish_of(response: ModelResponse) -> str:
    """finish_reason; "stop" for a response without one."""
    reason = response.finish_reason or "stop"
    if reason == "refusal" and not any(isinstance(part, Refusal) for part in response.message.parts):
        return "content_filter"
    return _FINISH_OUT.get(reason, reason)


def _tokens(
    body: Mapping[str, Any], choice: Mapping[str, Any]
) -> tuple[list[int] | None, list[int] | None, list[float] | None]:
    """Prompt ids, ids and log probabilities, as vLLM and SGLang send them. Log probabilities of another number than the
    ids are those of other tokens, and are left out."""
    prompt = body.get("prompt_token_ids")
    prompt_ids = fields.token_ids(prompt if prompt is not None else choice.get("prompt_token_ids"), "prompt_token_ids")
    ids = fields.token_ids(choice.get("token_ids"), "choices[0].token_ids")
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    logprobs = None
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        logprobs = fields.logprob_values([row.get("logprob") for row in content], "choices[0].logprobs")
    meta = choice.get("meta_info")
    output = meta.get("output_token_logprobs") if isinstance(meta, dict) else None
    if ids is None and isinstance(output, list) and all(isinstance(row, list) and len(row) > 1 for row in output):
        ids = fields.token_ids([row[1] for row in output], "meta_info.output_token_logprobs")
        logprobs = fields.logprob_values([row[0] for row in output], "meta_info.output_token_logprobs")
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        logprobs = None
    return prompt_ids, ids, logprobs
