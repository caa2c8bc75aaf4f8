"""Requests to ports of sandboxes: by headers below /e2b, and by the host name PORT-ID.DOMAIN."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any

from rock.dialects.e2b.errors import NotRunning, PortClosed, not_running, port_closed
from rock.errors import PortFailed
from rock.http.asgi import Answer, App, Receive, Scope, Send
from rock.protocol.keys import CALLER, Caller
from rock.protocol.routes import ERROR_CODE

_HOST = re.compile(r"([0-9]{1,5})-([a-z0-9](?:[a-z0-9-]{0,55}))\.(.+)")
_OWN = (b"e2b-sandbox-id", b"e2b-sandbox-port", b"e2b-traffic-access-token", b"x-access-token")
_CODE, _CLOSED = ERROR_CODE.encode(), PortFailed.code.encode()
_OF_SERVER = {404, 410, 421, 503}  # statuses of errors of the server that mean that the sandbox does not run


def target_of(scope: Scope, domain: str) -> tuple[int, str] | None:
    """(port, sandbox id) of a request by its host name below a domain; None for other hosts."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    match = _HOST.fullmatch(host)
    if match is None or match[3] != domain or not 0 < int(match[1]) < 65536:
        return None
    return int(match[1]), match[2]


async def forward(
    data: App, scope: Scope, receive: Receive, send: Send, sandbox_id: str, port: int, path: str, caller: Caller
) -> None:
    """Forward a request or a WebSocket to a port. The credentials of the sandbox do not reach the program."""
    target = f"/v1/sandboxes/{sandbox_id}/ports/{port}{path if path.startswith('/') else '/' + path}"
    headers = [header for header in scope["headers"] if header[0] not in _OWN]
    raw = target.encode("utf-8", "surrogateescape")
    inner = {**scope, "path": target, "raw_path": raw, "headers": headers, CALLER: caller}
    if scope["type"] != "http":
        await data(inner, receive, send)
        return
    replaced: Answer | None = None

    async def take(message: MutableMapping[str, Any]) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            code = next((value for name, value in message["headers"] if name == _CODE), None)
            if code == _CLOSED and message["status"] == 502:
                replaced = port_closed(PortClosed(sandbox_id, port))
            elif code is not None and message["status"] in _OF_SERVER:
                replaced = not_running(NotRunning(sandbox_id))
        if replaced is None:
            await send(message)

    await data(inner, receive, take)
    if replaced is not None:
        await replaced.send(send)
