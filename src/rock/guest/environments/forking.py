"""Forks of an environment's process: the checks before a fork, the processes, and new seeds.

`os.fork` copies memory, and nothing that other processes or the kernel hold. An environment with threads, processes,
connections or shared memory would therefore not continue as its parent: it is refused before any change, unless it
declares `fork_safe = True`.

The copies must not be children of the environment, which may end before them and may wait for its own children. So an
intermediate process forks them and ends, and the kernel makes them children of the zygote, which is a subreaper.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import random
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from rock.guest.environments import frames

_LIBRARIES = ("torch", "jax", "tensorflow", "cupy")
_HARMLESS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_CREATION = os.O_CREAT | os.O_EXCL | os.O_TRUNC
_PACKET = 1 << 14
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MOST_NAMED = 5  # causes of one kind that a refusal lists


class Unforkable(Exception):
    """The environment cannot be forked; the text states the cause."""


def die_with_parent() -> None:
    """Have the kernel kill this process with its parent: a pipe of its own does not close with the zygote."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> bool:
    """Become the parent of processes whose parent ends. False where the kernel does not support it."""
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


# ---- checks ----


def check(layers: list[Any], own: set[int]) -> None:
    """Raise Unforkable, with the cause, unless a fork of this process continues as its parent. layers: of the
    environment, see hosting.py; own: descriptors of the host, which a fork replaces."""
    if any(getattr(layer, "fork_safe", False) is True for layer in layers):
        return
    maps = _lines("/proc/self/maps")
    causes = (_threads(), _libraries(maps), _processes(), _descriptors(own), _mappings(maps))
    found = "; ".join(cause for cause in causes if cause)
    if found:
        raise Unforkable(f"the environment cannot be forked: {found}")


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{what} ({', '.join(names[:_MOST_NAMED])}{more})" if names else ""


def _threads() -> str:
    try:
        tasks = [task for task in os.listdir("/proc/self/task") if int(task) != threading.get_native_id()]
    except OSError:
        return "" if threading.active_count() == 1 else f"it has {threading.active_count()} threads"
    names = ["".join(_lines(f"/proc/self/task/{task}/comm")) or task for task in tasks]
    return _named(f"it has {len(tasks) + 1} threads, and only the calling one survives a fork", names)


def _libraries(maps: list[str]) -> str:
    loaded = [name for name in _LIBRARIES if name in sys.modules]
    loaded += ["CUDA"] if any("/libcuda.so" in line for line in maps) else []
    return _named("it has loaded libraries whose state does not survive a fork", loaded)


def _processes() -> str:
    """Running children, and other processes of its group."""
    here, found = os.getpid(), []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == here:
            continue
        fields = "".join(_lines(f"/proc/{entry}/stat")).rpartition(")")
        status = fields[2].split()
        if len(status) > 2 and status[0] not in "ZX" and (int(status[1]) == here or int(status[2]) == here):
            found.append(f"{entry} {fields[0].partition('(')[2]}")
    return _named("it has processes, which a fork would share", found)


def _opened(own: set[int]) -> list[tuple[int, os.stat_result]]:
    """Descriptors of the environment itself."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        if fd in own or fd in (0, 1, 2, frames.MEMORY):
            continue
        try:
            found.append((fd, os.fstat(fd)))
        except OSError:
            continue  # that of the listing
    return found


def _descriptors(own: set[int]) -> str:
    """Descriptors whose state is the kernel's: pipes, sockets, event loops, devices."""
    shared = []
    for fd, status in _opened(own):
        target = _target(fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode) and target not in _HARMLESS:
            shared.append(f"{fd} {target}")
    return _named("it has descriptors that a fork would share", shared)


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "unknown"


def _mappings(maps: list[str]) -> str:
    """Writable shared memory, except the part for large responses."""
    try:
        own = str(os.fstat(frames.MEMORY).st_ino)
    except OSError:
        own = ""
    shared = []
    for line in maps:
        fields = line.split(maxsplit=5)
        if len(fields) > 4 and fields[1][1] == "w" and fields[1][3] == "s" and fields[4] != own:
            shared.append(fields[5] if len(fields) > 5 else "anonymous")
    return _named("it has memory that a fork would share", shared)


# ---- processes ----


