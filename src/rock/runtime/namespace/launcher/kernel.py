"""System calls for the creation of sandboxes, by ctypes. Standard library only: it runs in the launcher and its
children.

Every function raises OSError with the name of the call. Numbers that differ between x86_64 and aarch64 are in `_TABLE`;
the mount calls of 5.2 and later have the same numbers everywhere.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import platform
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE, MS_SLAVE = 32, 4096, 8192, 16384, 1 << 18, 1 << 19
MNT_DETACH = 2

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, ATTR_IDMAP = 1, 2, 4, 8, 0x00100000

PR_SET_PDEATHSIG = 1
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_SIGCHLD = 17

_TABLE = {
    "x86_64": {"clone": 56, "pivot_root": 155, "setns": 308, "unshare": 272, "capset": 126, "seccomp": 317, "read": 0,
               "prctl": 157, "setsid": 112, "chdir": 80, "setgroups": 116, "setresgid": 119, "setresuid": 117,
               "getpid": 39, "openat": 257, "dup3": 292, "sendmsg": 46,
               "write": 1, "socket": 41, "ioctl": 16, "sethostname": 170, "listen": 50,
               "rt_sigaction": 13, "rt_sigprocmask": 14, "execve": 59, "umask": 95, "prlimit64": 302,
               "sched_setattr": 314},
    "aarch64": {"clone": 220, "pivot_root": 41, "setns": 268, "unshare": 97, "capset": 91, "seccomp": 277, "read": 63,
                "prctl": 167, "setsid": 157, "chdir": 49, "setgroups": 159, "setresgid": 149, "setresuid": 147,
                "getpid": 172, "openat": 56, "dup3": 24, "sendmsg": 211,
                "write": 64, "socket": 198, "ioctl": 29, "sethostname": 161, "listen": 201,
                "rt_sigaction": 134, "rt_sigprocmask": 135, "execve": 221, "umask": 166, "prlimit64": 261,
                "sched_setattr": 274},
}
_OPEN_TREE, _MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
FSCONFIG_CREATE = 6
_CLOSE_RANGE = 436

MACHINE = platform.machine()
NUMBERS = _TABLE.get(MACHINE, {})

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_mount = _libc.mount
_mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_umount2 = _libc.umount2
_umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_long = ctypes.c_long
# A manual fork must hold the interpreter's lock throughout: PyDLL does not release it.
_fork_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_fork_syscall.restype = ctypes.c_long


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def _number(name: str) -> int:
    if name not in NUMBERS:
        raise OSError(errno.ENOSYS, f"{name}: {MACHINE} is not supported")
    return NUMBERS[name]


def fork_into(flags: int) -> int:
    """Fork with new namespaces: 0 in the child, its pid in the parent. Only for a process with a single thread."""
    arguments = [_long(flags | _SIGCHLD), _long(0), _long(0), _long(0), _long(0)]
    pid = int(_fork_syscall(_long(_number("clone")), *arguments))
    if pid < 0:
        _raise("clone")
    return pid


def call(number: int, *arguments: int) -> int:
    """Any system call; returns a negative errno on failure."""
    result = int(_syscall(_long(number), *(_long(value) for value in arguments)))
    return result if result >= 0 else -ctypes.get_errno()


def map_private(fd: int, length: int) -> int:
    """Map a file read-only and privately; returns the address."""
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, ctypes.c_size_t(length), 1, 2, fd, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        _raise("mmap")
    return int(address)


def resident(address: int, length: int) -> bytes:
    """One byte per page, odd when the page is in memory."""
    pages = ctypes.create_string_buffer(-(-length // 4096))
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages) < 0:
        _raise("mincore")
    return pages.raw


def munmap(address: int, length: int) -> None:
    _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))


def unshare(flags: int) -> None:
    if _syscall(_long(_number("unshare")), _long(flags)) < 0:
        _raise("unshare")


def setns(fd: int, kind: int) -> None:
    if _syscall(_long(_number("setns")), _long(fd), _long(kind)) < 0:
        _raise("setns")


def prctl(option: int, value: int = 0, third: int = 0) -> int:
    result = int(_prctl(option, value, third, 0, 0))
    if result < 0:
        _raise(f"prctl {option}")
    return result


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    if _mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(options) or None) < 0:
        _raise(f"mount {kind or source} at {target}")


def umount(target: str, flags: int = 0) -> None:
    if _umount2(os.fsencode(target), flags) < 0:
        _raise(f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    if _syscall(_long(_number("pivot_root")), ctypes.c_char_p(os.fsencode(new)), ctypes.c_char_p(os.fsencode(old))) < 0:
        _raise("pivot_root")


def open_tree(path: str, *, recursive: bool = False, folder: int = _AT_FDCWD) -> int:
    """A detached copy of the mount at `path`, as a descriptor; without a path, at the descriptor `folder`."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0) | (0 if path else _AT_EMPTY_PATH)
    fd = int(_syscall(_long(_OPEN_TREE), _long(folder), ctypes.c_char_p(os.fsencode(path)), _long(flags)))
    if fd < 0:
        _raise(f"open_tree {path}")
    return fd


