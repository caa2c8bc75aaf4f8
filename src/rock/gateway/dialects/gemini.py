"""Gemini: generateContent and streamGenerateContent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast
from urllib.parse import quote

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
from rock.gateway.dialects.fields import DialectError
from rock.gateway.dialects.gemini_stream import GeminiParser, GeminiRenderer
from rock.gateway.dialects.parts import (
    STATUS,
    add_turn,
    check_convertible,
    convertible_tools,
    estimate_tokens,
    own_body,
    passes_unchanged,
    plain_text,
    refusal,
    schema_of,
    tool_names,
)

NAME = "gemini"
_SAMPLING = {
    "temperature": "temperature", "top_p": "topP", "top_k": "topK", "max_tokens": "maxOutputTokens",
    "stop": "stopSequences", "seed": "seed", "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}  # fmt: skip
_FILTERED = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "LANGUAGE"})
_FINISH_OUT = {"length": "MAX_TOKENS", "refusal": "SAFETY", "content_filter": "SAFETY"}
_ERRORS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 502: "INTERNAL",
           503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}  # fmt: skip
_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY", "named": "ANY"}
_HIDDEN = frozenset({"logprobsResult", "avgLogprobs", "token_ids"})


class Gemini:
    """The dialect "gemini". Field names are accepted in camel case and in snake case."""

    name = NAME

    # ---- requests ----

    def parse_request(
        self, body: dict[str, Any], model_of_path: str | None = None, stream: bool | None = None
    ) -> ModelRequest:
        fields.checked(body)
        inner = fields.mapping(body, "generateContentRequest", "the body")  # of countTokens
        given = inner if inner and "contents" not in body else body
        if not isinstance(given.get("contents"), (list, str)):
            raise DialectError("contents is not a list")
        system = fields.mapping(given, _key(given, "systemInstruction"), "the body")
        config = fields.mapping(given, _key(given, "generationConfig"), "the body")
        count = config.get(_key(config, "candidateCount"))
        unconvertible = None
        if given.get(_key(given, "cachedContent")):
            unconvertible = "the field 'cachedContent'"
        elif count not in (None, 1):
            unconvertible = "a request for several candidates (candidateCount)"
        return ModelRequest(
            NAME, fields.model_name(given, model_of_path).removeprefix("models/"), tuple(_messages(given)),
            plain_text(_parts(system, "systemInstruction", _Ids("")), "\n\n") or None, tuple(_tools(given)),
            _choice(given), _sampling(config), bool(stream), body, _format(config), None, unconvertible,
        )  # fmt: skip

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool = False) -> dict[str, Any]:
        if request.dialect == NAME and request.raw:
            body = dict(request.raw)
            key = _key(body, "generationConfig")
            config = dict(fields.mapping(body, key, "the body"))
            before = _sampling(config)
            for ours, theirs in _SAMPLING.items():
                if before.get(ours) == request.sampling.get(ours):
                    continue
                field = _key(config, theirs)
                if request.sampling.get(ours) is None:
                    config.pop(field, None)
                else:
                    config[field] = request.sampling[ours]
        else:
            body, key = _converted(request), "generationConfig"
            config = body.pop(key)
        if token_fields:
            config["responseLogprobs"] = True
        if config:
            body[key] = config
        return body

    # ---- responses ----

    def parse_response(self, body: dict[str, Any]) -> ModelResponse:
        own_body(body)
        candidates = fields.rows(body, "candidates", "the response", fields.MAX_CHOICES)
        blocked = fields.mapping(body, "promptFeedback", "the response").get("blockReason")
        if not candidates and not blocked:
            raise DialectError("candidates: the response has none")
        candidate = candidates[0] if candidates else {}
        ids = _Ids(call_prefix(body))
        parts = _parts(fields.mapping(candidate, "content", "candidates[0]"), "candidates[0].content", ids)
        reason = fields.text(candidate, "finishReason", "candidates[0]", "")
        finish: FinishReason | None = None
        if blocked or reason in _FILTERED:
            finish = "content_filter"
        elif reason:
            finish = "length" if reason == "MAX_TOKENS" else "stop"
        if finish == "stop" and any(isinstance(part, ToolCall) for part in parts):
            finish = "tool_calls"
        chosen = fields.mapping(candidate, "logprobsResult", "candidates[0]").get("chosenCandidates")
        token_ids, logprobs = _chosen(chosen)
        return ModelResponse(
            fields.text(body, "responseId", "the response", ""), fields.text(body, "modelVersion", "the response", ""),
            Message("assistant", tuple(parts)), finish, _usage(body.get("usageMetadata")), None, token_ids, logprobs,
            raw=body, dialect=NAME,
        )  # fmt: skip

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        if passes_unchanged(response, NAME):
            return self.strip_token_fields(cast("dict[str, Any]", response.raw), request)
        parts = [rendered for part in response.message.parts for rendered in _rendered_part(part, {})]
        content = {"role": "model", "parts": parts}
        return {
            "candidates": [{"content": content, "finishReason": finish_of(response), "index": 0}],
            "usageMetadata": rendered_usage(response.usage), "modelVersion": request.model or response.model,
            "responseId": response.id or "rock",
        }  # fmt: skip

    def stream_parser(self) -> GeminiParser:
        return GeminiParser(self.parse_response, call_prefix)

    def stream_renderer(self, request: ModelRequest) -> GeminiRenderer:
        return GeminiRenderer(request, self.render_response, self.render_error)

    # ---- the rest ----

    def render_error(self, kind: str, message: str) -> tuple[int, dict[str, Any]]:
        status = STATUS.get(kind, 500)
        return status, {"error": {"code": status, "message": message, "status": _ERRORS.get(status, "INTERNAL")}}

    def strip_token_fields(self, body: dict[str, Any], request: ModelRequest | None = None) -> dict[str, Any]:
        candidates = body.get("candidates")
        if not isinstance(candidates, list):
            return dict(body)
        config = request.raw.get(_key(request.raw, "generationConfig")) if request is not None else None
        if isinstance(config, dict) and config.get(_key(config, "responseLogprobs")):
            return dict(body)
        kept = [
            {key: value for key, value in row.items() if key not in _HIDDEN} if isinstance(row, dict) else row
            for row in candidates
        ]
        return {**body, "candidates": kept}

    def count_tokens(self, request: ModelRequest) -> int:
        return estimate_tokens(request)

    def upstream_path(self, model: str, stream: bool) -> str:
        name = quote(model.removeprefix("models/"), safe="")
        return f"/v1beta/models/{name}:{'streamGenerateContent?alt=sse' if stream else 'generateContent'}"

    def auth_headers(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}


def call_prefix(body: Mapping[str, Any]) -> str:
    """The first part of the ids of tool calls that have none; from the id of the response."""
    found = body.get("responseId")
    return f"call_{found[-16:]}_" if isinstance(found, str) and found else "call_"


def _key(row: Mapping[str, Any], name: str) -> str:
    """The name of a field, or its snake case form if the row has that one."""
    if name in row:
        return name
    snake = _snake(name)
    return snake if snake in row else name


@cache
def _snake(name: str) -> str:
    """Called with names of this module only."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


