"""Starts the processes of a tree in a sandbox, each with its number inside, as copies of this process.

    this process ── clone ──► entrant: cgroups, namespaces ── clone ──► first process of each program ── clone ──► ...
                                 └── exits, so that pid 1 is the parent

All of them run only this code, and wait. `rebuild` then replaces their memory. Their own descriptors are above all that
a process of the guest has. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rock.guest.init import process_tree
from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.limits import cgroups
from rock.runtime.namespace.processes import capture, state
from rock.runtime.namespace.processes.state import Process, Tree

_CLONE3 = 435
_PR_SET_DUMPABLE = 4
_HIGHEST_PID = 4_000_000
_DONTFORK, _DOFORK = 10, 11  # of madvise
_PATIENCE = 20.0  # seconds
_CHOSEN = b"chosen"
_NAMESPACES = (kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET
               | kernel.CLONE_NEWCGROUP)  # fmt: skip
_clone3 = ctypes.PyDLL(None, use_errno=True).syscall
_clone3.restype = ctypes.c_long


class Failed(Exception):
    """The processes could not be started in the sandbox."""


class Target(NamedTuple):
    """The sandbox: its pid 1 outside with its start time, and its cgroups."""

    pid: int
    start: int
    cgroups: Sequence[str]


class Waiting(NamedTuple):
    """A waiting process. handed: the descriptors that it has for descriptions, by index. outside: its number here."""

    process: Process
    outside: int
    handed: Mapping[int, int]
    lowest: int  # all its descriptors are from here on


def clone(pid: int) -> int:
    """Fork a process that gets this number in the innermost pid namespace: 0 in the child, the number in the
    parent. Only for a process with one thread. OSError."""
    numbers = (ctypes.c_int * 1)(pid)
    fields = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(numbers), 1, 0)
    arguments = ctypes.create_string_buffer(fields, 88)
    made = int(_clone3(ctypes.c_long(_CLONE3), arguments, ctypes.c_long(88)))
    if made < 0:
        raise OSError(ctypes.get_errno(), f"clone3: {os.strerror(ctypes.get_errno())}")
    return made


class Entrant:
    """The process that starts the others. It stays until `close`, to choose the numbers of threads."""

    def __init__(self) -> None:
        self.pid = 0
        self.sync, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sync.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.control, self.numbers = os.pipe2(os.O_CLOEXEC)

    def choose(self, number: int) -> None:
        """The next new process or thread in the sandbox gets this number, if it is free. Failed."""
        os.write(self.numbers, struct.pack("=Q", number))
        self.sync.settimeout(_PATIENCE)
        if self.sync.recv(4096) != _CHOSEN:
            raise Failed("the number of a thread cannot be chosen")

    def started(self) -> None:
        """Close what only the other processes use."""
        self.theirs.close()
        os.close(self.control)
        self.control = -1

    def end(self) -> None:
        """End it without waiting for that, once no more numbers are chosen. Idempotent."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it. While it were not reaped, the pid namespace could not end. Idempotent."""
        self.sync.close()
        self.theirs.close()
        for fd in (self.control, self.numbers):
            if fd >= 0:
                os.close(fd)
        self.control = self.numbers = -1
        if self.pid:
            self.end()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0


def start(tree: Tree, target: Target, descriptors: Mapping[int, int], gate: int, memory: int,
          entrant: Entrant) -> list[Waiting]:
    """Start the processes of a tree. memory: the address of its pages in this process. descriptors: ours, by index of
    the description. gate: the reading end of a pipe; processes that are not rebuilt exit when its other end closes.
    Failed, OSError; nothing is left then."""
    init = os.pidfd_open(target.pid)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = process_tree.read(target.pid)
        if entry is None or entry.start != target.start:
            raise Failed("its pid 1 has ended")
        lowest = 3 + max((number for one in tree.processes for number, _, _ in one.descriptors), default=0)
        number = _free_number(tree)
        kernel.setns(init, kernel.CLONE_NEWPID)
        try:
            entrant.pid = clone(number)
            if entrant.pid == 0:
                _enter(tree, target, memory, init, entrant, gate, descriptors, lowest)
        finally:  # the entrant never gets here
            kernel.setns(own, kernel.CLONE_NEWPID)
        entrant.started()
        outside = _receive(entrant.sync, len(tree.processes))
        handed = {index: lowest + place for place, index in enumerate(sorted(descriptors))}
        return [Waiting(one, outside[one.pid], handed, lowest) for one in tree.processes]
    finally:
        os.close(init)
        os.close(own)


