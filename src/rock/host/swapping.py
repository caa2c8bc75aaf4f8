"""Moves memory of other processes to the swap space: process_madvise(MADV_PAGEOUT). Linux 5.10 or newer.

The memory of a stopped process stays in the main memory until that is short. Advice moves it earlier. It changes no
content, so what a process maps is hostile and harmless: sizes and numbers are limited.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable

from rock.errors import Unsupported

_PAGEOUT = 21
_CALL = 440  # process_madvise on every architecture
_MOST_MAPS = 65_530
_AT_ONCE = 512  # ranges of one call
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def free_swap() -> int:
    """Unused bytes of the swap space of this machine."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("SwapFree:"):
                return int(line.split()[1]) << 10
    return 0


def swapped(pid: int) -> int:
    """Bytes of a process in the swap space; 0 for one that has ended."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmSwap:"):
                return int(line.split()[1]) << 10
    return 0


def ranges(maps: Iterable[str]) -> list[tuple[int, int]]:
    """Start and length of the private, writable mappings without a file, in lines of /proc/PID/maps."""
    found = []
    for line in maps:
        fields = line.split(maxsplit=5)
        if len(fields) < 5 or not fields[1].startswith("rw") or fields[1][3] != "p" or fields[4] != "0":
            continue
        start, _, end = fields[0].partition("-")
        found.append((int(start, 16), int(end, 16) - int(start, 16)))
        if len(found) >= _MOST_MAPS:
            break
    return found


def swap_out(pids: Iterable[int]) -> int:
    """Swap out the memory of processes; returns the bytes that were moved. Blocking. Unsupported with the reason where
    nothing can be moved."""
    if not free_swap():
        raise Unsupported("this machine has no free swap space", hint="add swap space to the worker")
    moved = 0
    for pid in pids:
        before = swapped(pid)
        try:
            _advise(pid)
        except ProcessLookupError:
            continue
        except OSError as error:
            if error.errno == errno.ENOENT:  # it ended between two reads
                continue
            raise Unsupported(f"the memory of processes cannot be swapped out: {error.strerror}",
                              hint="run the server as root, on Linux 5.10 or newer") from None
        moved += max(0, swapped(pid) - before)
    return moved


def _advise(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            found = ranges(lines)
        for place in range(0, len(found), _AT_ONCE):
            part = found[place : place + _AT_ONCE]
            vector = (_Range * len(part))(*(_Range(start, length) for start, length in part))
            if _libc.syscall(_CALL, fd, vector, ctypes.c_ulong(len(part)), _PAGEOUT, 0) < 0:
                code = ctypes.get_errno()
                if code not in (errno.ESRCH, errno.ENOMEM):  # it has ended, or has changed its mappings
                    raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