class _Ids:
    """Ids of tool calls without one: by their place. Results refer to the first unanswered call of the same name."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self._open: dict[str, list[str]] = {}
        self._given: set[str] = set()

    def of_call(self, row: Mapping[str, Any], name: str) -> str:
        found = fields.name(row, "id", "functionCall", "") or f"{self._prefix}{self._count}"
        self._count += 1
        self._open.setdefault(name, []).append(found)
        self._given.add(found)
        return found

    def of_result(self, row: Mapping[str, Any], name: str) -> str:
        given = fields.name(row, "id", "functionResponse", "")
        waiting = self._open.get(name, [])
        if given in waiting:
            waiting.remove(given)
            return given
        if given in self._given:
            return given
        return waiting.pop(0) if waiting else given or f"{self._prefix}{name}"


# ---- requests ----


def _messages(body: Mapping[str, Any]) -> list[Message]:
    if isinstance(body["contents"], str):
        return [Message("user", (Text(body["contents"]),))]
    messages: list[Message] = []
    ids = _Ids("call_")
    for place, row in enumerate(fields.rows(body, "contents", "the body", fields.MAX_MESSAGES)):
        where = f"contents[{place}]"
        role = fields.text(row, "role", where, "user")
        parts = _parts(row, where, ids)
        match role:
            case "model" | "assistant":
                messages.append(Message("assistant", tuple(parts)))
            case "system":
                messages.append(Message("system", tuple(parts)))
            case "user" | "function" | "tool" | "":
                add_turn(messages, parts)
                if not parts:
                    messages.append(Message("user", ()))
            case _:
                raise DialectError(f"{where}.role is {role[:40]!r}; it is user or model")
    return messages


def _parts(content: Mapping[str, Any], where: str, ids: _Ids) -> list[Part]:
    if isinstance(content.get("parts"), dict):
        content = {**content, "parts": [content["parts"]]}
    found: list[Part] = []
    for place, row in enumerate(fields.rows(content, "parts", where, fields.MAX_PARTS)):
        part = _part(row, f"{where}.parts[{place}]", ids)
        if part is not None:
            found.append(part)
    return found


def _part(row: Mapping[str, Any], where: str, ids: _Ids) -> Part | None:
    signature = fields.optional_text(row, _key(row, "thoughtSignature"), where)
    if (text := fields.optional_text(row, "text", where)) is not None:
        if row.get("thought"):
            return Reasoning(text, signature)
        if text:
            return Text(text)
        return Reasoning("", signature) if signature else None
    call = fields.mapping(row, _key(row, "functionCall"), where)
    if call:
        name = fields.name(call, "name", f"{where}.functionCall")
        return ToolCall(ids.of_call(call, name), name, fields.arguments(call.get("args"), f"{where}.args"), signature)
    result = fields.mapping(row, _key(row, "functionResponse"), where)
    if result:
        return _result(result, f"{where}.functionResponse", ids)
    inline = fields.mapping(row, _key(row, "inlineData"), where)
    file = fields.mapping(row, _key(row, "fileData"), where)
    if inline or file:
        source = inline or file
        media_type = fields.text(source, _key(source, "mimeType"), where, "")
        kind = media_type.partition("/")[0]
        kind = kind if kind in ("image", "audio") else "file"
        if inline:
            return Media(cast(Any, kind), media_type, fields.text(inline, "data", f"{where}.inlineData"))
        url = fields.text(file, _key(file, "fileUri"), f"{where}.fileData")
        if url.lower().startswith(("https://", "http://", "gs://")) and "generativelanguage.googleapis" not in url:
            return Media(cast(Any, kind), media_type, url=url)
    return Other(NAME, next(iter(row), "part")[:100], row)


def _result(row: Mapping[str, Any], where: str, ids: _Ids) -> ToolResult:
    name = fields.name(row, "name", where)
    value = row.get("response")
    error = isinstance(value, dict) and set(value) == {"error"}
    if isinstance(value, dict) and len(value) == 1 and (error or set(value) <= {"output", "result"}):
        value = next(iter(value.values()))
    text = value if isinstance(value, str) else "" if value is None else fields.dumps(value)
    more = [part for part in _parts(row, where, ids) if isinstance(part, (Text, Media))]
    return ToolResult(ids.of_result(row, name), (*((Text(text),) if text else ()), *more), error, name)


def _tools(body: Mapping[str, Any]) -> list[Tool]:
    found: list[Tool] = []
    for row in fields.rows(body, "tools", "the body", fields.MAX_TOOLS):
        key = _key(row, "functionDeclarations")
        for function in fields.rows(row, key, "tools", fields.MAX_TOOLS):
            schema = fields.mapping(function, _key(function, "parametersJsonSchema"), "functionDeclarations")
            if not schema:
                schema = _json_schema(fields.mapping(function, "parameters", "functionDeclarations"))
            found.append(Tool(fields.name(function, "name", "functionDeclarations"),
                              fields.text(function, "description", "functionDeclarations", ""), schema))  # fmt: skip
        for other in row:
            if other != key:
                kind: Any = "other" if other in ("computerUse", "computer_use") else "provider"
                found.append(Tool(other[: fields.MAX_NAME], kind=kind))
        if len(found) > fields.MAX_TOOLS:
            raise DialectError(f"tools: there are more than {fields.MAX_TOOLS}")
    return found


_SCHEMA_MAPS = frozenset({"properties", "$defs", "defs"})
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalProperties"})


def _json_schema(schema: Any) -> Any:
    """A JSON schema of one of Gemini's, with types in lower case and `nullable` as a type."""
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            found[key] = [value.lower(), "null"] if schema.get("nullable") is True else value.lower()
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            found[key] = {name: _json_schema(inner) for name, inner in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            found[key] = [_json_schema(inner) for inner in value]
        elif key in _SCHEMAS:
            found[key] = _json_schema(value)
        elif key != "nullable":
            found[key] = value
    return found


def _choice(body: Mapping[str, Any]) -> ToolChoice | None:
    config = fields.mapping(body, _key(body, "toolConfig"), "the body")
    calling = fields.mapping(config, _key(config, "functionCallingConfig"), "toolConfig")
    names = calling.get(_key(calling, "allowedFunctionNames"))
    match calling.get("mode"):
        case "ANY" if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
            return ToolChoice("named", names[0])
        case "ANY":
            return ToolChoice("required")
        case "NONE":
            return ToolChoice("none")
        case "AUTO" | "VALIDATED":
            return ToolChoice("auto")
    return None


def _format(config: Mapping[str, Any]) -> ResponseFormat | None:
    if config.get(_key(config, "responseMimeType")) != "application/json":
        return None
    schema = fields.mapping(config, _key(config, "responseJsonSchema"), "generationConfig")
    if not schema:
        schema = _json_schema(fields.mapping(config, _key(config, "responseSchema"), "generationConfig"))
    return ResponseFormat(schema or None)


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ours, theirs in _SAMPLING.items():
        value = config.get(_key(config, theirs))
        if value is None:
            continue
        if not isinstance(value, list if ours == "stop" else (int, float)) or isinstance(value, bool):
            raise DialectError(f"{theirs} is not a {'list of texts' if ours == 'stop' else 'number'}")
        found[ours] = value
    return found


def _converted(request: ModelRequest) -> dict[str, Any]:
    check_convertible(request, NAME)
    names = tool_names(request.messages)
    contents: list[dict[str, Any]] = []
    for message in request.messages:
        role = "model" if message.role == "assistant" else "user"
        parts = [rendered for part in message.parts for rendered in _rendered_part(part, names)]
        if not parts:
            continue
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        else:
            contents.append({"role": role, "parts": parts})
    body: dict[str, Any] = {"contents": contents}
    if request.system:
        body["systemInstruction"] = {"role": "user", "parts": [{"text": request.system}]}
    tools = convertible_tools(request, NAME)
    if tools:
        body["tools"] = [{"functionDeclarations": [
            {"name": tool.name, "description": tool.description, "parametersJsonSchema": schema_of(tool)}
            for tool in tools
        ]}]  # fmt: skip
    choice = request.tool_choice
    if choice is not None and tools:
        calling: dict[str, Any] = {"mode": _MODES[choice.mode]}
        if choice.mode == "named":
            calling["allowedFunctionNames"] = [choice.name]
        body["toolConfig"] = {"functionCallingConfig": calling}
    config = {theirs: request.sampling[ours] for ours, theirs in _SAMPLING.items() if ours in request.sampling}
    form = request.response_format
    if form is not None:
        config["responseMimeType"] = "application/json"
        if form.schema is not None:
            config["responseJsonSchema"] = dict(form.schema)
    body["generationConfig"] = config
    return body


def _rendered_part(part: Part, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parts of one; several for a tool result with media; none for an empty text."""
    match part:
        case Text(text) | Refusal(text):
            return [{"text": text}] if text else []
        case Reasoning(text, signature):
            row: dict[str, Any] = {"text": text, "thought": True}
            return [{**row, "thoughtSignature": signature} if signature else row]
        case ToolCall():
            call = {"id": part.id, "name": part.name, "args": fields.argument_object(part.arguments)}
            row = {"functionCall": call}
            return [{**row, "thoughtSignature": part.signature} if part.signature else row]
        case ToolResult():
            text = plain_text(part.parts, "\n")
            name = part.name or names.get(part.call_id) or part.call_id
            row = {"functionResponse": {"id": part.call_id, "name": name,
                                        "response": {"error" if part.is_error else "output": text}}}  # fmt: skip
            media = [inner for inner in part.parts if not isinstance(inner, (Text, Refusal))]
            return [row, *(rendered for inner in media for rendered in _rendered_part(inner, names))]
        case Media(url=None):
            data = {"mimeType": part.media_type or "application/octet-stream", "data": part.data or ""}
            return [{"inlineData": data}]
        case Media():
            file = {"fileUri": part.url} | ({"mimeType": part.media_type} if part.media_type else {})
            return [{"fileData": file}]
        case Other(dialect=dialect) if dialect == NAME:
            return [dict(part.raw)]
    raise refusal(part, NAME)


# ---- responses ----


def _chosen(value: Any) -> tuple[list[int] | None, list[float] | None]:
    """Token ids and log probabilities of logprobsResult.chosenCandidates."""
    if not isinstance(value, list) or not value:
        return None, None
    if not all(isinstance(row, dict) and row.get("tokenId") is not None for row in value):
        return None, None
    return (fields.token_ids([row["tokenId"] for row in value], "chosenCandidates.tokenId"),
            fields.logprob_values([row.get("logProbability") for row in value], "logProbability"))  # fmt: skip


def _usage(value: Any) -> Usage:
    row = value if isinstance(value, dict) else {}
    reasoning = fields.count(row, "thoughtsTokenCount")
    prompt = fields.count(row, "promptTokenCount") + fields.count(row, "toolUsePromptTokenCount")
    completion = fields.count(row, "candidatesTokenCount") + reasoning
    return Usage(prompt, completion, fields.count(row, "cachedContentTokenCount"), reasoning)


def rendered_usage(usage: Usage) -> dict[str, Any]:
    return {
        "promptTokenCount": usage.prompt, "candidatesTokenCount": max(0, usage.completion - usage.reasoning),
        "thoughtsTokenCount": usage.reasoning, "cachedContentTokenCount": usage.cached,
        "totalTokenCount": usage.prompt + usage.completion,
    }  # fmt: skip


def finish_of(response: ModelResponse) -> str:
    """finishReason; "STOP" for a response without one."""
    return _FINISH_OUT.get(response.finish_reason or "stop", "STOP")
