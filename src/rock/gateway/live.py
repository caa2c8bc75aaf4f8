"""The response of a running call: produced once, followed by any number of clients.

A retried request joins its call: it gets the response from its first byte on. The response is complete in memory until
the call has ended and was delivered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

Headers = list[tuple[bytes, bytes]]
JSON_TYPE = b"application/json"
SSE_TYPE = b"text/event-stream; charset=utf-8"


class Live:
    """followers: clients that receive the response now. complete: all bytes were produced."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.parts: list[bytes] = []
        self.complete = False
        self.broken = False
        self.followers = 0
        self._news: list[asyncio.Future[None]] = []

    def start(self, status: int, content_type: bytes, headers: Headers | None = None) -> None:
        """The head of the response."""
        self.status = status
        self.headers = [(b"content-type", content_type), *(headers or [])]
        self._wake()

    def send(self, part: bytes) -> None:
        if part:
            self.parts.append(part)
            self._wake()

    def end(self) -> None:
        self.complete = True
        self._wake()

    def abort(self) -> None:
        """The response stays incomplete: followers close their connections."""
        self.broken = True
        self.end()

    def whole(self, status: int, body: bytes, content_type: bytes = JSON_TYPE, headers: Headers | None = None) -> None:
        """A complete response."""
        self.parts = [body]
        self.start(status, content_type, headers)
        self.end()

    def _wake(self) -> None:
        news, self._news = self._news, []
        for future in news:
            if not future.done():
                future.set_result(None)

    async def _changed(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news.append(future)
        await future

    async def begun(self) -> None:
        """Wait for the head of the response, or its end without one."""
        while not (self.status or self.complete):
            await self._changed()

    async def ended(self) -> None:
        """Wait for the end of the response."""
        while not self.complete:
            await self._changed()

    async def follow(self) -> AsyncGenerator[bytes]:
        """The body from the first byte on. ConnectionError when it stays incomplete."""
        at = 0
        while True:
            while at < len(self.parts):
                yield self.parts[at]
                at += 1
            if self.complete:
                if self.broken:
                    raise ConnectionError("the response broke")
                return
            await self._changed()
