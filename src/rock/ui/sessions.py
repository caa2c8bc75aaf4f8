"""Sessions of the web page: a cookie in exchange for an API key, and one-time links.

A session is a random token; the store has its SHA-256 and that of the key. Each request is authenticated by the key, so
a revoked key ends its sessions, and sessions survive a restart of the server.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie

from rock.admin.auth import check_origin
from rock.errors import Forbidden, Unauthorized
from rock.http.asgi import Scope
from rock.store.access import AccessStore, Session

COOKIE = "rock_session"
CSRF = b"x-rock-csrf"
LASTS = 12 * 3600.0  # seconds
LINK_LASTS = 60.0
_FRESH = 5.0  # seconds for which a session is cached
_REMEMBERED = 1000
_LONGEST_COOKIE = 8 << 10  # bytes


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def csrf_of(token: str) -> str:
    """The CSRF token of a session. It reveals nothing about the session's token."""
    return hmac.new(token.encode(), b"rock csrf", hashlib.sha256).hexdigest()


def token_of(scope: Scope) -> str:
    """The session token in the cookies of a request; "" without one."""
    for name, value in scope["headers"]:
        if name == b"cookie" and len(value) <= _LONGEST_COOKIE:
            try:
                found = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                continue
            if found is not None and 20 <= len(found.value) <= 100:
                return found.value
    return ""


def cookie(scope: Scope, token: str, seconds: float) -> tuple[bytes, bytes]:
    """The Set-Cookie header of a session. Its path keeps it from requests to programs in sandboxes."""
    secure = "; Secure" if scope["scheme"] in ("https", "wss") else ""
    text = f"{COOKIE}={token}; Path=/ui; Max-Age={int(seconds)}; HttpOnly; SameSite=Strict{secure}"
    return b"set-cookie", text.encode()


def check_same_origin(scope: Scope) -> None:
    """Unauthorized for a request that a page of another origin sent. A WebSocket has to name its origin."""
    check_origin(scope)
    if any(name == b"sec-fetch-site" and value not in (b"same-origin", b"none") for name, value in scope["headers"]):
        raise Unauthorized("the request comes from a web page of another site", hint="open the page of this server")
    if scope["type"] == "websocket" and not any(name == b"origin" for name, _ in scope["headers"]):
        raise Unauthorized("a WebSocket with a session has no header Origin", hint="send an API key instead")


def check_csrf(scope: Scope, token: str) -> None:
    """Forbidden for a request that changes something without the CSRF token of its session."""
    if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD"):
        return
    given = next((value for name, value in scope["headers"] if name == CSRF), b"")
    if not hmac.compare_digest(given, csrf_of(token).encode()):
        raise Forbidden("the CSRF token is missing or wrong", hint="reload the page")


class Sessions:
    """The sessions in a store, with a small cache."""

    def __init__(self, access: AccessStore) -> None:
        self._access = access
        self._seen: OrderedDict[str, tuple[float, Session]] = OrderedDict()

    async def open(self, key: str) -> str:
        """Begin a session of a key, by its digest; returns the token."""
        return await self._add("session", key, LASTS)

    async def link(self, key: str) -> str:
        """The token of a link that signs in once, within LINK_LASTS seconds."""
        return await self._add("link", key, LINK_LASTS)

    async def _add(self, kind: str, key: str, seconds: float) -> str:
        token, now = secrets.token_urlsafe(32), time.time()
        session = Session(_digest(token), "link" if kind == "link" else "session", key, now + seconds)
        await self._access.add_session(session, now)
        return token

    async def enter(self, token: str) -> str | None:
        """The key of a link, which is used up by this; None for a used or expired one."""
        session = await self._access.take_session(_digest(token), "link")
        return None if session is None or session.until < time.time() else session.key

    async def find(self, token: str) -> Session | None:
        """A session by its token; None when it expired or was closed."""
        digest = _digest(token)
        known = self._seen.get(digest)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        found = await self._access.session(digest, "session", time.time())
        if found is None:
            self._seen.pop(digest, None)
            return None
        self._seen[digest] = (time.monotonic() + _FRESH, found)
        self._seen.move_to_end(digest)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return found

    async def close(self, token: str) -> None:
        """End a session."""
        digest = _digest(token)
        self._seen.pop(digest, None)
        await self._access.take_session(digest, "session")
