"""Direct requests: a client with a token of the server sends requests for one sandbox to its worker.

    client ──► server   GET /v1/sandboxes/ID/direct ──► address of the worker, token for this sandbox, 20 s
    client ──► worker   Authorization: Bearer direct.PAYLOAD.MAC: data plane of this sandbox
    worker ──► client   X-ROCK-Direct: PROOF, by which the client recognizes the worker

    client ──► worker   Authorization: Bearer direct.PAYLOAD.MAC, for the data plane of this sandbox
epoch, the sandbox, the tenant and the access rights of the caller. The worker checks all of them for each request, as
the proxy does; it accepts none without a lease. docs/decisions/0076-direct-requests.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from rock.errors import Forbidden, RockError, Unauthorized, no_such_route
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, deny, failure
from rock.protocol.keys import GRANTED, Access, Caller
from rock.protocol.routes import BUILD, CALL, CONNECTION, DIRECT, OTHER_KEY, PREFIX, ROUTES, is_data

LIFETIME = 20.0  # seconds; the time for which a revoked key may still reach a sandbox
_BEARER = b"Bearer direct."
_LONGEST = 2048  # bytes of a token
_REMEMBERED = 2000  # tokens
PROOF = DIRECT.encode()
_REMOVED = frozenset({b"authorization", OTHER_KEY.encode(), CALL.encode()})  # headers that programs inside must not see

Lease = Callable[[], tuple[str, int] | None]  # the name and the epoch of this worker; None without a lease


@dataclass(frozen=True)
class Grant:
    """What a token permits. expires: seconds since the epoch, by the clock of the server."""

    worker: str
    epoch: int
    sandbox: str
    caller: Caller
    expires: float


def signed(grant: Grant, key: str) -> str:
    """The token of a grant. key: that the server and the worker share."""
    caller = grant.caller
    scopes = sorted(access.value for access in caller.scopes)
    payload = orjson.dumps([grant.worker, grant.epoch, grant.sandbox, caller.tenant, scopes, caller.key_id,
                            grant.expires])  # fmt: skip
    text = base64.urlsafe_b64encode(payload).rstrip(b"=")
    return f"direct.{text.decode()}.{_mac(text, key, b'token')}"


def proof_of(token: str, key: str) -> str:
    """What a worker with the key shows to a client that has the token."""
    return _mac(token.encode(), key, b"proof")


def _mac(text: bytes, key: str, purpose: bytes) -> str:
    own = hmac.new(key.encode(), b"rock direct requests: " + purpose, hashlib.sha256).digest()
    return hmac.new(own, text, hashlib.sha256).hexdigest()


def granted(token: bytes, key: str) -> Grant:
    """The grant of a token whose signature is valid. Unauthorized."""
    text, _, mac = token.removeprefix(b"direct.").rpartition(b".")
    if len(token) > _LONGEST or not hmac.compare_digest(mac, _mac(text, key, b"token").encode()):
        raise Unauthorized("the token of this direct request is not valid", hint="send the request to the server")
    try:
        worker, epoch, sandbox, tenant, scopes, key_id, expires = orjson.loads(
            base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4)))  # fmt: skip
    except (ValueError, binascii.Error, TypeError):
        raise Unauthorized("the token of this direct request has an unknown format",
                           hint="use the same version of ROCK on the server and its workers") from None  # fmt: skip
    caller = Caller(tenant, frozenset(Access(scope) for scope in scopes), key_id=key_id)
    return Grant(worker, epoch, sandbox, caller, expires)


class DirectRequests:
    """Wraps the authentication of a worker: a request with a valid token passes it as the caller of the token.

    key: that the server and this worker share. only: whether requests without a token are rejected, at an address that
    is for direct requests only.
    """

    def __init__(self, app: App, key: str | None, lease: Lease, only: bool = False) -> None:
        self._app = app
        self._key = key
        self._lease = lease
        self._only = only
        self._known: OrderedDict[bytes, tuple[Grant, bytes]] = OrderedDict()  # valid tokens, with their proofs
        self._rows = Router("data")
        for route in ROUTES.values():
            if route.plane == "data":
                self._rows.add(route, _elsewhere)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tokens = [value for name, value in scope["headers"] if name == b"authorization" and value.startswith(_BEARER)]
        if not tokens and not self._only:
            await self._app(scope, receive, send)
            return
        try:
            if len(tokens) != 1:
                raise Unauthorized("this address is for direct requests with a token", hint="send it to the server")
            caller, proof = self._caller(scope, tokens[0].removeprefix(b"Bearer "))
        except RockError as error:
            await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))
            return
        headers = [header for header in scope["headers"] if header[0] not in _REMOVED]

        async def proven(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [header for header in message["headers"] if header[0].lower() != PROOF]  # of a program inside
                message["headers"] = [*kept, (PROOF, proof)]
            await send(message)

        await self._app({**scope, "headers": headers, GRANTED: caller}, receive, proven)

    def _caller(self, scope: Scope, token: bytes) -> tuple[Caller, bytes]:
        """The caller of a request that its token permits, and the proof for it. Unauthorized, Forbidden, NotFound."""
        known = self._known.get(token)
        if known is None:
            if not self._key:
                raise Unauthorized("this worker accepts no direct requests", hint="send the request to the server")
            known = granted(token, self._key), proof_of(token.decode(), self._key).encode()
            self._known[token] = known
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        (grant, proof), lease = known, self._lease()
        if time.time() > grant.expires:
            raise Unauthorized("the token of this direct request has expired", hint="request another one")
        if lease != (grant.worker, grant.epoch):
            raise Unauthorized("the token of this direct request is for another worker, or this one has no lease",
                               hint="send the request to the server")  # fmt: skip
        path: str = scope["path"]
        if path == CONNECTION:
            return grant.caller, proof  # the tokens of the requests over the connection are checked as here
        if path == BUILD or not is_data(path) or path[len(PREFIX) :].partition("/")[0] != grant.sandbox:
            raise Forbidden("the token of this direct request is for requests to one sandbox only",
                            hint="send this request to the server")  # fmt: skip
        if scope["type"] == "websocket":  # it would outlive the token, and a key that is revoked
            raise Forbidden("a WebSocket cannot be a direct request", hint="open it at the server")
        found = self._rows.match(scope["method"], path)
        if found is None:
            raise no_such_route(path, scope["method"])
        grant.caller.require(found[2].access)
        return grant.caller, proof


async def _elsewhere(request: Request) -> Answer:
    raise AssertionError("only its access rights are used")
