"""Turns on one event loop: a client that floods the server waits behind itself, not in front of others.

Nothing is measured or promised; only the order changes. A client whose requests come one by one never waits. One that
has more of them at once than are begun in a pass of the loop has the rest in a line of its own: of all the lines one
request begins in each pass, in turn, and none for a few milliseconds while a request of somebody without a line is
fresh, so that its few steps through the loop find it free. A line always moves on after that, step by step while such
a request is young, as what that waits for, a program inside, needs the machine too; and alone it moves fast.
Connections whose client has a line have the place of their next request in it before that is read (connections.py).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

_AT_ONCE = 4  # requests of one client that begin in one pass of the loop, before there is a line
_CALM = 0.005  # seconds for which a request is fresh, and for which the lines may stand still
_YOUNG, _STEP = 0.05, 0.001  # seconds for which a request is young, and between two moves of the lines meanwhile
_ALONE = 0.1  # seconds after which somebody who was here is no longer counted


PLACE = "rock.place"  # of a connection, in the scopes of its requests


class QueuePlace:
    """What a connection has to do with lines. line: of which client its last request was, if that had to wait."""

    __slots__ = ("_turns", "_waited", "line")

    def __init__(self) -> None:
        self.line = ""
        self._waited = ""
        self._turns: FairQueue | None = None

    def wait(self, begin: Callable[[], None]) -> bool:
        """Have `begin` called when it is the turn of this connection's next request; False when there is no line."""
        line = self.line
        if not line or self._turns is None:
            return False

        def go() -> None:
            self._waited = line
            begin()

        return self._turns.line_up(line, go)

    def has_waited(self, turns: FairQueue, who: str) -> bool:
        """Whether the request that was just read had its turn already, as one of `who`."""
        waited, self._waited = self._waited, ""
        if waited != who or self._turns is not turns:
            self._turns, self.line = turns, ""
            return False
        return True


class FairQueue:
    """Who may begin now. For each request `take`, and when it is over `leave`; clients are told apart by name."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: OrderedDict[str, deque[asyncio.Future[None] | Callable[[], None]]] = OrderedDict()
        self._begun: dict[str, int] = {}  # in this pass of the loop
        self._fresh: dict[int, tuple[str, float]] = {}  # young requests of clients without a line, and when they began
        self._seen: dict[str, float] = {}  # when a client without a line was here
        self._number = 0
        self._moved = 0.0  # when a line moved
        self._pass: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Requests in all lines."""
        return sum(map(len, self._lines.values()))

    async def take(self, who: str, place: QueuePlace | None = None) -> int:
        """Wait for the turn of a request; answers what to `leave` with. place: of the connection that it came by."""
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
        """Have `begin` called at the turn of one more request of a client that has a line; False when it has none."""
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
        """Once in a pass of the loop in which anybody began or waits."""
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
        """What is not young any more, and what is of a client that has a line by now."""
        old = [number for number, (who, at) in self._fresh.items() if now - at > _YOUNG or who in self._lines]
        for number in old:
            del self._fresh[number]

    def _pause(self, now: float) -> float:
        """Seconds for which the lines stand still between two moves."""
        if not self._fresh:
            return 0.0
        return _CALM if any(now - at <= _CALM for _, at in self._fresh.values()) else _STEP

    def _wake(self) -> None:
        self._later = None
        self._arm()

    def _move(self) -> None:
        """The first of the line whose turn it is begins."""
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
