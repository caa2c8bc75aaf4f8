"""Requests that another server relays to this one: the end of their connection is not the end of their client.

    client ──► server ──► this one        x-rock-call: ID on each relayed request
    the client leaves:  DELETE /node/v1/calls/ID, then the connection closes
    the server dies:    the connection closes, and nothing else is sent

A handler sees a disconnect (`http.disconnect`) at once in the first case, and in the second only after the reconnect
period, unless the request comes again with its idempotency key: then the new request takes the place of the old one. A
request without the header comes from a client itself, whose connection is all that is known of it.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

from rock.errors import InvalidConfig
from rock.protocol.keys import caller_of
from rock.protocol.routes import CALL, IDEMPOTENCY_KEY, ROUTES
from rock.wire.asgi import Answer, App, Receive, Scope, Send, failure

_CALL = CALL.encode()
_KEY = IDEMPOTENCY_KEY.encode()
_PREFIX = ROUTES["cancel_call"].path.partition("{")[0]
_EARLY = 1000  # cancelled calls that are remembered because their request was not read yet
_LONGEST = 100  # characters of an id

Place = tuple[str, bytes]


class Calls:
    """`app` for relayed requests too. reconnect: seconds for which a request goes on after its connection broke."""

    def __init__(self, app: App, reconnect: float) -> None:
        self._app = app
        self._reconnect = reconnect
        self._left: dict[bytes, asyncio.Event] = {}  # set when the client of a call has left
        self._places: dict[Place, bytes] = {}  # the last call of an idempotency key
        self._early: OrderedDict[bytes, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "DELETE" and scope["path"].startswith(_PREFIX):
            await self._cancel(scope["path"][len(_PREFIX) :].encode("utf-8", "replace"), scope, send)
            return
        call = key = None
        for name, value in scope["headers"]:
            if name == _CALL:
                call = value
            elif name == _KEY:
                key = value
        if not call or len(call) > _LONGEST or call in self._left:
            await self._app(scope, receive, send)
            return
        left = self._left[call] = asyncio.Event()
        if call in self._early:
            del self._early[call]
            left.set()
        place = None if key is None else (scope["path"], key)
        if place is not None:
            before = self._left.get(self._places.get(place, b""))
            if before is not None:
                before.set()
            self._places[place] = call
        try:
            await self._app(scope, self._held(receive, left), send)
        finally:
            del self._left[call]
            if place is not None and self._places.get(place) == call:
                del self._places[place]

    def _held(self, receive: Receive, left: asyncio.Event) -> Receive:
        """`receive`, which tells of a broken connection once its client has left or the reconnect period is over."""
        whole = False

        async def held() -> MutableMapping[str, Any]:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
            elif whole:  # a request that was cut short cannot be carried out
                try:
                    async with asyncio.timeout(self._reconnect):
                        await left.wait()
                except TimeoutError:
                    pass
            return message

        return held

    async def _cancel(self, call: bytes, scope: Scope, send: Send) -> None:
        """The client of a call has left. The id is known to the server that made it and to this one only."""
        caller_of(scope)
        if not call or len(call) > _LONGEST:
            await failure(InvalidConfig("this is no id of a call")).send(send)
            return
        left = self._left.get(call)
        if left is not None:
            left.set()
        else:  # it has ended; or it travels by another connection, and is read after this
            self._early[call] = None
            while len(self._early) > _EARLY:
                self._early.popitem(last=False)
        await Answer(b"{}").send(send)


class Ids:
    """Ids of the calls that one server relays: nobody else can guess them."""

    def __init__(self) -> None:
        self._prefix = os.urandom(16).hex()
        self._count = 0

    def next(self) -> bytes:
        self._count += 1
        return f"{self._prefix}{self._count:x}".encode()
