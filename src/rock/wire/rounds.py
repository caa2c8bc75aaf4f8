"""Long work on the event loop, in portions: one portion of all that wait begins in each pass of the loop.

However many connections have much to parse at once, others wait for one portion of it, and not for one of each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

BUDGET = 0.001  # seconds of a portion


class Rounds:
    """The work that waits on one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def soon(self, work: Callable[[], None]) -> None:
        """Call it in a pass of its own."""
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
    """Those of the running loop."""
    global _last
    loop = asyncio.get_running_loop()
    if _last is None or _last.loop is not loop:
        _last = Rounds(loop)
    return _last
