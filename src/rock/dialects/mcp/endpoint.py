"""The route /mcp: streamable HTTP. A POST has one message and returns its response as JSON; DELETE ends a session.

The query selects the sandbox of a session: `?sandbox=ID` an existing one, `?image=`, `?memory=`, `?cpus=`, `?network=`
the fields of the one that the first call creates. Clients that speak all versions choose one with sessions, whose
sandbox ends with them; `?stateless=1` offers 2026-07-28 to them. A request of that version is served in any case.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from rock.dialects.api import api_of, lasting_api_of, limited_body
from rock.dialects.mcp.context import Session, ToolContext
from rock.dialects.mcp.messages import (
    HANDSHAKE,
    HEADER_MISMATCH,
    INVALID_REQUEST,
    LONGEST,
    MODERN,
    MOST_BATCHED,
    VERSIONS,
    Failure,
    Message,
    error_response,
    failure_of,
    id_of,
    message_of,
    parsed,
    response,
    unsupported,
)
from rock.dialects.mcp.protocol import initialized, result_of
from rock.dialects.mcp.sessions import Sessions, session_of
from rock.errors import InvalidConfig, NotFound, RockError
from rock.http.asgi import Answer, App, Found, Request, Router
from rock.protocol.keys import Access, caller_of
from rock.protocol.route import Route

PATH = "/mcp"
_STATELESS = "stateless"
_SESSION, _VERSION, _METHOD, _NAME = b"mcp-session-id", b"mcp-protocol-version", b"mcp-method", b"mcp-name"


class McpEndpoint:
    """The routes of the endpoint. api: the application that serves the native API."""

    def __init__(self, api: App) -> None:
        self._api = api
        self._sessions = Sessions()
        self._router = Router("mcp")
        for method, handler in (("POST", self.post), ("DELETE", self.delete), ("GET", self.get)):
            row = Route(f"mcp_{method.lower()}", method, PATH, "control", "MCP", access=Access.READ)
            self._router.add(row, handler)

    def match(self, method: str, path: str) -> Found | None:
        """The handler of a request."""
        return self._router.match(method, path)

    async def close(self) -> None:
        """No effect: each request ends by itself."""

    async def get(self, request: Request) -> Answer:
        """There is no stream of messages of the server."""
        return Answer(b"", 405, headers=[(b"allow", b"POST, DELETE")])

    async def delete(self, request: Request) -> Answer:
        """End a session: its requests are canceled, and its own sandbox is stopped."""
        session = self._session(request)
        self._sessions.remove(session)
        await session.close(lasting_api_of(self._api, request))
        return Answer(b"", 204)

    async def post(self, request: Request) -> Answer:
        data = await limited_body(request, LONGEST)
        value: Any = None
        try:
            value = parsed(data)
            if isinstance(value, list):
                return await self._batch(request, value)
            message = message_of(value)
            return await self._one(request, message)
        except Failure as error:
            return _reply(error_response(id_of(value), error), error.status)

    async def _one(self, request: Request, message: Message) -> Answer:
        if message.method == "initialize" and message.id is not None:
            return self._initialize(request, message)
        modern = message.is_modern or (request.header(_VERSION) or "") in MODERN
        session = _stateless(request) if modern else self._session(request)
        if message.method is None or message.id is None:
            if session is not None and not modern and message.method == "notifications/cancelled":
                session.cancel(message.params.get("requestId"))
            return Answer(b"", 202)
        if modern:
            _check_headers(request, message)
        else:
            _check_version(request)
        reply, failed = await self._reply(request, message, session)
        return _reply(reply, failed.status if failed is not None and modern else 200)

    def _initialize(self, request: Request, message: Message) -> Answer:
        result = initialized(message.params)
        session = session_of(caller_of(request.scope).owner, dict(request.query))
        self._sessions.add(session)
        return _reply(response(message.id, result), headers=[(_SESSION, session.id.encode())])

    async def _batch(self, request: Request, values: list[Any]) -> Answer:
        """Messages of one POST, which version 2025-03-26 has."""
        if not 1 <= len(values) <= MOST_BATCHED:
            raise Failure(INVALID_REQUEST, f"a batch of {len(values)} messages; 1 to {MOST_BATCHED} are accepted")
        session = self._session(request)
        messages = [message_of(value) for value in values]
        if any(message.method == "initialize" or message.is_modern for message in messages):
            raise Failure(INVALID_REQUEST, "initialize, and requests of 2026-07-28, are not sent in a batch")
        for message in messages:
            if message.method == "notifications/cancelled":
                session.cancel(message.params.get("requestId"))
        asked = [message for message in messages if message.method is not None and message.id is not None]
        replies = await asyncio.gather(*(self._reply(request, message, session) for message in asked))
        return _reply([reply for reply, _ in replies]) if replies else Answer(b"", 202)

    async def _reply(
        self, request: Request, message: Message, session: Session | None
    ) -> tuple[dict[str, Any], Failure | None]:
        caller = caller_of(request.scope)
        context = ToolContext(api_of(self._api, request), session, _base_url(request))
        try:
            versions = VERSIONS if _STATELESS in request.query else tuple(reversed(HANDSHAKE))
            return response(message.id, await result_of(message, context, caller.scopes, versions)), None
        except Failure as error:
            return error_response(message.id, error), error
        except RockError as error:
            failure = failure_of(error)
            return error_response(message.id, failure), failure

    def _session(self, request: Request) -> Session:
        """The session of a request. NotFound, upon which a client opens another."""
        given = request.header(_SESSION)
        if given is None:
            raise InvalidConfig("the request has no header Mcp-Session-Id", hint="send initialize first")
        session = self._sessions.find(given, caller_of(request.scope).owner)
        if session is None:
            raise NotFound(f"there is no MCP session {given[:64]!r}; it has ended, or the server has restarted",
                           hint="send initialize, and use the new session")
        return session


def _stateless(request: Request) -> Session | None:
    """The sandbox that the query names for requests without a session. InvalidConfig for other options."""
    options = {name: value for name, value in request.query.items() if name != _STATELESS}
    if set(options) - {"sandbox"}:
        raise InvalidConfig(f"{', '.join(options)[:200]} select the sandbox of a session, and version 2026-07-28 has "
                            "no sessions", hint="use sandbox_create, or a client of an earlier version")
    return session_of("", options) if options else None


def _check_version(request: Request) -> None:
    """Failure for the header of a version that is not served. A request without it is of 2025-03-26."""
    version = request.header(_VERSION)
    if version is not None and version not in HANDSHAKE:
        raise unsupported(version)


def _check_headers(request: Request, message: Message) -> None:
    """The headers of a request of 2026-07-28 repeat the body, for proxies; Failure where they differ."""
    if not message.is_modern:
        message.check_envelope()  # names the missing fields
    expected = {_VERSION: message.meta.get("io.modelcontextprotocol/protocolVersion"), _METHOD: message.method}
    if message.method == "tools/call":
        expected[_NAME] = message.params.get("name")
    for name, value in expected.items():
        given = [found for key, found in request.headers if key == name]
        if len(given) != 1 or given[0].decode("latin-1") != value:
            raise Failure(HEADER_MISMATCH, f"the header {name.decode()} does not match the body",
                          {"supported": list(VERSIONS)})


def _base_url(request: Request) -> str:
    """The address by which the client reached the server."""
    return f"{request.scope.get('scheme', 'http')}://{request.header(b'host') or '127.0.0.1'}"


def _reply(value: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> Answer:
    return Answer(orjson.dumps(value, default=repr), status, headers=headers or [])
