"""Landlock: restricts files, TCP ports, signals and abstract sockets of a process and all its descendants.

Uses ctypes; standard library only. A ruleset can only become stricter, and requires no privilege but no_new_privs.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_PATH_BENEATH = 1
_VERSION = 1
_PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights per ABI version
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_TCP = 3  # bind, connect
_SCOPES = 3  # abstract unix sockets, signals

READ = EXECUTE | READ_FILE | READ_DIR
DEVICE = READ_FILE | WRITE_FILE | IOCTL_DEV

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_long = ctypes.c_long


def version() -> int:
    """The kernel's Landlock ABI version; 0 where it is missing or disabled."""
    return max(0, int(_syscall(_long(_CREATE), None, _long(0), _long(_VERSION))))


def everything(abi: int) -> int:
    """All file rights of this ABI version."""
    return (1 << _RIGHTS.get(abi, 16)) - 1


class Ruleset:
    """Rules under construction: allowed file accesses; all others are denied. tcp: whether ports are denied too.

    OSError from a kernel without Landlock.
    """

    def __init__(self, *, tcp: bool) -> None:
        self.abi = version()
        self._handled = everything(self.abi)
        # A kernel rejects a longer structure only when the fields that it does not know are not zero.
        ports, scopes = _TCP if tcp and self.abi >= 4 else 0, _SCOPES if self.abi >= 6 else 0
        packed = struct.pack("=QQQ", self._handled, ports, scopes)
        size = 8 if self.abi < 4 else 16 if self.abi < 6 else 24
        self._fd = int(_syscall(_long(_CREATE), ctypes.c_char_p(packed), _long(size), _long(0)))
        if self._fd < 0:
            _raise("landlock_create_ruleset")

    def allow(self, rights: int, paths: Iterable[str]) -> None:
        """Allow these rights on files, and on everything below folders. Missing paths are skipped."""
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                given = rights & self._handled
                if not os.path.isdir(f"/proc/self/fd/{fd}"):
                    given &= _OF_FILES
                rule = ctypes.c_char_p(struct.pack("=Qi", given, fd))
                if _syscall(_long(_ADD), _long(self._fd), _long(_PATH_BENEATH), rule, _long(0)) < 0:
                    _raise(f"landlock_add_rule {path}")
            finally:
                os.close(fd)

    def enforce(self) -> None:
        """Restrict this process and all its future children. Irreversible."""
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, _long(1), _long(0), _long(0), _long(0))
        if _syscall(_long(_RESTRICT), _long(self._fd), _long(0)) < 0:
            _raise("landlock_restrict_self")
        os.close(self._fd)


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
