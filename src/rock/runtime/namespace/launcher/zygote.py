"""The zygote: a copy of the launcher that never runs Python again, from which all sandboxes' pid 1 are forked.

    launcher ── address of an area ──► zygote: clone ── child: the area's system calls, then back into Python ──► pid 1
       ▲ ◄────── the same address ────────┘

A Python process writes into most pages that it uses, if only to count references. Whoever is forked from the busy
launcher keeps the old versions of all those pages: 1.5 MB a sandbox. The zygote waits in compiled code instead
(native/zygote.c), so that its pages stay shared by all sandboxes. It has the launcher's descriptors (CLONE_FILES) and a
piece of shared memory, the areas, in which the launcher writes what a child has to do first. Without the compiled code
the launcher forks by itself: the same with more memory. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import struct
from collections.abc import Callable

from rock.guest.init import native
from rock.guest.init.sharing import PageSharing
from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.launcher.snapshot import Snapshot

AREA = 16_384
_AREAS = 32
_HEAD = 24  # bytes: clone flags, number of rows, pid of the child
_ROW = 64  # bytes: number, six arguments, result; before that is known, whether it matters
_NOTE = 64  # bytes at the end of an area, for what the child has to know
_CLONE_FILES = 0x400
_UNWRITTEN, _UNWRITTEN_OPTIONAL = 1 << 40, 1
OPTIONAL = "if it can be had"  # what a row is for that may fail
_WORD = (1 << 64) - 1

Row = tuple[str, tuple[int, ...]]  # what it is for, and the number and arguments of the call


class Area:
    """A piece of shared memory for one child: its calls, the strings that they point to, and the launcher's note."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.rows: list[Row] = []
        self._used = _NOTE

    def put(self, data: bytes) -> int:
        """Place a string; answers its address, the same in the child."""
        self._used += len(data) + 1
        place = self.address + AREA - self._used
        ctypes.memmove(place, data + b"\0", len(data) + 1)
        return place

    def row(self, index: int) -> int:
        """Address of a row, which begins with its number: another row may fill it in."""
        return self.address + _HEAD + _ROW * index

    def result(self, index: int) -> int:
        return int(struct.unpack("q", ctypes.string_at(self.row(index) + 56, 8))[0])

    def pid(self) -> int:
        return int(struct.unpack("q", ctypes.string_at(self.address + 16, 8))[0])

    def seal(self, flags: int, note: bytes) -> None:
        """Write it all down, for a clone with these flags."""
        packed = b"".join(
            struct.pack("8Q", *_fill(call), _UNWRITTEN_OPTIONAL if what == OPTIONAL else _UNWRITTEN)
            for what, call in self.rows)
        assert _HEAD + len(packed) + self._used <= AREA
        assert len(note) <= _NOTE
        data = struct.pack("QQq", flags | signal.SIGCHLD, len(self.rows), 0) + packed
        ctypes.memmove(self.address, data, len(data))
        ctypes.memmove(self.address + AREA - _NOTE, note, len(note))

    def reason(self, index: int) -> tuple[str, int]:
        """What the row was for that failed, and the error number."""
        return self.rows[index][0], -self.result(index)


def _failed(area: Area) -> int:
    """Which row of a child failed: none was made after it."""
    count = int(struct.unpack("Q", ctypes.string_at(area.address + 8, 8))[0])
    return next((index for index in reversed(range(count)) if area.result(index) < 0), count - 1)


