"""Takes the state of stopped processes: registers, what only a process itself can tell, and its pages.

    stopped processes ── /proc (inventory.py), ptrace ──► state.Process ── process_vm_readv ──► this process's memory

The processes stay as they were: an injected call only reads. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rock.runtime.namespace.launcher import process_files, ptrace
from rock.runtime.namespace.processes import address_space, injected, inventory, state
from rock.runtime.namespace.processes.address_space import PAGE, Range
from rock.runtime.namespace.processes.inventory import Found, Inventory

NUMBERS = injected.NUMBERS
_GETREGSET, _GET_RSEQ = 0x4204, 0x420F
_XSTATE = 0x202
_LARGEST_XSTATE = 16384
_PR_GET_TID_ADDRESS = 40
_BATCH = 512  # ranges of one process_vm_readv
_PORTION = 64 << 20  # bytes of one
HUGE = 2 << 20  # bytes of a huge page
_HUGEPAGE, _NOHUGEPAGE, _POPULATE_WRITE = 14, 15, 23  # of madvise
_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t


class Refused(Exception):
    """The processes cannot be copied. args: the reasons. passing: all of them usually pass in some milliseconds."""

    passing = False


class TooLarge(Exception):
    """The processes have more memory of their own than there is room for."""


def inspect(stopped: ptrace.Stopped, first: int,
            programs: Sequence[Mapping[str, object]]) -> tuple[Inventory, list[state.Program]]:
    """What the stopped processes have. Refused with the reasons against a copy, OSError."""
    found = Inventory([pid for pid in stopped.pids if pid != first], first)
    try:
        known = found.look(programs)
    finally:
        found.close()
    for pids, what, problems in ((stopped.halted, "is stopped by a signal", found.problems),
                                 (stopped.interrupted, "is receiving a signal", found.passing)):
        problems += [f"{process_files.label(pid)} {what}" for pid in pids if pid != first]
    if found.problems or found.passing:
        refused = Refused(*[*found.problems, *found.passing][:20])
        refused.passing = not found.problems
        raise refused
    return found, known


def capture(stopped: ptrace.Stopped, first: int, programs: Sequence[Mapping[str, object]], most: int, limit: int,
            check: Callable[[], None], prepared: Prepared | None = None) -> tuple[state.Tree, Pages]:
    """The state of all stopped processes but pid 1, `first`, and their pages, except those that `Pages.complete` reads
    of duplicates, while the processes continue. most: bytes of pages. limit: of the sandbox's memory; 0 is none. check:
    raises when the time is over. prepared: memory for the pages. Refused, TooLarge, OSError; all processes are then as
    before."""
    found, known = inspect(stopped, first, programs)
    check()
    pages = Pages({one.outside: one.mappings for one in found.processes}, most, prepared)
    try:
        large = _large(pages, [one.outside for one in found.processes if one.parent == 1], first, limit)
        processes = []
        for one in found.processes:
            processes.append(_process(one, found, pages, one.outside in large))
            check()
        pages.read(check)
    except BaseException:
        pages.close()
        raise
    return state.Tree(known, processes, found.descriptions, found.pipes, pages.size, pages.bytes), pages


def _large(layout: Layout | Pages, children: Sequence[int], first: int, limit: int) -> set[int]:
    """The processes that are forked in place: of the children of pid 1 those with much memory, if the sandbox has room
    for as many pages again, which it needs when all of them are written to meanwhile."""
    sizes = {pid: sum(run.end - run.start for run in layout.runs[pid]) for pid in children}
    large = {pid: size for pid, size in sizes.items() if size >= injected.LEAST}
    if not large or not injected.room(first, layout.runs, limit).fits(sum(large.values())):
        return set()
    return set(large)


# ---- registers, and what only the process itself can tell ----


def _process(one: Found, found: Inventory, pages: Pages, duplicate: bool) -> state.Process:
    pid, status = one.outside, one.status
    extended = register_set(pid, _XSTATE)
    rseq = rseq_of(pid)
    robust = _robust_list(pid)
    with ptrace.Injection(pid) as process:
        own = injected.ask(process, int(status["SigCgt"], 16))
        registers, blocked = process.registers, process.blocked
        if duplicate:
            pages.duplicate(process)
    if own.securebits:
        raise Refused(f"{process_files.label(pid)} has secure bits")
    memory, maps = list(one.memory), _Maps(pid)
    memory[5] = own.break_
    with open(f"/proc/{pid}/auxv", "rb") as file:
        auxiliary = file.read()
    return state.Process(
        pid=one.pid, parent=one.parent, session=one.session, group=one.group, name=one.name, registers=registers,
        extended=extended, blocked=blocked, rseq=rseq, robust_list=robust, mappings=one.mappings, runs=pages.runs[pid],
        memory=memory, auxiliary=auxiliary, program=one.program, folder=one.folder, umask=int(status["Umask"], 8),
        ids=_ids(pid, status, maps), groups=[_inside(number, maps.gid) for number in status["Groups"].split()],
        capabilities=inventory.capabilities(status)[:4], nice=one.nice,
        oom_score=int(_text(f"/proc/{pid}/oom_score_adj")),
        limits=limits(pid),
        actions=own.actions, ignored=int(status["SigIgn"], 16), alternate_stack=own.alternate_stack,
        timers=own.timers, tid_address=own.tid_address, subreaper=own.subreaper, death_signal=own.death_signal,
        dumpable=own.dumpable, personality=int(_text(f"/proc/{pid}/personality"), 16),
        descriptors=found.descriptors[pid], threads=[_thread(tid) for tid in one.threads])  # fmt: skip


def _thread(tid: int) -> state.Thread:
    extended, rseq, robust = register_set(tid, _XSTATE), rseq_of(tid), _robust_list(tid)
    with ptrace.Injection(tid) as thread:
        thread.call(NUMBERS["prctl"], _PR_GET_TID_ADDRESS, thread.put(bytes(8)), 0, 0, 0)
        address = int(struct.unpack("=Q", thread.fetch(8))[0])
        thread.call(NUMBERS["sigaltstack"], 0, thread.put(bytes(24)))
        stack = thread.fetch(24)
        registers, blocked = thread.registers, thread.blocked
    return state.Thread(inventory.inside(tid), inventory.comm(tid), registers, extended, blocked, rseq, robust, stack,
                        address)  # fmt: skip


def register_set(pid: int, kind: int) -> bytes:
    """Registers of a stopped process. OSError."""
    buffer = ctypes.create_string_buffer(_LARGEST_XSTATE)
    vector = struct.pack("=QQ", ctypes.addressof(buffer), _LARGEST_XSTATE)
    place = ctypes.create_string_buffer(vector, 16)
    ptrace.call(_GETREGSET, pid, kind, ctypes.addressof(place))
    return buffer.raw[: struct.unpack("=QQ", place.raw)[1]]


def rseq_of(pid: int) -> list[int]:
    """Address, size, flags and signature of its area for restartable sequences; size 0 without one."""
    buffer = ctypes.create_string_buffer(24)
    ptrace.call(_GET_RSEQ, pid, 24, ctypes.addressof(buffer))
    address, size, signature, flags = struct.unpack_from("=QIII", buffer.raw)
    return [address, size, flags, signature]


def _robust_list(pid: int) -> list[int]:
    head, length = ctypes.c_ulong(), ctypes.c_ulong()
    number = ctypes.c_long(NUMBERS["get_robust_list"])
    if int(_libc.syscall(number, ctypes.c_long(pid), ctypes.byref(head), ctypes.byref(length))) < 0:
        raise OSError(ctypes.get_errno(), "get_robust_list failed")
    return [head.value, length.value]


def _text(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()


def limits(pid: int) -> list[tuple[int, int]]:
    """Soft and hard resource limits of a process, in the order of their numbers; -1 is none. OSError."""
    with open(f"/proc/{pid}/limits", encoding="ascii", errors="replace") as file:
        rows = [line[26:].split()[:2] for line in file.read().splitlines()[1:]]
    return [tuple(-1 if text == "unlimited" else int(text) for text in row) for row in rows]  # type: ignore[misc]


class _Maps:
    """The mappings of user and group ids of a process."""

    def __init__(self, pid: int) -> None:
        self.uid, self.gid = (
            [tuple(int(word) for word in line.split()) for line in _text(f"/proc/{pid}/{kind}_map").splitlines()]
            for kind in ("uid", "gid"))


def _inside(number: str, mapped: Sequence[tuple[int, ...]]) -> int:
    """A user or group id as the sandbox sees it."""
    for inside, outside, count in mapped:
        if outside <= int(number) < outside + count:
            return inside + int(number) - outside
    raise Refused(f"a process has the id {number}, which the sandbox does not have")


def _ids(pid: int, status: Mapping[str, str], maps: _Maps) -> list[int]:
    found = []
    for kind, known in (("Uid", maps.uid), ("Gid", maps.gid)):
        real, effective, saved, file = status[kind].split()
        if file != effective:
            raise Refused(f"{process_files.label(pid)} has another identity for files")
        found += [_inside(number, known) for number in (real, effective, saved)]
    return found


# ---- pages ----


class Layout:
    """Where the own pages of several processes are in one range of memory: a slot for each anonymous mapping that has
    such pages, and one for the other pages of a process.

    runs: by process outside. hidden: of these, the ones that the process itself cannot read. size: of the range. bytes:
    of the pages.
    """

    def __init__(self, spaces: Mapping[int, Sequence[address_space.Mapping]], most: int) -> None:
        """spaces: the mappings of each process. TooLarge, OSError."""
        self.runs: dict[int, list[state.Run]] = {}
        self.hidden: dict[int, list[state.Run]] = {}
        self.size = self.bytes = 0
        self.spaces = [(one.start, one.end) for mappings in spaces.values() for one in mappings]
        for pid, mappings in spaces.items():
            self._place(pid, mappings)
            if self.bytes > most:
                raise TooLarge(f"the processes have more than {most >> 20} MiB of memory of their own")

    def _place(self, pid: int, mappings: Sequence[address_space.Mapping]) -> None:
        pages = address_space.own_pages(pid, mappings)
        runs, hidden = self.runs.setdefault(pid, []), self.hidden.setdefault(pid, [])
        for mapping in mappings:
            mine = address_space.within(pages, mapping)
            if not mine or mapping.is_special:
                continue
            whole = state.is_parked(mapping)
            if whole and mapping.size >= HUGE:
                self.size += (mapping.start - self.size) % HUGE  # huge pages can be moved there undivided
            for start, end in mine:
                place = self.size + start - mapping.start if whole else self.size
                runs.append(state.Run(start, end, place))
                if not mapping.protection & 1:
                    hidden.append(runs[-1])
                self.bytes += end - start
                if not whole:
                    self.size += end - start
            if whole:
                self.size += mapping.size

    def places(self, pids: Iterable[int]) -> list[Range]:
        """The pages of these processes in the range, in order."""
        wanted = set(pids)
        return [(run.place, run.place + run.end - run.start)
                for pid, runs in self.runs.items() if pid in wanted for run in runs]  # fmt: skip


class Prepared:
    """Memory for the pages of processes that still run, so that the kernel assigns it before they stop, unless they are
    forked in place. The processes may change meanwhile."""

    def __init__(self, pids: Sequence[int], most: int, first: int, limit: int) -> None:
        """first: pid 1. limit: as of `capture`. TooLarge, TooMany, OSError."""
        layout = Layout({pid: address_space.mappings(pid) for pid in pids}, most)
        self.memory: Reserved | None = reserve(layout.size, layout.spaces)
        large = _large(layout, [pid for pid in pids if inventory.parent(pid) == first], first, limit)
        self._places = layout.places(pid for pid in pids if pid not in large)
        try:
            self.memory.favour_huge(layout.places(large))
            self.memory.fill(self._places)
        except OSError:
            self.close()
            raise

    def take(self, layout: Layout) -> Reserved | None:
        """The memory, for this layout; None if it does not fit. It is then released by the caller."""
        memory = self.memory
        if memory is None or memory.size < layout.size or memory.touches(layout.spaces):
            return None
        for start, end in address_space.without(self._places, layout.places(layout.runs)):
            memory.drop(start, end)
        self.memory = None
        return memory

    def close(self) -> None:
        """Release the memory if it was not used. Idempotent."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Pages:
    """The own pages of several processes in this process's memory. runs: by process outside. Use `read` while the
    processes are stopped, and then `complete`."""

    def __init__(self, spaces: Mapping[int, Sequence[address_space.Mapping]], most: int,
                 prepared: Prepared | None = None) -> None:
        """TooLarge, OSError, address_space.TooMany."""
        layout = Layout(spaces, most)
        self.runs, self._hidden, self.size, self.bytes = layout.runs, layout.hidden, layout.size, layout.bytes
        memory = prepared.take(layout) if prepared is not None else None
        self.memory = memory or reserve(layout.size, layout.spaces)
        if memory is None:
            self.memory.favour_huge(layout.places(layout.runs))
        self._spaces = spaces
        self._duplicates: dict[int, injected.Duplicate] = {}  # by original
        self._later: list[tuple[injected.Duplicate, Sequence[state.Run], Sequence[state.Run]]] = []

    def duplicate(self, process: ptrace.Injection) -> None:
        """Fork a stopped process in place, so that its pages are read later. Without effect where that is not possible,
        such as at a limit of processes."""
        with contextlib.suppress(OSError):
            self._duplicates[process.pid] = injected.Duplicate(process)

    def read(self, check: Callable[[], None]) -> None:
        """Copy the pages from the stopped processes: of those with a duplicate, only the ones that it does not have,
        such as after MADV_DONTFORK. check: called after each portion. OSError."""
        for pid, runs in self.runs.items():
            hidden = self._hidden[pid]
            if (one := self._duplicates.get(pid)) is not None:
                known = one.pages(self._spaces[pid])
                self._later.append((one, _inside_of(runs, known), _inside_of(hidden, known)))
                runs, hidden = _outside(runs, known), _outside(hidden, known)
            self._read_all(pid, runs, hidden, check)

    def complete(self, check: Callable[[], None]) -> None:
        """Copy the other pages, from the duplicates, which end. injected.Vanished, OSError."""
        try:
            for one, runs, hidden in self._later:
                try:
                    self._read_all(one.pid, runs, hidden, check)
                finally:
                    one.check()  # the cause of a failure
                one.end()
        finally:
            self.let_go()

    @property
    def is_complete(self) -> bool:
        return not self._duplicates

    def let_go(self) -> None:
        """End the duplicates. Idempotent."""
        self._later.clear()
        while self._duplicates:
            self._duplicates.popitem()[1].end()

    def _read_all(self, pid: int, runs: Sequence[state.Run], hidden: Sequence[state.Run],
                  check: Callable[[], None]) -> None:
        """hidden: of the runs, those that the process itself cannot read."""
        without = set(hidden)
        for batch in _batches([part for run in runs if run not in without for part in _parts(run)]):
            self._read(pid, batch)
            check()
        self._read_hidden(pid, [part for run in hidden for part in _parts(run)])
        check()

    def _read(self, pid: int, runs: Sequence[state.Run]) -> None:
        base = self.memory.address
        ours = b"".join(struct.pack("=QQ", base + run.place, run.end - run.start) for run in runs)
        theirs = b"".join(struct.pack("=QQ", run.start, run.end - run.start) for run in runs)
        left = sum(run.end - run.start for run in runs)
        got = int(_readv(ctypes.c_int(pid), ours, ctypes.c_ulong(len(runs)), theirs, ctypes.c_ulong(len(runs)),
                         ctypes.c_ulong(0)))  # fmt: skip
        if got != left:
            if len(runs) == 1:
                raise OSError(14, f"memory of a process cannot be read ({got} of {left} bytes)")
            for run in runs:
                self._read(pid, [run])

    def _read_hidden(self, pid: int, runs: Sequence[state.Run]) -> None:
        """Pages of mappings without permission to read."""
        if not runs:
            return
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for run in runs:
                length = run.end - run.start
                if os.preadv(fd, [self.memory.view(run.place, length)], run.start) != length:
                    raise OSError(14, "memory of a process cannot be read")
        finally:
            os.close(fd)

    def close(self) -> None:
        """End the duplicates, and release the memory."""
        self.let_go()
        self.memory.close()


