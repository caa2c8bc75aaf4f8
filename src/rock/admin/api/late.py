"""An application that is made when it is first asked for, and the door in front of it, which does not wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson

from rock.errors import ClientError, NotFound, RockError
from rock.protocol.keys import Access, caller_of
from rock.protocol.routes import ROUTES
from rock.wire.asgi import Answer, App, Receive, Scope, Send, failure, fit

_PAGES = ("/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")


class Late:
    """`make` runs in a thread, at the first request: what it imports takes as long as all the rest of a start."""

    def __init__(self, make: Callable[[], App]) -> None:
        self._make = make
        self._lock = asyncio.Lock()
        self._app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            async with self._lock:
                if self._app is None:
                    self._app = await asyncio.to_thread(self._make)
        await self._app(scope, receive, send)


def guarded(app: App) -> App:
    """`app` for callers whose keys are for its rows. A path without a row is there for the server's owner alone."""
    control = (route for route in ROUTES.values() if route.plane == "control")
    rows = [(route.method, tuple(route.path.split("/")), route.access) for route in control]

    def found(path: str) -> dict[str, Access]:
        """What each method of a path is for; of two rows that fit, what the first is for."""
        given = path.split("/")
        return {kind: needed for kind, parts, needed in reversed(rows) if fit(parts, given) is not None}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            caller, kinds = caller_of(scope), found(path)
            needed = kinds.get("GET" if method == "HEAD" else method)
            if path in _PAGES:
                needed = Access.OPEN if path == "/" else Access.READ
            try:
                if needed is None and Access.ADMIN not in caller.scopes:
                    raise NotFound(f"no such route: {method} {path}")
                caller.require(needed or Access.ADMIN)
            except RockError as error:
                await failure(error).send(send)
                return
            if kinds and method not in kinds:
                refused = ClientError(f"{method} {path}: Method Not Allowed")
                headers = [(b"allow", ", ".join(sorted(kinds)).encode())]
                await Answer(orjson.dumps(refused.to_wire()), 405, headers=headers).send(send)
                return
        await app(scope, receive, send)

    return guard
