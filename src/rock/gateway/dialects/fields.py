"""Typed and bounded access to JSON bodies of unknown origin. Every problem is a `DialectError` that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

MAX_DEPTH = 100  # of nested objects and lists; orjson renders up to 254
MAX_MESSAGES = 20_000
MAX_PARTS = 10_000  # of one message
MAX_TOOLS = 2_000
MAX_NAME = 512  # characters of names and ids
MAX_CHOICES = 128
MAX_TOKENS = 1 << 53
_CONTAINERS = frozenset({dict, list})  # of JSON; subclasses do not occur


class DialectError(ValueError):
    """The data is not valid in the dialect, or has no form in the other dialect."""


class Truncated(DialectError):
    """A stream ended before the event that completes its response."""


def checked(body: Any, where: str = "the body") -> dict[str, Any]:
    """The body, if it is a JSON object of at most MAX_DEPTH levels with text as keys. DialectError."""
    if not isinstance(body, dict):
        raise DialectError(f"{where} is not a JSON object")
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            values = container.values() if type(container) is dict else container
            below += [value for value in values if type(value) in _CONTAINERS]
        if not below:
            return body
        level = below
    raise DialectError(f"{where} has more than {MAX_DEPTH} nested levels")


def loads(data: str, where: str) -> Any:
    """JSON text as a value. DialectError."""
    try:
        return orjson.loads(data)
    except (orjson.JSONDecodeError, UnicodeError, RecursionError) as error:
        raise DialectError(f"{where} is not JSON: {error}") from None


def event_object(data: str) -> dict[str, Any]:
    """The JSON object of a stream event. DialectError."""
    return checked(loads(data, "an event of the stream"), "an event of the stream")


def dumps(value: Any) -> str:
    """JSON text. DialectError for what JSON cannot express, such as a lone surrogate."""
    try:
        return orjson.dumps(value).decode()
    except (TypeError, UnicodeError, RecursionError) as error:
        raise DialectError(f"a value has no JSON form: {error}") from None


def text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A text; `default` for a missing field or null, else DialectError."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DialectError(f"{where}.{key} is {'missing' if value is None else 'not a text'}")
    return value


def optional_text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DialectError(f"{where}.{key} is not a text")
    return value


def name(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A text of at most MAX_NAME characters."""
    value = text(row, key, where, default)
    if len(value) > MAX_NAME:
        raise DialectError(f"{where}.{key} is over {MAX_NAME} characters")
    return value


def model_name(body: Mapping[str, Any], of_path: str | None) -> str:
    """The model of the path, else of the body."""
    return of_path if of_path else name(body, "model", "the body", "")


def mapping(row: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object; {} for a missing field or null."""
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DialectError(f"{where}.{key} is not an object")
    return value


def rows(row: Mapping[str, Any], key: str, where: str, limit: int) -> list[dict[str, Any]]:
    """A list of objects; [] for a missing field or null."""
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DialectError(f"{where}.{key} is not a list")
    if len(value) > limit:
        raise DialectError(f"{where}.{key} has {len(value)} entries; the limit is {limit}")
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DialectError(f"{where}.{key}[{place}] is not an object")
    return value


def count(row: Mapping[str, Any], key: str) -> int:
    """A number of tokens; 0 for what is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MAX_TOKENS:
        return 0
    return int(value)


def index(row: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A place in a list of a stream. DialectError."""
    value = row.get(key, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_PARTS:
        raise DialectError(f"{key} is not a number from 0 to {MAX_PARTS - 1}")
    return value


def token_ids(value: Any, where: str) -> list[int] | None:
    """A list of token ids; None for a missing one. DialectError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(entry) is int and 0 <= entry < 1 << 32 for entry in value):
        raise DialectError(f"{where} is not a list of token ids")
    return value


def logprob_values(value: Any, where: str) -> list[float] | None:
    """A list of log probabilities; None for a missing one. DialectError."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in value
    ):
        raise DialectError(f"{where} is not a list of log probabilities")
    return [float(entry) for entry in value]


_INVALID = "INVALID_JSON"  # Anthropic's convention for arguments that are no JSON object


def arguments(value: Any, where: str) -> str:
    """Arguments of a tool call as JSON text. Text that is no JSON passes: it is what the model wrote."""
    if isinstance(value, str):
        return value
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise DialectError(f"{where} is not an object")
    if len(value) == 1 and isinstance(invalid := value.get(_INVALID), str):
        return invalid
    return dumps(value)


def argument_object(value: str) -> dict[str, Any]:
    """Arguments as an object, for dialects without JSON text. {} for "". Text that is no JSON object is the value of
    "INVALID_JSON", because a model that writes invalid arguments is no error of the upstream."""
    if not value.strip():
        return {}
    try:
        return checked(loads(value, "the arguments"))
    except DialectError:
        return {_INVALID: value}
