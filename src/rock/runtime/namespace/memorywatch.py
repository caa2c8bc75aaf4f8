"""Memory limits where no cgroup holds them: looked after from here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

from rock.runtime.namespace import limits
from rock.runtime.namespace.slots import Sandbox

_EVERY = 0.25  # seconds
_FILES_EVERY = 8  # looks: files in memory are dearer to find


class MemoryWatch:
    """Of the sandboxes in `live`, as they come and go. What it kills it counts in `Sandbox.kills`."""

    def __init__(self, live: Mapping[str, Sandbox]) -> None:
        self._live = live
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="namespace memory watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(_EVERY)
            by_pid = {sandbox.pid: sandbox for sandbox in self._live.values() if sandbox.memory}
            if by_pid:
                wanted = {pid: sandbox.memory for pid, sandbox in by_pid.items()}
                for pid, count in (
                        await asyncio.to_thread(limits.watch, wanted, files=turn % _FILES_EVERY == 0)).items():
                    by_pid[pid].kills += count
