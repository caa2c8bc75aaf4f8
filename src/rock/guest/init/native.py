"""Starting a program without copying ourselves: a child that shares our memory and only makes system calls.

A fork of a Python process copies its page tables, and each page that either side touches afterwards: 1.9 ms measured.
This child is a clone with CLONE_VM and a stack of its own that runs a few instructions over a table of prepared system
calls, ending in execve: 0.45 ms. It runs no Python and touches none of our memory but its table. It is no vfork: we go
on meanwhile, so a program that stops the child cannot stop us.

Only for x86_64; elsewhere, and where memory cannot be made executable, `available` is False and programs are forked.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable

CALL = (  # the system call of the row that r12 points to, from its number and six arguments; its result is in rax
    "498b0424"          # mov rax,[r12]
    "498b7c2408"        # mov rdi,[r12+0x8]
    "498b742410"        # mov rsi,[r12+0x10]
    "498b542418"        # mov rdx,[r12+0x18]
    "4d8b542420"        # mov r10,[r12+0x20]
    "4d8b442428"        # mov r8,[r12+0x28]
    "4d8b4c2430"        # mov r9,[r12+0x30]
    "0f05"              # syscall
)
_CODE = bytes.fromhex(
    "4154"              # push r12
    "4155"              # push r13
    "4989fc"            # mov r12,rdi
    "b80e000000"        # mov eax,0xe
    "bf02000000"        # mov edi,0x2
    "498d742418"        # lea rsi,[r12+0x18]
    "498d542420"        # lea rdx,[r12+0x20]
    "41ba08000000"      # mov r10d,0x8
    "0f05"              # syscall
    "498b3c24"          # mov rdi,[r12]
    "498b742408"        # mov rsi,[r12+0x8]
    "31d2"              # xor edx,edx
    "4531d2"            # xor r10d,r10d
    "4531c0"            # xor r8d,r8d
    "b838000000"        # mov eax,0x38
    "0f05"              # syscall
    "4885c0"            # test rax,rax
    "7424"              # je child
    "4989c5"            # mov r13,rax
    "b80e000000"        # mov eax,0xe
    "bf02000000"        # mov edi,0x2
    "498d742420"        # lea rsi,[r12+0x20]
    "31d2"              # xor edx,edx
    "41ba08000000"      # mov r10d,0x8
    "0f05"              # syscall
    "4c89e8"            # mov rax,r13
    "415d"              # pop r13
    "415c"              # pop r12
    "c3"                # ret
    "4d8b6c2410"        # child: mov r13,[r12+0x10]
    "4983c428"          # add r12,0x28
    + CALL +            # row:
    "4989442438"        # mov [r12+0x38],rax
    "4885c0"            # test rax,rax
    "7809"              # js end
    "4983c440"          # add r12,0x40
    "49ffcd"            # dec r13
    "75c9"              # jne row
    "bf7f000000"        # end: mov edi,0x7f
    "b8e7000000"        # mov eax,0xe7
    "0f05"              # syscall
)
_CLONE_VM_SIGCHLD = 0x00000100 | 17
_STACK = 4096
_SIGACTION, _SIGPROCMASK, _IOCTL, _DUP2, _SETSID, _PRCTL = 13, 14, 16, 33, 112, 157
_SETGROUPS, _SETRESUID, _SETRESGID, _PRLIMIT, _CHDIR, _EXECVE = 116, 117, 119, 302, 80, 59
_SETMASK, _TIOCSCTTY, _PR_SET_CHILD_SUBREAPER, _RLIMIT_NOFILE = 2, 0x540E, 36, 7
_UNWRITTEN = 1 << 40
_ALL_SIGNALS = (1 << 64) - 1
_HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)
_HEAD = 40  # bytes: flags, stack, number of rows, signals to block, room for the old ones
_ROW = 64  # bytes: number, six arguments, result


class Table:
    """The child's system calls, in order, and the memory that they point to; to be kept until the child has exec'ed."""

    def __init__(self) -> None:
        self._kept: list[object] = []
        self._rows: list[tuple[int, ...]] = []
        self._zeros = ctypes.create_string_buffer(64)
        self._memory: ctypes.Array[ctypes.c_char] | None = None

    def _call(self, number: int, *arguments: int) -> None:
        self._rows.append((number, *arguments, *([0] * (6 - len(arguments))), _UNWRITTEN))

    def _point(self, data: bytes) -> int:
        buffer = ctypes.create_string_buffer(data, len(data) + 1)
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def _strings(self, items: list[bytes]) -> int:
        addresses = [self._point(item) for item in items]
        return self._point(struct.pack(f"{len(addresses) + 1}Q", *addresses, 0))

    def session(self, terminal: int | None) -> None:
        """A session of its own, heir of its orphans; with a terminal as the controlling one."""
        for number in _HANDLED:
            self._call(_SIGACTION, number, ctypes.addressof(self._zeros), 0, 8)
        self._call(_SETSID)
        self._call(_PRCTL, _PR_SET_CHILD_SUBREAPER, 1)
        if terminal is not None:
            self._call(_IOCTL, terminal, _TIOCSCTTY, 0)

    def descriptors(self, theirs: dict[int, int]) -> None:
        for number, fd in theirs.items():
            self._call(_DUP2, fd, number)

    def files(self, soft: int, hard: int) -> None:
        limit = [value if value >= 0 else (1 << 64) - 1 for value in (soft, hard)]
        self._call(_PRLIMIT, 0, _RLIMIT_NOFILE, self._point(struct.pack("QQ", *limit)), 0)

    def user(self, uid: int, gid: int, groups: list[int] | None) -> None:
        if groups is not None:
            self._call(_SETGROUPS, len(groups), self._point(struct.pack(f"{len(groups)}I", *groups)))
        self._call(_SETRESGID, gid, gid, gid)
        self._call(_SETRESUID, uid, uid, uid)

    def folder(self, path: str) -> None:
        self._call(_CHDIR, self._point(os.fsencode(path)))

    def execute(self, path: str, argv: list[bytes], env: dict[bytes, bytes]) -> None:
        self._call(_SIGPROCMASK, _SETMASK, ctypes.addressof(self._zeros), 0, 8)
        words = self._strings(argv)
        variables = self._strings([key + b"=" + value for key, value in env.items()])
        self._call(_EXECVE, self._point(os.fsencode(path)), words, variables)

    def run(self) -> int:
        """Start the child; answers its pid. OSError when there can be no further process."""
        assert _function is not None
        size = _HEAD + _ROW * len(self._rows)
        self._memory = ctypes.create_string_buffer(size + _STACK + 16)
        base = ctypes.addressof(self._memory)
        stack = (base + size + _STACK) & ~15
        head = struct.pack("QQQQQ", _CLONE_VM_SIGCHLD, stack, len(self._rows), _ALL_SIGNALS, 0)
        ctypes.memmove(base, head + b"".join(struct.pack("8Q", *row) for row in self._rows), size)
        pid = int(_function(base))  # signals are blocked meanwhile: the child must not handle one on our memory
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def failed(self) -> bool:
        """After the child's end or exec: whether a call failed, or was never made."""
        assert self._memory is not None
        last = len(self._rows) - 1  # execve writes no result when it goes well
        before: int = struct.unpack_from("q", self._memory, _HEAD + _ROW * (last - 1) + 56)[0]
        return before != 0 or bool(struct.unpack_from("q", self._memory, _HEAD + _ROW * last + 56)[0] != _UNWRITTEN)


def load(code: bytes) -> Callable[[int], int] | None:
    """A function of these instructions, in memory that may be executed and not written; None where that cannot be."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    libc = ctypes.PyDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.mmap(None, 4096, 3, 0x22, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    ctypes.memmove(address, code, len(code))
    if libc.mprotect(address, 4096, 5) != 0:
        return None
    function: Callable[[int], int] = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)
    return function


_function = load(_CODE)
available = _function is not None
