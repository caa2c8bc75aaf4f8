"""The zygote: a copy of the launcher that never runs Python again, from which every pid 1 is forked.

    launcher ── address of an area ──► zygote: clone ── child: the area's system calls, then back into Python ──► pid 1
       ▲ ◄────── the same address ────────┘

A Python process writes into most pages that it uses, because it counts references. A fork of the busy launcher retains
the old versions of all those pages: 1.5 MB per sandbox. The zygote waits in compiled code instead (native/zygote.c), so
its pages stay shared by all sandboxes. It shares the launcher's descriptors (CLONE_FILES) and a memory mapping of
areas, in which the launcher writes the first actions of a child. Without the compiled code the launcher forks by
itself, which takes more memory. Standard library only.
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
from typing import NamedTuple

from rock.guest.init import native
from rock.guest.init.sharing import PageSharing
from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.launcher.snapshot import Snapshot

AREA = 16_384
_AREAS = 32
_HEAD = 96  # bytes, struct area in native/zygote.c
_CONTROL = 184  # bytes, struct control there
_WAITED = 1  # see there
_ROW = 64  # bytes: number, six arguments, result; before the call, whether it is required
NOTE = 128  # bytes at the end of an area, for data for the child
_CLONE_FILES = 0x400
_UNWRITTEN, _UNWRITTEN_OPTIONAL = 1 << 40, 1
OPTIONAL = "if it can be had"  # purpose of a row that may fail
_WORD = (1 << 64) - 1

Row = tuple[str, tuple[int, ...]]  # purpose, and the number and arguments of the call


class NoSpace(Exception):
    """The area is full."""


class Area:
    """Shared memory for one child: its calls, the strings that they point to, and the launcher's note."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.rows: list[Row] = []
        self._used = NOTE
        self._sealed = 0  # rows

    def put(self, data: bytes) -> int:
        """Store a string; returns its address, which is the same in the child. NoSpace."""
        if _HEAD + _ROW * max(self._sealed, len(self.rows)) + self._used + len(data) + 8 > AREA:
            raise NoSpace
        self._used += -(-(len(data) + 1) // 8) * 8
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
        """Write the content, for a clone with these flags."""
        packed = _packed(self.rows)
        assert _HEAD + len(packed) + self._used <= AREA
        assert len(note) <= NOTE
        data = struct.pack("12Q", flags | signal.SIGCHLD, len(self.rows), *([0] * 9), self.address + AREA - NOTE)
        self._sealed = len(self.rows)
        ctypes.memmove(self.address, data + packed, _HEAD + len(packed))
        ctypes.memmove(self.address + AREA - NOTE, note, len(note))

    def add_program(self, program: list[Row], after: list[Row], fds: tuple[int, int, int],
                    shared: tuple[int, int]) -> None:
        """Add a first program to a child that has not yet made all its rows: calls of a child of it, and those that it
        makes itself afterwards. fds: on which the server connects, of its connection, and for the report that the child
        is ready. shared: address and size of all areas. NoSpace."""
        packed = _packed([*program, *after])
        if _HEAD + _ROW * self._sealed + len(packed) + self._used > AREA:
            raise NoSpace
        ctypes.memmove(self.row(self._sealed), packed, len(packed))
        self._sealed += len(program) + len(after)
        head = struct.pack("QQq3q2Q", len(program), len(after), 0, *fds, *shared)
        ctypes.memmove(self.address + 24, head, len(head))

    def started(self) -> int:
        """The pid of the first program once the child is ready, as the child sees it, or a negative errno."""
        return int(struct.unpack("q", ctypes.string_at(self.address + 40, 8))[0])

    def reason(self, index: int) -> tuple[str, int]:
        """The purpose of the failed row, and the errno."""
        return self.rows[index][0], -self.result(index)


def _packed(rows: list[Row]) -> bytes:
    return b"".join(
        struct.pack("8Q", *_fill(call), _UNWRITTEN_OPTIONAL if what == OPTIONAL else _UNWRITTEN)
        for what, call in rows)


def _failed(area: Area) -> int:
    """The index of a child's failed row: later rows did not run."""
    count = int(struct.unpack("Q", ctypes.string_at(area.address + 8, 8))[0])
    return next((index for index in reversed(range(count)) if area.result(index) < 0), count - 1)


class First(NamedTuple):
    """What a child did before it had work. pid: of its first program, or a negative errno. connection: of the server;
    -1: there is none. watching: whether the server waits for output of the program."""

    pid: int
    connection: int
    watching: int


class Zygote:
    """Started by the launcher once it is ready to be copied.

    live: runs in each child, with the launcher's note, the index of the failed call or -1, the function that releases
        unchanged pages, or None, and what the child did before, if it started a first program.
    rehearse: runs in the zygote before it waits, for the benefit of its children.
    join: runs there too, or otherwise in each child: joins the cgroups shared by all sandboxes.
    """

    def __init__(self, live: Callable[[bytes, int, PageSharing | None, First | None], None],
                 rehearse: Callable[[], None], join: Callable[[], object] = lambda: None) -> None:
        self._live, self._rehearse, self._join = live, rehearse, join
        self._sweep: PageSharing | None = None
        self._left_at_most = 0  # of the zygote's own calls, for an effective sweep
        self._memory = mmap.mmap(-1, AREA * (_AREAS + 1))  # the last one is for the zygote's own calls
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = [self._base + AREA * index for index in range(_AREAS)]
        self._pid = 0
        self._pidfd = -1
        self._library = native.library

    @property
    def full(self) -> bool:
        """Whether all areas are in use."""
        return not self._free

    def _start(self) -> None:
        commands, self._command = os.pipe2(os.O_CLOEXEC)
        self._reply, replies = os.pipe2(os.O_CLOEXEC)
        own = self._base + AREA * _AREAS
        self._control = ctypes.create_string_buffer(struct.pack("QQQQ", commands, replies, own, 0), _CONTROL)
        launcher = os.getpid()
        file = _memory_file()
        pid = kernel.fork_into(_CLONE_FILES)
        if pid == 0:
            address = 0
            try:
                kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps its children
                self._join()
                if os.getppid() == launcher and self._library is not None:
                    self._snapshot(file)
                    address = int(self._library.run_zygote(ctypes.addressof(self._control)))
                if address == _WAITED:
                    self._wake()
                elif address:
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
        """Move the zygote's memory into a file, by the compiled code. Without it each child has more private memory."""
        with contextlib.suppress(Exception):  # a failure must not prevent the start of the zygote
            with contextlib.suppress(Exception):
                self._rehearse()
            snapshot = Snapshot(file)
            calls = b"".join(struct.pack("8Q", *(value & _WORD for value in call)) for call in snapshot.calls)
            assert len(calls) <= AREA
            ctypes.memmove(self._base + AREA * _AREAS, calls, len(calls))
            struct.pack_into("Q", self._control, 24, len(snapshot.calls))
            self._sweep, self._left_at_most = PageSharing(snapshot.regions), snapshot.optional

    def area(self) -> Area:
        """An area for a child; freed when the child is ready or gone."""
        return Area(self._free.pop())

    def free(self, area: Area) -> None:
        self._free.append(area.address)

    def clone(self, area: Area, flags: int, note: bytes) -> int:
        """Start the child of an area, with new namespaces; returns its pid."""
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
        """Whether it was killed while idle."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _answer(self) -> None:
        """Wait until the zygote has completed its request."""
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
        """End the zygote and wait for its exit. After a kill of the launcher it exits slightly later."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # it was killed before, and is reaped
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
        """Run the rows from Python; returns the index of the failed one, or -1."""
        for index in range(len(area.rows)):
            result = kernel.call(*struct.unpack("7q", ctypes.string_at(area.row(index), 56)))
            ctypes.memmove(area.row(index) + 56, struct.pack("q", result), 8)
            if result < 0 and area.rows[index][0] != OPTIONAL:
                return index
        return -1

    def _go_on(self, area: Area, failed: int) -> None:
        """In a child: unmap the shared memory and call `live`."""
        note = ctypes.string_at(area.address + AREA - NOTE, NOTE)
        kernel.munmap(*self.shared)
        self._live(note, failed, self._whole_sweep(), None)

    def _wake(self) -> None:
        """In a child that waited beside its first program: call `live`."""
        first = First(*struct.unpack_from("3q", self._control, 32))
        self._live(self._control.raw[_CONTROL - NOTE :], -1, self._whole_sweep(), first)

    def _whole_sweep(self) -> PageSharing | None:
        whole = self._sweep is not None and struct.unpack_from("Q", self._control, 24)[0] <= self._left_at_most
        return self._sweep if whole else None

    @property
    def shared(self) -> tuple[int, int]:
        """Address and size of the shared memory."""
        return self._base, AREA * (_AREAS + 1)

    @property
    def starts_programs(self) -> bool:
        """Whether a child can start a first program by itself."""
        return self._library is not None


def _fill(call: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value & _WORD for value in (*call, *([0] * (7 - len(call)))))


def _memory_file() -> int:
    """An empty sealable memory file; -1 without kernel support."""
    try:
        return os.memfd_create("rock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1
