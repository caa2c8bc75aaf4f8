"""Makes a waiting process into the copy of another one: a table of system calls that it executes in one stop.

    unmap all but the vDSO, the room and the copied memory ─► map files, move memory ─► identity, filter ─► files,
    signals, timers ─► own pages of file mappings ─► registers

The room is a range that the guest does not use. It has a short loop and the table. The process has rights over its
sandbox alone, and gives them up before it opens a file of the guest for reading or writing. Addresses, paths and
registers come from a guest: they are only arguments of calls of this process, and the kernel checks them. Standard
library only.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import signal
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rock.runtime.namespace.processes import address_space, capture
from rock.runtime.namespace.processes.address_space import PAGE, Mapping
from rock.runtime.namespace.processes.capture import Reserved
from rock.runtime.namespace.processes.starting import Failed, Waiting
from rock.runtime.namespace.processes.state import Description, Process, Run, Thread, Tree, is_parked, mapping_of
from rock.runtime.namespace.processes.traced import ORIG_RAX, PRSTATUS, RAX, RIP, WORD, XSTATE, Table, Traced, write

_PRIVATE, _SHARED, _FIXED, _ANONYMOUS, _GROWS, _STACK, _NORESERVE = 2, 1, 0x10, 0x20, 0x100, 0x20000, 0x4000
_MOVE = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
_AT_FDCWD = -100
_EPOLL_ADD = 1
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_NAME, _PR_CAPBSET_DROP = 1, 4, 8, 15, 24
_PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAP_LAST = 63
_RSEQ_UNREGISTER = 1
_RESTARTS = (-512, -513, -514, -516)  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
_RESTART_SYSCALL = 219
_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM


# ---- the table ----


class Places(NamedTuple):
    """What each new process has already. special: its mappings of the kernel. filter: a packed system call filter.
    limits: the resource limits of pid 1."""

    special: Sequence[Mapping]
    memory: Reserved
    filter: bytes
    limits: Sequence[tuple[int, int]]


def own_special() -> list[Mapping]:
    """The mappings of the kernel in this process, and in its forks. OSError."""
    return [each for each in address_space.mappings(os.getpid()) if each.is_special]


def plan(waiting: Waiting, tree: Tree, places: Places, rseq: Sequence[int]) -> Table:
    """The table of a process. rseq: of the new one. Failed."""
    one, table = waiting.process, Table(places.memory.room)
    if rseq[1]:
        table.call("rseq", rseq[0], rseq[1], _RSEQ_UNREGISTER, rseq[3])
    table.call("close_range", 0, waiting.lowest - 1, 0)
    if one.group != one.pid:
        table.call("setpgid", 0, one.group)
    _clear(table, one, places)
    _map(table, one, places)
    _memory_fields(table, one)
    _identity(table, one)
    _files(table, waiting, tree)
    _signals(table, one)
    _rest(table, one, places)
    return table


class Tables:
    """The last table of each process of a tree: most children get the same ones."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Table]] = {}

    def plan(self, waiting: Waiting, tree: Tree, places: Places, rseq: Sequence[int]) -> Table:
        """As `plan`. Failed."""
        values = (waiting.handed, waiting.lowest, places.limits, list(rseq))
        known = self._known.get(waiting.process.pid)
        if known is not None and known[0] == values:
            return known[1]
        table = plan(waiting, tree, places, rseq)
        self._known[waiting.process.pid] = values, table
        return table


