"""Rules of conversion that all dialects share: refusals, data URLs, tool calls, error statuses, estimates."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from rock.gateway.call import (
    Media,
    Message,
    ModelRequest,
    ModelResponse,
    Other,
    Part,
    Refusal,
    Text,
    Tool,
    ToolCall,
    ToolResult,
)
from rock.gateway.dialects.fields import DialectError, checked, dumps, loads

_DATA_URL = re.compile(r"data:([A-Za-z0-9.+-]+/[A-Za-z0-9.+-]+)?(?:;[A-Za-z0-9=._-]+)*;base64,", re.ASCII)
_IMAGE_TOKENS = 1_000
# HTTP statuses that the client programs do not retry for final errors: 409 and 429 are retried by most of them.
STATUS = {
    "budget": 400, "bad_request": 400, "unsupported": 400, "unauthorized": 401, "ended": 403, "upstream": 502,
    "overloaded": 503, "timeout": 504,
}  # fmt: skip
CUSTOM_PARAMETERS: Mapping[str, Any] = {
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False,
}  # fmt: skip


def refusal(part: Other | Tool | str, dialect: str) -> DialectError:
    """The error for what has no form in a dialect."""
    match part:
        case Other():
            what = f"{part.kind!r} of dialect {part.dialect}"
        case Tool():
            what = f"the tool {part.name!r}, whose schema is known to its provider only,"
        case str():
            what = part
    return DialectError(f"{what} cannot be converted to dialect {dialect}; use an upstream of the agent's dialect")


def check_convertible(request: ModelRequest, dialect: str) -> None:
    """DialectError for a request with a feature that no other dialect has."""
    if request.unconvertible is not None:
        raise refusal(request.unconvertible, dialect)


def convertible_tools(request: ModelRequest, dialect: str) -> list[Tool]:
    """The tools without those that the provider runs. DialectError for tools of an unknown schema, and when the
    request forces a tool that is left out."""
    for tool in request.tools:
        if tool.kind == "other":
            raise refusal(tool, dialect)
    kept = [tool for tool in request.tools if tool.kind != "provider"]
    choice = request.tool_choice
    if choice is not None and choice.mode in ("named", "required"):
        names = {tool.name for tool in kept}
        if (choice.name not in names) if choice.mode == "named" else not names:
            raise refusal("a required tool that the provider runs", dialect)
    return kept


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    if tool.kind == "custom":
        return dict(CUSTOM_PARAMETERS)
    return dict(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}


def media_of_url(kind: Any, url: str, detail: str | None = None, name: str | None = None) -> Media:
    """An image or a file of a URL or a data URL. DialectError for another scheme."""
    match = _DATA_URL.match(url)
    if match is not None:
        return Media(kind, match[1] or "", url[match.end() :], name=name, detail=detail)
    if not url.lower().startswith(("https://", "http://", "gs://")):
        raise DialectError(f"{kind}: {url[:40]!r} is no URL with http or https, and no base64 data URL")
    return Media(kind, url=url, name=name, detail=detail)


def url_of(media: Media) -> str:
    """The URL of a media part: its own, or a data URL."""
    if media.url is not None:
        return media.url
    return f"data:{media.media_type or 'application/octet-stream'};base64,{media.data or ''}"


def plain_text(parts: Iterable[Part], separator: str = "") -> str:
    """The texts of the parts, with refusals."""
    return separator.join(part.text for part in parts if isinstance(part, (Text, Refusal)))


def tool_names(messages: Iterable[Message]) -> dict[str, str]:
    """Names of the called tools, by call id."""
    return {part.id: part.name for message in messages for part in message.parts if isinstance(part, ToolCall)}


def custom_names(request: ModelRequest) -> frozenset[str]:
    return frozenset(tool.name for tool in request.tools if tool.kind == "custom")


def custom_input(arguments: str) -> str:
    """The text of a custom tool's arguments; all of them when they are no {"input": TEXT}."""
    try:
        found = loads(arguments, "the arguments")
    except DialectError:
        return arguments
    value = found.get("input") if isinstance(found, dict) else None
    return value if isinstance(value, str) else arguments


def estimate_tokens(request: ModelRequest) -> int:
    """A quarter of the UTF-8 bytes of the prompt, and 1,000 for an image or another file."""
    size, media = _bytes(request.system or ""), 0
    for tool in request.tools:
        size += len(tool.name) + _bytes(tool.description) + len(dumps(tool.parameters or {}))
    for message in request.messages:
        for part in message.parts:
            more, files = _size(part)
            size += more
            media += files
        size += 12
    return max(1, size // 4 + media * _IMAGE_TOKENS)


def _bytes(text: str) -> int:
    """The UTF-8 length of a text; of a lone surrogate as if it were a character."""
    return len(text.encode("utf-8", "surrogatepass"))


def _size(part: Part) -> tuple[int, int]:
    match part:
        case Text(text) | Refusal(text):
            return _bytes(text), 0
        case ToolCall(name=name, arguments=arguments):
            return len(name) + _bytes(arguments), 0
        case ToolResult(parts=parts):
            sizes = [_size(inner) for inner in parts]
            return sum(size for size, _ in sizes), sum(files for _, files in sizes)
        case Media():
            return 0, 1
        case Other(raw=raw):
            return len(dumps(raw)), 0
    return _bytes(part.text), 0


def add_turn(messages: list[Message], parts: list[Part]) -> None:
    """Append a message of the user, in which tool results and the rest are separate messages."""
    group: list[Part] = []
    for place, part in enumerate(parts):
        group.append(part)
        result = isinstance(part, ToolResult)
        if place + 1 == len(parts) or isinstance(parts[place + 1], ToolResult) != result:
            if result and messages and messages[-1].role == "tool":
                messages[-1] = Message("tool", messages[-1].parts + tuple(group))
            else:
                messages.append(Message("tool" if result else "user", tuple(group)))
            group = []


def passes_unchanged(response: ModelResponse, dialect: str) -> bool:
    """Whether the response has a body of the dialect."""
    return response.raw is not None and response.dialect == dialect


def own_body(body: dict[str, Any]) -> dict[str, Any]:
    """A response body; DialectError for one that is an error or no object."""
    checked(body, "the response")
    error = body.get("error")
    if error:
        raise DialectError(f"the response is an error: {error_text(error)}")
    return body


def error_text(error: Any) -> str:
    """The message of an error object, at most 500 characters."""
    message = error.get("message") if isinstance(error, dict) else error
    return str(message if message else error)[:500]


def as_base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "replace")).decode()


def event(data: Mapping[str, Any], kind: str = "") -> bytes:
    """One server-sent event with JSON data. DialectError for what JSON cannot express."""
    try:
        encoded = orjson.dumps(data)
    except (TypeError, UnicodeError, RecursionError) as error:
        raise DialectError(f"a value has no JSON form: {error}") from None
    head = b"event: " + kind.encode() + b"\n" if kind else b""
    return head + b"data: " + encoded + b"\n\n"
