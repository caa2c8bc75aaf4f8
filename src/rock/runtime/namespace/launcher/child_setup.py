"""Setup that pid 1 performs itself: wait until its namespaces are furnished, drop privileges, serve.

Privileges are dropped by a list of system calls that needs no Python (zygote.py); `plan` writes it. Standard library
only.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import resource
import signal
import socket
import struct
from typing import Any, NamedTuple

from rock.guest.init import native, pid1, programs, syscalls
from rock.guest.init.sharing import PageSharing
from rock.guest.init.users import User
from rock.runtime.namespace.launcher import kernel, userns
from rock.runtime.namespace.launcher.mounts import HOST_NAME
from rock.runtime.namespace.launcher.zygote import OPTIONAL, Area, First, Row
from rock.runtime.namespace.limits import cgroups

# chown, dac_override, fowner, fsetid, kill, setgid, setuid, net_bind_service, sys_chroot
CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
LAST_CAPABILITY = int(cgroups.read_text("/proc/sys/kernel/cap_last_cap") or 40)
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 24, 38, 4
_HAS_CGROUPS = os.path.exists("/proc/self/ns/cgroup")
_NO_CALL = 0xFFFFF  # until the gate opens, which writes the real number
_CLOSE_RANGE = 436
_LAST_FD = 0xFFFFFFFF
_PROC_FD = 1
_AT_FDCWD = -100
_FREE_LOWEST = ((_CLOSE_RANGE, 0, _PROC_FD),)  # descriptors 0 and 1 are then the next free ones
_PATIENCE = 20.0  # seconds


class Descriptors(NamedTuple):
    """The launcher's descriptors that pid 1 uses.

    listener: its socket.
    ready: the socket on which it reports readiness.
    gate: the pipe that lets it continue, and the launcher's end of the pipe.
    userns: its user namespace.
    lease: holds the lock on its image's layers for its lifetime; -1 where the layers are never removed.
    net: the network namespace to enter; -1 for its initial one.
    sockets: its egress sockets; pid 1 retains them for the next server.
    streams: of its first program: the ends of the program, then those that pid 1 retains; empty without one.
    connection: of the server, where there is a first program; else -1.
    data: of the first program; -1 where it has none.
    """

    listener: int
    ready: int
    gate: tuple[int, int]
    userns: int
    lease: int = -1
    net: int = -1
    sockets: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()
    connection: int = -1
    data: int = -1

    @property
    def pages(self) -> int:
        """An unused descriptor number, for its own page table."""
        return 1 + max(self.listener, self.ready, *self.gate, self.userns, self.lease, self.net, *self.sockets,
                       *self.streams, self.connection, self.data)

    @property
    def kept(self) -> set[int]:
        """Those that pid 1 has when it drops the others."""
        return {self.listener, self.ready, self.lease, self.pages, *self.sockets, *self.streams,
                self.connection, self.data} - {-1}


class Constants:
    """Memory that the calls point to. Allocated before the zygote starts, so its address is the same in every child."""

    def __init__(self, bpf: bytes) -> None:
        self.loopback = ctypes.create_string_buffer(kernel.LOOPBACK_UP, len(kernel.LOOPBACK_UP))
        self.proc = ctypes.create_string_buffer(b"proc")
        self.byte = ctypes.create_string_buffer(b"p", 1)
        self.vector = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(self.byte), 1), 16)
        self.control = ctypes.create_string_buffer(
            struct.pack("Qiii4x", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, _PROC_FD), 24)
        self.message = ctypes.create_string_buffer(
            struct.pack("QQQQQQQ", 0, 0, ctypes.addressof(self.vector), 1, ctypes.addressof(self.control), 24, 0), 56)
        self.mounts = ctypes.create_string_buffer(b"1/ns/mnt")
        self.pagemap = ctypes.create_string_buffer(b"1/pagemap")
        self.null = ctypes.create_string_buffer(b"/dev/null")
        self.filter = ctypes.create_string_buffer(bpf, max(1, len(bpf)))
        self.program = ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", len(bpf) // 8, ctypes.addressof(self.filter)), 16) if bpf else None
        self.capability_header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
        low, high = CAPABILITIES & 0xFFFFFFFF, CAPABILITIES >> 32
        self.capabilities = ctypes.create_string_buffer(struct.pack("=IIIIII", low, low, 0, high, high, 0), 24)
        self.zeros = ctypes.create_string_buffer(64)  # also: the default action of a signal, no signals, no core file
        self.slices = ctypes.create_string_buffer(syscalls.short_slices(), 48)
        self.score_file = ctypes.create_string_buffer(f"/proc/{_FIRST_PID}/oom_score_adj".encode())
        self.score = ctypes.create_string_buffer(programs.OOM_SCORE)


def plan(area: Area, constants: Constants, fds: Descriptors, spec: dict[str, Any]) -> None:
    """Write the calls of a pid 1 into its area, in order."""
    number = kernel.NUMBERS
    rows = area.rows
    rows += [("the launcher's end", (number["prctl"], kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL))),
             # the gate closes with the launcher, if that died before the call above
             ("the launcher's end", (_CLOSE_RANGE, fds.gate[1], fds.gate[1])),
             ("session", (number["setsid"],)),
             ("socket", (number["listen"], fds.listener, 16))]
    if fds.net >= 0:
        rows.append(("network", (number["setns"], fds.net, kernel.CLONE_NEWNET)))
    elif spec["network"] == "none":
        rows += [("network", call) for call in _loopback(constants)]
    rows.append(("its own names", (number["sethostname"], area.put(HOST_NAME.encode()), len(HOST_NAME))))
    rows += [("its own /proc", call) for call in _proc(constants)]
    if fds.net < 0 and spec["network"] == "none":
        rows += [("network", call) for call in _network(area, spec["privileged"])]
    pages = str(spec["shared"] // resource.getpagesize()).encode()
    rows += [("shared memory", call) for call in _setting(area, b"kernel/shmall", pages)]
    rows.append(("its own /proc", (number["sendmsg"], fds.ready, ctypes.addressof(constants.message), 0)))
    rows += _pages(constants, fds.pages)
    rows += [("root folder", (_CLOSE_RANGE, 0, 0)),
             ("root folder", (number["openat"], _PROC_FD, ctypes.addressof(constants.mounts), os.O_RDONLY))]
    gate = area.row(len(rows) + 1)
    rows += [("waiting for its files", (number["read"], fds.gate[0], gate, 8)),
             ("waiting for its files", (_NO_CALL,)),
             ("root folder", (number["setns"], 0, kernel.CLONE_NEWNS))]  # to the overlay, which now covers the root
    if _HAS_CGROUPS:  # also without limits of its own: a sandbox must not see the names of the host's cgroups
        rows.append(("cgroup namespace", (number["unshare"], kernel.CLONE_NEWCGROUP)))
    rows.append(("user namespace", (number["setns"], fds.userns, kernel.CLONE_NEWUSER)))
    if spec["privileged"]:
        rows.append(("groups", (number["setgroups"], 0, 0)))
    rows += [("user", (number["setresgid"], 0, 0, 0)), ("user", (number["setresuid"], 0, 0, 0))]
    rows += [("capabilities", (number["prctl"], _PR_CAPBSET_DROP, capability))
             for capability in range(LAST_CAPABILITY + 1) if not CAPABILITIES >> capability & 1]
    rows += [
        ("capabilities", (number["capset"], ctypes.addressof(constants.capability_header),
                          ctypes.addressof(constants.capabilities))),
        ("no new privileges", (number["prctl"], _PR_SET_NO_NEW_PRIVS, 1)),
        ("privacy", (number["prctl"], _PR_SET_DUMPABLE, 0)),
    ]
    if constants.program is not None:
        rows.append(("system call filter", (number["seccomp"], 1, 0, ctypes.addressof(constants.program))))
    rows += [("descriptors", call) for call in _descriptors(constants, fds.kept)]
    rows.append(("the launcher's end", (number["prctl"], kernel.PR_SET_PDEATHSIG, 0)))
    if fds.streams:
        rows += [("first program", call) for call in _before_program(constants)]


# ---- the first program ----
#
# The calls of `plan_program` do what guest/init/programs.py does for later programs, and those of `_before_program` do
# what pid 1 does before it starts one.

_FIRST_PID = 2  # of the first process after pid 1 in a new pid namespace
_KEEP_CLOSED = 4  # CLOSE_RANGE_CLOEXEC


def _before_program(constants: Constants) -> list[tuple[int, ...]]:
    number, zeros = kernel.NUMBERS, ctypes.addressof(constants.zeros)
    return [
        (number["umask"], 0o022),
        (number["prlimit64"], 0, resource.RLIMIT_CORE, zeros, 0),
        (number["rt_sigaction"], int(signal.SIGCHLD), zeros, 0, 8),  # the zygote ignores it, which would reap children
        (_CLOSE_RANGE, 3, _LAST_FD, _KEEP_CLOSED),
    ]


def _strings(area: Area, items: list[bytes]) -> int:
    """The address of a list of strings that ends with a null pointer."""
    addresses = [area.put(item) for item in items]
    return area.put(struct.pack(f"{len(addresses) + 1}Q", *addresses, 0))


def plan_program(area: Area, constants: Constants, fds: Descriptors, spec: dict[str, Any], path: str, user: User,
                 shared: tuple[int, int]) -> None:
    """Add the start of the first program to the area of a child that waits for its files. NoSpace.

    spec: of the sandbox; its program has the numbers of the descriptors, in the order of `fds.streams`, the arguments,
    the environment and the working directory. path: the program. shared: address and size of all areas.
    """
    number, zeros = kernel.NUMBERS, ctypes.addressof(constants.zeros)
    program = spec["program"]
    theirs = fds.streams[: len(program["numbers"])]
    words = [path, *program["arguments"]]
    variables = [f"{name}={value}" for name, value in {"HOME": user.home, **program["env"], "SHELL": path}.items()]
    calls: list[tuple[int, ...]] = [(number["rt_sigaction"], int(one), zeros, 0, 8) for one in native.HANDLED]
    calls += [(number["setsid"],), (number["prctl"], native.PR_SET_CHILD_SUBREAPER, 1)]
    for fd, wanted in zip(theirs, program["numbers"], strict=True):
        calls += [(number["dup3"], fd, one, 0) for one in wanted]
    if fds.data >= 0:
        calls.append((number["dup3"], fds.data, program["data"], 0))
        theirs = (*theirs, fds.data)
    if spec["privileged"] and program["user"]:
        calls += [(number["setgroups"], len(user.groups), area.put(struct.pack(f"{len(user.groups)}I", *user.groups))),
                  (number["setresgid"], user.gid, user.gid, user.gid),
                  (number["setresuid"], user.uid, user.uid, user.uid)]
    calls += [(number["chdir"], area.put(os.fsencode(program["cwd"]))),
              (number["rt_sigprocmask"], native.SETMASK, zeros, 0, 8),
              (number["execve"], area.put(os.fsencode(path)), _strings(area, [os.fsencode(word) for word in words]),
               _strings(area, [os.fsencode(one) for one in variables]))]
    score = ctypes.addressof(constants.score)
    free = next(fd for fd in itertools.count(3) if fd in theirs or fd not in fds.kept)
    after = [*((_CLOSE_RANGE, fd, fd) for fd in theirs),
             # after execve only: until then the program has the memory of pid 1, and its score
             (number["openat"], _AT_FDCWD, ctypes.addressof(constants.score_file), os.O_WRONLY | os.O_CLOEXEC),
             (number["write"], free, score, len(programs.OOM_SCORE)),
             (_CLOSE_RANGE, free, free)]
    slices = (number["sched_setattr"], 0, ctypes.addressof(constants.slices), 0)
    area.add_program([("first program", call) for call in calls], [(OPTIONAL, call) for call in (*after, slices)],
                     (fds.listener, fds.connection, fds.ready), shared)  # fmt: skip


def _loopback(constants: Constants) -> list[tuple[int, ...]]:
    return [
        *_FREE_LOWEST,
        (kernel.NUMBERS["socket"], int(socket.AF_INET), int(socket.SOCK_DGRAM), 0),
        (kernel.NUMBERS["ioctl"], 0, kernel.SIOCSIFFLAGS, ctypes.addressof(constants.loopback)),
    ]


def _network(area: Area, privileged: bool) -> list[tuple[int, ...]]:
    """Enable all ports and pings for every user: uid 0 inside has no rights over the network namespace."""
    groups = userns.IDS.ping_groups.encode() if privileged else b"0 0"
    return [*_setting(area, b"net/ipv4/ip_unprivileged_port_start", b"0"),
            *_setting(area, b"net/ipv4/ping_group_range", groups)]


def _setting(area: Area, name: bytes, value: bytes) -> list[tuple[int, ...]]:
    """Write a setting of one of its namespaces, through its own /proc.

    The /proc of the host retains an entry for each namespace that wrote a setting through it, in one list, which each
    later write searches.
    """
    return [(_CLOSE_RANGE, 0, 0),
            (kernel.NUMBERS["openat"], _PROC_FD, area.put(b"sys/" + name), os.O_WRONLY),
            (kernel.NUMBERS["write"], 0, area.put(value), len(value))]


def _proc(constants: Constants) -> list[tuple[int, ...]]:
    """Create a /proc as a detached mount at descriptor `_PROC_FD`, for its settings and for the launcher.

    Only a process of the new pid namespace can create it, and only while a complete /proc is visible in its mount
    namespace.
    """
    attributes = kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC
    return [
        *_FREE_LOWEST,
        (kernel.FSOPEN, ctypes.addressof(constants.proc), 0),
        (kernel.FSCONFIG, 0, kernel.FSCONFIG_CREATE, 0, 0, 0),
        (kernel.FSMOUNT, 0, 0, attributes),
    ]


def _pages(constants: Constants, number: int) -> list[Row]:
    """Open its own page table in that /proc, for guest/init/sharing.py: it shows which pages are private. The open must
    precede `privacy`, after which other processes cannot inspect this one."""
    name = ctypes.addressof(constants.pagemap)
    return [
        ("descriptors", (_CLOSE_RANGE, 0, 0)),
        ("descriptors", (_CLOSE_RANGE, number, number)),
        (OPTIONAL, (kernel.NUMBERS["openat"], _PROC_FD, name, os.O_RDONLY | os.O_CLOEXEC)),
        (OPTIONAL, (kernel.NUMBERS["dup3"], 0, number, os.O_CLOEXEC)),
    ]


class SetupFailed(Exception):
    """The error that pid 1 reports instead of continuing, as `live` writes it."""

    def __init__(self, message: bytes) -> None:
        super().__init__(message)
        self.message = message


def receive_proc(ready: socket.socket) -> int:
    """The /proc that pid 1 created. Raises when pid 1 reports a failure."""
    ready.settimeout(_PATIENCE)
    data, ancillary, _, _ = ready.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    for level, kind, fds in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return int(struct.unpack("i", fds[:4])[0])
    raise SetupFailed(data)


def open_gate(gate: int) -> None:
    """Let pid 1 continue. If the launcher dies instead, pid 1 reads no number and exits."""
    os.write(gate, struct.pack("q", kernel.NUMBERS["getpid"]))


def _descriptors(constants: Constants, keep: set[int]) -> list[tuple[int, ...]]:
    """Close all descriptors of the host except the listed ones; 0, 1 and 2 are the sandbox's own /dev/null."""
    null = ctypes.addressof(constants.null)
    calls: list[tuple[int, ...]] = [
        (_CLOSE_RANGE, 0, 2),
        (kernel.NUMBERS["openat"], -100, null, os.O_RDWR),
        (kernel.NUMBERS["dup3"], 0, 1, 0),
        (kernel.NUMBERS["dup3"], 0, 2, 0),
    ]
    lowest = 3
    for fd in sorted(keep):
        if fd > lowest:
            calls.append((_CLOSE_RANGE, lowest, fd - 1))
        lowest = fd + 1
    calls.append((_CLOSE_RANGE, lowest, _LAST_FD))
    return calls