def _clear(table: Table, one: Process, places: Places) -> None:
    """Unmap what the new process had, and move the mappings of the kernel to their addresses."""
    memory = places.memory
    kept = [*((each.start, each.end) for each in places.special), (memory.room, memory.room + Reserved.ROOM),
            (memory.address, memory.address + memory.size)]
    last = PAGE
    for start, end in [*sorted(kept), (address_space.HIGHEST, 0)]:
        if start > last:
            table.call("munmap", last, start - last)
        last = end
    wanted = {each.name: each for each in one.mappings if each.is_special}
    own = {each.name: each for each in places.special}
    if {name: each.size for name, each in wanted.items()} != {name: each.size for name, each in own.items()}:
        raise Failed("the processes were copied under another kernel")
    spot = memory.room + Reserved.ROOM
    spots = {}
    for name, each in own.items():
        table.call("mremap", each.start, each.size, each.size, _MOVE, spot)
        spots[name] = spot
        spot += each.size
    for name, each in wanted.items():
        table.call("mremap", spots[name], each.size, each.size, _MOVE, each.start)


def _map(table: Table, one: Process, places: Places) -> None:
    """Map the files, and move the copied memory to its addresses."""
    starts: dict[int, Run] = {}
    for run in one.runs:
        starts.setdefault(mapping_of(one, run.start).start, run)
    opened = ""
    for each in one.mappings:
        if each.is_special:
            continue
        if each.is_file:
            if opened != each.name:
                if opened:
                    table.call("close", 0)
                table.call("openat", _AT_FDCWD, table.path(each.name), os.O_RDONLY | os.O_CLOEXEC)
                opened = each.name
            sharing = _SHARED if each.shared else _PRIVATE
            table.call("mmap", each.start, each.size, each.protection, sharing | _FIXED, 0, each.offset)
        elif each.start in starts and is_parked(each):
            run = starts[each.start]
            place = places.memory.address + run.place - (run.start - each.start)
            table.call("mremap", place, each.size, each.size, _MOVE, each.start)
            if each.protection != 3:
                table.call("mprotect", each.start, each.size, each.protection)
        else:
            flags = _PRIVATE | _FIXED | _ANONYMOUS | (0 if each.protection else _NORESERVE)
            if not is_parked(each):
                flags |= _GROWS | _STACK
            table.call("mmap", each.start, each.size, each.protection, flags, -1, 0)
    if opened:
        table.call("close", 0)
    table.call("munmap", places.memory.address, places.memory.size)


def _memory_fields(table: Table, one: Process) -> None:
    table.call("openat", _AT_FDCWD, table.path(one.program), os.O_RDONLY | os.O_CLOEXEC)
    fields = struct.pack("=12QII", *one.memory, table.put(one.auxiliary), len(one.auxiliary), 0)
    table.call("prctl", _PR_SET_MM, _PR_SET_MM_MAP, table.put(fields), len(fields), 0)
    table.call("close", 0)


def _identity(table: Table, one: Process) -> None:
    inheritable, permitted, effective, bounding = one.capabilities
    table.call("setgroups", len(one.groups), table.put(struct.pack(f"={len(one.groups)}I", *one.groups)))
    for number in range(_last_capability() + 1):
        if not bounding >> number & 1:
            table.call("prctl", _PR_CAPBSET_DROP, number)
    table.call("prctl", _PR_SET_KEEPCAPS, 1)
    table.call("setresgid", *one.ids[3:])
    table.call("setresuid", *one.ids[:3])
    header = table.put(struct.pack("=Ii", 0x20080522, 0))
    low = [value & 0xFFFFFFFF for value in (effective, permitted, inheritable)]
    high = [value >> 32 for value in (effective, permitted, inheritable)]
    table.call("capset", header, table.put(struct.pack("=6I", *low, *high)))
    table.call("prctl", _PR_SET_KEEPCAPS, 0)
    table.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


@functools.cache
def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return min(_CAP_LAST, int(file.read()))


