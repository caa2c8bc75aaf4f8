"""Authentication and server roles: the owner by the key given at start, tenants by their API keys.

A server beyond loopback requires a key; on loopback the owner may be recognized without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from rock.admin.preflight import is_loopback
from rock.admin.tenants import Keys
from rock.errors import RockError, Unauthorized, Unavailable, WrongRole
from rock.http.asgi import App, Receive, Scope, Send, deny, failure
from rock.http.fair_queue import PLACE, FairQueue
from rock.http.forwarding import RemoteApp, first_reached
from rock.http.peers import PEER
from rock.protocol.keys import CALLER, GRANTED, NOBODY, OPERATOR, WORKER, Access, Caller, digest_of, pod_of
from rock.protocol.routes import HANDED_ON, OTHER_KEY, Role, role_for
from rock.telemetry.context import CURRENT

PAGE_KEY = "rock.page_key"  # in an ASGI scope: the digest of the key of a session of the web page
_WORKERS = "/v1/workers/"
_OPEN = ("/healthz", "/")
# Headers that may contain a key, in order of preference. The last three are those of ROCK's clients and servers.
KEY_HEADERS = (OTHER_KEY.encode(), b"authorization", b"x-api-key", b"x-key", b"xrl-authorization")
_KEYS = frozenset(KEY_HEADERS)
_BEARERS = (b"authorization", b"xrl-authorization")


class Authenticated:
    """The authentication middleware: identifies the caller of each request and rejects unauthenticated ones.

    key: of the server's owner. Without one, the owner is the client that has `owner_key`, or is recognized without a
    key; any other key is ignored then. keys: of its tenants. worker_key: the key with which a worker may join, without
    other rights. names: of the server, see names_of. checks_host: whether requests with a key have to use one of them
    too. A key is sent as `Authorization: Bearer KEY`, alone as X-ROCK-API-Key, or as clients of ROCK send one.
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
        self._sockets: dict[str, set[asyncio.Task[None]]] = {}  # open WebSockets by key
        self._turns = FairQueue()
        if keys is not None:
            keys.on_revoked.append(self._cut)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            caller = await self.caller(scope)
        except RockError as error:
            # queued by address, so that different keys of one client share a queue
            turn = await self._turns.take(_peer(scope), scope.get(PLACE))
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
            # Keys are removed here: programs inside, to which requests are forwarded, must not see them.
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

    async def caller(self, scope: Scope) -> Caller:
        """The caller of a request. Unauthorized."""
        is_open = scope["type"] == "http" and scope["path"] in _OPEN
        if self._names is not None and not is_open:
            check_host(scope, self._names)
        granted = scope.get(GRANTED)
        if isinstance(granted, Caller):
            return granted
        digest = scope.get(PAGE_KEY)
        if digest:
            if (caller := await self._holder_of(digest)) is not None:
                return caller
            raise Unauthorized("the session has ended, because its key was revoked", hint="sign in with another key")
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

    @property
    def is_keyless(self) -> bool:
        """Whether the owner is recognized without a key."""
        return self._keyless is not None

    async def sign_in(self, key: bytes) -> str | None:
        """The digest under which a session of the web page stores a key; None for an unknown or revoked one."""
        digest = hashlib.sha256(key).hexdigest()
        return None if await self._holder_of(digest) is None else digest

    async def _holder_of(self, digest: str) -> Caller | None:
        """The caller with the key of this digest. A worker's key opens no session."""
        if self._key is not None and hmac.compare_digest(digest, hashlib.sha256(self._key).hexdigest()):
            return OPERATOR
        return await self._keys.caller_of(digest) if self._keys is not None else None

    async def problem(self, scope: Scope) -> RockError | None:
        """The error of a rejected request; None for an accepted one."""
        try:
            await self.caller(scope)
        except RockError as error:
            return error
        return None

    async def _holder(self, key: bytes) -> Caller | None:
        if self._key is not None and hmac.compare_digest(key, self._key):
            return OPERATOR
        if self._worker_key and hmac.compare_digest(key, self._worker_key):
            return WORKER
        if (pod := pod_of(key, self._worker_key)) is not None:
            return replace(WORKER, worker=pod)
        return await self._keys.caller(key) if self._keys is not None else None

    def _is_key(self, name: bytes, value: bytes) -> bool:
        """Whether the value of a header is a key."""
        bare = _bare(name, value)
        own = (self._key or b"", self._worker_key)
        return any(key and hmac.compare_digest(bare, key) for key in own) or (
            digest_of(bare) is not None or pod_of(bare, self._worker_key) is not None)

    # ---- WebSockets ----

    async def _socket(self, key_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a WebSocket for as long as its key is valid."""
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
    """The queue of a request. A worker's heartbeat does not wait behind a burst of clients with the same address: each
    worker has a queue of its own, because otherwise its lease could expire."""
    path: str = scope["path"]
    if path.startswith(_WORKERS) and Access.WORKER in caller.scopes:
        return path
    return caller.key_id or f"{caller.owner} {_peer(scope)}"


def _peer(scope: Scope) -> str:
    """The client address of a request."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def given_key(scope: Scope) -> bytes:
    """The key in the headers of a request, the preferred one; b"" without one."""
    given = [header for header in scope["headers"] if header[0] in _KEYS]
    return _bare(*min(given, key=lambda header: KEY_HEADERS.index(header[0]))) if given else b""


def _bare(name: bytes, value: bytes) -> bytes:
    """The key in a header."""
    if value[:7].lower() == b"bearer ":
        return value[7:].strip()
    return b"" if name in _BEARERS else value.strip()


# ---- requests without a key ----
#
# A server without a key serves only its owner. A request without the owner key is accepted when
# 1. Host names this server: a name or address of loopback, the address that it listens on, or a name of
#    ROCK_PUBLIC_NAMES. A web page under a name that resolves to 127.0.0.1 (DNS rebinding) has another one;
# 2. it comes from no page of another origin, by Origin and Sec-Fetch-Site, which programs do not send;
# 3. the kernel reports that its socket is held by processes of the owner, or of root, outside of any sandbox:
#    http/peers.py.

_HINT = ("use the account that started the server, or send the key that is in owner.key in its ROCK_HOME as header "
         "X-ROCK-API-Key (SDK and CLI: ROCK_API_KEY), or start the server with ROCK_API_KEY")  # fmt: skip
# Pages of programs inside have an origin of their own (rocklet/ports.py): their requests are cross-site.
_PORTS = re.compile(r"/v1/sandboxes/[^/]+/ports/|/apis/envs/sandbox/v1/sandboxes/[^/]+/(?:proxy|vnc)(?:/|$)")
_LONGEST_HOST = 300  # bytes
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]@/?#\s]*)(?::[0-9]{1,5})?")