def _outside(runs: Sequence[state.Run], pages: Sequence[Range]) -> list[state.Run]:
    """The parts of sorted runs that lie in none of these sorted ranges."""
    return _at(runs, address_space.without([(run.start, run.end) for run in runs], pages))


def _inside_of(runs: Sequence[state.Run], pages: Sequence[Range]) -> list[state.Run]:
    """The parts of sorted runs that lie in these sorted ranges."""
    left = [(run.start, run.end) for run in _outside(runs, pages)]
    return _at(runs, address_space.without([(run.start, run.end) for run in runs], left))


def _at(runs: Sequence[state.Run], parts: Sequence[Range]) -> list[state.Run]:
    """Parts of sorted runs, as runs."""
    found, index = list[state.Run](), 0
    for start, end in parts:
        while runs[index].end <= start:
            index += 1
        found.append(state.Run(start, end, runs[index].place + start - runs[index].start))
    return found


def _parts(run: state.Run) -> Iterator[state.Run]:
    """Portions of a run: one call of the kernel copies at most 2 GiB."""
    for start in range(run.start, run.end, _PORTION):
        yield state.Run(start, min(run.end, start + _PORTION), run.place + start - run.start)


def _batches(runs: Sequence[state.Run]) -> Iterator[list[state.Run]]:
    """Runs that are read by one call."""
    batch, size = list[state.Run](), 0
    for run in runs:
        if batch and (len(batch) >= _BATCH or size + run.end - run.start > _PORTION):
            yield batch
            batch, size = [], 0
        batch.append(run)
        size += run.end - run.start
    if batch:
        yield batch


