"""Names that environments were given, and the idle time after which they are released."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from rock.errors import Conflict, NotFound
from rock.rocklet.envcalls import Hosted

_REMEMBERED = 1000  # released ones, to tell why they are gone


class Names:
    """Environments of one sandbox by name. `release` is called with the number of one that nobody used for its time."""

    def __init__(self, sandbox_id: str, release: Callable[[int], None]) -> None:
        self._sandbox_id = sandbox_id
        self._release = release
        self._numbers: dict[str, int] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._released: OrderedDict[str | int, float] = OrderedDict()

    def add(self, number: int, name: str | None) -> None:
        """Conflict when another environment has that name."""
        if name is None:
            return
        if name in self._numbers:
            raise Conflict(f"instance {name!r} exists already in sandbox {self._sandbox_id}",
                           sandbox_id=self._sandbox_id, hint="release it, or leave instance_id out")  # fmt: skip
        self._numbers[name] = number
        self._released.pop(name, None)

    def watch(self, number: int, hosted: Hosted, idle: float | None) -> None:
        """Release it when nothing was asked and answered for `idle` seconds; None is never."""
        if idle is None:
            return
        loop = asyncio.get_running_loop()
        hosted.since = loop.time()
        self._timers[number] = loop.call_later(idle, self._look, number, hosted, idle)

    def _look(self, number: int, hosted: Hosted, idle: float) -> None:
        loop = asyncio.get_running_loop()
        quiet = 0.0 if hosted.asked else loop.time() - hosted.since
        if quiet < idle:
            self._timers[number] = loop.call_later(idle - quiet, self._look, number, hosted, idle)
            return
        names = [name for name, known in self._numbers.items() if known == number]
        self._released[number] = idle
        self._released.update(dict.fromkeys(names, idle))
        while len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)
        self._release(number)

    def number_of(self, name: str) -> int:
        """The number of the environment with that name; NotFound, which says when it was released for its idle time."""
        if name not in self._numbers:
            raise NotFound(f"Instance {name} not found!", sandbox_id=self._sandbox_id, hint=self.why_gone(name))
        return self._numbers[name]

    def why_gone(self, which: str | int) -> str:
        idle = self._released.get(which)
        why = "it was closed" if idle is None else f"it was released after {idle:g} s without use"
        return f"{why}; make a new one"

    def drop(self, number: int) -> None:
        """It is gone: its name is free."""
        timer = self._timers.pop(number, None)
        if timer is not None:
            timer.cancel()
        for name in [name for name, known in self._numbers.items() if known == number]:
            del self._numbers[name]

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
