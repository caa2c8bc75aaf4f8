"""State of the environments of a sandbox: pending requests, names, idle timeouts and the leases of owners."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rock.errors import Conflict, NotFound, RockError

Answered = bytes | bytearray | RockError  # a complete frame, or the error in its place


class Batch:
    """The responses to a batch of requests, in the order of the requests."""

    __slots__ = ("answers", "future", "left")

    def __init__(self, count: int) -> None:
        self.answers: list[Answered] = [b""] * count
        self.left = count
        self.future: asyncio.Future[list[Answered]] = asyncio.get_running_loop().create_future()

    def put(self, place: int, answer: Answered) -> None:
        self.answers[place] = answer
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(self.answers)


@dataclass(slots=True)
class Call:
    """A pending request to an environment. `id`: the id that the caller chose."""

    batch: Batch
    place: int
    number: int
    op: int
    id: int


@dataclass
class Hosted:
    """An environment inside. `pipe`: its own request pipe, if it has one. `ended`: the reason why it has ended.
    `asked`: ids of its pending requests, each limited to `timeout` seconds; the start time of the oldest one, and its
    timer. `dead`: its process has ended. `token`: the token for borrowing its pipes; `lent`: the borrower, which is
    notified when the pipes are taken back."""

    env_id: str
    pipe: int | None = None
    closed: bool = False
    ended: RockError | None = None
    timeout: float | None = None
    asked: deque[int] = field(default_factory=deque)
    since: float = 0.0
    timer: asyncio.TimerHandle | None = None
    dead: bool = False
    token: str = ""
    lent: Callable[[RockError], None] | None = None
    returned: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class LentPipes:
    """The pipes of an environment, lent to a client. `memory`: shared memory for large responses and the offset of the
    environment's part, where available. `timeout`: seconds for each request."""

    requests: int
    answers: int
    memory: tuple[int, int] | None
    timeout: float


# ---- names and idle timeouts ----

_REMEMBERED = 1000  # released environments that are remembered, to report why they ended


class Names:
    """The environments of one sandbox by name. `release` is called with the number of an environment whose idle timeout
    expired."""

    def __init__(self, sandbox_id: str, release: Callable[[int], None]) -> None:
        self._sandbox_id = sandbox_id
        self._release = release
        self._numbers: dict[str, int] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._released: OrderedDict[str | int, float] = OrderedDict()

    def add(self, number: int, name: str | None) -> None:
        """Add a name. Conflict when another environment has it."""
        if name is None:
            return
        if name in self._numbers:
            raise Conflict(f"instance {name!r} exists already in sandbox {self._sandbox_id}",
                           sandbox_id=self._sandbox_id, hint="release it, or leave instance_id out")  # fmt: skip
        self._numbers[name] = number
        self._released.pop(name, None)

    def watch(self, number: int, hosted: Hosted, idle: float | None) -> None:
        """Release the environment after `idle` seconds without a request or a response; None disables this."""
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
        """The number of the environment with that name; NotFound, which reports a release by the idle timeout."""
        if name not in self._numbers:
            raise NotFound(f"Instance {name} not found!", sandbox_id=self._sandbox_id, hint=self.why_gone(name))
        return self._numbers[name]

    def why_gone(self, which: str | int) -> str:
        idle = self._released.get(which)
        why = "it was closed" if idle is None else f"it was released after {idle:g} s without use"
        return f"{why}; make a new one"

    def drop(self, number: int) -> None:
        """The environment has ended: its name is free."""
        timer = self._timers.pop(number, None)
        if timer is not None:
            timer.cancel()
        for name in [name for name, known in self._numbers.items() if known == number]:
            del self._numbers[name]

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


# ---- leases of owners ----
#
# An environment is released when the client process that made it no longer renews its lease. A client process that is
# killed, or ends without `close()`, stops renewing. Its environments are then released, independent of other clients of
# the same sandbox. A client on this machine that holds the pipes of an environment is alive even if it does not renew:
# the kernel closes the pipes when it ends.

class Owners:
    """Leases of the owners of one sandbox's environments.

    lease: seconds without a renewal, and without a request to the environment, after which an environment is released.
    release: called with the number of each environment whose lease is over.
    """

    def __init__(self, envs: Mapping[int, Hosted], lease: float, release: Callable[[int], None]) -> None:
        self._envs = envs
        self._lease = lease
        self._release = release
        self._numbers: dict[str, set[int]] = {}
        self._seen: dict[str, float] = {}  # time of the last renewal, on the event loop's clock
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def add(self, number: int, owner: str | None) -> None:
        """Add an environment with its owner; None: it has no owner, and no lease."""
        if owner is None:
            return
        self._numbers.setdefault(owner, set()).add(number)
        self.renew(owner)

    def renew(self, owner: str) -> int:
        """The owner is alive. Returns the number of its environments here."""
        found = len(self._numbers.get(owner, ()))
        if found:
            loop = asyncio.get_running_loop()
            self._seen[owner] = loop.time()
            if owner not in self._timers:
                self._timers[owner] = loop.call_later(self._lease, self._check, owner)
        return found

    def of(self, owner: str) -> list[int]:
        """The numbers of the owner's environments."""
        return sorted(self._numbers.get(owner, ()))

    def drop(self, number: int) -> None:
        """The environment has ended. Idempotent."""
        for owner, numbers in list(self._numbers.items()):
            numbers.discard(number)
            if not numbers:
                self._forget(owner)

    def stop(self) -> None:
        for owner in list(self._timers):
            self._forget(owner)

    def _forget(self, owner: str) -> None:
        self._numbers.pop(owner, None)
        self._seen.pop(owner, None)
        timer = self._timers.pop(owner, None)
        if timer is not None:
            timer.cancel()

    def _check(self, owner: str) -> None:
        loop = asyncio.get_running_loop()
        now, last = loop.time(), self._seen[owner]
        over = [number for number in self.of(owner) if self._is_over(number, last, now)]
        self._timers.pop(owner)
        for number in over:
            self._release(number)  # this also removes the number here
        if owner in self._numbers and owner not in self._timers:
            left = last + self._lease - now
            self._timers[owner] = loop.call_later(left if left > 0 else self._lease / 2, self._check, owner)

    def _is_over(self, number: int, renewed: float, now: float) -> bool:
        hosted = self._envs.get(number)
        if hosted is None:
            return True
        in_use = hosted.lent is not None or bool(hosted.asked)
        return not in_use and now - max(renewed, hosted.since) >= self._lease
