"""A small event loop: descriptors, timers, and callbacks whose mistakes do not end it."""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable

_LONGEST = 60.0  # seconds without anything to do
_QUIET = 0.5  # seconds without anything to do, after which it is time to `rest`


class Loop:
    """Callbacks by descriptor and by time. `turn` waits once; what a callback raises goes to `complain`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.readers: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.rest: Callable[[], None] | None = None  # called once after each time of work
        self._rested = False

    def turn(self) -> None:
        """Wait for something to do, and do it."""
        timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else _LONGEST
        restless = self.rest is not None and not self._rested and timeout > _QUIET
        try:
            ready = self.epoll.poll(_QUIET if restless else timeout, 64)
        except InterruptedError:
            ready = []
        if restless and not ready and self.rest is not None:
            self._rested = True
            self.guard(self.rest)
            return
        for fd, _ in ready:
            self._rested = False
            callback = self.readers.get(fd)
            if callback is not None:
                self.guard(callback)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            self._rested = False
            self.guard(heapq.heappop(self.timers)[2])

    def guard(self, callback: Callable[[], None]) -> None:
        """Call, and survive it."""
        try:
            callback()
        except Exception as error:
            self.complain(error)

    def complain(self, error: BaseException) -> None:
        """Where mistakes go."""

    def watch(self, fd: int, callback: Callable[[], None], mask: int = select.EPOLLIN) -> None:
        """Call whenever a descriptor is ready."""
        if fd in self.readers:
            self.epoll.modify(fd, mask)
        else:
            self.epoll.register(fd, mask)
        self.readers[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Call no more; before the descriptor is closed."""
        if self.readers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call once, after so many seconds."""
        self._sequence += 1
        heapq.heappush(self.timers, (time.monotonic() + seconds, self._sequence, callback))
