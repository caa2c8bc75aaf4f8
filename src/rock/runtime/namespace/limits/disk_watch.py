"""Disk limits in the server: the mechanisms that this host supports, and a monitor of sandboxes without a dedicated
disk.

`Disks` tests which mechanisms for a disk limit this host supports. `DiskWatch` measures sandboxes without a dedicated
disk and ends one that exceeds its limit:

    due (it used CPU since, and its turn has come) -> one low-priority process adds up the files of all due sandboxes

It adds no work to a create. A sandbox may exceed its limit by what it writes between two measurements: small trees are
measured every two seconds and large ones less often, because all measurements use at most a twentieth of one CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.namespace.limits import cgroups, disk_layout

Way = Literal["loop", "tmpfs", "none"]
_WAYS: tuple[Way, ...] = ("loop", "tmpfs")


class Disks:
    """attempt: creates and removes a sandbox with a disk of this mechanism; RockError on failure.

    way: the detected mechanism; "none" when there is none. trying: the mechanism under test.
    """

    def __init__(self, attempt: Callable[[str], Awaitable[None]]) -> None:
        self.way: Way = "none"
        self.trying = ""
        self._attempt = attempt
        self._reasons: list[str] | None = None
        self._gate = asyncio.Lock()

    async def choose(self, config: SandboxConfig) -> None:
        """Raise Unsupported when this disk cannot be provided."""
        async with self._gate:
            if self._reasons is None:
                await self._find()
        if self.way == "none":
            raise errors.Unsupported(f"disk={config.disk} cannot be enforced here: {'; '.join(self._reasons or [])}",
                                     hint="leave disk unset")
        if self.way == "tmpfs" and config.disk_bytes * 2 > config.memory_bytes:
            raise errors.Unsupported(
                f"disk={config.disk}: here it is held in memory, and so at most half of that, {config.memory}",
                hint="run the server as root with mke2fs and /dev/loop-control, or ask for less disk or more memory")

    async def _find(self) -> None:
        reasons = []
        for way in _WAYS:
            try:
                await self._attempt(way)
                self.way = way
                break
            except errors.RockError as error:
                reasons.append(f"{way}: {error.message}")
            finally:
                self.trying = ""
        self._reasons = reasons

    async def prepare(self, folder: str, config: SandboxConfig) -> None:
        """Create the files that the launcher will mount, in a sandbox's run folder. OSError on failure."""
        if self._current() == "loop":
            await asyncio.to_thread(disk_layout.make_file, folder, config.disk_bytes, config.disk_inodes)

    def spec(self, config: SandboxConfig) -> dict[str, Any] | None:
        """The disk's specification for the launcher."""
        if config.disk is None:
            return None
        return {"way": self._current(), "bytes": config.disk_bytes, "inodes": config.disk_inodes}

    def in_memory(self, config: SandboxConfig) -> int:
        """Bytes of its memory limit that its disk may use."""
        return config.disk_bytes if config.disk is not None and self.way == "tmpfs" else 0

    def _current(self) -> str:
        return self.trying or self.way


_EVERY = 2.0  # seconds
_SHARE = 20  # pause after a measurement, as a multiple of its duration
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """Files that are measured: of a sandbox, or of a volume. folder: the files. limit: bytes. processes: of each
    sandbox that writes them, pid 1 and the folder of its pids cgroup, or "". cpus: of each, the file with its CPU time,
    or "". tell: called with each measured size; a size over the limit may be less than the real one.

    only: the id of the volume, of which alone deleted files count. without: ids of volumes of which none count.
    """

    folder: str
    limit: int
    processes: Sequence[tuple[int, str]]
    cpus: Sequence[str]
    tell: Callable[[int], None]
    only: str = ""
    without: Sequence[str] = ()


class DiskWatch:
    """Monitors the sandboxes that `held` returns, which is called for each measurement."""

    def __init__(self, held: Callable[[], Sequence[Held]]) -> None:
        self._held = held
        self._task: asyncio.Task[None] | None = None
        self._due: dict[str, tuple[float, str]] = {}  # by folder: its next turn, and its CPU time at the last one

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="disk watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            started = time.monotonic()
            held = {one.folder: one for one in self._held()}
            self._due = {folder: due for folder, due in self._due.items() if folder in held}
            try:
                await self._look([one for one in held.values() if self._is_due(one, started)])
            except (OSError, ValueError) as error:  # such as a host without memory for a process: retried soon
                _log.warning("the disk use of sandboxes could not be measured: %s", error)
            await asyncio.sleep((time.monotonic() - started) * _SHARE)

    def _is_due(self, one: Held, now: float) -> bool:
        due, before = self._due.get(one.folder, (0.0, ""))
        return now >= due and (not before or before != _used(one))  # without CPU use nothing was written

    async def _look(self, due: Sequence[Held]) -> None:
        if not due:
            return
        by_folder = {one.folder: (one, _used(one)) for one in due}
        request = json.dumps([[one.folder, one.limit, one.processes, one.only, one.without] for one in due])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", disk_layout.__file__,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={})
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.encode())
            process.stdin.close()
            while line := await process.stdout.readline():
                folder, size, seconds = json.loads(line)
                one, used = by_folder[folder]
                self._due[folder] = time.monotonic() + seconds * _SHARE * 2, used
                one.tell(size)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def _used(one: Held) -> str:
    """The CPU time of the writers, as one text; "" when one of them is not known."""
    texts = [cgroups.read_text(cpu) if cpu else "" for cpu in one.cpus]
    return "\n".join(texts) if all(texts) else ""
