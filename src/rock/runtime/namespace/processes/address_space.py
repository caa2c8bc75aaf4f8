"""Address spaces of processes: mappings, the pages that a process has of its own, and ranges that none of several uses.

All values are those of a guest. They are compared, stored, and used as arguments of system calls of a copy of the same
guest. Standard library only.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rock.runtime.namespace.launcher import process_files

PAGE = 4096
HIGHEST = 0x7FFFFFFFF000  # of user space on x86_64
SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]")  # mapped by the kernel; a process can move them
MOST_MAPPINGS = 30_000
_NOT_PROCESS = ("[vsyscall]",)  # the same in each process, and above user space
_LOWEST = 1 << 44  # of the ranges that `free_range` returns
_SCAN = 0xC0606610  # PAGEMAP_SCAN
_FILE, _PRESENT, _SWAPPED, _ZERO = 1 << 2, 1 << 3, 1 << 4, 1 << 5
_REGIONS = 2048

Range = tuple[int, int]


class TooMany(Exception):
    """An address space has more mappings than are copied, or no free range."""


class Mapping(NamedTuple):
    """A line of /proc/PID/maps. protection: as of mmap. name: a path, a name in brackets, or ""."""

    start: int
    end: int
    protection: int
    shared: bool
    offset: int
    inode: int
    name: str

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def is_file(self) -> bool:
        """Whether a file is mapped. The kernel names no anonymous mapping with a slash."""
        return self.inode != 0

    @property
    def is_special(self) -> bool:
        return self.name in SPECIAL


def mappings(pid: int) -> list[Mapping]:
    """The mappings of a process, in the order of their addresses. TooMany, OSError."""
    found: list[Mapping] = []
    for line in process_files.content(f"/proc/{pid}/maps").decode("utf-8", "surrogateescape").split("\n"):
        if len(found) >= MOST_MAPPINGS:
            raise TooMany(f"it has more than {MOST_MAPPINGS} mappings")
        if line and (one := parse(line)).name not in _NOT_PROCESS:
            found.append(one)
    return found


def parse(line: str) -> Mapping:
    """A mapping from its line. ValueError."""
    span, access, offset, _, inode, *name = line.rstrip("\n").split(None, 5)
    start, _, end = span.partition("-")
    protection = (access[0] == "r") | (access[1] == "w") << 1 | (access[2] == "x") << 2
    return Mapping(int(start, 16), int(end, 16), protection, access[3] == "s", int(offset, 16), int(inode),
                   plain(name[0]) if name else "")  # fmt: skip


def plain(name: str) -> str:
    """A path of /proc/PID/maps without the escapes of the kernel, which are those of a newline and a backslash."""
    return name.replace("\\012", "\n").replace("\\134", "\\")


def own_pages(pid: int, mapped: Sequence[Mapping]) -> list[Range]:
    """The ranges of a process's pages that no file has: written since they were mapped, and not zero pages. mapped: its
    mappings. OSError."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    regions = ctypes.create_string_buffer(24 * _REGIONS)
    found: list[Range] = []
    try:
        for start, end, files in _areas(mapped):
            _scan(fd, start, end, _FILE | _ZERO if files else _ZERO, regions, found)
        return found
    finally:
        os.close(fd)


def _areas(mapped: Sequence[Mapping]) -> list[tuple[int, int, bool]]:
    """Parts of an address space, and whether they have mappings of files. To find out whether a page is one of a file,
    the kernel reads its data structure, which takes ten times as long as the rest of a scan."""
    found: list[tuple[int, int, bool]] = []
    for one in mapped:
        files = one.is_file or one.is_special
        if found and found[-1][2] == files:
            found[-1] = found[-1][0], one.end, files
        else:
            found.append((one.start, one.end, files))
    return found


def _scan(fd: int, start: int, end: int, without: int, regions: ctypes.Array[ctypes.c_char],
          found: list[Range]) -> None:
    """Append the ranges of present or swapped pages between two addresses, without those of some categories."""
    while start < end:
        argument = bytearray(struct.pack(
            "=12Q", 96, 0, start, end, 0, ctypes.addressof(regions), _REGIONS, 0, without, without,
            _PRESENT | _SWAPPED, _PRESENT | _SWAPPED))  # fmt: skip
        try:
            count = fcntl.ioctl(fd, _SCAN, argument)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                raise OSError(errno.ENOSYS, "Linux 6.7 or newer is needed, for PAGEMAP_SCAN") from None
            raise
        for first, last, _ in struct.iter_unpack("=3Q", bytes(memoryview(regions)[: 24 * count])):
            if found and found[-1][1] == first:
                found[-1] = found[-1][0], last
            else:
                found.append((first, last))
        start = struct.unpack_from("=Q", argument, 32)[0] if count == _REGIONS else end


def within(pages: Sequence[Range], mapping: Mapping) -> list[Range]:
    """The parts of sorted ranges that lie in a mapping."""
    index = max(0, bisect.bisect_right(pages, (mapping.start, HIGHEST)) - 1)
    found: list[Range] = []
    for start, end in pages[index:]:
        if start >= mapping.end:
            break
        start, end = max(start, mapping.start), min(end, mapping.end)
        if start < end:
            found.append((start, end))
    return found


def without(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """The parts of sorted ranges that lie in none of the others, which are sorted too."""
    found: list[Range] = []
    index = 0
    for start, end in ranges:
        while index < len(others) and others[index][1] <= start:
            index += 1
        place = index
        while start < end and place < len(others) and others[place][0] < end:
            if start < others[place][0]:
                found.append((start, others[place][0]))
            start = others[place][1]
            place += 1
        if start < end:
            found.append((start, end))
    return found


def free_range(size: int, taken: Iterable[Range]) -> int:
    """The address of a range of `size` bytes that touches none of these. TooMany."""
    address = _LOWEST
    for start, end in sorted(taken):
        if address + size + PAGE <= start:
            break
        address = max(address, end + PAGE)
    if address + size > HIGHEST:
        raise TooMany("its address space has no free range")
    return address
