"""Enforces and measures limits of sandboxes: by cgroups, otherwise by monitoring, CPU affinity and rlimits.

`MemoryWatch` enforces memory limits on hosts without a memory cgroup."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rock.guest.init import process_tree
from rock.protocol.sandbox import SandboxConfig, Usage
from rock.runtime.base import Enforced
from rock.runtime.namespace.limits import cgroups

Watched = Mapping[int, tuple[int, Callable[[], None]]]

_MOST_FILES = 4096  # maximum inspected files of a process
_SLOT = "\0"  # in a path, instead of the slot
_MOST_CHANGES = 256
_PAGE = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class Limiter:
    """The mechanisms by which this host enforces limits."""

    groups: cgroups.Cgroups
    _changes: dict[Any, list[tuple[str, str]]] = field(default_factory=dict)  # by limits
    _cpus: Any = field(default_factory=lambda: itertools.cycle(sorted(os.sched_getaffinity(0))))

    def enforced(self) -> dict[str, Enforced]:
        """The mechanism per limit on this host, for `Handle.enforced`."""
        def by(controller: str, otherwise: Enforced) -> Enforced:
            version = self.groups.version(controller)
            return otherwise if version is None else "cgroup-v1" if version == 1 else "cgroup-v2"

        return {"memory": by("memory", "watched"), "cpus": by("cpu", "affinity"), "pids": by("pids", "rlimit")}

    def files(self, slot: str, config: SandboxConfig) -> list[tuple[str, str]]:
        """Control files to write for a sandbox."""
        hard = config.limit_cpus or config.cpus
        return self.groups.limits(slot, config.memory_bytes, hard, config.cpus, config.pids)

    def _changed(self, config: SandboxConfig, before: SandboxConfig) -> list[tuple[str, str]]:
        """The files that differ, with _SLOT in their paths; the members of a pool mostly get equal limits."""
        key = _limits(config), _limits(before)
        found = self._changes.get(key)
        if found is None:
            known = set(self.files(_SLOT, before))
            if len(self._changes) >= _MOST_CHANGES:
                self._changes.clear()
            found = self._changes[key] = [file for file in self.files(_SLOT, config) if file not in known]
        return found

    def affinity(self, config: SandboxConfig) -> list[int] | None:
        """CPUs to run on, where no cgroup enforces the limit: whole ones, assigned round-robin."""
        if self.groups.version("cpu") is not None:
            return None
        count = min(math.ceil(config.limit_cpus or config.cpus), len(os.sched_getaffinity(0)))
        return [next(self._cpus) for _ in range(count)]

    def processes(self, config: SandboxConfig) -> int:
        """RLIMIT_NPROC where no cgroup enforces the limit, else 0. Counted by the sandbox's user namespace."""
        return 0 if self.groups.version("pids") is not None else config.pids

    def apply(self, slot: str, pid: int, config: SandboxConfig, before: SandboxConfig) -> None:
        """Change the limits of a running sandbox. OSError when one cannot be set."""
        cgroups.write_limits([(path.replace(_SLOT, slot), value) for path, value in self._changed(config, before)])
        affinity, processes = self.affinity(config), self.processes(config)
        if affinity is not None:
            os.sched_setaffinity(pid, affinity)
        if processes:
            resource.prlimit(pid, resource.RLIMIT_NPROC, (processes, processes))


def _limits(config: SandboxConfig) -> tuple[int, float, float, int]:
    return config.memory_bytes, config.limit_cpus or config.cpus, config.cpus, config.pids


