"""The few system calls that Python 3.11 does not wrap."""

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
_SLICE = 100_000  # nanoseconds: the kernel's least; its own is some milliseconds


def prctl(option: int, value: int) -> None:
    """prctl with one argument; OSError on failure."""
    if _prctl(option, value, 0, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def filter_calls(program: bytes) -> None:
    """Have a filter applied to this thread and all that it starts, from now on; OSError where that cannot be."""
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _prctl(_PR_SET_SECCOMP, _FILTER, ctypes.addressof(described), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def run_soon() -> None:
    """Ask the kernel for short turns for this thread, and none that it starts: who asks for a short turn gets it sooner
    (Linux 6.12). A server and a pid 1 that have something to pass on need not wait until a program that counts has had
    its own turn. No more CPU time comes of it, and where it cannot be had nothing does.
    """
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        spec = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, _SLICE, 0, 0)
        _syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.create_string_buffer(spec, 48), ctypes.c_long(0))


def become_subreaper() -> None:
    """Inherit the orphans among one's descendants. Cannot fail."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def default_signals() -> None:
    """Undo what was inherited: programs would start with the signals ignored that whoever started us ignored.

    Not by the signal module: the C library keeps the numbers 32 and 33 to itself, and they too may be ignored.
    """
    number = _SIGACTION.get(os.uname().machine)
    if number is None:
        return
    default = ctypes.create_string_buffer(64)
    for signum in range(1, 65):  # SIGKILL and SIGSTOP answer EINVAL
        _syscall(ctypes.c_long(number), ctypes.c_long(signum), default, None, ctypes.c_long(8))


def close_on_exec_from(lowest: int) -> None:
    """Mark every descriptor from `lowest` on close-on-exec."""
    arguments = ctypes.c_uint(lowest), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(_CLOSE_RANGE_CLOEXEC)
    if _syscall(ctypes.c_long(_CLOSE_RANGE), *arguments) < 0:  # older than 5.11
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= lowest:
                try:
                    os.set_inheritable(int(name), False)
                except OSError:
                    pass


def open_plain(path: str) -> int:
    """An O_PATH descriptor, reached without any of /proc's magic links: OSError ELOOP where there is one."""
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _NO_MAGIC_LINKS)
    fd = int(_syscall(ctypes.c_long(_OPENAT2), ctypes.c_long(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)),
                      ctypes.c_char_p(how), ctypes.c_long(len(how))))
    if fd < 0:
        number = ctypes.get_errno()
        if number == errno.ENOSYS:  # older than 5.6
            return os.open(path, os.O_PATH | os.O_CLOEXEC)
        raise OSError(number, os.strerror(number))
    return fd


def close_range(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`, both included."""
    if first > last:
        return
    if _syscall(ctypes.c_long(_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)) < 0:
        os.closerange(first, min(last + 1, 65536))  # older than 5.9


def close_all_but(highest: int, spared: int) -> None:
    """Close every descriptor over `highest`, except one."""
    close_range(highest + 1, spared - 1)
    close_range(spared + 1, 0xFFFFFFFF)


close_on_exec_from(1 << 30)  # resolves the symbol and the argument converters before the root is switched
