"""Long work on the event loop, in portions: each pass of the loop runs one portion of all waiting work.

When many connections have much to parse, other tasks wait for one portion in total, not for one portion per connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

BUDGET = 0.001  # seconds per portion


class Rounds:
    """The waiting work of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def soon(self, work: Callable[[], None]) -> None:
        """Call the function in a pass of its own."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self.loop.call_soon(self._next)

    async def wait(self) -> None:
        """Return in a pass of its own."""
        turn = self.loop.create_future()
        self.soon(lambda: None if turn.done() else turn.set_result(None))
        await turn

    def _next(self) -> None:
        work = self._waiting[0]
        try:
            work()
        finally:
            self._waiting.popleft()
            if self._waiting:
                self.loop.call_soon(self._next)


_last: Rounds | None = None


def rounds() -> Rounds:
    """The queue of the running loop."""
    global _last
    loop = asyncio.get_running_loop()
    if _last is None or _last.loop is not loop:
        _last = Rounds(loop)
    return _last


# ---- waiting for shared work ----

async def settled(future: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Wait until the future is done, or `seconds` are over; a cancellation of the caller does not cancel it.

    Equivalent to asyncio.wait and asyncio.shield, at a third of their cost: every command waits here twice.
    """
    if future.done():
        return
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def end(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    future.add_done_callback(end)
    timer = None if seconds is None else loop.call_later(seconds, end)
    try:
        await over
    finally:
        future.remove_done_callback(end)
        if timer is not None:
            timer.cancel()
