"""Who may call: the owner by the key that is given at start, tenants by keys of theirs. A server beyond loopback has to
have one; on loopback the owner may be recognized without a key (keyless.py)."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from rock.admin.keyless import Keyless, check_host
from rock.admin.keys import Keys
from rock.errors import RockError, Unauthorized, Unavailable
from rock.protocol.keys import CALLER, NOBODY, OPERATOR, WORKER, Access, Caller, digest_of
from rock.protocol.routes import OTHER_KEY
from rock.telemetry.context import CURRENT
from rock.wire.asgi import App, Receive, Scope, Send, deny, failure
from rock.wire.peers import PEER
from rock.wire.turns import PLACE, Turns

_WORKERS = "/v1/workers/"
_OPEN = ("/healthz", "/")
# Where a key may be, the plainest first. The last three are of ROCK's clients, and of those that it serves too.
KEY_HEADERS = (OTHER_KEY.encode(), b"authorization", b"x-api-key", b"x-key", b"xrl-authorization")
_KEYS = frozenset(KEY_HEADERS)
_BEARERS = (b"authorization", b"xrl-authorization")


class Authenticated:
    """The door: says who sent each request, and lets nobody in who is nobody.

    key: of the server's owner. Without one the owner is who has `owner_key`, or is recognized without any: keyless.py;
    a key that is neither is ignored then. keys: of its tenants. worker_key: by it a worker may join, and nothing else.
    names: of the server, see keyless.names_of. checks_host: whether requests with a key have to use one of them too.
    A key comes as `Authorization: Bearer KEY`, alone as X-ROCK-API-Key, or as clients of ROCK send one.
    """

    def __init__(
        self, app: App, key: str | None, keys: Keys | None = None, worker_key: str = "", *, owner_key: str = "",
        names: frozenset[str] = frozenset(), checks_host: bool = False,
    ) -> None:  # fmt: skip
        self._app = app
        self._worker_key = worker_key.encode()
        self._keyless = None if key else Keyless(names, _OPEN)
        self._key = (key or owner_key).encode() or None
        self._names = names if checks_host else None
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
        peer = (scope.get("state") or {}).get(PEER)
        if peer is not None and caller is not NOBODY and not peer.prove(caller.owner, caller.tenant is not None):
            full = Unavailable("this tenant has half of all connections that the server can have",
                               hint="close idle connections, or try again")  # fmt: skip
            await (deny(scope, send, full) if scope["type"] == "websocket" else failure(full).send(send))
            return
        headers = scope["headers"]
        if self._key is not None:
            # Keys end here: programs inside, to which requests are handed on, must not see them.
            keys = [header for header in headers if header[0] in _KEYS and self._is_key(*header)]
            if keys:
                headers = [header for header in headers if header not in keys]
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
        is_open = scope["type"] == "http" and scope["path"] in _OPEN
        if self._names is not None and not is_open:
            check_host(scope, self._names)
        given = [header for header in scope["headers"] if header[0] in _KEYS]
        if len(given) > 1:
            given.sort(key=lambda header: KEY_HEADERS.index(header[0]))
        for name, value in given:
            if (caller := await self._holder(_bare(name, value))) is not None:
                return caller
        if self._keyless is not None:
            return OPERATOR if await self._keyless.admits(scope) else NOBODY
        if is_open:
            return NOBODY
        raise Unauthorized("the API key is missing or wrong", hint="set ROCK_API_KEY to a key of the server")

    async def problem(self, scope: Scope) -> RockError | None:
        """Why a request is not let in, if it is not."""
        try:
            await self._caller(scope)
        except RockError as error:
            return error
        return None

    async def _holder(self, key: bytes) -> Caller | None:
        if self._key is not None and hmac.compare_digest(key, self._key):
            return OPERATOR
        if self._worker_key and hmac.compare_digest(key, self._worker_key):
            return WORKER
        return await self._keys.caller(key) if self._keys is not None else None

    def _is_key(self, name: bytes, value: bytes) -> bool:
        """Of a header that may bear one."""
        bare = _bare(name, value)
        own = (self._key or b"", self._worker_key)
        return any(key and hmac.compare_digest(bare, key) for key in own) or digest_of(bare) is not None

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
