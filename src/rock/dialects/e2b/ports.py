"""Requests to ports of sandboxes: by headers below /e2b, and by the host name PORT-ID.DOMAIN."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from rock.dialects.e2b.errors import PortClosed, failure, not_running, port_closed
from rock.dialects.e2b.native import raised
from rock.errors import RockError, Unavailable
from rock.http.asgi import App, Receive, Scope, Send
from rock.protocol.keys import CALLER, Caller
from rock.protocol.routes import ERROR_CODE

_HOST = re.compile(r"([0-9]{1,5})-([a-z0-9](?:[a-z0-9-]{0,55}))\.(.+)")
_OWN = (b"e2b-sandbox-id", b"e2b-sandbox-port", b"e2b-traffic-access-token", b"x-access-token")
_CODE = ERROR_CODE.encode()
_OF_SERVER = {404, 409, 410, 421, 503}  # statuses of errors of the server, beside those of the program


def target_of(scope: Scope, domain: str) -> tuple[int, str] | None:
    """(port, sandbox id) of a request by its host name below a domain; None for other hosts."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    match = _HOST.fullmatch(host)
    if match is None or match[3] != domain or not 0 < int(match[1]) < 65536:
        return None
    return int(match[1]), match[2]


async def forward(
    data: App, scope: Scope, receive: Receive, send: Send, sandbox_id: str, port: int, prefix: str, caller: Caller
) -> None:
    """Forward a request or a WebSocket to a port, without this prefix of the path and the credentials of E2B."""
    target = f"/v1/sandboxes/{sandbox_id}/ports/{port}"
    headers = [header for header in scope["headers"] if header[0] not in _OWN]
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or quote(path).encode()
    inner = {**scope, "path": target + path.removeprefix(prefix), CALLER: caller, "headers": headers,
             "raw_path": target.encode() + raw.removeprefix(prefix.encode())}  # fmt: skip
    if scope["type"] != "http":
        await data(inner, receive, send)
        return
    held: MutableMapping[str, Any] | None = None  # the head of an error of the server, and its body
    body = b""

    async def take(message: MutableMapping[str, Any]) -> None:
        nonlocal held, body
        if message["type"] == "http.response.start" and message["status"] in _OF_SERVER:
            held = message if any(name == _CODE for name, _ in message["headers"]) else None
        if held is None:
            await send(message)
        else:
            body += message.get("body", b"")

    await data(inner, receive, take)
    if held is not None:
        error = raised(body, held["status"], sandbox_id)
        closed = isinstance(error, Unavailable) and error.message.startswith("nothing listens")
        reply = (port_closed(PortClosed(sandbox_id, port)) if closed else failure(error)
                 if isinstance(error, RockError) else not_running(error))  # fmt: skip
        await reply.send(send)
