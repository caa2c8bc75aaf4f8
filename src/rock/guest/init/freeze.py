"""Freezes all processes of a sandbox. Standard library only.

While its files are read from outside: such a freeze belongs to one connection and ends with it, so a crashed server
leaves no process stopped. Requests that start a program or change a file wait for its end.

While it is paused: that freeze stays until it is released. Such requests are refused.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from typing import Any

from rock.guest.init import process_tree
from rock.guest.init.link import Connection, Fault

_HELD = frozenset(("spawn", "open_write", "commit_write", "abort_write", "remove", "make_dir", "symlink", "move",
                   "chmod", "chown"))  # fmt: skip
_MOST_HELD = 1000
_SETTLE = 1.0  # seconds: a process in an uninterruptible wait stops only after it
_PATIENCE = 30.0


class Freeze:
    """`again` handles a delayed request."""

    def __init__(self, again: Callable[[Connection, dict[str, Any]], None]) -> None:
        self.owner: Connection | None = None
        self.paused = False
        self._again = again
        self._held: list[tuple[Connection, dict[str, Any]]] = []
        self._stopped: dict[tuple[int, int], float] = {}  # pid and start -> when

    def holds(self, connection: Connection, request: dict[str, Any]) -> bool:
        """Whether a request waits for the end of the freeze; Fault when too many do."""
        if request.get("op") not in _HELD or not (self.paused or self.owner is not None):
            return False
        if self.owner is None:
            raise Fault("conflict", "the sandbox is paused")
        if len(self._held) >= _MOST_HELD:
            raise Fault("unavailable", "the sandbox stands still, and too many requests wait for it")
        self._held.append((connection, request))
        return True

    def begin(self, owner: Connection) -> Generator[float, None, int]:
        """Stop every process; yields seconds to wait, returns the number of stopped processes, or -1 when some did not
        stop."""
        if self.owner is not None:
            raise Fault("conflict", "the sandbox stands still already")
        self.owner = owner
        return self._stop_all(time.monotonic() + _PATIENCE)

    def pause(self) -> Generator[float, None, int]:
        """As `begin`, until `unpause`. Idempotent."""
        self.paused = True
        return self._stop_all(time.monotonic() + _PATIENCE)

    def unpause(self) -> None:
        """End a pause. Idempotent."""
        self.paused = False
        if self.owner is None:
            self.end()

    def _stop_all(self, end: float) -> Generator[float, None, int]:
        pause = 0.0005
        while self.paused or self.owner is not None:
            restless, now = False, time.monotonic()
            for entry in _under_us():  # parents first, so that none sees its children stop
                state = _state(entry)
                if state in "TtZX":
                    continue
                key = entry.pid, entry.start
                since = self._stopped.get(key)
                if since is None:
                    if process_tree.send(entry, signal.SIGSTOP, threads=True):
                        self._stopped[key] = now
                    restless = True
                elif state != "D" or now - since < _SETTLE:
                    restless = True
            if not restless:
                return len(self._stopped)
            if now >= end:
                break
            yield pause
            pause = min(pause * 2, 0.02)
        return -1

    def end(self) -> None:
        """Continue the stopped processes, children before their parents, and execute the delayed requests. The
        processes of a paused sandbox remain stopped. Idempotent."""
        self.owner = None
        stopped = {}
        if not self.paused:
            stopped, self._stopped = self._stopped, {}
        if stopped:
            for entry in reversed(_under_us()):
                if (entry.pid, entry.start) in stopped:
                    process_tree.send(entry, signal.SIGCONT, threads=True)
        held, self._held = self._held, []
        for connection, request in held:
            self._again(connection, request)


def _under_us() -> list[process_tree.Entry]:
    return list(process_tree.descendants(process_tree.scan(), os.getpid()))


def _state(entry: process_tree.Entry) -> str:
    """The state of a process; that of a live thread when its main thread has ended."""
    if entry.state != "Z":
        return entry.state
    found = "Z"
    try:
        for name in os.listdir(f"/proc/{entry.pid}/task"):
            thread = process_tree.read_thread(entry.pid, int(name))
            if thread is not None and thread.state not in "ZX" and (found in "ZTt" or thread.state == "R"):
                found = thread.state
    except OSError:
        pass
    return found