def _free_number(tree: Tree) -> int:
    """A number that no process of the tree has, and that a new sandbox does not use."""
    used = {number for one in tree.processes for number in (one.pid, *(thread.tid for thread in one.threads))}
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        number = min(int(file.read()), _HIGHEST_PID) - 1
    while number in used:
        number -= 1
    return number


def _receive(ours: socket.socket, count: int) -> dict[int, int]:
    """The numbers of all processes outside, by those inside. Failed with their reason."""
    found: dict[int, int] = {}
    end = time.monotonic() + _PATIENCE
    while len(found) < count:
        ours.settimeout(max(0.01, end - time.monotonic()))
        try:
            data, extra, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError:
            raise Failed("the processes do not start in time") from None
        if not data:
            raise Failed("a process ended while it started")
        if data.startswith(b"!"):
            raise Failed(data[1:].decode("utf-8", "replace"))
        for level, kind, credentials in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                found[int(data)] = struct.unpack("iII", credentials[:12])[0]
    return found


# ---- in the new processes; none of these functions returns ----


def _enter(tree: Tree, target: Target, memory: int, init: int, entrant: Entrant, gate: int,
           descriptors: Mapping[int, int], lowest: int) -> None:
    """The entrant: enters the sandbox, starts the first process of each program, and chooses numbers of threads."""
    sync = entrant.theirs.fileno()
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(_PR_SET_DUMPABLE, 0)  # PR_SET_DUMPABLE: the guest cannot inspect it
        for folder in dict.fromkeys(target.cgroups):
            cgroups.write(f"{folder}/cgroup.procs", "0")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        last = os.open("/proc/sys/kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC)
        own = [sync, gate, init, entrant.control, last]
        fds = _move([*(descriptors[index] for index in sorted(descriptors)), *own], lowest)
        sync, gate, init, control, last = fds[-5:]
        kernel.setns(init, _NAMESPACES)
        for one in tree.processes:
            if one.parent == 1 and _fork(one, tree, memory) == 0:
                _become(one, tree, memory, init, sync, gate)
        answers = socket.socket(fileno=sync)
        while data := os.read(control, 8):
            os.pwrite(last, str(struct.unpack("=Q", data)[0] - 1).encode(), 0)
            answers.send(_CHOSEN)
        os._exit(0)
    except BaseException as error:
        _report(sync, error)


def _move(fds: Sequence[int], lowest: int) -> list[int]:
    """Place these descriptors from `lowest` on, and close all others."""
    high = max(lowest, *fds) + 1 + len(fds)
    for place, fd in enumerate(fds):
        os.dup2(fd, high + place, inheritable=False)
    for place in range(len(fds)):
        os.dup2(high + place, lowest + place, inheritable=False)
    kernel.close_from(lowest + len(fds))
    os.closerange(0, lowest)
    return [lowest + place for place in range(len(fds))]


def _fork(one: Process, tree: Tree, memory: int) -> int:
    """Fork a process, which gets only the memory that it and its descendants need: that saves page tables."""
    own, needed = _family(one.parent, tree), _family(one.pid, tree)
    others = [span for each in tree.processes if each.pid in own - needed and (span := state.span(each))]
    for start, end in others:
        capture.advise(memory + start, end - start, _DONTFORK)
    pid = clone(one.pid)
    for start, end in others if pid else ():  # a failure ends all of them
        capture.advise(memory + start, end - start, _DOFORK)
    return pid


def _family(pid: int, tree: Tree) -> set[int]:
    """A process with its descendants."""
    found = {pid}
    for each in tree.processes:  # parents first
        if each.parent in found:
            found.add(each.pid)
    return found


def _become(one: Process, tree: Tree, memory: int, init: int, sync: int, gate: int) -> None:
    """A process of the tree: sets what has an order, starts its children, enters the user namespace, and waits."""
    try:
        if one.session == one.pid:
            os.setsid()
        elif one.group == one.pid:
            os.setpgid(0, 0)
        for child in tree.processes:
            if child.parent == one.pid and _fork(child, tree, memory) == 0:
                _become(child, tree, memory, init, sync, gate)
        os.setpriority(os.PRIO_PROCESS, 0, one.nice)
        kernel.setns(init, kernel.CLONE_NEWUSER)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        kernel.prctl(_PR_SET_DUMPABLE, 0)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 0)
        sock = socket.socket(fileno=sync)
        sock.send(str(os.getpid()).encode())
        os.read(gate, 1)  # until it is rebuilt, or the other side ends
        os._exit(1)
    except BaseException as error:
        _report(sync, error)


def _report(sync: int, error: BaseException) -> Any:
    try:
        socket.socket(fileno=sync).send(f"!{error}"[:1000].encode())
    finally:
        os._exit(1)
