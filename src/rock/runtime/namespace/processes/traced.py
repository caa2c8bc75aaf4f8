"""A process or thread that is traced and executes tables of system calls, in a room at addresses that it does not use.

    room   the loop | the rows: number, six arguments, result | data that the rows point to

Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time

from rock.runtime.namespace.launcher import ptrace
from rock.runtime.namespace.processes import capture
from rock.runtime.namespace.processes.address_space import PAGE
from rock.runtime.namespace.processes.capture import NUMBERS, Reserved
from rock.runtime.namespace.processes.injected import LOOP, ROW
from rock.runtime.namespace.processes.starting import Failed

_UNWRITTEN = 1 << 40
PRSTATUS, XSTATE = 1, 0x202
_CONT, _SINGLESTEP, _DETACH, _SEIZE, _INTERRUPT, _GETEVENTMSG = 7, 9, 17, 0x4206, 0x4207, 0x4201
_SETREGSET, _SETSIGMASK = 0x4205, 0x420B
_EXITKILL, _TRACECLONE, _EVENT_CLONE = 0x100000, 8, 3
_R13, _R12, RAX, _RSI, _RDI, ORIG_RAX, RIP = 2, 3, 10, 13, 14, 15, 16
WORD = (1 << 64) - 1
_ALL_BLOCKED = struct.pack("=Q", WORD & ~(1 << (signal.SIGTRAP - 1)))
_WALL = 0x40000000
_PATIENCE = 20.0  # seconds
_CHUNK = 1 << 20


def prepare_room(memory: Reserved) -> None:
    """Map the room in this process, whose copies then have it. OSError."""
    capture.map_fixed(memory.room, Reserved.ROOM, 3)
    ctypes.memmove(memory.room, LOOP, len(LOOP))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(memory.room), ctypes.c_size_t(PAGE), 5) < 0:
        raise OSError(ctypes.get_errno(), "the room cannot be made executable")


def write(memory: int, data: bytes | memoryview, address: int) -> None:
    """Write into the memory of a process, by its descriptor. OSError; Failed when the process has ended."""
    view = memoryview(data)
    while view:
        count = os.pwrite(memory, view[:_CHUNK], address)
        if not count:  # of a process without memory, which is no error of the kernel
            raise Failed("a process ended while it was rebuilt")
        view, address = view[count:], address + count


class Table:
    """System calls, and the data that they point to, for the room at an address. It does not change once it is written.
    """

    def __init__(self, room: int) -> None:
        self.rows: list[tuple[str, tuple[int, ...]]] = []
        self._room = room
        self._data = bytearray()
        self._packed = b""  # once it was written

    def call(self, name: str, *arguments: int) -> None:
        self.rows.append((name, arguments))

    def put(self, data: bytes) -> int:
        """Store data; returns its address."""
        place = len(self._data)
        self._data += data + bytes(-len(data) % 8)
        if len(self._data) > Reserved.ROOM // 2:
            raise Failed("a process has too much state")
        return self._room + Reserved.ROOM // 2 + place

    def path(self, path: str) -> int:
        return self.put(os.fsencode(path) + b"\0")

    def write(self, memory: int) -> None:
        """Write the table into the memory of a process, by its descriptor."""
        packed = self._packed or b"".join(
            struct.pack("=8Q", NUMBERS[name], *(value & WORD for value in _six(arguments)), _UNWRITTEN)
            for name, arguments in self.rows)  # fmt: skip
        if len(packed) > Reserved.ROOM // 2 - PAGE:
            raise Failed("a process has too many mappings")
        self._packed = packed
        write(memory, packed, self._room + PAGE)
        write(memory, bytes(self._data), self._room + Reserved.ROOM // 2)

    def results(self, memory: int) -> list[int]:
        data = os.pread(memory, ROW * len(self.rows), self._room + PAGE)
        if len(data) != ROW * len(self.rows):
            raise Failed("a process ended while it was rebuilt")
        return [found[7] for found in struct.iter_unpack("=8q", data)]


def _six(arguments: tuple[int, ...]) -> tuple[int, ...]:
    return (*arguments, *([0] * (6 - len(arguments))))


class Traced:
    """A stopped process or thread. memory: the descriptor of its memory."""

    def __init__(self, tid: int, memory: int = -1) -> None:
        """memory: of a thread, which the kernel traces from its start; a process is traced from now on. OSError,
        Failed."""
        self.tid = tid
        self.memory = memory
        self.cloned = 0  # the thread that the last table has started, outside
        self._table: Table | None = None  # in execution
        if memory < 0:
            ptrace.call(_SEIZE, tid, 0, _EXITKILL | _TRACECLONE)
            ptrace.call(_INTERRUPT, tid)
        self._wait()
        self.block(_ALL_BLOCKED)
        if memory < 0:
            self.memory = os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._registers = capture.register_set(tid, PRSTATUS)

    def execute(self, table: Table, room: int) -> list[int]:
        """Execute a table; returns the results. Failed."""
        self.begin(table, room)
        return self.end()

    def begin(self, table: Table, room: int) -> None:
        """Begin to execute a table. Failed."""
        table.write(self.memory)
        self._set({RIP: room, _R12: room + PAGE, _R13: len(table.rows), ORIG_RAX: WORD})
        self._table = table
        ptrace.call(_CONT, self.tid)

    def end(self) -> list[int]:
        """Wait until the table is executed; returns the results. Failed."""
        table, self._table = self._table, None
        assert table is not None
        status = self._wait()
        if status >> 8 == signal.SIGTRAP | _EVENT_CLONE << 8:
            message = ctypes.c_ulong()
            ptrace.call(_GETEVENTMSG, self.tid, 0, ctypes.addressof(message))
            self.cloned = message.value
            ptrace.call(_CONT, self.tid)
            status = self._wait()
        results = table.results(self.memory)
        for (name, arguments), result in zip(table.rows, results, strict=True):
            if -4096 < result < 0:
                raise Failed(f"{name}{tuple(hex(value) for value in arguments)}: {os.strerror(-result)}")
        if os.WSTOPSIG(status) != signal.SIGTRAP or _UNWRITTEN in results:
            raise Failed(f"it was stopped by signal {os.WSTOPSIG(status)}")
        return results

    def unmap(self, instruction: int, address: int, size: int) -> None:
        """Unmap memory, the room itself too. instruction: the address of a system call instruction. Failed."""
        self._set({RIP: instruction, RAX: NUMBERS["munmap"], _RDI: address, _RSI: size, ORIG_RAX: WORD})
        ptrace.call(_SINGLESTEP, self.tid)
        self._wait()
        if struct.unpack("=27Q", capture.register_set(self.tid, PRSTATUS))[RAX]:
            raise Failed("the room cannot be released")

    def _set(self, changes: dict[int, int]) -> None:
        values = list(struct.unpack("=27Q", self._registers))
        for place, value in changes.items():
            values[place] = value
        self.set(PRSTATUS, struct.pack("=27Q", *values))

    def set(self, kind: int, data: bytes) -> None:
        """Set a set of registers. OSError for values that the kernel does not accept."""
        buffer = ctypes.create_string_buffer(data, len(data))
        vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), len(data)), 16)
        ptrace.call(_SETREGSET, self.tid, kind, ctypes.addressof(vector))

    def block(self, mask: bytes) -> None:
        """Set the mask of blocked signals."""
        buffer = ctypes.create_string_buffer(mask, len(mask))
        ptrace.call(_SETSIGMASK, self.tid, 8, ctypes.addressof(buffer))

    def _wait(self) -> int:
        """The status of its next stop. Failed when it ended, or does not stop in time."""
        end, pause = time.monotonic() + _PATIENCE, 0.0
        while True:
            found, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
            if found:
                if not os.WIFSTOPPED(status):
                    raise Failed("a process ended while it was rebuilt")
                return status
            if time.monotonic() > end:
                raise Failed("a process does not stop")
            time.sleep(pause)
            pause = min(pause + 0.00002, 0.001)

    def detach(self) -> None:
        """Let it continue. OSError when it was killed."""
        ptrace.call(_DETACH, self.tid)
