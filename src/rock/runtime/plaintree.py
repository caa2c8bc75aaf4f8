"""Processes of this machine by `ps`, which every Unix has: who descends from whom, and signals to a tree.

It sees less than guest/proctree.py: start times are whole seconds, and who left its group and lost its parent is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal as signals
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

from rock.protocol.sandbox import Usage

_PATIENCE = 10.0


@dataclass(frozen=True)
class Entry:
    """One line of ps: `born` is the start as it tells it, `start` the same in seconds since the epoch."""

    pid: int
    parent: int
    group: int
    memory: int
    cpu: float
    born: str
    start: float


async def scan() -> dict[int, Entry]:
    """Every living process, by pid."""
    return await asyncio.to_thread(scan_now)


def scan_now() -> dict[int, Entry]:
    """The same; blocks for some milliseconds."""
    argv = ["ps", "-A", "-o", "pid=,ppid=,pgid=,rss=,time=,stat=,lstart="]
    told = subprocess.run(argv, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
    found = {}
    for line in told.stdout.splitlines():
        words = line.split()
        with suppress(ValueError, IndexError):
            born = " ".join(words[6:11])
            start = time.mktime(time.strptime(born, "%a %b %d %H:%M:%S %Y"))
            pid, parent, group, kilobytes = (int(word) for word in words[:4])
            entry = Entry(pid, parent, group, kilobytes * 1024, _seconds(words[4]), born, start)
            if not words[5].startswith(("Z", "X")):
                found[entry.pid] = entry
    return found


def _seconds(text: str) -> float:
    """Of [DD-]HH:MM:SS and of MM:SS.ss."""
    days, _, rest = text.rpartition("-")
    total = 0.0
    for part in rest.split(":"):
        total = total * 60 + float(part)
    return total + 86400 * int(days or 0)


def under(table: dict[int, Entry], root: int, since: float | None = None) -> list[Entry]:
    """Descendants of a process, and what is in its group, without itself. since: seconds since the epoch."""
    tree, grown = {root}, True
    while grown:
        more = {e.pid for e in table.values() if e.pid not in tree and (e.parent in tree or e.group == root)}
        tree |= more
        grown = bool(more)
    return [e for pid, e in table.items() if pid in tree and pid != root and (since is None or e.start >= int(since))]


def send(pid: int, number: int) -> bool:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


async def kill_tree(root: int, since: float | None, *, include: bool) -> int:
    """SIGKILL to the tree until none of it is left; answers how many were killed."""
    killed: set[tuple[int, str]] = set()
    end = time.monotonic() + _PATIENCE
    send(root, signals.SIGSTOP)
    try:
        while time.monotonic() < end and (left := under(await scan(), root, since)):
            for entry in left:  # first all stand still: nobody begets what would not be seen
                send(entry.pid, signals.SIGSTOP)
            for entry in left:
                if send(entry.pid, signals.SIGKILL):
                    killed.add((entry.pid, entry.born))
    finally:
        if not include:
            send(root, signals.SIGCONT)
    if include and send(root, signals.SIGKILL):
        killed.add((root, ""))
    return len(killed)


async def usage(roots: list[int]) -> Usage:
    table = await scan()
    entries = {e.pid: e for root in roots for e in ([table[root]] if root in table else []) + under(table, root)}
    return Usage(memory_bytes=sum(e.memory for e in entries.values()), cpu_seconds=sum(e.cpu for e in entries.values()),
                 pids=len(entries))