class ChildPipes:
    """The descriptors of a child to be: `control` is its end of a socket to the zygote, which carries its requests too
    unless it has `requests` and `answers`; offset: of its part of the shared memory."""

    def __init__(self, report: dict[str, Any], fds: list[int]) -> None:
        self.number: int = report["number"]
        self.offset: int | None = report["offset"]
        self.fds = fds
        self.parents = (0, 0)  # of its process: the first one, and the one that replaces it
        self.control, self.stderr = fds[:2]
        self.requests = fds[2] if len(fds) > 2 else self.control
        self.answers = fds[3] if len(fds) > 3 else None

    def tell(self, report: dict[str, Any]) -> None:
        """Report to the zygote: {} that the process serves, or the error in its place. The zygote may have given up."""
        with contextlib.suppress(OSError):
            os.write(self.control, json.dumps(report).encode())

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def part(self) -> mmap.mmap | None:
        """Its part of the shared memory; None without one."""
        try:
            return None if self.offset is None else mmap.mmap(frames.MEMORY, frames.PART, offset=self.offset)
        except (OSError, ValueError):
            return None


def receive(control: int, count: int) -> list[ChildPipes] | None:
    """The descriptors of `count` children, from the zygote; without those that it could not send. None when the zygote
    has ended."""
    found = []
    with socket.socket(fileno=os.dup(control)) as source:
        for _ in range(count):
            data, fds, _, _ = socket.recv_fds(source, _PACKET, 4, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return None
            report = json.loads(data)
            if len(fds) == report["fds"]:
                found.append(ChildPipes(report, list(fds)))
            else:  # too many open files; the zygote sees the end of the socket
                for fd in fds:
                    os.close(fd)
    return found


def fork(children: list[ChildPipes], failed: Any) -> ChildPipes | None:
    """Fork one process for each of the children. Returns None in the parent, and in each child its descriptors.

    failed: called with a child and the OSError when its process cannot be started.
    """
    zygote = os.getppid()
    state = random.getstate()  # Python's random module draws a new seed in every forked process
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pid = os.fork()
    except OSError as error:
        for child in children:
            failed(child, error)
        return None
    if pid:
        with contextlib.suppress(ChildProcessError):  # the environment ignores SIGCHLD, or has waited for it
            os.waitpid(pid, 0)
        return None
    try:
        intermediate = os.getpid()
        for child in children:
            try:
                pid = os.fork()
            except OSError as error:
                failed(child, error)
                continue
            if pid == 0:
                random.setstate(state)
                child.parents = intermediate, zygote
                _start(child, children)
                return child
    except BaseException:
        os._exit(1)
    os._exit(0)


def _start(child: ChildPipes, children: Iterable[ChildPipes]) -> None:
    os.setpgid(0, 0)
    os.dup2(child.stderr, 1)
    os.dup2(child.stderr, 2)
    for other in children:
        if other is not child:
            other.close()


def wait_for_adoption(child: ChildPipes) -> None:
    """In a child: wait until the zygote is its parent, then end with it."""
    intermediate, zygote = child.parents
    while os.getppid() == intermediate:
        time.sleep(0.0005)
    die_with_parent()
    if os.getppid() != zygote:
        os._exit(1)


def reopen(own: set[int]) -> None:
    """In a child: give regular files a position of their own, which a fork would share."""
    for fd, status in _opened(own):
        if not stat.S_ISREG(status.st_mode):
            continue
        flags, inheritable = _flags(fd), os.get_inheritable(fd)
        position = os.lseek(fd, 0, os.SEEK_CUR)
        new = os.open(f"/proc/self/fd/{fd}", (flags & ~_CREATION) | os.O_CLOEXEC)
        os.lseek(new, position, os.SEEK_SET)
        os.dup2(new, fd, inheritable)
        os.close(new)


def _flags(fd: int) -> int:
    """The flags of an open file."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return int(file.read().partition(b"flags:")[2].split()[0], 8)


# ---- seeds ----


def reseed(layers: list[Any]) -> None:
    """Draw new seeds: for the global random state of Python and numpy, and for each generator that the environment
    holds anywhere. An environment with generators of other kinds defines `reseed(seed)`."""
    random.seed()
    generators: tuple[type, ...] = (random.Random,)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
        generators += (numpy.random.Generator, numpy.random.RandomState)
    held = [found for found in gc.get_objects() if issubclass(type(found), generators)]
    for layer in layers:  # these may be older than the zygote's last collection, which hides them
        held += [value for value in getattr(layer, "__dict__", {}).values() if issubclass(type(value), generators)]
    for generator in held:
        bits = getattr(generator, "bit_generator", None)
        if bits is not None:
            bits.state = type(bits)().state
        elif not isinstance(generator, random.SystemRandom):
            generator.seed()
    for layer in layers:
        if callable(getattr(type(layer), "reseed", None)):
            layer.reseed(int.from_bytes(os.urandom(4), "big"))
