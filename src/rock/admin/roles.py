"""A writer and a reader, of the same parts: what tells them apart is which requests they let in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from rock.errors import RockError, WrongRole
from rock.protocol.planes import Role, role_for
from rock.protocol.routes import HANDED_ON
from rock.wire.asgi import App, Receive, Scope, Send, deny, failure
from rock.wire.remote import Remote, first_reached

_WHAT = {"write": "a reader: it changes nothing", "read": "a writer: it reaches into no sandbox"}
_MARK = (HANDED_ON.encode(), b"1")
_SETTING = {"write": "ROCK_WRITER", "read": "ROCK_READER"}


def servers(text: str) -> list[Remote]:
    """Those that "URL,URL" names. InvalidConfig."""
    return [Remote(url.strip()) for url in text.split(",") if url.strip()]


class Doors:
    """`app` for the requests of its role. others: servers of the other role, to which the rest is handed on as it came,
    key included; without one it is refused with WrongRole, as is what was handed on here by mistake. guard: why a
    request must not be handed on, as the other server cannot tell from whom it is."""

    def __init__(
        self, app: App, role: Role, others: Sequence[Remote],
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
