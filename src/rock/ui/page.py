"""The web page below /ui: static files, login, and the API for its sessions.

`Page.over` wraps the authentication: it serves what needs no caller, and marks requests of a session with the key of
that session. The API below /ui/v1 is the public API at /v1; the cookie of a session is valid for these paths alone, so
a program in a sandbox, which is served below /v1, never receives it. `Page.inside` serves what needs a caller.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import orjson

from rock import __version__
from rock.admin.auth import PAGE_KEY, Authenticated, given_key
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unauthorized, Unsupported, no_such_route
from rock.http.asgi import Answer, App, Receive, Request, Scope, Send, answer, deny, failure
from rock.protocol.keys import Caller, caller_of
from rock.protocol.routes import PAGE, PAGE_API
from rock.store.access import AccessStore
from rock.ui.assets import API_HEADERS, FOREVER, HEADERS, NEVER, Asset, Assets
from rock.ui.live import Live
from rock.ui.sessions import LASTS, LINK_LASTS, Sessions, check_csrf, check_same_origin, cookie, csrf_of, token_of

_API = PAGE + "/api/"
_STATIC = PAGE + "/static/"
_LONGEST_LOGIN = 4096  # bytes
_TOLD = 16 << 10  # bytes of a URL that the page accepts
Note = Callable[[Scope, Caller, str, int], None]


class Page:
    """The page of one server. note: adds a login or a logout to the audit log."""

    def __init__(self, access: Callable[[], AccessStore], live: Live, note: Note) -> None:
        self._access = access
        self._opened: Sessions | None = None
        self._assets = Assets()
        self._live = live
        self._note = note

    @property
    def _sessions(self) -> Sessions:
        if self._opened is None:
            self._opened = Sessions(self._access())
        return self._opened

    async def close(self) -> None:
        await self._live.close()

    # ---- before authentication ----

    def over(self, auth: Authenticated) -> App:
        """Wrap the authenticated application."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan" or not (scope["path"] == PAGE or scope["path"].startswith(PAGE + "/")):
                if scope["type"] == "http" and scope["path"] == "/" and _wants_html(scope):
                    await _redirect(PAGE + "/").send(send)
                    return
                await auth(scope, receive, send)
                return
            try:
                await self._serve(auth, scope, receive, send)
            except RockError as error:
                await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))

        return app

    async def _serve(self, auth: Authenticated, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if len(path) + len(scope.get("query_string", b"")) > _TOLD:
            raise InvalidConfig(f"the URL is over {_TOLD} bytes", hint="use fewer filters")
        if not path.startswith((PAGE_API, _API)):
            if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
                raise no_such_route(path, "WEBSOCKET" if scope["type"] == "websocket" else scope["method"])
            await self._file(scope).send(send)
            return
        if scope["type"] == "http" and scope["method"] == "POST" and path == _API + "login":
            await (await self._login(auth, scope, receive)).send(send)
            return
        token = token_of(scope)
        session = await self._sessions.find(token) if token else None
        if session is not None:
            check_same_origin(scope)
            check_csrf(scope, token)
            if path == _API + "logout":
                await self._sessions.close(token)
                self._note(scope, await auth.caller({**scope, PAGE_KEY: session.key}), "logout", 200)
                await Answer(b"{}", headers=[cookie(scope, "", 0), NEVER]).send(send)
                return
        elif path == _API + "session" and not auth.is_keyless:
            await _json({"signed_in": False, "version": __version__}).send(send)
            return
        elif path == _API + "link" and (key := given_key(scope)):
            scope = {**scope, "rock.key_digest": await auth.sign_in(key)}
        inner = {**scope, "headers": [h for h in scope["headers"] if h[0] != b"cookie"]}
        if session is not None:
            inner |= {PAGE_KEY: session.key, "rock.page_token": token}
        if path.startswith(PAGE_API):
            path = path.removeprefix(PAGE)
            if "/ports/" in path or "/tcp/" in path:
                raise Unsupported("a session of the web page reaches no port of a sandbox",
                                  hint="use an API key, or: rock port-forward SANDBOX PORT")
            inner |= {"path": path, "raw_path": scope.get("raw_path", b"").removeprefix(PAGE.encode())}
            send = _hardened(send)
        await auth(inner, receive, send)

    async def _login(self, auth: Authenticated, scope: Scope, receive: Receive) -> Answer:
        """Exchange a key, or the token of a one-time link, for a session."""
        check_same_origin(scope)
        body = orjson_object(await _limited(scope, receive, _LONGEST_LOGIN))
        if auth.is_keyless:
            raise Conflict("this server recognizes its owner without a key", hint="reload the page")
        if isinstance(link := body.get("link"), str):
            key = await self._sessions.enter(link)
            problem = Unauthorized("the link was used already or has expired", hint="run `rock ui` for another link")
        else:
            given = body.get("key")
            if not isinstance(given, str) or not given.strip():
                raise InvalidConfig("the login has no key", hint='send {"key": KEY} or {"link": TOKEN}')
            key = await auth.sign_in(given.strip().encode())
            problem = Unauthorized("the key is unknown or was revoked", hint="use a key from `rock key create`")
        if key is None:
            raise problem
        token = await self._sessions.open(key)
        caller = await auth.caller({**scope, PAGE_KEY: key})
        self._note(scope, caller, "login", 200)
        return Answer(orjson.dumps(_about(caller, csrf_of(token))), headers=[cookie(scope, token, LASTS), NEVER])

    def _file(self, scope: Scope) -> Answer:
        path = scope["path"]
        if path == PAGE:
            return _redirect(PAGE + "/")
        if path.startswith(_STATIC):
            version, _, name = path.removeprefix(_STATIC).partition("/")
            asset = self._assets.find(name)
            if asset is None:
                raise NotFound(f"the page has no file {name[:100]!r}", hint="reload the page")
            # A page of the previous version may still load a file; it must not be cached under that version.
            return _asset(scope, asset, FOREVER if version == self._assets.version else NEVER)
        return _asset(scope, self._assets.index(), NEVER)

    # ---- after authentication ----

    def inside(self, rest: App) -> App:
        """Serve the paths that need a caller, and `rest` for all others."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan" or not scope["path"].startswith(_API):
                await rest(scope, receive, send)
                return
            try:
                await self._own(scope, receive, send)
            except RockError as error:
                await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))

        return app

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, caller = scope["path"].removeprefix(_API), caller_of(scope)
        if scope["type"] == "websocket":
            if name != "live":
                raise no_such_route(scope["path"], "WEBSOCKET")
            await self._live.serve(caller, receive, send)
            return
        match scope["method"], name:
            case "GET", "session":
                token = scope.get("rock.page_token")
                await _json(_about(caller, csrf_of(token) if token else "")).send(send)
            case "GET", "rows":
                data = await self._live.columns(caller, Request(scope, receive, {}))
                await Answer(data, headers=[(b"content-encoding", b"gzip"), NEVER]).send(send)
            case "POST", "link":
                await _json(await self._link(scope)).send(send)
            case _:
                raise no_such_route(scope["path"], scope["method"])

    async def _link(self, scope: Scope) -> dict[str, Any]:
        """A one-time link for the key of this request; without a key the page needs no link."""
        key = scope.get("rock.key_digest")
        if not key:
            return {"path": PAGE + "/", "seconds": None}
        return {"path": f"{PAGE}/#link={await self._sessions.link(key)}", "seconds": LINK_LASTS}


def _about(caller: Caller, csrf: str) -> dict[str, Any]:
    return {"signed_in": True, "version": __version__, "csrf": csrf, "keyless": not csrf, "tenant": caller.tenant,
            "key_id": caller.key_id, "scopes": sorted(caller.scopes)}  # fmt: skip


def _json(value: Any) -> Answer:
    reply = answer(value)
    reply.headers.append(NEVER)
    return reply


def orjson_object(body: bytes) -> dict[str, Any]:
    """A JSON object. InvalidConfig."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise InvalidConfig("the body is no JSON object", hint='send {"key": KEY}')
    return found


async def _limited(scope: Scope, receive: Receive, most: int) -> bytes:
    """The body of a request of at most `most` bytes."""
    data = b""
    async for part in Request(scope, receive, {}).chunks():
        data += part
        if len(data) > most:
            raise InvalidConfig(f"the body is over {most} bytes", hint="send a key")
    return data


def _wants_html(scope: Scope) -> bool:
    accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return scope["method"] in ("GET", "HEAD") and b"text/html" in accept


def _redirect(path: str) -> Answer:
    return Answer(status=307, content_type=b"text/plain", headers=[(b"location", path.encode()), NEVER, *HEADERS])


def _asset(scope: Scope, asset: Asset, caching: tuple[bytes, bytes]) -> Answer:
    accepted = next((value for name, value in scope["headers"] if name == b"accept-encoding"), b"")
    headers = [caching, (b"vary", b"accept-encoding"), *HEADERS]
    if b"gzip" in accepted:
        return Answer(asset.packed, content_type=asset.content_type,
                      headers=[*headers, (b"content-encoding", b"gzip")])  # fmt: skip
    return Answer(asset.plain, content_type=asset.content_type, headers=headers)


def _hardened(send: Send) -> Send:
    """Send responses of the API with headers that keep them from becoming a document of the page's origin."""

    async def hardened(message: MutableMapping[str, Any]) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            kept = [h for h in message.get("headers", ()) if h[0] not in (b"content-security-policy", b"set-cookie")]
            message = {**message, "headers": [*kept, *API_HEADERS]}
        await send(message)

    return hardened