def set_attributes(fd: int, attributes: int, *, userns: int = -1, recursive: bool = False,
                   private: bool = False) -> None:
    """Set mount attributes of a descriptor of `open_tree`; with a user namespace's descriptor, its id mapping too."""
    if userns >= 0:
        attributes |= ATTR_IDMAP
    packed = struct.pack("=QQQQ", attributes, 0, MS_PRIVATE if private else 0, max(userns, 0))
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    if _syscall(_long(_MOUNT_SETATTR), _long(fd), ctypes.c_char_p(b""), _long(flags), ctypes.c_char_p(packed),
                _long(len(packed))) < 0:
        _raise("mount_setattr")


def move_mount(fd: int, target: str, folder: int = _AT_FDCWD) -> None:
    """Attach a detached mount at a path; without a path, at the descriptor `folder`."""
    path, flags = ctypes.c_char_p(os.fsencode(target)), 4 if target else 4 | 0x40  # F_EMPTY_PATH, T_EMPTY_PATH
    if _syscall(_long(_MOVE_MOUNT), _long(fd), ctypes.c_char_p(b""), _long(folder), path, _long(flags)) < 0:
        _raise(f"move_mount to {target}")


def new_mount(kind: str, options: dict[str, str], attributes: int) -> int:
    """A new file system as a detached mount; it disappears with its descriptor unless it was attached to a path."""
    fd = int(_syscall(_long(FSOPEN), ctypes.c_char_p(kind.encode()), _long(1)))
    if fd < 0:
        _raise(f"fsopen {kind}")
    try:
        for key, value in options.items():
            _fsconfig(fd, 1, key, value)
        _fsconfig(fd, FSCONFIG_CREATE, None, None)
        tree = int(_syscall(_long(FSMOUNT), _long(fd), _long(1), _long(attributes)))
        if tree < 0:
            _raise(f"fsmount {kind}")
        return tree
    finally:
        os.close(fd)


def mount_overlay(target: str, layers: list[str], options: dict[str, str], flags: list[str]) -> None:
    """Overlay by the new mount calls, whose options have no common length limit (`lowerdir+`, 6.5 and later)."""
    fd = int(_syscall(_long(FSOPEN), ctypes.c_char_p(b"overlay"), _long(1)))
    if fd < 0:
        _raise("fsopen overlay")
    try:
        for layer in layers:
            _fsconfig(fd, 1, "lowerdir+", layer)
        for key, value in options.items():
            _fsconfig(fd, 1, key, value)
        for flag in flags:
            _fsconfig(fd, 0, flag, None)
        _fsconfig(fd, FSCONFIG_CREATE, None, None)
        tree = int(_syscall(_long(FSMOUNT), _long(fd), _long(1), _long(ATTR_NOSUID | ATTR_NODEV)))
        if tree < 0:
            _raise("fsmount overlay")
        try:
            move_mount(tree, target)
        finally:
            os.close(tree)
    finally:
        os.close(fd)


def _fsconfig(fd: int, command: int, key: str | None, value: str | None) -> None:
    name = ctypes.c_char_p(key.encode() if key is not None else None)
    text = ctypes.c_char_p(os.fsencode(value) if value is not None else None)
    if _syscall(_long(FSCONFIG), _long(fd), _long(command), name, text, _long(0)) < 0:
        _raise(f"fsconfig {key or 'create'}")


def set_file_owner(identity: int) -> None:
    """Use this user and group for file accesses and new files, from now on."""
    _libc.setfsgid(ctypes.c_uint(identity))
    _libc.setfsuid(ctypes.c_uint(identity))


def capset(mask: int, effective: int | None = None) -> None:
    """Retain exactly these capabilities: permitted and, unless `effective` says otherwise, effective."""
    header = struct.pack("=Ii", 0x20080522, 0)
    now = mask if effective is None else effective
    data = struct.pack("=IIIIII", now & 0xFFFFFFFF, mask & 0xFFFFFFFF, 0, now >> 32, mask >> 32, 0)
    if _syscall(_long(_number("capset")), ctypes.c_char_p(header), ctypes.c_char_p(data)) < 0:
        _raise("capset")


@functools.cache
def permitted() -> int:
    """The permitted capabilities at the first call, as a mask."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapPrm:"):
                return int(line.split()[1], 16)
    return 0


LOOPBACK_UP = struct.pack("16sh22x", b"lo", 0x49)  # an ifreq with IFF_UP | IFF_LOOPBACK | IFF_RUNNING
SIOCSIFFLAGS = 0x8914


def loopback_up() -> None:
    """Enable `lo` in the network namespace of this process."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, LOOPBACK_UP)


def set_title(title: bytes) -> None:
    """Overwrite this process's command line, whose host paths would be visible in the sandbox as pid 1's."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if 0 < end - start < 1 << 20:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, title[: end - start], min(len(title), end - start))
    set_name(title)


def set_name(name: bytes) -> None:
    """Set the process name in listings."""
    prctl(15, ctypes.cast(ctypes.c_char_p(name[:15]), ctypes.c_void_p).value or 0)  # PR_SET_NAME


def close_from(lowest: int) -> None:
    """Close this descriptor and all above it."""
    _syscall(_long(_CLOSE_RANGE), _long(lowest), _long(0xFFFFFFFF), _long(0))
