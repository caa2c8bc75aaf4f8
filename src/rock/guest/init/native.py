"""The compiled functions, and the start of a program by one of them: a child that shares the parent's memory.

A fork of a Python process copies its page tables, and each page that either side touches afterwards: 1.9 ms measured.
`Table` instead prepares the system calls of a child, ending in execve; compiled code executes them in a child created
by clone(CLONE_VM) with a stack of its own: 0.45 ms. The child runs no Python. Unlike with vfork the parent continues
meanwhile, so a program that stops the child cannot stop pid 1.

The functions are C (folder `native/` of the repository), built as an optional shared library next to this file for
x86_64 and aarch64. Where it is missing or cannot be loaded, `library` is None, `missing` holds the reason, and all
starts use fork. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

NAME = "librocknative.so"
_VERSION = 3  # rock_native_version in native/program.c: an editable installation may have an older library
_NUMBERS = {
    "x86_64": {"rt_sigaction": 13, "rt_sigprocmask": 14, "ioctl": 16, "dup3": 292, "setsid": 112, "prctl": 157,
               "setgroups": 116, "setresuid": 117, "setresgid": 119, "prlimit64": 302, "chdir": 80, "execve": 59},
    "aarch64": {"rt_sigaction": 134, "rt_sigprocmask": 135, "ioctl": 29, "dup3": 24, "setsid": 157, "prctl": 167,
                "setgroups": 159, "setresuid": 147, "setresgid": 149, "prlimit64": 261, "chdir": 49, "execve": 221},
}
_NUMBER = _NUMBERS.get(platform.machine(), {})
MACHINES = frozenset(_NUMBERS)  # supported architectures of the library
SETMASK, _TIOCSCTTY, PR_SET_CHILD_SUBREAPER, _RLIMIT_NOFILE = 2, 0x540E, 36, 7
_STACK = 4096
_UNWRITTEN = 1 << 40
HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)
_ROW = 64  # bytes, struct call in native/syscall.h: number, six arguments, result


class Table:
    """The child's system calls, in order, and the memory that they use; must live until the child has called exec."""

    def __init__(self) -> None:
        self._kept: list[object] = []
        self._rows: list[tuple[int, ...]] = []
        self._zeros = ctypes.create_string_buffer(64)
        self._memory: ctypes.Array[ctypes.c_char] | None = None

    def _call(self, name: str, *arguments: int) -> None:
        self._rows.append((_NUMBER[name], *arguments, *([0] * (6 - len(arguments))), _UNWRITTEN))

    def _point(self, data: bytes) -> int:
        buffer = ctypes.create_string_buffer(data, len(data) + 1)
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def _strings(self, items: list[bytes]) -> int:
        addresses = [self._point(item) for item in items]
        return self._point(struct.pack(f"{len(addresses) + 1}Q", *addresses, 0))

    def session(self, terminal: int | None) -> None:
        """Create a session and become a subreaper; with a terminal as the controlling one."""
        for number in HANDLED:
            self._call("rt_sigaction", number, ctypes.addressof(self._zeros), 0, 8)
        self._call("setsid")
        self._call("prctl", PR_SET_CHILD_SUBREAPER, 1)
        if terminal is not None:
            self._call("ioctl", terminal, _TIOCSCTTY, 0)

    def descriptors(self, theirs: dict[int, int]) -> None:
        for number, fd in theirs.items():
            self._call("dup3", fd, number, 0)

    def files(self, soft: int, hard: int) -> None:
        limit = [value if value >= 0 else (1 << 64) - 1 for value in (soft, hard)]
        self._call("prlimit64", 0, _RLIMIT_NOFILE, self._point(struct.pack("QQ", *limit)), 0)

    def user(self, uid: int, gid: int, groups: list[int] | None) -> None:
        if groups is not None:
            self._call("setgroups", len(groups), self._point(struct.pack(f"{len(groups)}I", *groups)))
        self._call("setresgid", gid, gid, gid)
        self._call("setresuid", uid, uid, uid)

    def folder(self, path: str) -> None:
        self._call("chdir", self._point(os.fsencode(path)))

    def execute(self, path: str, argv: list[bytes], env: dict[bytes, bytes]) -> None:
        self._call("rt_sigprocmask", SETMASK, ctypes.addressof(self._zeros), 0, 8)
        words = self._strings(argv)
        variables = self._strings([key + b"=" + value for key, value in env.items()])
        self._call("execve", self._point(os.fsencode(path)), words, variables)

    def run(self) -> int:
        """Start the child; returns its pid. OSError when no process can be created."""
        assert library is not None
        size = _ROW * len(self._rows)
        self._memory = ctypes.create_string_buffer(b"".join(struct.pack("8Q", *row) for row in self._rows),
                                                   size + _STACK)
        base = ctypes.addressof(self._memory)
        pid = int(library.start_program(base, len(self._rows), base + size, _STACK))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def failed(self) -> bool:
        """After the child's exit or exec: whether a call failed, or did not run."""
        assert self._memory is not None
        last = len(self._rows) - 1  # execve writes no result on success
        before: int = struct.unpack_from("q", self._memory, _ROW * (last - 1) + 56)[0]
        return before != 0 or bool(struct.unpack_from("q", self._memory, _ROW * last + 56)[0] != _UNWRITTEN)


class Library:
    """The shared library. OSError with a message when it cannot be loaded.

    The functions hold the interpreter's lock, and return a negative errno on failure.

    start_program(rows, count, stack, size of the stack): starts a child that executes these calls; returns its pid.
    run_zygote(control): see runtime/namespace/launcher/zygote.py.
    share_pages(regions, count, descriptor of the page table): see sharing.py; returns a number of pages.
    """

    def __init__(self, path: str) -> None:
        if platform.machine() not in MACHINES:
            raise OSError(f"it is for x86_64 and aarch64; this machine is {platform.machine()}")
        if not os.path.exists(path):
            raise OSError("it was not built when ROCK was installed")
        loaded = ctypes.PyDLL(path)
        try:
            version = ctypes.c_long.in_dll(loaded, "rock_native_version").value
        except ValueError:
            version = 0
        if version != _VERSION:
            raise OSError(f"{path} has version {version} instead of {_VERSION}: it was built from other sources")
        word, address = ctypes.c_ulong, ctypes.c_void_p
        self.path = path
        self.start_program = loaded.rock_start_program
        self.start_program.argtypes, self.start_program.restype = [address, word, address, word], ctypes.c_long
        self.run_zygote = loaded.rock_run_zygote
        self.run_zygote.argtypes, self.run_zygote.restype = [address], ctypes.c_long
        self.share_pages = loaded.rock_share_pages
        self.share_pages.argtypes, self.share_pages.restype = [address, word, ctypes.c_long], ctypes.c_long


def _load() -> tuple[Library | None, str]:
    try:
        return Library(os.path.join(os.path.dirname(os.path.abspath(__file__)), NAME)), ""
    except OSError as error:
        return None, str(error)


def disable() -> None:
    """Use fork in this process and its forks, as where the library is missing."""
    global library, missing
    library, missing = None, "it was switched off"


library, missing = _load()
