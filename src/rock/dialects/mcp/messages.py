"""JSON-RPC messages of the Model Context Protocol: parsing with limits, error codes, versions and responses.

Two eras of the protocol are served. Versions up to 2025-11-25 begin with `initialize`, which opens a session. From
2026-07-28 on each request is complete in itself: its `_meta` has the version and the capabilities of the client, and
there is no session.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from rock.errors import RockError

HANDSHAKE = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
MODERN = ("2026-07-28",)
VERSIONS = (*reversed(MODERN), *reversed(HANDSHAKE))
MOST_BATCHED = 32  # messages of one batch, which only 2025-03-26 has
LONGEST = 16 << 20  # bytes of a message

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
HEADER_MISMATCH, UNSUPPORTED_VERSION = -32020, -32022
CANCELED = -32800
_STATUS = {PARSE_ERROR: 400, INVALID_REQUEST: 400, INVALID_PARAMS: 400, HEADER_MISMATCH: 400, UNSUPPORTED_VERSION: 400,
           METHOD_NOT_FOUND: 404}  # fmt: skip

_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"

Id = str | int


class Failure(Exception):
    """The error of a request, as JSON-RPC has it."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    @property
    def status(self) -> int:
        """The HTTP status that 2026-07-28 requires."""
        return _STATUS.get(self.code, 200)


@dataclass(frozen=True)
class Message:
    """A request, a notification (id None), or the response of a client (method None), which is ignored."""

    method: str | None
    params: dict[str, Any]
    id: Id | None

    @property
    def meta(self) -> dict[str, Any]:
        found = self.params.get("_meta")
        return found if isinstance(found, dict) else {}

    @property
    def is_modern(self) -> bool:
        """Whether it has the envelope of 2026-07-28 or later."""
        return _VERSION_KEY in self.meta

    def check_envelope(self) -> str:
        """The version of a modern request. Failure."""
        missing = [key for key in (_VERSION_KEY, _CAPABILITIES_KEY) if key not in self.meta]
        if missing:
            raise Failure(INVALID_PARAMS, f"params._meta has no {', '.join(missing)}")
        version = self.meta[_VERSION_KEY]
        if not isinstance(version, str):
            raise Failure(INVALID_PARAMS, f"{_VERSION_KEY} is not a string")
        if version not in MODERN:
            raise unsupported(version)
        return version


def unsupported(version: str) -> Failure:
    return Failure(UNSUPPORTED_VERSION, "Unsupported protocol version",
                   {"supported": list(VERSIONS), "requested": version[:100]})


def parsed(data: bytes) -> Any:
    """The JSON value of a body. Failure."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Failure(PARSE_ERROR, f"the message is not JSON: {error}") from None


def message_of(value: Any) -> Message:
    """A message from plain data. Failure."""
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise Failure(INVALID_REQUEST, 'the message is not an object with "jsonrpc": "2.0"')
    given = value.get("id")
    if isinstance(given, bool) or not (given is None or isinstance(given, str | int)):
        raise Failure(INVALID_REQUEST, "the id of a request is a string or an integer")
    if isinstance(given, str) and len(given) > 256:
        raise Failure(INVALID_REQUEST, "the id of a request has more than 256 characters")
    method = value.get("method")
    if method is None and ("result" in value or "error" in value):
        return Message(None, {}, given)
    if not isinstance(method, str):
        raise Failure(INVALID_REQUEST, "the message has no method")
    params = value.get("params")
    if params is not None and not isinstance(params, dict):
        raise Failure(INVALID_PARAMS, "params is not an object")
    return Message(method, params or {}, given)


def id_of(value: Any) -> Id | None:
    """The id of an invalid message, where it has a valid one."""
    given = value.get("id") if isinstance(value, dict) else None
    return given if isinstance(given, str | int) and not isinstance(given, bool) else None


def response(id: Id | None, result: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "result": result}


def error_response(id: Id | None, error: Failure) -> dict[str, Any]:
    wire: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.data is not None:
        wire["data"] = error.data
    return {"jsonrpc": "2.0", "id": id, "error": wire}


def failure_of(error: RockError) -> Failure:
    """An error of the API outside of a tool."""
    return Failure(INTERNAL if error.status >= 500 else INVALID_REQUEST, str(error), error.to_wire()["error"])
