"""The zygote's memory as a memory file that all pid 1 processes share, and the warm-up of the interpreter before it.

    memory ── write ──► memory file, then sealed ──► mapped privately over the same memory, and again read-only

Each forked pid 1 shares the file's pages where it wrote nothing, and can return to them (guest/init/sharing.py). No
code of the process may run between the copy and the mapping: both are system calls of a table that compiled code
executes (native/zygote.c).

`rehearse` performs the first work of every pid 1 in the zygote. The interpreter writes into code, types and caches
until it has specialized them; without the warm-up each pid 1 would have private copies of those pages. The warm-up
reads no file of this machine, whose content would be in the memory of every pid 1. Standard library only.
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

Call = tuple[int, ...]  # number, six arguments, and the required result


class Snapshot:
    """A snapshot of this process, which must have one thread. OSError where the kernel lacks support.

    fd: an empty memory file, needed only while the calls run.
    calls: in order; no other code of this process may run after the first and before the last.
    optional: how many of the last calls may fail.
    regions: the input of `sharing.PageSharing`.
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
        # Fills the page table (Linux 5.14), and writes one byte of each region unchanged. A fork then copies the table,
        # and a child does not take a fault per page.
        touches = [(_PREAD, fd, mapping[1], 1, mapping[6], 0, 0, 1) for mapping in mappings]
        looks = [(_MADVISE, start, end - start, _POPULATE_READ, 0, 0, 0, 0) for start, end in found]
        self.calls: list[Call] = [*copies, seal, *mappings, *touches, *looks]
        self.optional = len(touches) + len(looks)


def _regions() -> list[tuple[int, int]]:
    """Start and end of the used private writable memory: the `_MOST_REGIONS` largest pieces.

    Excludes the stack, on which the calls run, and memory to which the kernel writes by itself.
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
    """The used pieces of a memory range, merged across small gaps."""
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
    """The pages around the C library's thread area, where the kernel writes the current CPU number."""
    location = ctypes.CDLL(None).__errno_location
    location.restype = ctypes.c_void_p
    page = int(location()) & -PAGE
    return page - 2 * PAGE, page + 3 * PAGE


# ---- warm-up ----

_TIMES = 10  # the interpreter specializes a function after eight calls
_PATIENCE = 2.0  # seconds for all of it
_PROGRAM = "/bin/true"
_ENVIRONMENT = {"HOME": "/", "PATH": "/usr/bin:/bin"}  # without HOME it would read the user database


class _Rehearsed(pid1.Init):
    """An Init that serves one connection of its own process."""

    def __init__(self) -> None:
        super().__init__(None, os.geteuid(), outside=False)
        theirs, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.adopt(theirs)
        self.number = 0
        self.end = time.monotonic() + _PATIENCE

    def ask(self, **request: object) -> None:
        """Have a request served; the reply is ignored."""
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
    """Warm up a process without children before it is copied. Without it the private memory of each copy is larger."""
    files, mask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o022)
    buried = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a pid is then not reused until it is reaped
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
