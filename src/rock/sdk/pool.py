"""Idle connections of this process, shared by all threads and event loops."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

IDLE_LIMIT = 256  # connections kept a server
IDLE_SECONDS = 60.0


class Pooled(Protocol):
    sock: socket.socket
    released: float

    def close(self) -> None: ...


C = TypeVar("C", bound=Pooled)


class Pool(Generic[C]):
    """Connections by server, the latest used first.

    There is no lock, which a fork could leave held: taking from and adding to a deque is atomic. A forked child drops
    its parent's connections without using them.
    """

    def __init__(self) -> None:
        self._idle: dict[Hashable, deque[C]] = {}
        self._pid = os.getpid()

    def take(self, key: Hashable) -> C | None:
        """A connection that the server has not closed, or None."""
        if self._pid != os.getpid():
            self.clear()
        idle = self._idle.get(key)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:
                break
            if not stale(connection.sock):
                return connection
            connection.close()
        return None

    def give(self, key: Hashable, connection: C) -> None:
        """Keep it for the next request."""
        if self._pid != os.getpid():
            connection.close()
            return
        idle = self._idle.setdefault(key, deque())
        connection.released = time.monotonic()
        idle.append(connection)
        try:
            oldest = idle[0]
            if len(idle) > IDLE_LIMIT or connection.released - oldest.released > IDLE_SECONDS:
                idle.popleft().close()
        except IndexError:
            return

    def clear(self) -> None:
        """Close all; after a fork this closes the child's copies only."""
        self._pid = os.getpid()
        while self._idle:
            _, idle = self._idle.popitem()
            while idle:
                idle.pop().close()


def stale(sock: socket.socket) -> bool:
    """An idle connection from which something can be read was closed, or speaks out of turn."""
    try:
        sock.setblocking(False)
        sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
    return True
