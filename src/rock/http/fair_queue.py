"""Fair queuing of requests on one event loop: a client that floods the server delays itself and not other clients.

The queue only changes the order of requests and guarantees no rate. A client with sequential requests never waits. When
a client has more concurrent requests than may begin in one pass of the loop, the rest is queued per client. Of all
queues one request begins in each pass, round-robin, and none for a few milliseconds while a request of a client without
a queue is fresh, so that its few steps find the loop free. Afterwards a queue always advances: step by step while such
a request is young, because the program inside that it waits for needs the machine too, and fast when no other client is
active. Connections of a client with a queue enqueue their next request before it is read (connections.py).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

_AT_ONCE = 4  # requests of one client that begin in one pass of the loop before a queue is created
_CALM = 0.005  # seconds for which a request is fresh, and for which the queues may pause
_YOUNG, _STEP = 0.05, 0.001  # seconds for which a request is young, and between two steps of the queues meanwhile
_ALONE = 0.1  # seconds after its last request after which a client is no longer active


PLACE = "rock.place"  # the QueuePlace of a connection, in the scopes of its requests


class QueuePlace:
    """The state of a connection in the queues. line: the client of its last request, if that was queued."""

    __slots__ = ("_turns", "_waited", "line")

    def __init__(self) -> None:
        self.line = ""
        self._waited = ""
        self._turns: FairQueue | None = None

    def wait(self, begin: Callable[[], None]) -> bool:
        """Call `begin` at the turn of this connection's next request; False when its client has no queue."""
        line = self.line
        if not line or self._turns is None:
            return False

        def go() -> None:
            self._waited = line
            begin()

        return self._turns.line_up(line, go)

    def has_waited(self, turns: FairQueue, who: str) -> bool:
        """Whether the request that was just read has already been queued, as a request of `who`."""
        waited, self._waited = self._waited, ""
        if waited != who or self._turns is not turns:
            self._turns, self.line = turns, ""
            return False
        return True


class FairQueue:
    """Decides which request begins. Call `take` for each request, and `leave` at its end; clients are identified by
    name."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: OrderedDict[str, deque[asyncio.Future[None] | Callable[[], None]]] = OrderedDict()
        self._begun: dict[str, int] = {}  # in this pass of the loop
        # young requests of clients without a queue, with their start times
        self._fresh: dict[int, tuple[str, float]] = {}
        self._seen: dict[str, float] = {}  # last request of each client without a queue
        self._number = 0
        self._moved = 0.0  # time of the last step of a queue
        self._pass: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Number of requests in all queues."""
        return sum(map(len, self._lines.values()))

    async def take(self, who: str, place: QueuePlace | None = None) -> int:
        """Wait for the turn of a request; returns the argument for `leave`. place: of the connection of the request."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        if place is not None and place.has_waited(self, who):
            return 0
        begun = self._begun.get(who, 0)
        if who not in self._lines and begun < _AT_ONCE:
            self._begun[who] = begun + 1
            self._arm()
            self._number += 1
            self._fresh[self._number] = (who, self._loop.time())
            return self._number
        if place is not None:
            place.line = who
        turn = self._loop.create_future()
        self._lines.setdefault(who, deque()).append(turn)
        self._arm()
        try:
            await turn
        except asyncio.CancelledError:
            line = self._lines.get(who)
            if line is not None and turn in line:
                line.remove(turn)
                if not line:
                    del self._lines[who]
            raise
        return 0

    def line_up(self, who: str, begin: Callable[[], None]) -> bool:
        """Call `begin` at the turn of one more request of a client with a queue; False when it has none."""
        line = self._lines.get(who)
        if line is None:
            return False
        line.append(begin)
        return True

    def leave(self, number: int) -> None:
        """A request is over."""
        if number and self._fresh.pop(number, None) is not None and self._lines:
            self._arm()

    def _arm(self) -> None:
        if self._pass is None and self._loop is not None:
            self._pass = self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Run once in each pass of the loop in which a request began or waits."""
        assert self._loop is not None
        self._pass = None
        now = self._loop.time()
        for who in self._begun:
            if who not in self._lines:
                self._seen[who] = now
        self._begun.clear()
        if len(self._seen) > 64:
            self._seen = {who: at for who, at in self._seen.items() if now - at < _ALONE}
        if not self._lines:
            return
        self._forget(now)
        pause = self._pause(now)
        if now - self._moved < pause:
            if self._later is None:
                self._later = self._loop.call_later(pause, self._wake)
            return
        self._moved = now
        others = len(self._lines) > 1 or any(now - at < _ALONE for who, at in self._seen.items()
                                             if who not in self._lines)  # fmt: skip
        for _ in range(1 if others else _AT_ONCE):
            self._move()
        if self._lines:
            self._arm()

    def _forget(self, now: float) -> None:
        """Drop entries that are no longer young, and those of clients that have a queue now."""
        old = [number for number, (who, at) in self._fresh.items() if now - at > _YOUNG or who in self._lines]
        for number in old:
            del self._fresh[number]

    def _pause(self, now: float) -> float:
        """Seconds between two steps of the queues."""
        if not self._fresh:
            return 0.0
        return _CALM if any(now - at <= _CALM for _, at in self._fresh.values()) else _STEP

    def _wake(self) -> None:
        self._later = None
        self._arm()

    def _move(self) -> None:
        """Begin the first request of the next queue."""
        while self._lines:
            who, line = self._lines.popitem(last=False)
            turn = line.popleft()
            if line:
                self._lines[who] = line
            if not isinstance(turn, asyncio.Future):
                turn()
                return
            if not turn.done():
                turn.set_result(None)
                return
