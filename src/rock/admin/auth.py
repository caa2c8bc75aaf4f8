"""Who may call: the owner by the key that is given at start, tenants by keys of theirs. A server beyond loopback has to
have one."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from rock.admin.keys import Keys
from rock.admin.starting import is_loopback
from rock.errors import RockError, Unauthorized
from rock.protocol.keys import CALLER, NOBODY, OPERATOR, WORKER, Access, Caller, digest_of
from rock.protocol.routes import OTHER_KEY
from rock.telemetry.context import CURRENT
from rock.wire.asgi import App, Receive, Scope, Send, deny, failure
from rock.wire.turns import PLACE, Turns

_WORKERS = "/v1/workers/"
_OPEN = ("/healthz", "/")
# Where a key may be, the plainest first. The last three are of ROCK's clients, and of those that it serves too.
KEY_HEADERS = (OTHER_KEY.encode(), b"authorization", b"x-api-key", b"x-key", b"xrl-authorization")
_BEARERS = (b"authorization", b"xrl-authorization")


def _foreign_page(scope: Scope) -> Unauthorized | None:
    """Without a key, what can reach us includes every web page in a browser of this machine: it may send requests
    here, under its own origin or under a name of its own that leads to 127.0.0.1. Programs tell no origin."""
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"").decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    browser = origin is not None or b"sec-fetch-site" in headers
    if not browser or (is_loopback(name.strip("[]")) and origin in (None, f"http://{host}".encode("latin-1"))):
        return None
    return Unauthorized("a web page of another origin has no business here", hint="set ROCK_API_KEY, and give the key")


class Authenticated:
    """The door: says who sent each request, and lets nobody in who is nobody.

    key: of the server's owner; without one everybody is the owner, but for web pages that are not ours. keys: of its
    tenants. worker_key: by it a worker may join, and nothing else. A key comes as `Authorization: Bearer KEY`, alone as
    X-ROCK-API-Key, or as clients of ROCK send one.
    """

    def __init__(self, app: App, key: str | None, keys: Keys | None = None, worker_key: str = "") -> None:
        self._app = app
        self._worker_key = worker_key.encode()
        self._key = key.encode() if key else None
        self._keys = keys
        self._sockets: dict[str, set[asyncio.Task[None]]] = {}  # what is open by a key
        self._turns = Turns()
        if keys is not None:
            keys.on_revoked.append(self._cut)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
        except RockError as error:
            turn = await self._turns.take(_peer(scope), scope.get(PLACE))  # whatever keys somebody tries, he is one
            try:
                await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))
            finally:
                self._turns.leave(turn)
            return
        if (context := CURRENT.get()) is not None:
            context.tenant = caller.owner
        headers = scope["headers"]
        if self._key is not None:
            # Keys end here: programs inside, to which requests are handed on, must not see them.
            headers = [header for header in headers if header[0] not in KEY_HEADERS or not self._is_key(*header)]
        scope = {**scope, "headers": headers, CALLER: caller}
        if scope["type"] == "websocket":
            await (self._socket(caller.key_id, scope, receive, send) if caller.key_id
                   else self._app(scope, receive, send))  # fmt: skip
            return
        turn = await self._turns.take(_name(caller, scope), scope.get(PLACE))
        try:
            await self._app(scope, receive, send)
        finally:
            self._turns.leave(turn)

    async def _caller(self, scope: Scope) -> Caller:
        if self._key is None:
            error = _foreign_page(scope)
            if error is not None:
                raise error
            return OPERATOR
        for name in KEY_HEADERS:
            for header, value in scope["headers"]:
                if header == name and (caller := await self._holder(_bare(name, value))) is not None:
                    return caller
        if scope["path"] in _OPEN and scope["type"] == "http":
            return NOBODY
        raise Unauthorized("the API key is missing or wrong", hint="set ROCK_API_KEY to a key of the server")

    async def _holder(self, key: bytes) -> Caller | None:
        if self._key is not None and hmac.compare_digest(key, self._key):
            return OPERATOR
        if self._worker_key and hmac.compare_digest(key, self._worker_key):
            return WORKER
        return await self._keys.caller(key) if self._keys is not None else None

    def _is_key(self, name: bytes, value: bytes) -> bool:
        """Of a header that may bear one."""
        bare = _bare(name, value)
        own = [key for key in (self._key, self._worker_key) if key]
        return digest_of(bare) is not None or any(hmac.compare_digest(bare, key) for key in own)

    # ---- what outlasts a request ----

    async def _socket(self, key_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a WebSocket for as long as its key is good."""
        task = asyncio.ensure_future(self._app(scope, receive, send))
        self._sockets.setdefault(key_id, set()).add(task)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            open_ones = self._sockets.get(key_id, set())
            open_ones.discard(task)
            if not open_ones:
                self._sockets.pop(key_id, None)
        if task.cancelled():
            with contextlib.suppress(RuntimeError, OSError):  # it may be closed already
                await send({"type": "websocket.close", "code": 1008, "reason": "the key was revoked"})
        elif (error := task.exception()) is not None:
            raise error

    def _cut(self, key_id: str) -> None:
        for task in self._sockets.get(key_id, ()):
            task.cancel()


def _name(caller: Caller, scope: Scope) -> str:
    """Who waits behind whom. A worker's heartbeat waits behind no burst of clients that come by the same address: each
    is a line of its own, or its lease would be over."""
    path: str = scope["path"]
    if path.startswith(_WORKERS) and Access.WORKER in caller.scopes:
        return path
    return caller.key_id or f"{caller.owner} {_peer(scope)}"


def _peer(scope: Scope) -> str:
    """The address that a request came from."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _bare(name: bytes, value: bytes) -> bytes:
    """The key in a header."""
    if value[:7].lower() == b"bearer ":
        return value[7:].strip()
    return b"" if name in _BEARERS else value.strip()
