"""Forks in place: a stopped process of a sandbox is cloned by an injected call, and the clone, which never runs code of
the guest, keeps its memory as it was. So the original continues before its pages are copied.

    original ── injected clone ──► duplicate, stopped and traced ── process_vm_readv ──► template
        └── continues                    └── killed when its pages are copied, or with its tracer

The duplicate is a child of pid 1, which takes its status, and no process of the guest is its parent. It has no
descriptors, and processes of the guest cannot access its memory. They can see and kill it: then its pages are not
used. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rock.runtime.namespace.launcher import ptrace, syscall_list
from rock.runtime.namespace.processes import address_space
from rock.runtime.namespace.processes.address_space import Range

LEAST = 16 << 20  # bytes of own pages from which on a process is forked in place
_SLACK = 16 << 20  # bytes that stay free below the limit of a sandbox
_PAGE = os.sysconf("SC_PAGESIZE")
_NUMBERS = syscall_list.NUMBERS["x86_64"]
_CLONE_PARENT = 0x8000
_SETOPTIONS, _EXITKILL = 0x4200, 0x100000
_PR_SET_DUMPABLE = 4
_HIGHEST_FD = 0xFFFFFFFF
_WALL = 0x40000000
_PATIENCE = 2.0  # seconds


class Vanished(Exception):
    """A duplicate was killed before its pages were copied."""


class Duplicate:
    """A duplicate of a process: its number outside, and that of the original. The caller is its tracer."""

    def __init__(self, process: ptrace.Injection) -> None:
        """Clone a stopped process. OSError when it cannot be cloned, such as at a limit of processes; nothing is left
        then, and the original is unchanged."""
        self.original = process.pid
        # Its parent is that of the original, which is pid 1. If this process ends before the next line, the duplicate
        # gets a segmentation fault at its first instruction: it has no stack and blocks all signals.
        self.pid = process.clone(_CLONE_PARENT)
        try:
            _await(self.pid)
            ptrace.call(_SETOPTIONS, self.pid, 0, _EXITKILL)
            with open(f"/proc/{self.pid}/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
            process.step(self.pid, _NUMBERS["prctl"], _PR_SET_DUMPABLE, 0, 0, 0, 0)
            process.step(self.pid, _NUMBERS["close_range"], 0, _HIGHEST_FD, 0)
        except BaseException:
            self.end()
            raise

    def pages(self, mapped: Sequence[address_space.Mapping]) -> list[Range]:
        """The ranges of its own pages. mapped: the mappings of the original. OSError."""
        return address_space.own_pages(self.pid, mapped)

    def check(self) -> None:
        """Vanished if it was killed. What was read of it before is then not used: the kernel may have removed pages."""
        if not self.pid:
            raise Vanished("the duplicate of a process was killed")
        found, status = os.waitpid(self.pid, _WALL | os.WNOHANG)
        if found and not os.WIFSTOPPED(status):
            self.pid = 0
            raise Vanished("the duplicate of a process was killed")

    def end(self) -> None:
        """Kill it. Idempotent."""
        pid, self.pid = self.pid, 0
        if not pid:
            return
        with contextlib.suppress(OSError):
            found, status = os.waitpid(pid, _WALL | os.WNOHANG)
            if found and not os.WIFSTOPPED(status):
                return
            os.kill(pid, signal.SIGKILL)  # not reused: its tracer has not taken its status
            while os.WIFSTOPPED(os.waitpid(pid, _WALL)[1]):
                pass


def _await(pid: int) -> None:
    """Wait for the first stop of a new tracee. OSError."""
    end = time.monotonic() + _PATIENCE
    while True:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(3, "the duplicate of a process was killed")
            return
        if time.monotonic() > end:
            raise TimeoutError(110, "the duplicate of a process does not stop")
        time.sleep(0)


class Room(NamedTuple):
    """How much memory a sandbox may still use: its limit, and what its processes and its files in memory use."""

    limit: int
    used: int

    def fits(self, size: int) -> bool:
        """Whether the original may write to all pages of a duplicate of this size, and gets new ones for them."""
        return not self.limit or self.used + size + _SLACK <= self.limit


def room(first: int, pids: Iterable[int], limit: int) -> Room:
    """first: pid 1 of the sandbox. pids: its other processes. limit: in bytes; 0 is none."""
    used = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
            used += (int(fields[1]) - int(fields[2])) * _PAGE
    with contextlib.suppress(OSError):
        info = os.statvfs(f"/proc/{first}/root/dev/shm")
        used += (info.f_blocks - info.f_bfree) * info.f_frsize
    return Room(limit, used)
