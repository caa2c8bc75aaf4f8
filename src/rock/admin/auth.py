"""Who may call: one key for all, given at start. A server beyond loopback has to have one."""

from __future__ import annotations

import hmac
import ipaddress

from rock.errors import InvalidConfig, Unauthorized
from rock.protocol.routes import OTHER_KEY
from rock.wire.asgi import App, Receive, Scope, Send, deny, failure

_OPEN = ("/healthz", "/")
_OTHER_KEY = OTHER_KEY.encode()


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key_beyond_loopback(host: str, key: str | None) -> None:
    if not key and not is_loopback(host):
        raise InvalidConfig(
            f"refusing to listen on {host} without an API key: anybody who can reach it could run programs here",
            hint="set ROCK_API_KEY, or listen on 127.0.0.1",
        )


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
    """Lets requests through that carry `Authorization: Bearer KEY`, or the key alone as X-ROCK-API-Key; without a key,
    every request but those of web pages that are not ours."""

    def __init__(self, app: App, key: str | None) -> None:
        self._app = app
        self._want = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope)
        if error is None:
            if self._want is not None and scope["type"] != "lifespan":
                # The key ends here: programs inside, to which requests are handed on, must not see it.
                scope = {**scope, "headers": [header for header in scope["headers"] if not self._is_key(*header)]}
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await deny(scope, send, error)
            return
        await failure(error).send(send)

    def _refusal(self, scope: Scope) -> Unauthorized | None:
        if scope["type"] == "lifespan":
            return None
        if self._want is None:
            return _foreign_page(scope)
        if self._allowed(scope):
            return None
        return Unauthorized("the API key is missing or wrong", hint="set ROCK_API_KEY to the server's key")

    def _allowed(self, scope: Scope) -> bool:
        if scope["path"] in _OPEN and scope["type"] == "http":
            return True
        return any(self._is_key(name, value) for name, value in scope["headers"])

    def _is_key(self, name: bytes, value: bytes) -> bool:
        want = self._want or b""
        if name == b"authorization":
            return hmac.compare_digest(value, want)
        return name == _OTHER_KEY and hmac.compare_digest(value, want.removeprefix(b"Bearer "))