def names_of(host: str, public: str) -> frozenset[str]:
    """The names of a server: the address that it listens on, and those of ROCK_PUBLIC_NAMES."""
    names = [host, *public.split(",")]
    return frozenset(name.strip().lower().rstrip(".").strip("[]") for name in names if name.strip())


def check_host(scope: Scope, names: frozenset[str]) -> None:
    """Unauthorized when Host is none of `names`, nor a name of loopback."""
    found = [value for name, value in scope["headers"] if name == b"host"]
    if not found and scope.get("http_version") == "1.0":
        return
    if len(found) != 1 or len(found[0]) > _LONGEST_HOST or not _is_named(found[0], names):
        text = found[0].decode("latin-1") if len(found) == 1 else ""
        shown = f"header Host: {text[:100]!r} is no name of this server" if found else "the request has no header Host"
        raise Unauthorized(
            shown, hint="use a loopback address, or add the name to ROCK_PUBLIC_NAMES of the server")


@lru_cache(maxsize=256)
def _is_named(host: bytes, names: frozenset[str]) -> bool:
    """Whether a header Host has one of `names`, or a name of loopback."""
    match = _HOST.fullmatch(host.decode("latin-1"))
    name = str(match[1]).strip("[]").lower().rstrip(".") if match is not None else ""
    return bool(name) and (is_loopback(name) or name in names)