def usage(folders: Mapping[str, str], pid: int, kills: int) -> Usage:
    """Resource usage of a sandbox, from its cgroups if any, otherwise from /proc. Blocking."""
    whole = "pids" in folders and "memory" in folders
    tree = [] if whole else list(process_tree.descendants(process_tree.scan(), pid))
    memory, cpuacct, cpu = folders.get("memory", ""), folders.get("cpuacct", ""), folders.get("cpu", "")
    result = Usage(oom_kills=kills)
    result.memory_bytes = _first(cgroups.read_value(f"{memory}/memory.usage_in_bytes"),
                                 cgroups.read_value(f"{memory}/memory.current"))
    if result.memory_bytes is None:
        living = [entry.pid for entry in tree if entry.alive]
        result.memory_bytes = sum(shared_out(pid) for pid in living) + sum(files_in_memory(living).values())
    result.memory_peak_bytes = _first(cgroups.read_value(f"{memory}/memory.max_usage_in_bytes"),
                                      cgroups.read_value(f"{memory}/memory.peak"))
    result.pids = _first(cgroups.read_value(f"{folders.get('pids', '')}/pids.current"), len(tree) + 1)
    nanoseconds = cgroups.read_value(f"{cpuacct}/cpuacct.usage")
    microseconds = cgroups.read_field(f"{cpu}/cpu.stat", "usage_usec")
    if nanoseconds is not None:
        result.cpu_seconds = nanoseconds / 1e9
    elif microseconds is not None:
        result.cpu_seconds = microseconds / 1e6
    else:
        result.cpu_seconds = _cpu_seconds(pid, tree)
    return result


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def resident(pid: int) -> int:
    """Resident memory of a process in bytes, shared pages in full; 0 when it is gone."""
    fields = cgroups.read_text(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE if len(fields) > 1 else 0


def shared_out(pid: int) -> int:
    """The same with shared pages divided among their users (PSS); slower to read."""
    for line in cgroups.read_text(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return resident(pid)


def is_first(pid: int) -> bool:
    """Whether a process is to be killed before all others, as the duplicate of a process in a checkpoint is."""
    return cgroups.read_text(f"/proc/{pid}/oom_score_adj").strip() == "1000"


def files_in_memory(pids: Iterable[int]) -> dict[int, int]:
    """Bytes of the memory files (memfd) that these processes hold open, by inode, each once.

    Mapped parts count twice, as resident memory too; a limit may therefore be reached slightly early."""
    found: dict[int, int] = {}
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(folder)[:_MOST_FILES]:
                with contextlib.suppress(OSError):
                    if os.readlink(f"{folder}/{name}").startswith("/memfd:"):
                        file = os.stat(f"{folder}/{name}")
                        found[file.st_ino] = file.st_blocks * 512
    return found


def _cpu_seconds(pid: int, tree: list[process_tree.Entry]) -> float:
    """CPU time of all living processes and, through their reaping parents, of all ended ones."""
    ticks = 0
    for number in (pid, *(entry.pid for entry in tree)):
        fields = cgroups.read_text(f"/proc/{number}/stat").rpartition(")")[2].split()
        if len(fields) > 14:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / process_tree.TICK


def watch(watched: Watched, *, files: bool = False) -> None:
    """Kill the largest processes of each sandbox that exceeds its limit; before them, those of `is_first`. Blocking.

    watched: by pid 1, the limit of its process tree in bytes, and a callback before each kill, so that the cause is
    known when the exit is seen. files: include memory files, which is slower. One scan of /proc serves all sandboxes;
    PSS is read only when the plain sum exceeds the limit.
    """
    table = process_tree.scan()
    for pid, (limit, tell) in watched.items():
        tree = [entry for entry in process_tree.descendants(table, pid) if entry.alive]
        held = {entry.pid: files_in_memory((entry.pid,)) for entry in tree} if files else {}
        in_files = sum({number: size for found in held.values() for number, size in found.items()}.values())
        if sum(resident(entry.pid) for entry in tree) + in_files <= limit:
            continue
        first = {entry.pid for entry in tree if is_first(entry.pid)}
        sizes = sorted(((shared_out(entry.pid) + sum(held.get(entry.pid, {}).values()), entry) for entry in tree),
                       key=lambda pair: (pair[1].pid in first, pair[0]), reverse=True)
        total = sum(shared_out(entry.pid) for entry in tree) + in_files
        for size, entry in sizes:
            if total <= limit:
                break
            now = process_tree.read(entry.pid)
            if now is not None and now.start == entry.start and now.alive:
                if entry.pid not in first:
                    tell()
                process_tree.send(entry, signal.SIGKILL)
            total -= size


# ---- memory monitor ----

_EVERY = 0.25  # seconds
_FILES_EVERY = 8  # scans: memory files are slower to find
_log = logging.getLogger(__name__)


def _prefer_this_thread() -> None:
    """Run the calling thread before others of the machine, where permitted: on Linux, priorities belong to threads."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)


class MemoryWatch:
    """Monitors the sandboxes that `watched` returns, which is called for each scan; see `watch`."""

    def __init__(self, name: str, watched: Callable[[], Watched]) -> None:
        self._name = name
        self._watched = watched
        self._task: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Start the monitor; no effect when it runs."""
        if self._task is None:
            # A thread of its own: the threads of the event loop may all be busy while a sandbox allocates.
            self._thread = ThreadPoolExecutor(1, f"{self._name} memory watch", _prefer_this_thread)
            self._task = asyncio.create_task(self._watch(self._thread), name=f"{self._name} memory watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)  # a scan in progress ends within milliseconds
            self._thread = None

    async def _watch(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        for turn in itertools.count():
            await asyncio.sleep(_EVERY)
            watched = self._watched()
            if not watched:
                continue
            try:
                scan = functools.partial(watch, watched, files=turn % _FILES_EVERY == 0)
                await loop.run_in_executor(thread, scan)
            except OSError:  # such as a temporary lack of descriptors: enforcement continues afterwards
                _log.exception("the memory of sandboxes could not be looked at")