class Zygote:
    """Made by the launcher once it is ready to be copied.

    live: run in each child, with the launcher's note, the index of the call that failed, or -1, and what lets go of
    pages that are as the zygote has them, or None. rehearse: run in the zygote before it waits, for its children. join:
    run there too, or else in each child: puts it into the groups of all sandboxes.
    """

    def __init__(self, live: Callable[[bytes, int, PageSharing | None], None], rehearse: Callable[[], None],
                 join: Callable[[], object] = lambda: None) -> None:
        self._live, self._rehearse, self._join = live, rehearse, join
        self._sweep: PageSharing | None = None
        self._left_at_most = 0  # of the zygote's own calls, for the sweep to be of use
        self._memory = mmap.mmap(-1, AREA * (_AREAS + 1))  # the last one is for the zygote's own calls
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = [self._base + AREA * index for index in range(_AREAS)]
        self._pid = 0
        self._pidfd = -1
        self._library = native.library

    @property
    def full(self) -> bool:
        """Whether as many children are on their way as there is room for."""
        return not self._free

    def _start(self) -> None:
        commands, self._command = os.pipe2(os.O_CLOEXEC)
        self._reply, replies = os.pipe2(os.O_CLOEXEC)
        own = self._base + AREA * _AREAS
        self._control = ctypes.create_string_buffer(struct.pack("QQQQ", commands, replies, own, 0), 32)
        launcher = os.getpid()
        file = _memory_file()
        pid = kernel.fork_into(_CLONE_FILES)
        if pid == 0:
            address = 0
            try:
                kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries its children
                self._join()
                if os.getppid() == launcher and self._library is not None:
                    self._snapshot(file)
                    address = int(self._library.run_zygote(ctypes.addressof(self._control)))
                if address:
                    area = Area(abs(address))
                    self._go_on(area, -1 if address > 0 else _failed(area))
            finally:
                os._exit(0)
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        try:
            self._answer()
        finally:
            if file >= 0:
                os.close(file)

    def _snapshot(self, file: int) -> None:
        """Have the zygote's memory made a file's, by the compiled code. Without it each child has more of its own."""
        with contextlib.suppress(Exception):  # this must never be why there is no zygote
            with contextlib.suppress(Exception):
                self._rehearse()
            snapshot = Snapshot(file)
            calls = b"".join(struct.pack("8Q", *(value & _WORD for value in call)) for call in snapshot.calls)
            assert len(calls) <= AREA
            ctypes.memmove(self._base + AREA * _AREAS, calls, len(calls))
            struct.pack_into("Q", self._control, 24, len(snapshot.calls))
            self._sweep, self._left_at_most = PageSharing(snapshot.regions), snapshot.optional

    def area(self) -> Area:
        """Room for a child, to be freed when the child is ready or gone."""
        return Area(self._free.pop())

    def free(self, area: Area) -> None:
        self._free.append(area.address)

    def clone(self, area: Area, flags: int, note: bytes) -> int:
        """Start the child of an area, with new namespaces; answers its pid."""
        area.seal(flags, note)
        pid = self._by_zygote(area) if self._library is not None else self._by_fork(area, flags)
        if pid < 0:
            raise OSError(-pid, f"clone: {os.strerror(-pid)}")
        return pid

    def _by_zygote(self, area: Area) -> int:
        if self._pid and self._is_dead():
            self._bury()
        if self._pid == 0:
            self._start()
        os.write(self._command, struct.pack("Q", area.address))
        self._answer()
        return area.pid()

    def _is_dead(self) -> bool:
        """Whether it was killed while it had nothing to do."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _answer(self) -> None:
        """Wait until the zygote has done what it was to do."""
        poll = select.poll()
        poll.register(self._reply, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        if self._reply not in [fd for fd, _ in poll.poll()]:
            self._bury()
            raise OSError(3, "the zygote was killed; the next request starts another one")
        os.read(self._reply, 8)

    def _bury(self) -> None:
        for fd in (self._pidfd, self._command, self._reply):
            os.close(fd)
        self._pid = 0

    def close(self) -> None:
        """End it, and be gone when this returns. Of a launcher that is killed it would go a moment later."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # it was killed before, and is buried
                os.waitpid(self._pid, 0)
            self._bury()

    def _by_fork(self, area: Area, flags: int) -> int:
        pid = kernel.fork_into(flags)
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                self._join()
                self._go_on(area, self._run(area))
            finally:
                os._exit(0)
        return pid

    @staticmethod
    def _run(area: Area) -> int:
        """The rows, from Python; answers the index of the one that failed, or -1."""
        for index in range(len(area.rows)):
            result = kernel.call(*struct.unpack("7q", ctypes.string_at(area.row(index), 56)))
            ctypes.memmove(area.row(index) + 56, struct.pack("q", result), 8)
            if result < 0 and area.rows[index][0] != OPTIONAL:
                return index
        return -1

    def _go_on(self, area: Area, failed: int) -> None:
        """In a child: let go of the shared memory, and live."""
        note = ctypes.string_at(area.address + AREA - _NOTE, _NOTE)
        kernel.munmap(self._base, AREA * (_AREAS + 1))
        whole = self._sweep is not None and struct.unpack_from("Q", self._control, 24)[0] <= self._left_at_most
        self._live(note, failed, self._sweep if whole else None)


def _fill(call: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value & _WORD for value in (*call, *([0] * (7 - len(call)))))


def _memory_file() -> int:
    """An empty memory file that can be sealed; -1 where there is none."""
    try:
        return os.memfd_create("rock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1
