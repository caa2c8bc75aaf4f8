"""System calls that Python 3.11 does not wrap. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
PR_SET_CHILD_SUBREAPER = 36
_CLOSE_RANGE = 436
_CLOSE_RANGE_CLOEXEC = 4
_OPENAT2 = 437
_SIGACTION = {"x86_64": 13, "aarch64": 134}
_AT_FDCWD = -100
_NO_MAGIC_LINKS = 2
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_RESET_ON_FORK = 1
_SLICE = 100_000  # nanoseconds: the kernel's minimum; its default is some milliseconds


def prctl(option: int, value: int) -> None:
    """prctl with one argument; OSError on failure."""
    if _prctl(option, value, 0, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def filter_calls(program: bytes) -> None:
    """Apply a filter to this thread and its future children; OSError where that is impossible."""
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _prctl(_PR_SET_SECCOMP, _FILTER, ctypes.addressof(described), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def run_soon() -> None:
    """Request short time slices for this thread, but not for its children: a shorter slice is scheduled sooner (Linux
    6.12). A server or pid 1 with data to forward does not wait for the slice of a computing program. The total CPU time
    does not change; without kernel support nothing happens.
    """
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is not None:
        spec = ctypes.create_string_buffer(short_slices(), 48)
        _syscall(ctypes.c_long(number), ctypes.c_long(0), spec, ctypes.c_long(0))


def short_slices() -> bytes:
    """The argument of sched_setattr for `run_soon`."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, _SLICE, 0, 0)


def become_subreaper() -> None:
    """Become the subreaper of one's descendants. Cannot fail."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def default_signals() -> None:
    """Reset inherited signal dispositions: programs would otherwise inherit ignored signals.

    Uses system calls instead of the signal module, because the C library reserves the signals 32 and 33, which may be
    ignored too.
    """
    number = _SIGACTION.get(os.uname().machine)
    if number is None:
        return
    default = ctypes.create_string_buffer(64)
    for signum in range(1, 65):  # SIGKILL and SIGSTOP return EINVAL
        _syscall(ctypes.c_long(number), ctypes.c_long(signum), default, None, ctypes.c_long(8))


def close_on_exec_from(lowest: int) -> None:
    """Set close-on-exec on every descriptor from `lowest` on."""
    arguments = ctypes.c_uint(lowest), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(_CLOSE_RANGE_CLOEXEC)
    if _syscall(ctypes.c_long(_CLOSE_RANGE), *arguments) < 0:  # older than 5.11
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= lowest:
                try:
                    os.set_inheritable(int(name), False)
                except OSError:
                    pass


def open_plain(path: str, flags: int | None = None) -> int:
    """A descriptor, by default of O_PATH, resolved without magic links of /proc: OSError ELOOP where there is one."""
    flags = (os.O_PATH if flags is None else flags) | os.O_CLOEXEC
    how = struct.pack("=QQQ", flags, 0, _NO_MAGIC_LINKS)
    fd = int(_syscall(ctypes.c_long(_OPENAT2), ctypes.c_long(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)),
                      ctypes.c_char_p(how), ctypes.c_long(len(how))))
    if fd < 0:
        number = ctypes.get_errno()
        if number == errno.ENOSYS:  # older than 5.6
            return os.open(path, flags)
        raise OSError(number, os.strerror(number))
    return fd


def close_range(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`, inclusive."""
    if first > last:
        return
    if _syscall(ctypes.c_long(_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)) < 0:
        os.closerange(first, min(last + 1, 65536))  # older than 5.9


def close_all_but(highest: int, spared: int) -> None:
    """Close every descriptor above `highest`, except one."""
    close_range(highest + 1, spared - 1)
    close_range(spared + 1, 0xFFFFFFFF)


close_on_exec_from(1 << 30)  # resolves the symbol and the argument converters before the root is switched
