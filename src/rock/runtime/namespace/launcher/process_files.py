"""What a stopped process has of the mounts that are replaced: working directory, open files, mappings.

`look` lists what has to be repaired, and what cannot be repaired. It changes nothing. Paths and contents of /proc of a
guest's processes are hostile: they are compared and passed back to the same process only. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_O_PATH = os.O_PATH
_DROPPED = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW
_APPEND_ONLY = os.O_WRONLY | os.O_APPEND
_DELETED = " (deleted)"
_PART, _MOST = 1 << 16, 32 << 20  # bytes of one read, and of a file
_ACCESS = 40  # bytes of a line of maps in which the addresses and the access are
_TRAP = 1 << 4  # SIGTRAP in a mask
_KCMP, _KCMP_FILE = 312, 0
_SHARED_MEMORY = ("/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "/dev/", "/i915", "anon_inode:")
_libc = ctypes.CDLL(None, use_errno=True)


class OpenFile(NamedTuple):
    """A descriptor that is opened again. flags: as for open. alike: an earlier descriptor of the same open file, or
    -1."""

    number: int
    path: str
    flags: int
    offset: int
    alike: int


class Found(NamedTuple):
    """folder: the working directory if it has to be entered again, else "". problems: reasons against a switch."""

    pid: int
    folder: str
    files: Sequence[OpenFile]
    problems: Sequence[str]
    sockets: Sequence[str]


class Mount(NamedTuple):
    """A line of mountinfo."""

    number: int
    parent: int
    target: str
    kind: str


def mounts(pid: int) -> list[Mount]:
    """The mounts that a process sees."""
    found = []
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            kind = fields[fields.index("-") + 1]
            found.append(Mount(int(fields[0]), int(fields[1]), _plain(fields[4]), kind))
    return found


def _plain(text: str) -> str:
    """A path without the escapes of mountinfo."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def mount_of(path: str) -> int:
    """The number of the mount to which a link of /proc leads. OSError."""
    fd = os.open(path, _O_PATH | os.O_CLOEXEC)
    try:
        return _mount(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def _mount(path: str) -> int:
    return int(fields_of(path).get("mnt_id", "-1"))


def fields_of(path: str) -> dict[str, str]:
    """The lines of a file of /proc as names and values."""
    found: dict[str, str] = {}
    for line in content(path).decode("utf-8", "replace").split("\n"):
        name, _, value = line.partition(":")
        if name not in found:
            found[name] = value.strip()
    return found


def content(path: str) -> bytes:
    """The content of a file of /proc. Processes are stopped meanwhile: this is the fastest way. OSError, also for more
    than 32 MiB, such as with many mappings of files with long names."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, left = list[bytes](), _MOST
        while part := os.read(fd, _PART):
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise OSError(errno.EFBIG, f"{path} has more than {_MOST >> 20} MiB")
        return b"".join(parts)
    finally:
        os.close(fd)


def filters(pids: Sequence[int]) -> dict[int, str]:
    """The number of system call filters of each process."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = _filters(pid)
    return found


class TooLong(Exception):
    """The processes have more open files than can be examined in time."""


def look(pid: int, first: int, replaced: Mapping[int, str], namespace: str, end: float) -> Found:
    """Look at a stopped process. first: pid 1 of the sandbox. replaced: targets of the replaced mounts, by number.
    namespace: the mount namespace that each process has. TooLong after `end`, a time of the monotonic clock."""
    problems: list[str] = []
    folder, files, sockets = "", list[OpenFile](), list[str]()
    name = _Name(pid)
    try:
        if os.readlink(f"/proc/{pid}/ns/mnt") != namespace:
            problems.append(f"{name} has a mount namespace of its own")
        if os.readlink(f"/proc/{pid}/root") != "/":
            problems.append(f"{name} has another root directory")
        if int(_line_of(content(f"/proc/{pid}/status"), b"SigIgn") or "0", 16) & _TRAP:
            problems.append(f"{name} ignores SIGTRAP, which injected calls would reset")
        folder = _folder(pid, name, replaced, problems)
        files = list(_files(pid, name, replaced, problems, sockets, end))
        if pid != first:  # pid 1 maps no file of the sandbox, and its processes cannot make it do so
            problems += _mappings(pid, name)
        if pid == first and (folder or files):
            problems.append("an operation on files is in progress")
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended
    return Found(pid, folder, files, problems, sockets)


class _Name:
    """How a process is named in a report; read only when that is needed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __str__(self) -> str:
        return label(self._pid)


def label(pid: int) -> str:
    """How a process is named in a report: its number inside, and its command line."""
    text = b""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        text = file.read(200).replace(b"\0", b" ").strip()
    return f"process {_inside(pid)} ({text.decode('utf-8', 'replace')[:100]})"


def _inside(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (status(pid).get("NSpid", "").split() or [str(pid)])[-1]
    return str(pid)


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    return fields_of(f"/proc/{pid}/status")


def _filters(pid: int) -> str:
    """The number of system call filters of a process."""
    return _line_of(content(f"/proc/{pid}/status"), b"Seccomp_filters")


def _line_of(data: bytes, name: bytes) -> str:
    """The value of one line of a file of names and values; "" without it."""
    return data.partition(b"\n%s:" % name)[2].partition(b"\n")[0].strip().decode()


def own_filters(counts: Mapping[int, str], first: int) -> list[str]:
    """Processes with more filters than the least of all but pid 1, which has its own number."""
    least = min((int(text) for pid, text in counts.items() if pid != first and text.isdigit()), default=0)
    return [f"{label(pid)} has a system call filter of its own" for pid, text in counts.items()
            if pid != first and text != str(least)]  # fmt: skip


def _folder(pid: int, name: _Name, replaced: Mapping[int, str], problems: list[str]) -> str:
    link = f"/proc/{pid}/cwd"
    if mount_of(link) not in replaced:
        return ""
    path = os.readlink(link)
    if path == "/":
        return ""  # pivot_root changes it
    if path.endswith(_DELETED) and not os.stat(link).st_nlink:
        problems.append(f"{name} has a deleted working directory")
        return ""
    return path


def _files(pid: int, name: _Name, replaced: Mapping[int, str], problems: list[str],
           sockets: list[str], end: float) -> Iterator[OpenFile]:
    seen: list[tuple[tuple[int, int], int]] = []
    numbers = sorted(int(text) for text in os.listdir(f"/proc/{pid}/fd"))
    for number in numbers:
        if time.monotonic() > end:
            raise TooLong(f"{name} has too many open files")
        link = f"/proc/{pid}/fd/{number}"
        target = os.readlink(link)
        if target.startswith("socket:"):
            sockets.append(target[8:-1])
        if target == "anon_inode:inotify":
            problems.append(f"{name} watches files with inotify (descriptor {number})")
        if not target.startswith("/"):
            continue
        data = fields_of(f"/proc/{pid}/fdinfo/{number}")
        if int(data.get("mnt_id", "-1")) not in replaced:
            continue
        flags, offset, info = int(data["flags"], 8), int(data["pos"]), os.stat(link)
        kind = stat.S_IFMT(info.st_mode)
        if not info.st_nlink or (target.endswith(_DELETED) and kind != stat.S_IFREG):
            problems.append(f"{name} has a deleted file open (descriptor {number})")
        elif "lock" in data:
            problems.append(f"{name} holds a lock on {target[:200]!r} (descriptor {number})")
        elif kind == stat.S_IFDIR and offset and not flags & _O_PATH:
            problems.append(f"{name} reads the directory {target[:200]!r} (descriptor {number})")
        elif kind not in (stat.S_IFREG, stat.S_IFDIR):
            problems.append(f"{name} has the special file {target[:200]!r} open (descriptor {number})")
        else:
            identity = info.st_dev, info.st_ino
            alike = next((other for key, other in seen if key == identity and _same(pid, number, pid, other)), -1)
            seen.append((identity, number))
            yield OpenFile(number, target, flags & ~_DROPPED, offset, alike)


def _same(pid: int, number: int, other_pid: int, other: int) -> bool:
    """Whether two descriptors are the same open file, with one offset."""
    result = _libc.syscall(ctypes.c_long(_KCMP), ctypes.c_long(pid), ctypes.c_long(other_pid),
                           ctypes.c_long(_KCMP_FILE), ctypes.c_long(number), ctypes.c_long(other))
    return int(result) == 0


def shared(found: Sequence[Found]) -> list[str]:
    """Open files that several processes share: opened again, each would get an offset of its own. Files that are only
    appended to have none."""
    problems = []
    known: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for one in found:
        for file in one.files:
            if file.alike >= 0 or file.flags & _O_PATH or file.flags & _APPEND_ONLY == _APPEND_ONLY:
                continue
            others = known.setdefault((file.path, file.flags), [])
            if any(_same(one.pid, file.number, pid, number) for pid, number in others):
                problems.append(f"{label(one.pid)} shares the open file {file.path[:200]!r} with another process")
                break
            others.append((one.pid, file.number))
    return problems


def _mappings(pid: int, name: _Name) -> Iterator[str]:
    for raw in content(f"/proc/{pid}/maps").split(b"\n"):
        if b"s " not in raw[:_ACCESS]:
            continue
        fields = raw.decode("utf-8", "replace").split(None, 5)
        if len(fields) < 6 or fields[1][1] != "w" or fields[1][3] != "s":
            continue
        if fields[5].startswith("/") and not fields[5].startswith(_SHARED_MEMORY):
            yield f"{name} has a shared writable mapping of {fields[5][:200]!r}"
            return


def bound_sockets(first: int, sockets: set[str]) -> list[str]:
    """Sockets of these inodes that are bound to a path: a new overlay does not have them."""
    problems = []
    with contextlib.suppress(OSError), open(f"/proc/{first}/net/unix", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.rstrip("\n").split(None, 7)
            if len(fields) == 8 and fields[6] in sockets and fields[7].startswith("/"):
                problems.append(f"a unix socket is bound to {fields[7][:200]!r}")
    return problems
