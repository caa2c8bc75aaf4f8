"""Owners of environments: an environment is released when the client process that made it no longer renews its lease.

A client process that is killed, or ends without `close()`, stops renewing. Its environments are then released whatever
other clients do with the same sandbox. A client on this machine that holds the pipes of an environment is alive even if
it does not renew: the kernel closes the pipes when it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from rock.rocklet.envcalls import Hosted


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
        self._seen: dict[str, float] = {}  # time of the last renewal, of the event loop
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def add(self, number: int, owner: str | None) -> None:
        """An environment was made by that owner; None: it has none, and no lease."""
        if owner is None:
            return
        self._numbers.setdefault(owner, set()).add(number)
        self.renew(owner)

    def renew(self, owner: str) -> int:
        """The owner is alive. Returns how many environments it has here."""
        found = len(self._numbers.get(owner, ()))
        if found:
            loop = asyncio.get_running_loop()
            self._seen[owner] = loop.time()
            if owner not in self._timers:
                self._timers[owner] = loop.call_later(self._lease, self._check, owner)
        return found

    def of(self, owner: str) -> list[int]:
        """The numbers of its environments."""
        return sorted(self._numbers.get(owner, ()))

    def drop(self, number: int) -> None:
        """The environment is gone. Idempotent."""
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
            self._release(number)  # which drops it here
        if owner in self._numbers and owner not in self._timers:
            left = last + self._lease - now
            self._timers[owner] = loop.call_later(left if left > 0 else self._lease / 2, self._check, owner)

    def _is_over(self, number: int, renewed: float, now: float) -> bool:
        hosted = self._envs.get(number)
        if hosted is None:
            return True
        in_use = hosted.lent is not None or bool(hosted.asked)
        return not in_use and now - max(renewed, hosted.since) >= self._lease
