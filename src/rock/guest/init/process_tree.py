"""Processes by their parents: who descends from whom, read from /proc, and signals to a whole tree.

A program is started as a child subreaper, so all that descends from it stays under it, orphans and daemons included.
Start times are in ticks (10 ms) of CLOCK_BOOTTIME, as /proc/PID/stat tells them.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Collection, Generator, Iterator
from typing import NamedTuple

TICK = os.sysconf("SC_CLK_TCK")
_PATIENCE = 10.0  # seconds that a kill may take before it answers with what is left


class Entry(NamedTuple):
    """One line of /proc: `start` in ticks since boot."""

    pid: int
    parent: int
    state: str
    start: int

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def parse_stat(text: bytes) -> Entry | None:
    """Entry of a /proc/PID/stat line; its second field may hold parentheses, spaces and newlines."""
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    return Entry(int(head.split(b" ", 1)[0]), int(fields[1]), chr(fields[0][0]), int(fields[19]))


def read(pid: int) -> Entry | None:
    """Entry of a process, or None when there is none."""
    return _read(f"/proc/{pid}/stat")


def lives(pid: int, start: int | None) -> bool:
    """Whether this very process lives; a pid that was used again does not count."""
    entry = read(pid)
    return entry is not None and entry.alive and start in (None, entry.start)


def read_thread(pid: int, thread: int) -> Entry | None:
    """The same of one of its threads."""
    return _read(f"/proc/{pid}/task/{thread}/stat")


def _read(path: str) -> Entry | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return parse_stat(os.read(fd, 4096))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def scan() -> dict[int, Entry]:
    """Every process that /proc shows, by pid."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            entry = read(int(name))
            if entry is not None:
                found[entry.pid] = entry
    return found


def descendants(table: dict[int, Entry], root: int) -> Iterator[Entry]:
    """All processes under `root`, without it; parents before children."""
    children: dict[int, list[Entry]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry)
    queue = [root]
    seen = {root}
    for pid in queue:
        for entry in children.get(pid, ()):
            if entry.pid not in seen:
                seen.add(entry.pid)
                queue.append(entry.pid)
                yield entry


def alive_under(root: int, since: int | None, spare: Collection[int] = ()) -> list[Entry]:
    """Living descendants of `root` that started at or after the tick `since`.

    A process whose start is in the same tick as `since` counts as inside: the child of a command starts within a
    millisecond of it, and must not survive the command's end.
    """
    return [entry for entry in descendants(scan(), root)
            if entry.alive and entry.pid not in spare and (since is None or entry.start >= since)]


def send(entry: Entry, number: int, *, threads: bool = False) -> bool:
    """Signal exactly this process: a pid that was used again meanwhile is left alone. False when it is gone.

    threads: also one whose main thread has ended, as others of it may still run.
    """
    try:
        fd = os.pidfd_open(entry.pid)
    except OSError as error:
        return error.errno == errno.ENOSYS and _send_plainly(entry, number, threads)
    try:
        now = read(entry.pid)
        if now is None or now.start != entry.start or not (now.alive or threads):
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _send_plainly(entry: Entry, number: int, threads: bool) -> bool:
    """Where the kernel has no pidfds, as gVisor's: between the look and the signal a pid could be used again."""
    now = read(entry.pid)
    if now is None or now.start != entry.start or not (now.alive or threads):
        return False
    try:
        os.kill(entry.pid, number)
    except OSError:
        return False
    return True


def signal_tree(root: int, number: int, since: int | None, include_root: bool, spare: Collection[int] = ()) -> int:
    """One signal to the tree, once; answers how many processes got it."""
    entries = alive_under(root, since, spare)
    own = read(root) if include_root else None
    return sum(send(entry, number) for entry in ([own, *entries] if own else entries))


def kill_tree(root: int, since: int | None, include_root: bool, spare: Collection[int] = (),
              tell: int | None = None) -> Generator[float, None, int]:
    """SIGKILL to the tree until none of it is left. Yields seconds to wait; returns how many were killed.

    Everything is stopped before the first kill, so that a fork bomb cannot outrun the killing, and the root goes last,
    because it is the one who inherits the orphans. tell: a signal that a spared root finds when it goes on, before it
    can notice what became of its children.
    """
    own = read(root)
    if own is None or not own.alive:
        return 0
    end = time.monotonic() + _PATIENCE
    killed: set[tuple[int, int]] = set()
    send(own, signal.SIGSTOP)
    if tell is not None:
        send(own, tell)
    try:
        yield from _stop_all(root, since, spare, end)
        pause = 0.0005
        while time.monotonic() < end and (left := alive_under(root, since, spare)):
            killed.update((entry.pid, entry.start) for entry in left if send(entry, signal.SIGKILL))
            pause = min(pause * 2, 0.02)
            yield pause
    finally:
        if not include_root and own.state != "T":
            send(own, signal.SIGCONT)
    if include_root and send(own, signal.SIGKILL):
        killed.add((own.pid, own.start))
        while time.monotonic() < end and (now := read(root)) and now.start == own.start and now.alive:
            yield 0.0005
    return len(killed)


def _stop_all(root: int, since: int | None, spare: Collection[int], end: float) -> Generator[float, None, None]:
    stopped: set[tuple[int, int]] = set()
    while time.monotonic() < end:
        fresh = [entry for entry in alive_under(root, since, spare) if (entry.pid, entry.start) not in stopped]
        if not fresh:
            return
        for entry in fresh:
            send(entry, signal.SIGSTOP)
            stopped.add((entry.pid, entry.start))
        yield 0.0


def run(job: Generator[float, None, int]) -> int:
    """Drive `kill_tree` to its end in this thread, sleeping as it asks."""
    while True:
        try:
            time.sleep(next(job))
        except StopIteration as end:
            return int(end.value)