def _files(table: Table, waiting: Waiting, tree: Tree) -> None:
    """Working directory and descriptors, in the order of their numbers. An open returns the lowest unused number."""
    one = waiting.process
    table.call("chdir", table.path(one.folder))
    used: set[int] = set()
    known: dict[int, int] = {}
    watching: list[tuple[int, Description]] = []
    lowest = 0
    for number, index, cloexec in one.descriptors:
        description = tree.descriptions[index]
        if index in known:
            table.call("dup3", known[index], number, cloexec)
        elif index in waiting.handed:
            table.call("dup3", waiting.handed[index], number, cloexec)
        else:
            while lowest in used:
                lowest += 1
            if description.kind == "epoll":
                table.call("epoll_create1", cloexec)
                watching.append((number, description))
            else:
                table.call("openat", _AT_FDCWD, table.path(description.path), description.flags | cloexec)
            if description.offset and not description.flags & os.O_PATH:
                table.call("lseek", lowest, description.offset, os.SEEK_SET)
            if lowest != number:
                table.call("dup3", lowest, number, cloexec)
                table.call("close", lowest)
        known.setdefault(index, number)
        used.add(number)
    for number, description in watching:
        for target, events, data in description.watched:
            event = struct.pack("=IQ", events & 0xFFFFFFFF, data)
            table.call("epoll_ctl", number, _EPOLL_ADD, target, table.put(event))
    table.call("close_range", waiting.lowest, 0xFFFFFFFF, 0)


def _signals(table: Table, one: Process) -> None:
    handled = dict(one.actions)
    default = table.put(bytes(32))
    ignore = table.put(struct.pack("=4Q", 1, 0, 0, 0))
    for number in range(1, 65):
        if number in (signal.SIGKILL, signal.SIGSTOP):
            continue
        place = ignore if one.ignored >> (number - 1) & 1 else default
        table.call("rt_sigaction", number, table.put(handled[number]) if number in handled else place, 0, 8)
    table.call("sigaltstack", table.put(_not_active(one.alternate_stack)), 0)


def _not_active(stack: bytes) -> bytes:
    """An alternate stack without the flag that says that it is in use, which a process cannot set."""
    address, flags, size = struct.unpack("=QixxxxQ", stack)
    return struct.pack("=QixxxxQ", address, flags & ~1, size)


