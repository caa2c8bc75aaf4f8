"""Ports in the ROCK dialect: the native routes under ROCK's paths, with its parameters for the port and its errors.

    ANY, WS  /sandboxes/{id}/proxy[/{path}]   8080, or /proxy/port/{n}, X-ROCK-Target-Port, ?rock_target_port
    ANY, WS  /sandboxes/{id}/vnc[/{path}]     port 8006
    WS       /sandboxes/{id}/portforward?port=
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import unquote

from rock.admin.api.rock_v1.envelope import Failed, failed, is_id, not_started, raised
from rock.errors import Unavailable
from rock.http.asgi import App, Receive, Request, Scope, Send, answer
from rock.protocol.routes import ERROR_CODE, ROUTES

_PATH = re.compile(r"^(/apis/envs/sandbox/v1/sandboxes/([^/]+)/(proxy|vnc|portforward))(?:/(.*))?$", re.S)
_IN_PATH = re.compile(r"^port/([0-9]+)(?:/(.*))?$", re.S)
_PREFIX = "rock.prefix"  # see rocklet/ports.py
_DEFAULT, _VNC = "8080", "8006"
_REASON = 120  # bytes; WebSockets allow 123


class Refused(Exception):
    """The request names no port, or several."""


class Ports:
    """An ASGI application for the paths that it `wants`."""

    def __init__(self, data: App) -> None:
        self._data = data

    @staticmethod
    def wants(scope: Scope) -> bool:
        found = _PATH.match(scope["path"])
        if found is None:
            return False
        return scope["type"] == "websocket" if found[3] == "portforward" else True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.match((scope.get("raw_path") or scope["path"].encode()).decode("latin-1"))
        sandbox_id, kind = (unquote(found[2]), found[3]) if found else ("", "proxy")
        socket = scope["type"] == "websocket"
        try:
            if found is None or not is_id(sandbox_id):
                raise not_started(sandbox_id)
            inner = _inner(scope, receive, found, sandbox_id)
        except Refused as error:
            await (_close(send, 1008, str(error)) if socket else answer({"detail": str(error)}, 400).send(send))
            return
        except Failed as error:
            await (_close(send, 1011, str(error)) if socket else failed(_message(kind), str(error)).send(send))
            return
        if not socket:
            await self._data(inner, receive, _Enveloped(send, sandbox_id, _message(kind)))
        elif kind == "portforward":
            plain = _Plain(send, receive)
            await self._data(inner, plain.receive, plain)
        else:
            await self._data(inner, receive, _Closing(send))


def _message(kind: str) -> str:
    return "vnc http proxy failed" if kind == "vnc" else "http proxy failed"


def _inner(scope: Scope, receive: Receive, found: re.Match[str], sandbox_id: str) -> Scope:
    """The scope of the native request."""
    prefix, rest = found[1], found[4] or ""
    request = Request(scope, receive, {})
    if found[3] == "portforward":
        port = _checked(request.query.get("port"), scope)
        path = ROUTES["tunnel"].path.format(sandbox_id=sandbox_id, port=port)
        return {**scope, "path": path, "raw_path": path.encode()}
    if found[3] == "vnc":
        port = _VNC
    else:
        inside = _IN_PATH.match(rest)
        named = {
            "path": inside[1] if inside else None,
            "header": request.header(b"x-rock-target-port"),
            "query": request.query.get("rock_target_port"),
        }
        given = {where: text for where, text in named.items() if text is not None}
        if len(given) > 1:
            raise Refused(f"the target port is named more than once: {', '.join(given)}")
        port = _checked(next(iter(given.values())), scope) if given else _DEFAULT
        if inside:
            rest = inside[2] or ""
        # a client that follows a redirection repeats its headers, but not the query
        if "header" not in given and given:
            prefix += f"/port/{port}"
    path = ROUTES["port"].path.format(sandbox_id=sandbox_id, port=port, rest=rest)
    return {**scope, "path": unquote(path), "raw_path": path.encode("latin-1"), _PREFIX: prefix}


def _checked(text: str | None, scope: Scope) -> str:
    """A port's number. Some ports are not allowed for WebSockets, as in ROCK."""
    number = int(text) if text and text.isascii() and text.isdigit() and len(text) <= 5 else 0
    socket = scope["type"] == "websocket"
    if not 0 < number < 65536 or (socket and (number < 1024 or number == 22)):
        raise Refused(f"{(text or '')[:40]!r} is not a port from {1024 if socket else 1} to 65535")
    return str(number)


def _text(reply: bytes, status: int, sandbox_id: str) -> str:
    error = raised(reply, status, sandbox_id)
    if isinstance(error, Unavailable) and error.message.startswith("nothing listens"):
        return f"All connection attempts failed: {error}"
    return str(error)


def _ours(message: MutableMapping[str, Any]) -> bool:
    """Whether a response is a ROCK error and not from a program inside."""
    return any(name == ERROR_CODE.encode() for name, _ in message["headers"])


async def _close(send: Send, code: int, reason: str) -> None:
    """Close a WebSocket that is not open yet. It is opened first; otherwise its client never receives the code."""
    cut = reason.encode()[:_REASON].decode(errors="ignore")
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": code, "reason": cut})


class _Enveloped:
    """Forwards a program's response unchanged; a ROCK error becomes "Failed" under HTTP 200."""

    def __init__(self, send: Send, sandbox_id: str, message: str) -> None:
        self._send = send
        self._sandbox_id = sandbox_id
        self._message = message
        self._status = 0
        self._parts: list[bytes] = []

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and _ours(message):
            self._status = message["status"]
        elif not self._status:
            await self._send(message)
        else:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                error = _text(b"".join(self._parts), self._status, self._sandbox_id)
                await failed(self._message, error).send(self._send)


class _Closing:
    """A rejected WebSocket is opened and closed with 1011."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status = 0
        self._known = False
        self._parts: list[bytes] = []

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "websocket.http.response.start":
            self._status = message["status"]
            self._known = _ours(message)
        elif message["type"] == "websocket.http.response.body":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                whole = b"".join(self._parts)
                reason = _text(whole, self._status, "") if self._known else f"it answered with {self._status}"
                await _close(self._send, 1011, reason)
        else:
            await self._send(message)


class _Plain(_Closing):
    """A tunnel for clients without half-close: it is closed when the program has sent all its data."""

    def __init__(self, send: Send, receive: Receive) -> None:
        super().__init__(send)
        self._receive = receive
        self._ended = False

    async def receive(self) -> MutableMapping[str, Any]:
        while True:
            message = await self._receive()
            if message["type"] != "websocket.receive" or message.get("bytes") != b"":
                return message

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if self._ended:
            return
        if message["type"] == "websocket.send" and message.get("bytes") == b"":
            message = {"type": "websocket.close", "code": 1000}
        self._ended = message["type"] == "websocket.close"
        await super().__call__(message)

