"""The disk limit of sandboxes that have no disk of their own: they are measured, and one that is over it is ended.

    due (it used CPU since, and its turn has come) -> one process of low priority adds up the files of all that are due

It costs nothing at the create. A sandbox may be over its limit by what it writes between two looks: there is one in two
seconds for small trees, and fewer for large ones, as all looks together take at most a twentieth of one CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rock.runtime.namespace import cgroups, disk

_EVERY = 2.0  # seconds
_SHARE = 20  # of the time that looks took, until the next ones
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A sandbox whose files are measured. folder: of its files. limit: bytes. processes: the folder of its pids cgroup,
    or "". cpu: the file that counts its CPU time, or "". end: is called when it is over the limit."""

    folder: str
    pid: int
    limit: int
    processes: str
    cpu: str
    end: Callable[[int], None]


class DiskWatch:
    """Of the sandboxes that `held` gives, asked again for each look."""

    def __init__(self, held: Callable[[], Sequence[Held]]) -> None:
        self._held = held
        self._task: asyncio.Task[None] | None = None
        self._due: dict[str, tuple[float, str]] = {}  # by folder: its next turn, and the CPU time that it had used

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
            except (OSError, ValueError) as error:  # as of a host without memory for a process: the next look is soon
                _log.warning("the disk use of sandboxes could not be measured: %s", error)
            await asyncio.sleep((time.monotonic() - started) * _SHARE)

    def _is_due(self, one: Held, now: float) -> bool:
        due, before = self._due.get(one.folder, (0.0, ""))
        return now >= due and (not before or before != _used(one))  # who did not run has not written

    async def _look(self, due: Sequence[Held]) -> None:
        if not due:
            return
        by_folder = {one.folder: (one, _used(one)) for one in due}
        wish = json.dumps([[one.folder, one.limit, one.pid, one.processes] for one in due])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", disk.__file__,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={})
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(wish.encode())
            process.stdin.close()
            while line := await process.stdout.readline():
                folder, size, seconds = json.loads(line)
                one, used = by_folder[folder]
                self._due[folder] = time.monotonic() + seconds * _SHARE * 2, used
                if size > one.limit:
                    one.end(size)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def _used(one: Held) -> str:
    return cgroups.read_text(one.cpu) if one.cpu else ""