_STREAMS = 8  # of the first program, both ends


def pack_note(fds: Descriptors, server: int) -> bytes:
    """Pack the data for pid 1: its descriptors and the server's user id as seen inside. native/zygote.c reads the
    output of the first program: the three before the last."""
    streams = [*fds.streams, *([-1] * (_STREAMS - len(fds.streams)))]
    return struct.pack("16q", fds.listener, fds.ready, server, *(fds.sockets or (-1, -1)), fds.pages, fds.connection,
                       *streams, fds.data)


def live(note: bytes, failed: int, sweep: PageSharing | None, first: First | None) -> None:
    """Continue in Python after the calls, as pid 1; never returns. `failed`: index of the failed call, or -1. `first`:
    what it did before it had work."""
    listener, ready, server, *found = struct.unpack_from("16q", note)
    sockets, pages, connection, streams, data = found[:2], found[2], found[3], found[4:12], found[12]
    if failed >= 0:
        os.write(ready, json.dumps({"row": failed}).encode())
        os._exit(1)
    try:
        one = pid1.prepare(socket.socket(fileno=listener), server, outside=True)
        one.sockets = [fd for fd in sockets if fd >= 0]
        if sweep is not None:
            one.share(sweep, pages)
        if first is not None:
            one.take_over(first.pid, streams[_STREAMS // 2 :], first.connection, bool(first.watching))
        elif connection >= 0:  # the server starts the program, and connects
            for fd in (connection, *streams, *([data] if data >= 0 else [])):
                os.close(fd)
        gc.freeze()
        if first is None:
            os.write(ready, b"{}")
            os.close(ready)
    except BaseException as error:
        if first is None:
            os.write(ready, json.dumps({"error": f"init: {error!r}"}).encode())
        os._exit(1)
    try:
        one.run()
    finally:
        os._exit(0)