class Reserved:
    """Private memory at an address that no process of a tree uses; before it a room for the table of system calls."""

    ROOM = 1 << 26

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size

    @property
    def room(self) -> int:
        """The address of `ROOM` bytes for the table and its data; behind it as many stay free."""
        return self.address - 2 * self.ROOM

    def favour_huge(self, places: Sequence[Range]) -> None:
        """Allow huge pages where these fill them: elsewhere, one page would take the memory of 512."""
        for start, end in places:
            first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
            if first < last:
                with contextlib.suppress(OSError):  # a kernel without them
                    advise(self.address + first, last - first, _HUGEPAGE)

    def fill(self, places: Sequence[Range]) -> None:
        """Have the kernel assign memory to these pages. OSError."""
        self.favour_huge(places)
        for start, end in places:
            advise(self.address + start, end - start, _POPULATE_WRITE)

    def keep_shared(self) -> None:
        """From now on, no huge pages are made: in a copy they would replace pages that it shares."""
        with contextlib.suppress(OSError):
            advise(self.address, self.size, _NOHUGEPAGE)

    def drop(self, start: int, end: int) -> None:
        """Release pages. OSError."""
        advise(self.address + start, end - start, mmap.MADV_DONTNEED)

    def touches(self, spaces: Sequence[Range]) -> bool:
        """Whether one of these ranges has addresses of the memory or of the room."""
        first, last = self.room - PAGE, self.address + self.size + PAGE
        return any(start < last and end > first for start, end in spaces)

    def view(self, place: int, length: int) -> memoryview:
        return memoryview((ctypes.c_char * length).from_address(self.address + place)).cast("B")

    def close(self) -> None:
        _unmap(self.address, self.size)


def reserve(size: int, taken: Sequence[Range]) -> Reserved:
    """Reserve memory and a room, away from these ranges and from all of this process. TooMany, OSError."""
    own = [(one.start, one.end) for one in address_space.mappings(os.getpid())]
    size = max(PAGE, size)
    start = address_space.free_range(size + 2 * Reserved.ROOM + HUGE, [*own, *taken])
    address = -(-(start + 2 * Reserved.ROOM) // HUGE) * HUGE
    map_fixed(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
    memory = Reserved(address, size)
    memory.keep_shared()  # except where `favour_huge` allows them
    return memory


_FIXED_NOREPLACE, _NORESERVE = 0x100000, 0x4000


def map_fixed(address: int, size: int, protection: int) -> None:
    """Map anonymous private memory at an unused address. OSError."""
    _libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE | _NORESERVE
    found = _libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0))
    if found != address:
        raise OSError(ctypes.get_errno() or 12, f"{size} bytes of memory cannot be reserved")


def advise(address: int, size: int, advice: int) -> None:
    """Call madvise for memory of this process. OSError."""
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) < 0:
        raise OSError(ctypes.get_errno(), "madvise failed")


def _unmap(address: int, size: int) -> None:
    _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
