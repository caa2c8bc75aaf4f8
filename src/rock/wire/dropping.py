"""Replies that a fault plan has dropped: the connection is closed without a word, as by a network that fails."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from rock import faults
from rock.protocol.routes import ROUTES
from rock.wire.asgi import App, Receive, Scope, Send, fit


def name_of(method: str, path: str) -> str:
    """The route of a request, for `reply.ROUTE`; "other" for what is in no row of the table."""
    given = path.split("/")
    for name, route in ROUTES.items():
        if route.method == method and fit(tuple(route.path.split("/")), given) is not None:
            return name
    return "other"


def dropping(app: App) -> App:
    """The application with the faults of its replies; it has to be the outermost."""

    async def over(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        dropped = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal dropped
            if message["type"] == "http.response.start":
                dropped = await faults.reply(name_of(scope["method"], scope["path"]))
                if dropped:
                    _cut(send)
                    await asyncio.sleep(0)
            if not dropped:
                await send(message)

        await app(scope, receive, sent)

    return over


def _cut(send: Send) -> None:
    """Close the connection under a `send` of uvicorn's, which has no message for that."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