def _rest(table: Table, one: Process, places: Places) -> None:
    table.call("umask", one.umask)
    if one.personality:
        table.call("personality", one.personality)
    table.call("prctl", _PR_SET_SUBREAPER, int(one.subreaper))
    table.call("prctl", _PR_SET_PDEATHSIG, one.death_signal)
    if one.dumpable in (0, 1):
        table.call("prctl", _PR_SET_DUMPABLE, one.dumpable)
    _of_thread(table, one)
    for which, value in enumerate(one.timers):
        if any(value[16:]):
            table.call("setitimer", which, table.put(value), 0)
    for number, ((soft, hard), (_, most)) in enumerate(zip(one.limits, places.limits, strict=True)):
        own = _least(hard, most, resource.getrlimit(number)[1])
        pair = [value & WORD for value in (_least(soft, own), own)]
        table.call("prlimit64", 0, number, table.put(struct.pack("=QQ", *pair)), 0)
    if places.filter:
        instructions = table.put(places.filter)
        table.call("seccomp", 1, 0, table.put(struct.pack("=HxxxxxxQ", len(places.filter) // 8, instructions)))


def _of_thread(table: Table, one: Process | Thread) -> None:
    """What each thread has for itself."""
    table.call("prctl", _PR_SET_NAME, table.put(one.name.encode("utf-8", "surrogateescape")[:15] + b"\0"))
    if one.robust_list[0]:
        table.call("set_robust_list", one.robust_list[0], one.robust_list[1])
    table.call("set_tid_address", one.tid_address)
    if one.rseq[1]:
        table.call("rseq", one.rseq[0], one.rseq[1], 0, one.rseq[3])


# ---- execution ----


class Rebuilt:
    """A waiting process that is made into the copy of another one. `go` lets it run."""

    def __init__(self, waiting: Waiting) -> None:
        """OSError, Failed."""
        self._waiting = waiting
        self._first = Traced(waiting.outside)
        self._threads: list[Traced] = []

    def begin(self, tree: Tree, places: Places, tables: Tables) -> None:
        """Have it begin to execute its table. OSError, Failed: then it has to be killed."""
        table = tables.plan(self._waiting, tree, places, capture.rseq_of(self._first.tid))
        self._first.begin(table, places.memory.room)

    def build(self, memory: Reserved, choose: Callable[[int], None]) -> None:
        """After `begin`. choose: gives the next new thread a number. OSError, Failed: then it has to be killed."""
        pid, one = self._first.tid, self._waiting.process
        self._first.end()
        for run in one.runs:
            if not is_parked(mapping_of(one, run.start)):
                write(self._first.memory, memory.view(run.place, run.end - run.start), run.start)
        for thread in one.threads:
            choose(thread.tid)
            self._start(thread, memory.room)
        self._first.unmap(self._instruction(), memory.room, Reserved.ROOM)
        self._continue(self._first, one)
        for traced, thread in zip(self._threads, one.threads, strict=True):
            self._continue(traced, thread)
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(one.oom_score))

    def _continue(self, traced: Traced, one: Process | Thread) -> None:
        """Set the state of the processor, with which it continues."""
        traced.set(XSTATE, one.extended)
        traced.set(PRSTATUS, struct.pack("=27Q", *resumed(one, self._first.memory)))
        traced.block(one.blocked)

    def _start(self, thread: Thread, room: int) -> None:
        """Start a thread of the process, which has its number then."""
        table = Table(room)
        table.call("clone", _THREAD, 0, 0, 0, 0)
        [tid] = self._first.execute(table, room)
        made = Traced(self._first.cloned, self._first.memory)
        self._threads.append(made)
        if tid != thread.tid:
            raise Failed(f"the number {thread.tid} of a thread is in use")
        table = Table(room)
        table.call("sigaltstack", table.put(_not_active(thread.alternate_stack)), 0)
        _of_thread(table, thread)
        made.execute(table, room)

    def _instruction(self) -> int:
        """The address of a system call instruction of the vDSO."""
        code = next(each for each in self._waiting.process.mappings if each.name == "[vdso]")
        at = os.pread(self._first.memory, code.size, code.start).find(b"\x0f\x05")
        if at < 0:
            raise Failed("the vDSO has no system call instruction")
        return code.start + at

    def go(self) -> None:
        """Let it run. OSError when it was killed."""
        for one in (*reversed(self._threads), self._first):
            one.detach()
        self.close()

    def close(self) -> None:
        """Release the descriptor. Idempotent."""
        if self._first.memory >= 0:
            os.close(self._first.memory)
            self._first.memory = -1


def _least(*values: int) -> int:
    """The least of some resource limits; -1 is none."""
    return min((value for value in values if value >= 0), default=-1)


def resumed(one: Process | Thread, memory: int) -> list[int]:
    """The registers with which a copy continues: an interrupted call is made again, from its beginning, and an
    interrupted restartable sequence is aborted, as the kernel does. memory: of the copy."""
    values = list(struct.unpack("=27Q", one.registers))
    result, number = struct.unpack("=qq", struct.pack("=QQ", values[RAX], values[ORIG_RAX]))
    if number >= 0 and result in _RESTARTS:
        if number == _RESTART_SYSCALL:
            values[RAX] = -errno.EINTR & WORD
        else:
            values[RAX] = number
            values[RIP] -= 2
    elif one.rseq[1]:
        values[RIP] = _aborted(values[RIP], one.rseq, memory)
    values[ORIG_RAX] = WORD
    return values


def _aborted(address: int, rseq: Sequence[int], memory: int) -> int:
    """Where a process continues that stopped at an address: behind a restartable sequence, if that is inside of one."""
    try:
        critical = int(struct.unpack("=Q", os.pread(memory, 8, rseq[0] + 8))[0])
        if not critical:
            return address
        _, start, length, abort = struct.unpack("=QQQQ", os.pread(memory, 32, critical))
    except (OSError, struct.error, OverflowError):
        return address
    return abort if 0 <= address - start < length else address
