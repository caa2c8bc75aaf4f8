"""Ending a sandbox from outside: kill its pid 1, remove its cgroups and its folder.

Safe on half-made and on dead ones.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path

from rock import errors
from rock.guest import proctree
from rock.guest.remove import remove_tree
from rock.runtime.namespace import cgroups, records, slot


def kill(pid: int, start: int) -> None:
    """SIGKILL to a pid 1, and with it to its whole pid namespace; never to another process that got its number."""
    entry = proctree.read(pid)
    if entry is not None and entry.start == start:
        proctree.send(entry, signal.SIGKILL)


def find(folder: Path) -> tuple[int, int] | None:
    """Pid and start time of a pid 1 that listens in a run folder without a record: the kernel tells who listens."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
                sock.connect(f"/proc/self/fd/{fd}/s")
                pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                entry = proctree.read(pid)
                return (pid, entry.start) if entry is not None else None
        finally:
            os.close(fd)
    return None


def remove(folder: Path, groups: list[str]) -> None:
    """Remove what is left when pid 1 is gone. Blocking. Raises Unavailable when something stays."""
    left = cgroups.remove(groups)
    try:
        if not slot.remove(str(folder)):
            remove_tree(str(folder))
    except OSError as error:
        raise errors.Unavailable(f"the files of a destroyed sandbox could not be removed: {error}",
                                 hint=f"look at {folder}; the next sweep tries again") from None
    if left:
        raise errors.Unavailable(f"cgroups of a destroyed sandbox could not be removed: {', '.join(left)}",
                                 hint="the next sweep tries again")


def leftover_groups(groups: cgroups.Cgroups) -> set[str]:
    """Slots that have a cgroup under our parents."""
    found: set[str] = set()
    for place in groups.places.values():
        try:
            found.update(name for name in os.listdir(place.parent) if name.startswith(records.SLOT_PREFIX))
        except OSError:
            continue
    return found
