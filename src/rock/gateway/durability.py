"""Durability of the gateway's files: when they are on the disk, so that a crash of the machine does not lose them.

Records reach the kernel at once, and so survive a crash of the server. They are synced in threads: all files with new
records together, each `every` seconds; the state and the calls of a run before the response to its end. A crash of the
machine loses at most the records of the last interval and of the sync in progress, and no ended run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.gateway")

SYNCS = REGISTRY.counter("rock_gateway_syncs_total", "Files of the gateway that were synced, by outcome", "outcome")
_THREADS = 2  # of syncs; a slow disk takes no thread from other work
_T = TypeVar("_T")


def sync(path: Path) -> None:
    """Sync a file or a folder. A deleted one has nothing to sync. OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Syncer:
    """The syncs of one gateway. every: seconds between two of a file. on_failed: called with the path of a file that
    could not be synced."""

    def __init__(self, every: float, on_failed: Callable[[Path], None]) -> None:
        self._every = every
        self._on_failed = on_failed
        self._changed: dict[Path, None] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "gateway-sync")

    def changed(self, *paths: Path) -> None:
        """These files or folders are synced within the interval."""
        self._changed.update(dict.fromkeys(paths))

    async def do(self, work: Callable[[], _T]) -> _T:
        """Work that syncs, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run(self) -> None:
        """Sync what changed, until it is cancelled."""
        while True:
            await asyncio.sleep(self._every)
            await self.flush()

    async def flush(self) -> None:
        """Sync what changed so far."""
        paths, self._changed = self._changed, {}
        if paths:
            for path in await self.do(lambda: _synced(paths)):
                self._on_failed(path)

    async def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed before
            await self.flush()
        self._pool.shutdown()


def _synced(paths: Iterable[Path]) -> list[Path]:
    """Sync files; those that failed."""
    failed = []
    for path in paths:
        try:
            sync(path)
            SYNCS.of("done").add()
        except OSError as error:
            log.error("%s is not synced: %s", path, error)
            SYNCS.of("failed").add()
            failed.append(path)
    return failed
