"""Requests of a dialect to the native API, by the names of its routes.

A dialect has no access of its own to sandboxes: each of its operations is a native request of the same caller, so that
access rights, quotas and the audit log apply unchanged.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol
from urllib.parse import urlencode

import orjson

from rock.errors import InvalidConfig, RockError, from_wire, no_such_sandbox
from rock.http.asgi import App, Receive, Request, call
from rock.protocol.keys import Caller, caller_of
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.protocol.sandbox import ID_PATTERN

_ID = re.compile(ID_PATTERN)
_SEGMENT = re.compile(r"^[A-Za-z0-9_.:@-]{1,300}\Z")
Query = Mapping[str, str | int | float]


class Api(Protocol):
    """The native API for one caller. body: bytes, or plain data that is sent as JSON. key: an idempotency key. path:
    the variables of the route. Raises the typed errors of the API."""

    async def bytes(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> bytes: ...

    async def json(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> Any: ...


class LocalApi:
    """The native API of this process. client: the source of disconnect messages of the original request, once its body
    was read; a request is canceled when the client disconnects. address: of that client, for the audit log."""

    def __init__(
        self, app: App, caller: Caller, client: Receive | None = None, address: tuple[str, int] | None = None
    ) -> None:
        self._app = app
        self.caller = caller
        self._client = client
        self._address = address

    async def bytes(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> bytes:
        row = ROUTES[route]
        check_path(path)
        data = body if isinstance(body, bytes | AsyncIterator) else orjson.dumps(body)
        status, reply = await call(
            self._app, row.method, row.path.format(**path), body=data, query=urlencode(query) if query else "",
            headers={IDEMPOTENCY_KEY: key} if key else None, caller=self.caller, client=self._client,
            address=self._address,
        )  # fmt: skip
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the server converts a cancellation to a response
            raise asyncio.CancelledError
        if status < 400:
            return reply
        raise error_of(reply, status)

    async def json(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> Any:
        return orjson.loads(await self.bytes(route, body, query=query, key=key, **path))


def api_of(app: App, request: Request) -> LocalApi:
    """The native API for the caller of a request whose body was read; it ends with the request."""
    return LocalApi(app, caller_of(request.scope), request.client, request.scope.get("client"))


def lasting_api_of(app: App, request: Request) -> LocalApi:
    """The native API for the caller of a request, also after its end."""
    return LocalApi(app, caller_of(request.scope), address=request.scope.get("client"))


def check_path(path: Mapping[str, str]) -> None:
    """Reject values that would change the path of a route. InvalidConfig; NotFound for an invalid sandbox id."""
    for name, value in path.items():
        if name == "sandbox_id" and not _ID.match(value):
            raise no_such_sandbox(value[:128])
        if not _SEGMENT.match(value) or value in (".", ".."):
            raise InvalidConfig(f"{name}={value[:100]!r} is not a valid name",
                                hint="use 1 to 300 letters, digits and `_.:@-`")


def error_of(reply: bytes, status: int) -> RockError:
    """The error of a response that is not 2xx."""
    try:
        return from_wire(orjson.loads(reply), status)
    except orjson.JSONDecodeError:
        return from_wire(reply.decode(errors="replace"), status)


async def limited_body(request: Request, limit: int) -> bytes:
    """The complete body. InvalidConfig above `limit` bytes, before more is read."""
    length = request.header(b"content-length")
    if length is not None and length.isascii() and length.isdigit() and int(length) > limit:
        raise InvalidConfig(f"the body has {length[:20]} bytes, and the limit is {limit}", hint="send a smaller body")
    parts: list[bytes] = []
    size = 0
    async for part in request.chunks():
        size += len(part)
        if size > limit:
            raise InvalidConfig(f"the body has more than {limit} bytes", hint="send a smaller body")
        parts.append(part)
    return b"".join(parts)
