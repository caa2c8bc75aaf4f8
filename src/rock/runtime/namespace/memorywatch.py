"""Memory limits where no cgroup holds them: looked after from here."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from rock.runtime.namespace import limits

_EVERY = 0.25  # seconds
_FILES_EVERY = 8  # looks: files in memory are dearer to find
_log = logging.getLogger(__name__)


class MemoryWatch:
    """Of the sandboxes that `watched` gives, asked again for each look; see `limits.watch`."""

    def __init__(self, name: str, watched: Callable[[], limits.Watched]) -> None:
        self._name = name
        self._watched = watched
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Once it was started, again does nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name=f"{self._name} memory watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(_EVERY)
            watched = self._watched()
            if not watched:
                continue
            try:
                await asyncio.to_thread(limits.watch, watched, files=turn % _FILES_EVERY == 0)
            except OSError:  # as of a host that is out of descriptors for a moment: the limits hold again after it
                _log.exception("the memory of sandboxes could not be looked at")
