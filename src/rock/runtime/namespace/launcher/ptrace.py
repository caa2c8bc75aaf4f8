"""Stops all threads of a sandbox from outside, and has a stopped process execute single system calls.

The caller is the processes' tracer until `release`. When the caller dies, the kernel detaches it and the processes
continue. x86_64 only. Standard library only.

Everything that is read of a process may be hostile: registers and memory are only saved, and written back as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import time
from collections.abc import Sequence

from rock.runtime.namespace.launcher.process_files import content

SUPPORTED = platform.machine() == "x86_64"

_CONT, _SINGLESTEP, _DETACH = 7, 9, 17
_GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT = 0x4204, 0x4205, 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_SETOPTIONS, _GETEVENTMSG, _TRACECLONE, _EVENT_CLONE = 0x4200, 0x4201, 8, 3
_PRSTATUS = 1
_REGISTERS = 27 * 8
_RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _RSP = 10, 12, 13, 14, 15, 16, 19
_R8, _R9, _R10, _R12, _R13 = 9, 8, 7, 3, 2
_GENERAL = 15  # registers, which come first
_CLONE = 56
_NO_STACK = 8  # an address that is never mapped
_WALL = 0x40000000
_EVENT_STOP = 128
_SYSCALL = b"\x0f\x05"
_PAGE = 4096
# All signals but SIGTRAP: when a single step finds that blocked, the kernel resets its handler.
_BLOCKED = struct.pack("=Q", ~(1 << (signal.SIGTRAP - 1)) & (1 << 64) - 1)
_LONGEST = 4096  # bytes of an argument in memory
_MOST_THREADS = 4096
_MOST_STEPS = 100
_PATIENCE = 2.0  # seconds for one system call

_offset: list[int] = []  # of the system call instruction in the vDSO: the same in each process
_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class NotStopped(Exception):
    """Some processes could not be stopped in time, or there are too many."""


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def call(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    result = int(_ptrace(request, tid, address, data))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")
    return result


class Stopped:
    """All threads of some processes, stopped one process after the other."""

    def __init__(self) -> None:
        self._threads: dict[int, int] = {}  # thread -> its process
        self._pending: dict[int, list[int]] = {}  # thread -> signals that it has to get when it continues
        self.halted: set[int] = set()  # processes that a signal such as SIGSTOP had stopped before

    @property
    def pids(self) -> list[int]:
        """The stopped processes, in the order in which they were found."""
        return list(dict.fromkeys(self._threads.values()))

    def seize(self, pids: Sequence[int], end: float) -> int:
        """Stop the threads of these processes that are not stopped yet; returns their number. A process that ends
        meanwhile is omitted. NotStopped, OSError."""
        fresh = []
        for pid in pids:
            for tid in _threads(pid):
                if tid in self._threads:
                    continue
                if len(self._threads) >= _MOST_THREADS:
                    raise NotStopped(f"more than {_MOST_THREADS} threads")
                try:
                    call(_SEIZE, tid)
                except OSError as error:
                    if error.errno == errno.ESRCH or _is_dead(pid, tid):
                        continue
                    raise
                self._threads[tid] = pid
                with contextlib.suppress(OSError):
                    call(_INTERRUPT, tid)
                fresh.append(tid)
        for tid in fresh:
            self._await_stop(tid, end)
        return len(fresh)

    def _await_stop(self, tid: int, end: float) -> None:
        pause = 0.0
        while True:
            try:
                found, status = os.waitpid(tid, _WALL | os.WNOHANG)
            except ChildProcessError:
                self._threads.pop(tid, None)
                return
            if found:
                if os.WIFSTOPPED(status):
                    self._note(tid, status)
                else:  # it ended
                    self._threads.pop(tid, None)
                return
            if time.monotonic() > end:
                raise NotStopped(f"process {self._threads[tid]} does not stop")
            time.sleep(pause)
            pause = min(pause + 0.00005, 0.001)

    def _note(self, tid: int, status: int) -> None:
        """Record a signal that the thread was about to receive."""
        number = os.WSTOPSIG(status)
        if status >> 16 != _EVENT_STOP and number != signal.SIGTRAP:
            self._pending.setdefault(tid, []).append(number)
        elif status >> 16 == _EVENT_STOP and number != signal.SIGTRAP:
            self.halted.add(self._threads[tid])

    @property
    def interrupted(self) -> set[int]:
        """The processes that were about to receive a signal."""
        return {self._threads[tid] for tid in self._pending if tid in self._threads}

    def release(self) -> None:
        """Let all threads continue, children first. Idempotent."""
        threads, self._threads = self._threads, {}
        for tid in reversed(threads):
            signals = self._pending.pop(tid, [])
            with contextlib.suppress(OSError):
                call(_DETACH, tid, 0, signals[0] if signals else 0)
            for number in signals[1:]:
                with contextlib.suppress(OSError):
                    os.kill(tid, number)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _is_dead(pid: int, tid: int) -> bool:
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


class Injection:
    """System calls in the main thread of a stopped process. Use as a context; its state is then as before.

    OSError when that is not possible: no memory or no system call instruction is found.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._memory = -1

    def __enter__(self) -> Injection:
        saved = ctypes.create_string_buffer(_REGISTERS)
        vector = _Vector(ctypes.addressof(saved), _REGISTERS)
        call(_GETREGSET, self.pid, _PRSTATUS, ctypes.addressof(vector))
        if vector.length != _REGISTERS:
            raise OSError(errno.ENOTSUP, "it is not a 64-bit program")
        self._saved = bytes(saved.raw)
        mask = ctypes.create_string_buffer(8)
        call(_GETSIGMASK, self.pid, 8, ctypes.addressof(mask))
        self._mask = bytes(mask.raw)
        instruction, self._room = _places(self.pid)
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._instruction = self._find(*instruction)
            self._old = os.pread(self._memory, _LONGEST, self._room)
            self._set_mask(_BLOCKED)
        except BaseException:
            os.close(self._memory)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.pwrite(self._memory, self._old, self._room)
            self._set_registers(self._saved)
            self._set_mask(self._mask)
        finally:
            os.close(self._memory)

    def _find(self, start: int, end: int) -> int:
        if _offset and os.pread(self._memory, 2, start + _offset[0]) == _SYSCALL:
            return start + _offset[0]
        at = os.pread(self._memory, end - start, start).find(_SYSCALL)
        if at < 0:
            raise OSError(errno.ENOTSUP, "its vDSO has no system call instruction")
        _offset[:] = [at]
        return start + at

    @staticmethod
    def _wait(pid: int) -> int:
        """The status of the next stop. A process that does not come to one is killed: it cannot be restored."""
        end, pause = time.monotonic() + _PATIENCE, 0.0
        while True:
            found, status = os.waitpid(pid, _WALL | os.WNOHANG)
            if found:
                return status
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise OSError(errno.ETIMEDOUT, "a system call takes too long")
            time.sleep(pause)
            pause = min(pause + 0.00002, 0.001)

    def _set_registers(self, data: bytes, pid: int = 0) -> None:
        vector = _Vector(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data))
        call(_SETREGSET, pid or self.pid, _PRSTATUS, ctypes.addressof(vector))

    def _set_mask(self, mask: bytes) -> None:
        call(_SETSIGMASK, self.pid, 8, ctypes.cast(ctypes.c_char_p(mask), ctypes.c_void_p).value or 0)

    def text(self, value: bytes) -> int:
        """Put a string into its memory for the next call; returns the address. OSError for a too long one."""
        data = value + b"\0"
        if len(data) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, "the path is too long")
        if os.pwrite(self._memory, data, self._room) != len(data):
            raise OSError(errno.EFAULT, "its memory cannot be written")
        return self._room

    def put(self, data: bytes) -> int:
        """Put data into its memory for the next call; returns the address. OSError."""
        if len(data) > _LONGEST or os.pwrite(self._memory, data, self._room) != len(data):
            raise OSError(errno.EFAULT, "its memory cannot be written")
        return self._room

    def fetch(self, length: int) -> bytes:
        """The data that the last call left at the address of `put`. OSError."""
        data = os.pread(self._memory, length, self._room)
        if len(data) != length:
            raise OSError(errno.EFAULT, "its memory cannot be read")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write into its memory. OSError."""
        if os.pwrite(self._memory, data, address) != len(data):
            raise OSError(errno.EFAULT, "its memory cannot be written")

    def read(self, address: int, length: int) -> bytes:
        """Read its memory. OSError."""
        data = os.pread(self._memory, length, address)
        if len(data) != length:
            raise OSError(errno.EFAULT, "its memory cannot be read")
        return data

    def execute(self, code: int, rows: int, count: int) -> None:
        """Execute code in its memory, with these values in r12 and r13, up to a breakpoint. OSError."""
        values = list(struct.unpack("=27Q", self._saved))
        values[_RIP], values[_R12], values[_R13], values[_ORIG_RAX] = code, rows, count, (1 << 64) - 1
        self._set_registers(struct.pack("=27Q", *values))
        call(_CONT, self.pid)
        status = self._wait(self.pid)
        if not os.WIFSTOPPED(status):
            raise OSError(errno.ESRCH, "it ended meanwhile")
        if os.WSTOPSIG(status) != signal.SIGTRAP or status >> 16:
            raise OSError(errno.EAGAIN, f"it was stopped by signal {os.WSTOPSIG(status)}")

    @property
    def registers(self) -> bytes:
        """Its registers before the first call."""
        return self._saved

    @property
    def blocked(self) -> bytes:
        """Its signal mask before the first call."""
        return self._mask

    def call(self, number: int, *arguments: int) -> int:
        """Execute a system call; returns its result. OSError with its errno."""
        self._prepare(number, *arguments)
        return self._result(self.pid)

    def clone(self, flags: int) -> int:
        """Clone the process, with these flags and its own copy of the memory; returns the number of the new process. It
        is traced by the caller, and about to stop. It has no stack and no values in its registers, and blocks all
        signals that a process can block: if it continued, it would be killed by a fault. OSError."""
        os.pwrite(self._memory, self._old, self._room)  # the copy has what was there before
        call(_SETOPTIONS, self.pid, 0, _TRACECLONE)
        made: list[int] = []
        try:
            self._prepare(_CLONE, flags, _NO_STACK, 0, 0, 0, clear=True)
            self._result(self.pid, made)
        except OSError:
            for pid in made:  # the original was killed
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, _WALL)
            raise
        finally:
            with contextlib.suppress(OSError):
                call(_SETOPTIONS, self.pid, 0, 0)
        if not made:
            raise OSError(errno.ENOSYS, "the kernel does not trace a new process")
        return made[0]

    def step(self, pid: int, number: int, *arguments: int) -> int:
        """Execute a system call without data in a process of `clone`; returns its result. OSError."""
        self._prepare(number, *arguments, clear=True, pid=pid)
        return self._result(pid)

    def _prepare(self, number: int, *arguments: int, clear: bool = False, pid: int = 0) -> None:
        """Set the registers for a call. clear: no other register has a value that leads to memory."""
        values = list(struct.unpack("=27Q", self._saved))
        if clear:
            values[:_GENERAL] = [0] * _GENERAL
        values[_RIP], values[_RAX], values[_ORIG_RAX] = self._instruction, number, (1 << 64) - 1
        for place, value in zip((_RDI, _RSI, _RDX, _R10, _R8, _R9), arguments, strict=False):
            values[place] = value & (1 << 64) - 1
        if pid:
            values[_RSP] = _NO_STACK
        self._set_registers(struct.pack("=27Q", *values), pid)

    def _result(self, pid: int, made: list[int] | None = None) -> int:
        """The result of the call that is prepared. made: receives the number of a process that it creates. OSError."""
        for _ in range(_MOST_STEPS):
            call(_SINGLESTEP, pid)
            status = self._wait(pid)
            if not os.WIFSTOPPED(status):
                raise OSError(errno.ESRCH, "it ended meanwhile")
            if made is not None and status >> 8 == signal.SIGTRAP | _EVENT_CLONE << 8:
                message = ctypes.c_ulong()
                call(_GETEVENTMSG, pid, 0, ctypes.addressof(message))
                made.append(message.value)
                continue
            after = ctypes.create_string_buffer(_REGISTERS)
            vector = _Vector(ctypes.addressof(after), _REGISTERS)
            call(_GETREGSET, pid, _PRSTATUS, ctypes.addressof(vector))
            found = struct.unpack("=27Q", after.raw)
            if found[_RIP] != self._instruction:
                break
        else:
            raise OSError(errno.EAGAIN, "it is stopped again and again")
        result = found[_RAX]
        if result >= (1 << 64) - 4095:
            failed = (1 << 64) - result
            raise OSError(failed, os.strerror(failed))
        return int(result)


def _places(pid: int) -> tuple[tuple[int, int], int]:
    """The vDSO, and the address of a page of its stack for arguments."""
    code, room = None, 0
    lines = content(f"/proc/{pid}/maps").split(b"\n")
    named = [line for line in lines if line.endswith((b"[vdso]", b"[stack]"))]
    for chosen in (named, lines):
        for line in () if code and room else chosen:
            fields = line.split(None, 5)
            start, end = (int(part, 16) for part in fields[0].split(b"-")) if fields else (0, 0)
            name = fields[5] if len(fields) > 5 else b""
            if name == b"[vdso]":
                code = start, end
            elif fields and fields[1].startswith(b"rw-p") and (name == b"[stack]" or not room):
                room = end - _PAGE
    if code is None or not room:
        raise OSError(errno.ENOTSUP, "it has no vDSO, or no stack")
    return code, room
