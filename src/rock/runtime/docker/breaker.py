"""When an engine fails again and again it is left alone for a while, instead of being asked by everybody at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from rock import errors

_MOST_FAILURES = 5
_REST = 5.0  # seconds, doubled each time that it fails after a rest
_LONGEST_REST = 60.0


class Breaker:
    """Closed until `failures` in a row; then open for `rest` seconds; then one call is let through to look.

        closed ── failures ──► open ── rest ──► half open ── worked ──► closed
                                ▲                   └────── failed ──► open, for longer
    """

    def __init__(self, failures: int = _MOST_FAILURES, rest: float = _REST,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._first_rest = self._rest = rest
        self._clock = clock
        self._failures = 0
        self._until: float | None = None
        self._looking_since: float | None = None

    def refuse(self, what: str) -> None:
        """Raise NoCapacity while it is open; else the caller may try, and tells how that went."""
        if self._until is None:
            return
        now = self._clock()
        left = self._until - now
        looking = self._looking_since is not None and now - self._looking_since < _LONGEST_REST
        if left > 0 or looking:
            raise errors.NoCapacity(
                f"the container engine failed {self._failures} times in a row, so it was not asked to {what}",
                hint=f"try again in {max(1.0, left):.0f} s; see the engine's own log, and start fewer at once")
        self._looking_since = now

    def worked(self) -> None:
        """The engine answered, whatever it said."""
        self._failures, self._until, self._looking_since = 0, None, None
        self._rest = self._first_rest

    def undecided(self) -> None:
        """Nobody waited for how it went."""
        self._looking_since = None

    def failed(self) -> None:
        """It did not answer, or said that it is not well."""
        self._failures += 1
        if self._looking_since is not None:
            self._looking_since = None
            self._rest = min(self._rest * 2, _LONGEST_REST)
            self._until = self._clock() + self._rest
        elif self._failures >= self._limit and self._until is None:
            self._until = self._clock() + self._rest
