"""What stopped processes of a sandbox have, as /proc shows it, and the reasons against a copy of them.

`look` changes nothing in a process. Everything that it reads belongs to a guest: names and paths are compared, put into
reasons, or passed back to a copy of the same guest. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat
import struct
import termios
import time
from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from typing import NamedTuple

from rock.host import folders
from rock.runtime.namespace.launcher import child_setup, kernel, process_files
from rock.runtime.namespace.processes import address_space, state
from rock.runtime.namespace.processes.address_space import Mapping
from rock.runtime.namespace.processes.state import Description

MOST_PROCESSES = 64
MOST_THREADS = 512
_MOST_DESCRIPTORS = 2000
_MOST_PIPE = 1 << 20  # bytes
_PATIENCE = 1.0  # seconds
_KCMP, _KCMP_FILE, _KCMP_VM, _KCMP_FILES, _KCMP_FS, _KCMP_EPOLL = 312, 0, 1, 2, 3, 7
_MEMORY_FIELDS = (26, 27, 45, 46, 47, 0, 28, 48, 49, 50, 51)  # of /proc/PID/stat, in the order of prctl_mm_map
_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}  # null, zero, full, random, urandom
_NOT_FILES = {"proc", "sysfs", "tmpfs", "devpts", "devtmpfs", "cgroup", "cgroup2", "mqueue"}
_NAMESPACES = ("mnt", "pid", "ipc", "uts", "user", "net", "cgroup", "pid_for_children")
_DROPPED = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW
_ASYNC = 0o20000
_DIRECT = 0o40000
_SOCK_DIAG, _BY_FAMILY, _ERROR = 4, 20, 2
_REQUEST = 1
_SHOW = 1 | 4 | 0x10  # name, peer, length of the queues
_NAME, _PEER, _QUEUES, _SHUTDOWN = 0, 2, 4, 6
_ESTABLISHED = 1
_ANY_COOKIE = 0xFFFFFFFF
_SOCKET_PATIENCE = 2.0  # seconds
_libc = ctypes.CDLL(None, use_errno=True)


class Found(NamedTuple):
    """A process as /proc shows it. outside: its number outside of the sandbox. threads: those of the others than its
    first thread."""

    outside: int
    pid: int
    parent: int
    session: int
    group: int
    name: str
    status: Dictionary[str, str]
    memory: Sequence[int]
    mappings: Sequence[Mapping]
    program: str
    folder: str
    nice: int
    threads: Sequence[int]


class Inventory:
    """What the stopped processes `pids` have; problems: the reasons against a copy. first: pid 1 of the sandbox."""

    def __init__(self, pids: Sequence[int], first: int) -> None:
        self.problems: list[str] = []
        self.passing: list[str] = []  # problems that usually pass within some milliseconds
        self.processes: list[Found] = []
        self.descriptions: list[Description] = []
        self.pipes: list[state.Pipe] = []
        self.descriptors: dict[int, list[tuple[int, int, int]]] = {}  # by number outside
        self._threads = 0
        self._end = time.monotonic() + _PATIENCE
        self._first = first
        self._pids = [pid for pid in pids if pid != first]
        self._inside = {pid: inside(pid) for pid in (first, *self._pids)}
        self._mounts = {one.number: one.kind for one in process_files.mounts(first)}
        self._known: dict[tuple[str, int], list[tuple[int, int, int]]] = {}  # by link and flags: pid, number, index
        self._pipes: dict[str, int] = {}
        self._streams_of: dict[int, tuple[str, str]] = {}  # key and name by pipe
        self._sockets: dict[int, tuple[int, str]] = {}  # index of the description, and its name, by inode
        self._namespaces = {kind: os.readlink(f"/proc/{first}/ns/{kind}") for kind in os.listdir(f"/proc/{first}/ns")
                            if kind in _NAMESPACES}  # fmt: skip
        self._root = os.open(f"/proc/{first}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._root)

    def look(self, programs: Sequence[Dictionary[str, object]]) -> list[state.Program]:
        """Read everything. programs: those of pid 1, as it describes them. OSError."""
        if len(self._pids) > MOST_PROCESSES:
            self.problems.append(f"there are {len(self._pids)} processes, more than {MOST_PROCESSES}")
            return []
        found = self._streams(programs)
        roots = {one.pid for one in found}
        for pid in self._pids:
            self._look(pid, roots)
        self._shared()
        self._groups()
        self._ended()
        self._pairs()
        return [one for one in found if one.pid in {each.pid for each in self.processes}]

    def _look(self, pid: int, roots: set[int]) -> None:
        name = process_files.label(pid)
        status = process_files.status(pid)
        fields = _stat(pid)
        parent, group, session = (self._inside.get(int(fields[n - 3]), 0) for n in (4, 5, 6))
        number = self._inside[pid]
        problems = list(_of_process(status, fields, pid))
        if parent == 1 and number not in roots:
            problems.append("belongs to a request that is in progress")
        if not parent:
            problems.append("has a parent that ended")
        threads = sorted(int(text) for text in os.listdir(f"/proc/{pid}/task") if int(text) != pid)
        self._threads += len(threads)
        if self._threads > MOST_THREADS:
            problems.append(f"has more than {MOST_THREADS} threads, with those of the other processes")
        else:
            problems += dict.fromkeys(problem for tid in threads for problem in _of_thread(pid, tid, status))
        memory = [int(fields[n - 3]) if n else 0 for n in _MEMORY_FIELDS]
        mapped: list[Mapping] = []
        try:
            mapped = address_space.mappings(pid)
        except address_space.TooMany as error:
            problems.append(str(error).removeprefix("it "))
        problems += self._of_mappings(pid, mapped)
        program = os.readlink(f"/proc/{pid}/exe")
        if not self._leads_to(program, f"/proc/{pid}/exe"):
            problems.append(f"runs the deleted or hidden program {program[:200]!r}")
        folder = os.readlink(f"/proc/{pid}/cwd")
        if not self._leads_to(folder, f"/proc/{pid}/cwd"):
            problems.append(f"has the deleted or hidden working directory {folder[:200]!r}")
        if os.readlink(f"/proc/{pid}/root") != "/":
            problems.append("has another root directory")
        for kind, own in self._namespaces.items():
            if os.readlink(f"/proc/{pid}/ns/{kind}") != own:
                problems.append(f"has a namespace of its own ({kind})")
        self.descriptors[pid] = []
        problems += self._of_descriptors(pid)
        self.problems += [f"{name} {problem}" for problem in problems]
        signals = [process_files.status(tid).get("SigPnd", "0") for tid in threads]
        signals += [status.get("SigPnd", "0"), status.get("ShdPnd", "0")]
        if any(int(text, 16) for text in signals):
            self.passing.append(f"{name} has a pending signal")
        self.processes.append(Found(pid, number, parent, session, group, comm(pid), status, memory, mapped,
                                    program, folder, int(fields[19 - 3]), threads))

    # ---- memory ----

    def _of_mappings(self, pid: int, mapped: Sequence[Mapping]) -> list[str]:
        problems = []
        checked = set()
        for one in mapped:
            if one.shared and (not one.is_file or one.protection & 2):
                problems.append(f"has shared writable memory ({one.name[:200] or 'anonymous'})")
            elif one.is_file and (one.inode, one.name) not in checked:
                checked.add((one.inode, one.name))
                link = f"/proc/{pid}/map_files/{one.start:x}-{one.end:x}"
                if not self._leads_to(one.name, link) or not stat.S_ISREG(os.stat(link).st_mode):
                    problems.append(f"maps {one.name[:200]!r}, which is deleted, hidden or not a file")
        if not any(one.name == "[vdso]" for one in mapped):
            problems.append("has no vDSO")
        return problems

    def _leads_to(self, path: str, link: str) -> bool:
        """Whether a path in the sandbox leads to the file of a link in /proc."""
        if not path.startswith("/"):
            return False
        try:
            fd = folders.open_under(self._root, path, folders.IN_ROOT | folders.NO_MAGICLINKS,
                                    os.O_PATH | os.O_CLOEXEC)  # fmt: skip
        except OSError:
            return False
        try:
            here, there = os.fstat(fd), os.stat(link)
        finally:
            os.close(fd)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    # ---- descriptors ----

    def _streams(self, programs: Sequence[Dictionary[str, object]]) -> list[state.Program]:
        """The programs of pid 1, and their pipes, which get indices."""
        found = []
        for one in programs:
            if one.get("ended") or not one.get("keep"):
                continue
            pid, key, pipes = int(str(one["pid"])), str(one["key"]), one.get("pipes")
            if one.get("starting"):  # pid 1 does not have its streams yet
                self.passing.append(f"program {key!r} is starting")
                found.append(state.Program(pid, key, {}))
                continue
            if not isinstance(pipes, dict) or not all(inode for inode, _ in pipes.values()):
                self.problems.append(f"program {key!r} has a stream that is no pipe, or pid 1 is of an older release")
                continue
            for name, (inode, _) in pipes.items():
                self._streams_of[len(self.pipes)] = key, str(name)
                self._pipes[f"pipe:[{int(inode)}]"] = len(self.pipes)
                self.pipes.append(state.Pipe(0, b""))
            found.append(state.Program(pid, key, {str(name): str(way) for name, (_, way) in pipes.items()}))
        return found

    def _of_descriptors(self, pid: int) -> list[str]:
        problems = []
        numbers = sorted(int(text) for text in os.listdir(f"/proc/{pid}/fd"))
        if sum(len(known) for known in self.descriptors.values()) + len(numbers) > _MOST_DESCRIPTORS:
            return [f"has more than {_MOST_DESCRIPTORS} open files, with those of the other processes"]
        for number in numbers:
            if time.monotonic() > self._end:
                raise address_space.TooMany(f"the open files cannot be examined in {_PATIENCE:g} s")
            link = f"/proc/{pid}/fd/{number}"
            target, info = os.readlink(link), process_files.fields_of(f"/proc/{pid}/fdinfo/{number}")
            flags = int(info["flags"], 8)
            cloexec, flags = flags & os.O_CLOEXEC, flags & ~os.O_CLOEXEC
            known = self._known.setdefault((target, flags), [])
            index = next((index for other, twin, index in known if same_file(pid, number, other, twin)), -1)
            if index < 0:
                made = self._describe(pid, link, target, flags, info)
                if isinstance(made, str):
                    problems.append(f"has {made} open (descriptor {number})")
                    continue
                index = len(self.descriptions)
                if made.kind == "socket":
                    label = f"{process_files.label(pid)} has a socket open (descriptor {number})"
                    self._sockets[int(target[8:-1])] = index, label
                self.descriptions.append(made)
                known.append((pid, number, index))
            elif pid not in {other for other, _, i in known if i == index} \
                    and not _can_be_shared(self.descriptions[index]):
                problems.append(f"shares the open file {target[:200]!r} with another process (descriptor {number})")
            self.descriptors[pid].append((number, index, cloexec))
        return problems

    def _describe(self, pid: int, link: str, target: str, flags: int, info: Dictionary[str, str]) -> Description | str:
        """An open file description, or what it is if it cannot be copied."""
        if flags & _ASYNC:
            return f"{target[:200]!r} with signals"
        if target.startswith("pipe:"):
            return self._pipe(link, target, flags)
        if target == "anon_inode:[eventfd]":
            return Description("event", flags | (1 if info.get("eventfd-semaphore") == "1" else 0),
                               value=int(info["eventfd-count"], 16))  # fmt: skip
        if target == "anon_inode:[eventpoll]":
            return _epoll(pid, int(link.rpartition("/")[2]), flags)
        if target.startswith("socket:"):
            return Description("socket", flags)
        if not target.startswith("/"):
            return f"{target[:100]!r}"
        found = os.stat(link)
        if stat.S_ISCHR(found.st_mode):
            if (os.major(found.st_rdev), os.minor(found.st_rdev)) not in _DEVICES:
                return f"the device {target[:200]!r}"
        elif not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            return f"the special file {target[:200]!r}"
        elif self._mounts.get(int(info.get("mnt_id", "-1")), "proc") in _NOT_FILES:
            return f"{target[:200]!r}, a file of the kernel or in memory,"
        if "lock" in info:
            return f"the locked file {target[:200]!r}"
        if not self._leads_to(target, link):
            return f"the deleted or hidden file {target[:200]!r}"
        offset = int(info["pos"])
        if stat.S_ISDIR(found.st_mode) and offset and not flags & os.O_PATH:
            return f"the partly read directory {target[:200]!r}"
        return Description("file", flags & ~_DROPPED, target, 0 if stat.S_ISCHR(found.st_mode) else offset)

    def _pipe(self, link: str, target: str, flags: int) -> Description | str:
        if flags & _DIRECT:
            return "a pipe of packets"
        if flags & 3 == os.O_RDWR:
            return "a pipe for both directions"
        reads = flags & 3 == os.O_RDONLY
        index = self._pipes.get(target, -1)
        if index < 0:
            index = self._pipes[target] = len(self.pipes)
            self.pipes.append(state.Pipe(0, b""))
        if not self.pipes[index].capacity:
            self.pipes[index] = _unread(link)
        if reads and self.pipes[index].capacity > _MOST_PIPE:
            return "a pipe of more than 1 MiB"
        stream = self._streams_of.get(index)
        if stream is not None:
            return Description("stream", flags, stream=stream, pipe=(index, reads))
        return Description("pipe", flags, pipe=(index, reads))

    def _pairs(self) -> None:
        """Unix sockets have to be pairs of which the processes have both ends."""
        if not self._sockets:
            return
        sockets = UnixSockets(self._first)
        try:
            found = {inode: sockets.get(inode) for inode in self._sockets}
        finally:
            sockets.close()
        for inode, (index, name) in self._sockets.items():
            one = found[inode]
            if one is None or one.peer not in found:
                self.problems.append(f"{name}, which is not one end of a pair of these processes")
            elif one.waiting:
                self.problems.append(f"{name}, which has unread data")
            else:
                first = min(inode, one.peer)
                pair = self._pipes.setdefault(f"pair:{first}", len(self.pipes))
                if pair == len(self.pipes):
                    self.pipes.append(state.Pipe(0, b""))
                made = self.descriptions[index]._replace(pipe=(pair, inode == first), value=one.kind)
                self.descriptions[index] = made

    def _groups(self) -> None:
        """Sessions and process groups have to be those that a start in the order of the tree gives."""
        known = {one.pid: one for one in self.processes}
        for one in self.processes:
            parent, leader = known.get(one.parent), known.get(one.group)
            if one.session != one.pid and (parent is None or one.session != parent.session):
                self.problems.append(f"{process_files.label(one.outside)} is in a session that its parent is not in")
            elif leader is None or leader.session != one.session or leader.group != leader.pid:
                self.problems.append(f"{process_files.label(one.outside)} is in a process group whose leader has ended")

    def _ended(self) -> None:
        """Children that have ended, whose status is not taken yet."""
        known = {one.outside for one in self.processes}
        for one in self.processes:
            with open(f"/proc/{one.outside}/task/{one.outside}/children", "rb") as file:
                if any(int(child) not in known for child in file.read().split()):
                    name = process_files.label(one.outside)
                    self.passing.append(f"{name} has a child that has ended, and has not taken its status")

    def _shared(self) -> None:
        """Processes that share memory, descriptors or directories: a copy would separate them."""
        for position, one in enumerate(self.processes):
            for other in self.processes[:position]:
                for kind, what in ((_KCMP_VM, "memory"), (_KCMP_FILES, "descriptors"), (_KCMP_FS, "directories")):
                    if _kcmp(one.outside, other.outside, kind, 0, 0):
                        name = process_files.label(one.outside)
                        self.problems.append(f"{name} shares its {what} with another process")
                        return


def _of_process(status: Dictionary[str, str], fields: Sequence[str], pid: int) -> list[str]:
    problems = []
    own = int(process_files.status(os.getpid()).get("Seccomp_filters", "0"))  # of a container, which a copy has too
    if status.get("NoNewPrivs") != "1" or status.get("Seccomp_filters") != str(own + 1):
        problems.append("has a system call filter of its own")
    inheritable, permitted, effective, bounding, ambient = capabilities(status)
    if ambient or (inheritable | permitted | effective | bounding) & ~child_setup.CAPABILITIES:
        problems.append("has capabilities that programs of a sandbox do not have")
    with open(f"/proc/{pid}/timers", encoding="utf-8", errors="replace") as file:
        if file.read(1):
            problems.append("has timers of timer_create")
    if int(fields[41 - 3]):
        problems.append("has a scheduling policy of its own")
    return problems


_OF_ALL_THREADS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
                   "Seccomp_filters")  # fmt: skip


def _of_thread(pid: int, tid: int, first: Dictionary[str, str]) -> list[str]:
    """Reasons against a copy of a thread other than the first one."""
    problems = []
    status, fields = process_files.status(tid), _stat(tid)
    if any(status.get(name) != first.get(name) for name in _OF_ALL_THREADS):
        problems.append("has threads with different rights")
    if int(fields[41 - 3]):
        problems.append("has threads with a scheduling policy of their own")
    if not all(_kcmp(pid, tid, kind, 0, 0) for kind in (_KCMP_FILES, _KCMP_FS)):
        problems.append("has threads with descriptors or directories of their own")
    return problems


def capabilities(status: Dictionary[str, str]) -> list[int]:
    """Inheritable, permitted, effective, bounding, ambient."""
    return [int(status.get(name, "0"), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


def parent(pid: int) -> int:
    """The parent of a process, outside."""
    return int(_stat(pid)[4 - 3])


def comm(pid: int) -> str:
    """The name of a process, which may have any bytes."""
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read().removesuffix("\n")


def inside(pid: int) -> int:
    """The number of a process or thread in its innermost pid namespace."""
    return int(process_files.status(pid)["NSpid"].split()[-1])


def _can_be_shared(one: Description) -> bool:
    """Whether processes can share it. A file that each opens again must have no position: only appended to, O_PATH, or
    a device."""
    if one.kind not in ("file", "epoll"):
        return True
    appended = os.O_WRONLY | os.O_APPEND
    return bool(one.flags & os.O_PATH) or one.flags & appended == appended or one.path in ("/dev/null", "/dev/zero")


def _epoll(pid: int, number: int, flags: int) -> Description | str:
    """An epoll instance, with the descriptors that it watches."""
    watched = []
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
        for line in file:
            if not line.startswith("tfd:"):
                continue
            fields = line.replace(":", " ").split()
            target, events, data = int(fields[1]), int(fields[3], 16), int(fields[5], 16)
            slot = ctypes.create_string_buffer(struct.pack("=III", number, target, 0), 12)
            if not os.path.lexists(f"/proc/{pid}/fd/{target}") \
                    or not _kcmp(pid, pid, _KCMP_EPOLL, target, ctypes.addressof(slot)):
                return "an epoll instance that watches a file that has no descriptor"
            watched.append((target, events, data))
    if len({target for target, _, _ in watched}) != len(watched):
        return "an epoll instance that watches a descriptor twice"
    return Description("epoll", flags, watched=watched)


def _unread(link: str) -> state.Pipe:
    """The capacity and the unread bytes of a pipe, which stay in it."""
    fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        count = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
        if not count or capacity > _MOST_PIPE:
            return state.Pipe(capacity, b"")
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, max(capacity, 1 << 16))
            copied = int(_libc.tee(fd, writing, ctypes.c_size_t(count), 0))
            data = os.read(reading, count) if copied > 0 else b""
            if len(data) != count:
                raise OSError(5, "the content of a pipe cannot be read")
            return state.Pipe(capacity, data)
        finally:
            os.close(reading)
            os.close(writing)
    finally:
        os.close(fd)


def same_file(pid: int, number: int, other: int, twin: int) -> bool:
    """Whether two descriptors are of the same open file description."""
    return _kcmp(pid, other, _KCMP_FILE, number, twin)


def _kcmp(pid: int, other: int, kind: int, first: int, second: int) -> bool:
    return int(_libc.syscall(*(ctypes.c_long(value) for value in (_KCMP, pid, other, kind, first, second)))) == 0


# ---- unix sockets, as the kernel reports them (sock_diag) ----


class UnixSocket(NamedTuple):
    """A connected socket without a name. peer: the inode of its peer. waiting: bytes or messages that were not read."""

    kind: int
    peer: int
    waiting: int


class UnixSockets:
    """The sockets of the network namespace of a process."""

    def __init__(self, pid: int) -> None:
        """OSError."""
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            theirs = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.setns(theirs, kernel.CLONE_NEWNET)
                try:
                    self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG)
                finally:
                    kernel.setns(own, kernel.CLONE_NEWNET)
            finally:
                os.close(theirs)
        finally:
            os.close(own)
        self._sock.settimeout(_SOCKET_PATIENCE)

    def close(self) -> None:
        self._sock.close()

    def get(self, inode: int) -> UnixSocket | None:
        """A connected socket that is one end of a pair; None for any other. OSError."""
        body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _SHOW, _ANY_COOKIE, _ANY_COOKIE)
        self._sock.send(struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST, 0, 0) + body)
        data = self._sock.recv(4096)
        if len(data) < 32 or struct.unpack_from("=H", data, 4)[0] == _ERROR:
            return None  # not of this family, or closed
        _, kind, status, _, number = struct.unpack_from("=BBBBI", data, 16)
        found: dict[int, bytes] = {}
        place = 32
        while place + 4 <= len(data):
            length, attribute = struct.unpack_from("=HH", data, place)
            if length < 4:
                break
            found[attribute] = data[place + 4 : place + length]
            place += (length + 3) & ~3
        if number != inode or status != _ESTABLISHED or _PEER not in found or found.get(_NAME):
            return None
        if any(found.get(_SHUTDOWN, b"")):
            return None
        return UnixSocket(kind, struct.unpack("=I", found[_PEER])[0], struct.unpack_from("=I", found[_QUEUES])[0])
