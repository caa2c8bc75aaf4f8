"""A data call of the dialect is the native one: a request through the data plane's ASGI application in this process."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import orjson

from rock.admin.api.rock_v1.envelope import Failed
from rock.errors import NotFound, RockError, from_wire
from rock.protocol.keys import caller_of
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import ID_PATTERN
from rock.wire.asgi import App, Request, call

_ID = re.compile(ID_PATTERN)


class DataPlane:
    """Requests to sandboxes by the names of the native rows."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def bytes(
        self,
        request: Request,
        route: str,
        sandbox_id: str,
        body: Any = b"",
        query: dict[str, str] | None = None,
        **path: str,
    ) -> bytes:
        """The answer's bytes. body: bytes, a stream of them, or plain data to go as JSON.

        Raises what the data plane raised; a sandbox that is not there is Failed, in ROCK's words for it.
        """
        row = ROUTES[route]
        if not is_id(sandbox_id):
            raise not_started(sandbox_id)
        if not isinstance(body, bytes | AsyncIterator):
            body = orjson.dumps(body)
        status, reply = await call(
            self._app,
            row.method,
            row.path.format(sandbox_id=sandbox_id, **path),
            body=body,
            query=urlencode(query) if query else "",
            caller=caller_of(request.scope),
            client=request.client,
        )
        if status < 400:
            return reply
        raise raised(reply, status, sandbox_id)

    async def json(
        self,
        request: Request,
        route: str,
        sandbox_id: str,
        body: Any = b"",
        query: dict[str, str] | None = None,
        **path: str,
    ) -> Any:
        """The answer as plain data."""
        return orjson.loads(await self.bytes(request, route, sandbox_id, body, query, **path))


def not_started(sandbox_id: str, why: RockError | None = None) -> Failed:
    return Failed(f"sandbox {sandbox_id} not started" + (f": {why}" if why else ""))


def is_id(text: str) -> bool:
    """Whether there could be a sandbox of that id."""
    return _ID.match(text) is not None


def raised(reply: bytes, status: int, sandbox_id: str) -> RockError | Failed:
    """What an answer of the data plane stands for; Failed for a sandbox that is not there."""
    try:
        error = from_wire(orjson.loads(reply), status)
    except orjson.JSONDecodeError:
        return from_wire(reply.decode(errors="replace"), status)
    if isinstance(error, NotFound) and error.message == f"Sandbox {sandbox_id} not found":
        return not_started(sandbox_id)
    if "cause" in error.details or error.message.startswith(f"sandbox {sandbox_id} has not started"):
        return not_started(sandbox_id, error)
    return error
