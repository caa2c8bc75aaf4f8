"""Calls that stopped processes of a sandbox execute for a copy: what only a process itself can read, and its clone.

Questions are answered in one stop, from a room that the process maps for them and unmaps; without that room, in one
stop for each.

A large process is forked in place (decision 77): the clone never runs code of the guest, and keeps the memory as it
was. So the original continues before its pages are copied.

    original ── injected clone ──► duplicate, stopped and traced ── process_vm_readv ──► template
        └── continues                    └── killed when its pages are copied, or with its tracer

The duplicate is a child of pid 1, which takes its status, and no process of the guest is its parent. It has no
descriptors, and processes of the guest cannot access its memory. They can see and kill it: then its pages are not
used. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rock.runtime.namespace.launcher import ptrace, syscall_list
from rock.runtime.namespace.processes import address_space
from rock.runtime.namespace.processes.address_space import Range

NUMBERS = {**syscall_list.NUMBERS["x86_64"], "clone3": 435, "close_range": 436}
# mov rax and the six arguments from [r12]; syscall; store rax; next row; stop at an error, or after r13 rows
LOOP = bytes.fromhex("498b0424 498b7c2408 498b742410 498b542418 4d8b542420 4d8b442428 4d8b4c2430 0f05 4989442438"
                     "4983c440 483d01f0ffff 7305 49ffcd 75c6 cc")  # fmt: skip
ROW = 64
_PR = {"death_signal": 2, "dumpable": 3, "securebits": 27, "subreaper": 37, "tid_address": 40}
_BY_ADDRESS = ("death_signal", "subreaper", "tid_address")
_TIMERS = (0, 1, 2)
_SLOT = 32  # bytes of a result in memory
_ROOM, _ROWS, _DATA = 1 << 14, 1 << 7, 1 << 13  # size; places of the rows and of the results
_PRIVATE_ANONYMOUS, _ALL = 0x22, 7
LEAST = 16 << 20  # bytes of own pages from which on a process is forked in place
_SLACK = 16 << 20  # bytes that stay free below the limit of a sandbox
_PAGE = os.sysconf("SC_PAGESIZE")
_CLONE_PARENT = 0x8000
_SETOPTIONS, _EXITKILL = 0x4200, 0x100000
_PR_SET_DUMPABLE = 4
_HIGHEST_FD = 0xFFFFFFFF
_WALL = 0x40000000
_PATIENCE = 2.0  # seconds


# ---- questions ----


class Own:
    """What only a process itself can read."""

    break_ = securebits = tid_address = death_signal = dumpable = 0
    subreaper = False
    alternate_stack = b""
    timers: Sequence[bytes] = ()
    actions: Sequence[tuple[int, bytes]] = ()


class _Question:
    """A system call. place: the argument that is the address of a result of `size` bytes; -1 for a call without."""

    def __init__(self, name: str, *arguments: int, place: int = -1, size: int = 8) -> None:
        self.number = NUMBERS[name]
        self.arguments = list(arguments)
        self.place = place
        self.size = size
        self.value = 0
        self.data = b""

    def at(self, address: int) -> list[int]:
        """The arguments, with an address for the result."""
        return [address if index == self.place else one for index, one in enumerate(self.arguments)]


def ask(process: ptrace.Injection, handled: int) -> Own:
    """handled: the mask of handled signals. OSError."""
    questions = {"break_": _Question("brk", 0)}
    for name, option in _PR.items():
        questions[name] = _Question("prctl", option, 0, 0, 0, 0, place=1 if name in _BY_ADDRESS else -1)
    questions["stack"] = _Question("sigaltstack", 0, 0, place=1, size=24)
    timers = [_Question("getitimer", which, 0, place=1, size=32) for which in _TIMERS]
    signals = {number: _Question("rt_sigaction", number, 0, 0, 8, place=2, size=32)
               for number in range(1, 65) if handled >> (number - 1) & 1}  # fmt: skip
    _execute(process, [*questions.values(), *timers, *signals.values()])
    own = Own()
    own.break_ = questions["break_"].value
    for name in _PR:
        one = questions[name]
        value = int(struct.unpack("=Q", one.data)[0]) if name in _BY_ADDRESS else one.value
        setattr(own, name, bool(value) if name == "subreaper" else value)
    own.alternate_stack = questions["stack"].data
    own.timers = [one.data for one in timers]
    own.actions = [(number, one.data) for number, one in signals.items()]
    return own


def _execute(process: ptrace.Injection, questions: Sequence[_Question]) -> None:
    try:
        room = process.call(NUMBERS["mmap"], 0, _ROOM, _ALL, _PRIVATE_ANONYMOUS, (1 << 64) - 1, 0)
    except OSError:  # such as at a limit of its address space
        _each(process, questions)
        return
    try:
        _together(process, questions, room)
    finally:
        process.call(NUMBERS["munmap"], room, _ROOM)


def _each(process: ptrace.Injection, questions: Sequence[_Question]) -> None:
    for one in questions:
        one.value = process.call(one.number, *one.at(process.put(bytes(one.size))))
        if one.place >= 0:
            one.data = process.fetch(one.size)


def _together(process: ptrace.Injection, questions: Sequence[_Question], room: int) -> None:
    rows = []
    for index, one in enumerate(questions):
        arguments = one.at(room + _DATA + index * _SLOT)
        rows.append(struct.pack("=8Q", one.number, *arguments, *[0] * (6 - len(arguments)), 0))
    process.write(room, LOOP)
    process.write(room + _ROWS, b"".join(rows))
    process.execute(room, room + _ROWS, len(rows))
    results = process.read(room + _ROWS, ROW * len(rows))
    data = process.read(room + _DATA, _SLOT * len(rows))
    for index, (one, found) in enumerate(zip(questions, struct.iter_unpack("=8q", results), strict=True)):
        if -4096 < found[7] < 0:
            raise OSError(-found[7], "a process cannot be asked for its state")
        one.value = found[7] & (1 << 64) - 1
        one.data = data[index * _SLOT : index * _SLOT + one.size]


# ---- forks in place ----


class Vanished(Exception):
    """A duplicate was killed before its pages were copied."""


class Duplicate:
    """A duplicate of a process: its number outside, and that of the original. The caller is its tracer."""

    def __init__(self, process: ptrace.Injection) -> None:
        """Clone a stopped process. OSError when it cannot be cloned, such as at a limit of processes; nothing is left
        then, and the original is unchanged."""
        self.original = process.pid
        # Its parent is that of the original, which is pid 1. If this process ends before the next line, the duplicate
        # gets a segmentation fault at its first instruction: it has no stack and blocks all signals.
        self.pid = process.clone(_CLONE_PARENT)
        try:
            _await(self.pid)
            ptrace.call(_SETOPTIONS, self.pid, 0, _EXITKILL)
            with open(f"/proc/{self.pid}/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
            process.step(self.pid, NUMBERS["prctl"], _PR_SET_DUMPABLE, 0, 0, 0, 0)
            process.step(self.pid, NUMBERS["close_range"], 0, _HIGHEST_FD, 0)
        except BaseException:
            self.end()
            raise

    def pages(self, mapped: Sequence[address_space.Mapping]) -> list[Range]:
        """The ranges of its own pages. mapped: the mappings of the original. OSError."""
        return address_space.own_pages(self.pid, mapped)

    def check(self) -> None:
        """Vanished if it was killed. What was read of it before is then not used: the kernel may have removed pages."""
        if not self.pid:
            raise Vanished("the duplicate of a process was killed")
        found, status = os.waitpid(self.pid, _WALL | os.WNOHANG)
        if found and not os.WIFSTOPPED(status):
            self.pid = 0
            raise Vanished("the duplicate of a process was killed")

    def end(self) -> None:
        """Kill it. Idempotent."""
        pid, self.pid = self.pid, 0
        if not pid:
            return
        with contextlib.suppress(OSError):
            found, status = os.waitpid(pid, _WALL | os.WNOHANG)
            if found and not os.WIFSTOPPED(status):
                return
            os.kill(pid, signal.SIGKILL)  # not reused: its tracer has not taken its status
            while os.WIFSTOPPED(os.waitpid(pid, _WALL)[1]):
                pass


def _await(pid: int) -> None:
    """Wait for the first stop of a new tracee. OSError."""
    end = time.monotonic() + _PATIENCE
    while True:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(3, "the duplicate of a process was killed")
            return
        if time.monotonic() > end:
            raise TimeoutError(110, "the duplicate of a process does not stop")
        time.sleep(0)


class Room(NamedTuple):
    """How much memory a sandbox may still use: its limit, and what its processes and its files in memory use."""

    limit: int
    used: int

    def fits(self, size: int) -> bool:
        """Whether the original may write to all pages of a duplicate of this size, and gets new ones for them."""
        return not self.limit or self.used + size + _SLACK <= self.limit


def room(first: int, pids: Iterable[int], limit: int) -> Room:
    """first: pid 1 of the sandbox. pids: its other processes. limit: in bytes; 0 is none."""
    used = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
            used += (int(fields[1]) - int(fields[2])) * _PAGE
    with contextlib.suppress(OSError):
        info = os.statvfs(f"/proc/{first}/root/dev/shm")
        used += (info.f_blocks - info.f_bfree) * info.f_frsize
    return Room(limit, used)
