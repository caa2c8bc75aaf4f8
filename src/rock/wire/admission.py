"""How many connections a server has open: in total, per client address before one is authenticated, per tenant after.

A connection that has brought no authenticated request is worth nothing to a client that is served, so it makes room for
others: the oldest is closed. Descriptors above the total are left for sandboxes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Protocol

UNPROVEN_EACH = 512  # connections of one address without an authenticated request
GRACE = 1.0  # seconds that a new connection has to bring one before it makes room for others
_LEAST = 64


class Connection(Protocol):
    """What is counted."""

    address: str
    made_at: float

    def drop(self) -> None:
        """Close it now."""


def most_connections() -> int:
    """Half of the descriptors that this process may have."""
    try:
        import resource
    except ImportError:  # no limits of that kind on this platform
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(_LEAST, soft // 2)


class Admission:
    """The connections of one server. total: at most that many; unproven_each: see UNPROVEN_EACH."""

    def __init__(self, total: int | None = None, unproven_each: int = UNPROVEN_EACH) -> None:
        self.total = most_connections() if total is None else total
        self.open = 0
        self.refused = 0
        self._each = min(unproven_each, self.total)
        self._unproven: OrderedDict[Connection, None] = OrderedDict()  # the oldest first
        self._by_address: dict[str, OrderedDict[Connection, None]] = {}
        self._owners: dict[Connection, str] = {}
        self._owned: dict[str, int] = {}

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; False when there is no room for it. `leave` has to follow in both cases."""
        self.open += 1
        same = self._by_address.setdefault(connection.address, OrderedDict())
        if len(same) >= self._each:
            self._make_room(same)
        if self.open > self.total and not self._make_room(self._unproven):
            self.refused += 1
            return False
        same[connection] = self._unproven[connection] = None
        return True

    def prove(self, connection: Connection, who: str, bounded: bool) -> bool:
        """An authenticated request of `who` came. bounded: at most half of the total is for it; False above that."""
        if connection in self._owners:
            return True
        if bounded and self._owned.get(who, 0) >= max(1, self.total // 2):
            return False
        self._forget(connection)
        self._owners[connection] = who
        self._owned[who] = self._owned.get(who, 0) + 1
        return True

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        self.open -= 1
        self._forget(connection)
        who = self._owners.pop(connection, None)
        if who is not None:
            self._owned[who] -= 1
            if not self._owned[who]:
                del self._owned[who]

    def _forget(self, connection: Connection) -> None:
        self._unproven.pop(connection, None)
        same = self._by_address.get(connection.address)
        if same is not None:
            same.pop(connection, None)
            if not same:
                del self._by_address[connection.address]

    def _make_room(self, among: OrderedDict[Connection, None]) -> bool:
        oldest = next(iter(among), None)
        if oldest is None or time.monotonic() - oldest.made_at < GRACE:
            return False
        self._forget(oldest)
        oldest.drop()
        return True
