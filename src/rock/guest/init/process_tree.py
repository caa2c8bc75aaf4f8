"""Process trees: descendants as read from /proc, and signals to a whole tree. Standard library only.

A program is started as a child subreaper, so all its descendants stay below it, orphans and daemons included. Start
times are in ticks (10 ms) of CLOCK_BOOTTIME, as in /proc/PID/stat.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Collection, Generator, Iterator
from typing import NamedTuple

TICK = os.sysconf("SC_CLK_TCK")
_PATIENCE = 10.0  # timeout of a kill in seconds; it then returns the remaining processes


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
    """Parse a /proc/PID/stat line; its second field may contain parentheses, spaces and newlines."""
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    return Entry(int(head.split(b" ", 1)[0]), int(fields[1]), chr(fields[0][0]), int(fields[19]))


def read(pid: int) -> Entry | None:
    """Entry of a process, or None when there is none."""
    return _read(f"/proc/{pid}/stat")


def lives(pid: int, start: int | None) -> bool:
    """Whether exactly this process lives; a reused pid does not count."""
    entry = read(pid)
    return entry is not None and entry.alive and start in (None, entry.start)


def read_thread(pid: int, thread: int) -> Entry | None:
    """The entry of one of its threads."""
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
    """Every process in /proc, by pid."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            entry = read(int(name))
            if entry is not None:
                found[entry.pid] = entry
    return found


def descendants(table: dict[int, Entry], root: int) -> Iterator[Entry]:
    """All descendants of `root`; parents before children."""
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

    A process that started in the same tick as `since` is included: the child of a command starts within a millisecond
    of it, and must not survive the command's end.
    """
    return [entry for entry in descendants(scan(), root)
            if entry.alive and entry.pid not in spare and (since is None or entry.start >= since)]


def send(entry: Entry, number: int, *, threads: bool = False) -> bool:
    """Signal exactly this process and no process with a reused pid. False when it is gone.

    threads: also a process whose main thread has ended, because its other threads may still run.
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
    """For kernels without pidfds, such as gVisor's: the pid could be reused between the check and the signal."""
    now = read(entry.pid)
    if now is None or now.start != entry.start or not (now.alive or threads):
        return False
    try:
        os.kill(entry.pid, number)
    except OSError:
        return False
    return True


def signal_tree(root: int, number: int, since: int | None, include_root: bool, spare: Collection[int] = ()) -> int:
    """Send one signal to the tree, once; returns the number of processes that received it."""
    entries = alive_under(root, since, spare)
    own = read(root) if include_root else None
    return sum(send(entry, number) for entry in ([own, *entries] if own else entries))


def kill_tree(root: int, since: int | None, include_root: bool, spare: Collection[int] = (),
              tell: int | None = None) -> Generator[float, None, int]:
    """Send SIGKILL to the tree until no process of it remains. Yields seconds to wait; returns the number of killed
    processes.

    All processes are stopped before the first kill, so a fork bomb cannot outrun it. The root is last, because it
    inherits the orphans. tell: a signal for a spared root, which it receives before it can notice the end of its
    children.
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
    """Run `kill_tree` to its end in this thread, with its sleeps."""
    while True:
        try:
            time.sleep(next(job))
        except StopIteration as end:
            return int(end.value)
