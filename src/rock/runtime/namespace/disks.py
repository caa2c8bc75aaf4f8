"""Which disks with a limit this host can give: found by making one, the first time that somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.namespace import disk

Way = Literal["loop", "tmpfs", "none"]
_WAYS: tuple[Way, ...] = ("loop", "tmpfs")


class Disks:
    """attempt: makes and removes a sandbox with a disk of this way; RockError when that fails.

    way: how a disk is held here, once one was asked for; "none" when it cannot be. trying: the way of such an attempt.
    """

    def __init__(self, attempt: Callable[[str], Awaitable[None]]) -> None:
        self.way: Way = "none"
        self.trying = ""
        self._attempt = attempt
        self._reasons: list[str] | None = None
        self._gate = asyncio.Lock()

    async def choose(self, config: SandboxConfig) -> None:
        """Raise Unsupported when this disk cannot be given."""
        async with self._gate:
            if self._reasons is None:
                await self._find()
        if self.way == "none":
            raise errors.Unsupported(f"disk={config.disk}: {'; '.join(self._reasons or [])}", hint="leave disk unset")
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
        """Make what the launcher will mount, in a sandbox's run folder. OSError when that fails."""
        if self._current() == "loop":
            await asyncio.to_thread(disk.make_file, folder, config.disk_bytes, config.disk_inodes)

    def spec(self, config: SandboxConfig) -> dict[str, Any] | None:
        """For the launcher."""
        if config.disk is None:
            return None
        return {"way": self._current(), "bytes": config.disk_bytes, "inodes": config.disk_inodes}

    def in_memory(self, config: SandboxConfig) -> int:
        """Bytes of its memory limit that its disk may take."""
        return config.disk_bytes if config.disk is not None and self.way == "tmpfs" else 0

    def _current(self) -> str:
        return self.trying or self.way
