"""Who watches a store, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

_MOST = 10_000


class Watchers:
    """Hands ids on to whoever watches. A watcher that is too slow is told that it missed some."""

    def __init__(self) -> None:
        self._queues: list[asyncio.Queue[str]] = []

    def tell(self, sandbox_id: str) -> None:
        for queue in self._queues:
            missed = queue.full()
            while missed and not queue.empty():
                queue.get_nowait()
            queue.put_nowait("" if missed else sandbox_id)

    async def watch(self) -> AsyncGenerator[str]:
        queue: asyncio.Queue[str] = asyncio.Queue(_MOST)
        self._queues.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)