def check_origin(scope: Scope) -> None:
    """Unauthorized for requests from a page of another origin."""
    for name, _ in scope["headers"]:
        if name == b"origin" or name.startswith(b"sec-fetch-"):
            break
    else:
        return
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    scheme = b"https" if scope["scheme"] in ("https", "wss") else b"http"
    if any(origin != scheme + b"://" + host for origin in origins):
        raise Unauthorized("the request comes from a web page of another origin", hint=_HINT)
    fetched = {name: value for name, value in scope["headers"] if name.startswith(b"sec-fetch-")}
    if fetched.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin"):
        return
    reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and not origins
    followed = fetched.get(b"sec-fetch-mode") == b"navigate" and fetched.get(b"sec-fetch-user") == b"?1"
    if not reads or not (followed or _PORTS.match(scope["path"])):
        raise Unauthorized("the request comes from a web page of another site", hint=_HINT)


async def check_owner(scope: Scope) -> None:
    """Unauthorized unless the kernel reports that the client is the owner of this process, outside of any sandbox."""
    peer = (scope.get("state") or {}).get(PEER)
    problem = "the connection has no socket" if peer is None else await peer.refusal()
    if problem:
        raise Unauthorized(f"a request without a key has to come from the owner of this server, and {problem}",
                           hint=_HINT)  # fmt: skip


class Keyless:
    """The three checks combined. open_paths: accessible to all clients that pass the first two."""

    def __init__(self, names: frozenset[str], open_paths: Iterable[str] = ()) -> None:
        self._names = names
        self._open = frozenset(open_paths)

    async def admits(self, scope: Scope) -> bool:
        """Whether the client is the owner; False on an open path, where this is not checked. Unauthorized."""
        check_host(scope, self._names)
        check_origin(scope)
        if scope["type"] == "http" and scope["path"] in self._open:
            return False
        await check_owner(scope)
        return True


# ---- server roles ----
#
# A writer and a reader have the same components and differ in the requests that they accept.

_WHAT = {"write": "a reader: it changes nothing", "read": "a writer: it reaches into no sandbox"}
_MARK = (HANDED_ON.encode(), b"1")
_SETTING = {"write": "ROCK_WRITER", "read": "ROCK_READER"}


def servers(text: str) -> list[RemoteApp]:
    """The servers in "URL,URL". InvalidConfig."""
    return [RemoteApp(url.strip()) for url in text.split(",") if url.strip()]


class RoleFilter:
    """Wraps `app` for the requests of its role. others: servers of the other role, to which other requests are
    forwarded unchanged, including the key. Without such a server they are rejected with WrongRole, as are requests that
    were forwarded here by mistake. guard: returns why a request must not be forwarded, because the other server cannot
    determine its sender."""

    def __init__(
        self, app: App, role: Role, others: Sequence[RemoteApp],
        guard: Callable[[Scope], Awaitable[RockError | None]] | None = None,
    ) -> None:  # fmt: skip
        self._guard = guard
        self._app = app
        self._role = role
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = None if scope["type"] == "lifespan" else role_for(scope.get("method", "GET"), scope["path"])
        if needed is None or needed == self._role:
            await self._app(scope, receive, send)
            return
        handed_on = any(name == _MARK[0] for name, _ in scope["headers"])
        if self._others and not handed_on:
            if self._guard is not None and (refused := await self._guard(scope)) is not None:
                await (deny(scope, send, refused) if scope["type"] == "websocket" else failure(refused).send(send))
                return
            await (await first_reached(self._others))({**scope, "headers": [*scope["headers"], _MARK]}, receive, send)
            return
        hint = f"ask a server of role {needed}, or let this one hand it on: {_SETTING[needed]}=URL"
        if handed_on:
            hint = f"{_SETTING[needed]} of the server that was asked leads here, to one of the same role: correct it"
        error = WrongRole(f"this server is {_WHAT[needed]}", details={"role": needed}, hint=hint)
        await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))
