"""The zygote's memory as a file: what the zygote has written so far becomes a private mapping of a memory file.

    memory ── write ──► memory file, then sealed ──► mapped privately over the same memory, and once more to be read

Each pid 1 is forked of it, so it has the file's pages where it wrote nothing, and can go back to them
(guest/sharing.py). Nothing of the process may run between the copy and the mapping: both are system calls of a table
that compiled code makes (native/zygote.c). Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from rock.guest import sharing
from rock.guest.sharing import PAGE
from rock.runtime.namespace import kernel

_NUMBERS = {  # of the system calls write, mmap, pread64, madvise, fcntl
    "x86_64": (1, 9, 17, 28, 72),
    "aarch64": (64, 222, 67, 233, 25),
}
_WRITE, _MMAP, _PREAD, _MADVISE, _FCNTL = _NUMBERS.get(kernel.MACHINE, (-1,) * 5)
_PRIVATE, _FIXED, _READ, _READ_WRITE = 0x02, 0x10, 1, 3
_POPULATE_READ = 22
_MOST_REGIONS = 60  # four calls for each, in one area of zygote.py
_LITTLE = 64 << 10  # bytes
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Call = tuple[int, ...]  # number, six arguments, and the result without which there is no going on


class Snapshot:
    """Of this process, which has one thread. OSError where it cannot be had.

    fd: an empty memory file, which is only needed while the calls are made.
    calls: in order; nothing must run in this process after the first and before the last.
    optional: how many of them, the last, need not be made.
    regions: what `sharing.Sweep` goes through.
    """

    def __init__(self, fd: int) -> None:
        if os.sysconf("SC_PAGE_SIZE") != PAGE:
            raise OSError(errno.ENOTSUP, f"pages of {os.sysconf('SC_PAGE_SIZE')} bytes: only {PAGE} are supported")
        found = _regions()
        size = sum(end - start for start, end in found)
        os.ftruncate(fd, size)
        mirror = kernel.map_private(fd, size)
        offset = 0
        copies: list[Call] = []
        mappings: list[Call] = []
        self.regions: list[sharing.Region] = []
        for start, end in found:
            length = end - start
            copies.append((_WRITE, fd, start, length, 0, 0, 0, length))
            mappings.append((_MMAP, start, length, _READ_WRITE, _PRIVATE | _FIXED, fd, offset, start))
            self.regions.append((start, length // PAGE, mirror + offset))
            offset += length
        seal = (_FCNTL, fd, fcntl.F_ADD_SEALS, _SEALS, 0, 0, 0, 0)
        # The page table is filled (Linux 5.14), and one byte of each region written, as it was: so a fork copies the
        # table, and a child need not find each page by a fault of its own.
        touches = [(_PREAD, fd, mapping[1], 1, mapping[6], 0, 0, 1) for mapping in mappings]
        looks = [(_MADVISE, start, end - start, _POPULATE_READ, 0, 0, 0, 0) for start, end in found]
        self.calls: list[Call] = [*copies, seal, *mappings, *touches, *looks]
        self.optional = len(touches) + len(looks)


def _regions() -> list[tuple[int, int]]:
    """Start and end of the private memory that we may write and have used, the largest `_MOST_REGIONS` pieces.

    Not the stack, on which the calls are made, nor what the kernel writes to by itself.
    """
    low, high = _thread_area()
    found: list[tuple[int, int]] = []
    with open("/proc/self/maps") as file:
        for line in file:
            span, access, _, _, _, *name = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if access == "rw-p" and not (name and name[0].startswith("[stack")):
                for piece in ((start, min(end, low)), (max(start, high), end)):
                    found += _used(*piece)
    return sorted(sorted(found, key=lambda piece: piece[0] - piece[1])[:_MOST_REGIONS])


def _used(start: int, end: int) -> list[tuple[int, int]]:
    """Pieces of some memory that are in use, with what is between them when that is little."""
    if start >= end:
        return []
    there = kernel.resident(start, end - start)
    pieces: list[tuple[int, int]] = []
    for place in (start + PAGE * index for index, one in enumerate(there) if one & 1):
        if pieces and place - pieces[-1][1] <= _LITTLE:
            pieces[-1] = pieces[-1][0], place + PAGE
        else:
            pieces.append((place, place + PAGE))
    return pieces


def _thread_area() -> tuple[int, int]:
    """The pages about the C library's notes on this thread, where the kernel tells on which processor it runs."""
    location = ctypes.CDLL(None).__errno_location
    location.restype = ctypes.c_void_p
    page = int(location()) & -PAGE
    return page - 2 * PAGE, page + 3 * PAGE
