"""The zygote's memory as a file: what the zygote has written so far becomes a private mapping of a memory file.

    memory ── write ──► memory file, then sealed ──► mapped privately over the same memory, and once more to be read

Each pid 1 is forked of it, so it has the file's pages where it wrote nothing, and can go back to them
(guest/init/sharing.py). Nothing of the process may run between the copy and the mapping: both are system calls of a
table that compiled code makes (native/zygote.c). Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator

from rock.guest.init import pid1, sharing
from rock.guest.init.sharing import PAGE
from rock.runtime.namespace.launcher import kernel

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


# ---- rehearsal ----
#
# What every pid 1 does first, done by the zygote before its memory becomes a file: what Python works out on the way is
# then in the file, for all.
#
# The interpreter writes into code, types and caches as it meets them, until it has settled; each pid 1 would have those
# pages to itself. No file of this machine is read: it would be in the memory of every pid 1. Standard library only.

_TIMES = 10  # the interpreter has settled on how to run a function after eight
_PATIENCE = 2.0  # seconds for all of it
_PROGRAM = "/bin/true"
_ENVIRONMENT = {"HOME": "/", "PATH": "/usr/bin:/bin"}  # without a HOME it would be looked up


class _Rehearsed(pid1.Init):
    """An Init that serves one connection, of its own process."""

    def __init__(self) -> None:
        super().__init__(None, os.geteuid(), outside=False)
        theirs, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.adopt(theirs)
        self.number = 0
        self.end = time.monotonic() + _PATIENCE

    def ask(self, **request: object) -> None:
        """Have a request served; what is answered does not matter."""
        self.number += 1
        self.ours.send(json.dumps({"id": self.number, **request}).encode())
        while time.monotonic() < self.end:
            self.later(0.02, lambda: None)
            self.turn()
            self.guard(self._reap)
            if self.number in list(self._answered()):
                return
        raise TimeoutError

    def _answered(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.ours, 65536, 64)
                for fd in fds:
                    os.close(fd)
                yield json.loads(data).get("id", 0)

    def close(self) -> None:
        for program in self.programs.values():
            program.release()
            if program.ended is None:
                os.kill(program.pid, signal.SIGKILL)
                os.waitpid(program.pid, 0)
        for connection in list(self.connections):
            self.drop(connection)
        self.ours.close()
        self.epoll.close()


def rehearse() -> None:
    """In a process without children that is to be copied. Without it the copies are larger."""
    files, mask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o022)
    buried = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a pid is then its program's until we ask for its end
    try:
        _play()
    finally:
        signal.signal(signal.SIGCHLD, buried)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.umask(mask)
        gc.collect()
        gc.freeze()


def _play() -> None:
    one = _Rehearsed()
    try:
        for _ in range(_TIMES):
            one.ask(op="hello")
            one.ask(op="stat", path=_PROGRAM)
            one.ask(op="spawn", argv=[_PROGRAM], env=_ENVIRONMENT, stdin="pipe", stdout="pipe", stderr="stdout",
                    channels={"197": "w", "199": "w"}, key=f"k{one.number}", keep=True)  # fmt: skip
    finally:
        one.close()
