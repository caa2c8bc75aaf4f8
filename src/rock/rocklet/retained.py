"""Sandboxes of this machine that do not run, and whose files are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import Lost, Unavailable
from rock.guest.init import process_tree
from rock.host import atomic_file
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.rocklet.state import StateDirectory
from rock.runtime.base import Handle, Keeps, Runtime

log = logging.getLogger("rock.node")


@dataclass(frozen=True)
class StoppedSandboxes:
    """One of them. `runtime` is a Keeps."""

    config: SandboxConfig
    runtime: Runtime
    handle: Handle


class RetainedSandboxes:
    """Those at rest, by id. Their records are on the shelf, so that the rocklet after this one knows them too."""

    def __init__(self, state_dir: StateDirectory) -> None:
        self._state_dir = state_dir
        self._stopped: dict[str, StoppedSandboxes] = {}
        self._read: Counter[str] = Counter()  # how many archives and images are being made of each

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._stopped

    def ids(self) -> list[str]:
        return sorted(self._stopped)

    def configs(self) -> dict[str, SandboxConfig]:
        """Of all of them, by id."""
        return {name: found.config for name, found in self._stopped.items()}

    async def recover(self, config: SandboxConfig, runtime: Runtime, handle: Handle) -> bool:
        """Take over one that is at rest, or was on its way there or back; False when its files are gone."""
        assert isinstance(runtime, Keeps)
        try:
            kept = await runtime.rest(handle)
        except Lost:
            return False
        self._state_dir.rest(config, kept)
        self._stopped[handle.id] = StoppedSandboxes(config, runtime, kept)
        return True

    async def rest(self, supervisor: Supervisor, grace: float) -> NodeSandbox:
        """Bring a running one to rest. Lost when its files are gone."""
        handle = await supervisor.rest(grace)
        self._stopped[supervisor.id] = StoppedSandboxes(supervisor.config, supervisor.runtime, handle)
        return self.describe(supervisor.id)

    def describe(self, sandbox_id: str) -> NodeSandbox:
        found = self._stopped.get(sandbox_id)
        if found is None:
            return NodeSandbox(sandbox_id=sandbox_id)
        return NodeSandbox(sandbox_id=sandbox_id, kept=True, runtime=found.handle.runtime)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> tuple[Runtime, Handle]:
        """Make it again over its files. Its record still says that it rests: the caller writes another. Lost."""
        found = self._stopped.get(sandbox_id)
        if found is None:
            raise Lost(f"the files of sandbox {sandbox_id} are not on this machine", sandbox_id=sandbox_id)
        assert isinstance(found.runtime, Keeps)
        self._refuse_read(sandbox_id)
        try:
            return found.runtime, await found.runtime.wake(found.handle, config)
        except Lost:
            await self.remove(sandbox_id)
            raise

    def _refuse_read(self, sandbox_id: str) -> None:
        if self._read[sandbox_id]:
            raise Unavailable(f"the files of sandbox {sandbox_id} are being read", sandbox_id=sandbox_id, hint="retry")

    async def pack(self, sandbox_id: str, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """Its files as a layer's tar, see `Keeps.pack`. Lost."""
        with self.reading(sandbox_id) as found:
            assert isinstance(found.runtime, Keeps)
            async with contextlib.aclosing(found.runtime.pack(found.handle, limit)) as stream:
                async for part in stream:
                    yield part

    @contextlib.contextmanager
    def reading(self, sandbox_id: str) -> Iterator[StoppedSandboxes]:
        """One of them, which stays where it is meanwhile. Lost."""
        found = self._stopped.get(sandbox_id)
        if found is None:
            raise Lost(f"the files of sandbox {sandbox_id} are not on this machine", sandbox_id=sandbox_id)
        self._read[sandbox_id] += 1
        try:
            yield found
        finally:
            self._read[sandbox_id] -= 1
            if not self._read[sandbox_id]:
                del self._read[sandbox_id]

    async def unpack(
        self, sandbox_id: str, config: SandboxConfig, runtime: Runtime, files: ArchivedFiles, data: AsyncIterator[bytes]
    ) -> None:
        """Take in one that is at rest elsewhere; one that is here already stays as it is. See `Keeps.unpack`."""
        if sandbox_id in self._stopped:
            return
        assert isinstance(runtime, Keeps)
        handle = await runtime.unpack(sandbox_id, config, files, data)
        self._state_dir.rest(config, handle)
        self._stopped[sandbox_id] = StoppedSandboxes(config, runtime, handle)

    def awake(self, sandbox_id: str) -> None:
        """It runs, and has the record of one that does."""
        del self._stopped[sandbox_id]

    async def remove(self, sandbox_id: str) -> None:
        """Remove its files. Nothing happens to one that is not at rest."""
        found = self._stopped.get(sandbox_id)
        if found is not None:
            self._refuse_read(sandbox_id)
            await found.runtime.destroy(found.handle)
            await asyncio.to_thread(self._state_dir.remove, sandbox_id)
            self._stopped.pop(sandbox_id, None)


# ---- quarantine ----
#
# Sandboxes of which the record is damaged: kept alive, not usable, and ended on request.



@dataclass(frozen=True)
class _Held:
    """One of them. data: what its runtime noted of it, None when nothing is found."""

    reason: str
    runtime: str
    data: dict[str, Any] | None

    @property
    def alive(self) -> bool:
        pid, start = (self.data or {}).get("pid"), (self.data or {}).get("start")
        return isinstance(pid, int) and isinstance(start, int) and process_tree.lives(pid, start)


class Quarantine:
    """Those of this machine, by id. folder: the run folder, in which each runtime has a folder with its own records."""

    def __init__(self, state_dir: StateDirectory, runtimes: Runtimes, folder: Path) -> None:
        self._state_dir = state_dir
        self._runtimes = runtimes
        self._folder = folder
        self._held: dict[str, _Held] = {}
        self.spools: list[str] = []  # folders that may be theirs: a damaged record does not say

    def __contains__(self, sandbox_id: object) -> bool:
        return sandbox_id in self._held

    def ids(self) -> list[str]:
        return sorted(self._held)

    def add(self, sandbox_id: str, why: str) -> bool:
        """Keep one; whether it is alive."""
        reason = f"{why}; it was kept and cannot be used"
        found = _Held(reason, "", None)
        for name in self._runtimes.names():
            for record in (self._folder / name).glob("*/record.json"):
                try:
                    data = atomic_file.parsed(record.read_bytes())
                except (OSError, ValueError):
                    continue
                if data.get("id") == sandbox_id:
                    found = _Held(reason, name, data)
        self._held[sandbox_id] = found
        log.error("sandbox %s: %s", sandbox_id, reason)
        return found.alive

    def describe(self) -> list[NodeSandbox]:
        return [NodeSandbox(sandbox_id=name, alive=held.alive, runtime=held.runtime, reason=held.reason)
                for name, held in self._held.items()]  # fmt: skip

    def look(self, sandbox_id: str) -> NodeSandbox | None:
        return next((found for found in self.describe() if found.sandbox_id == sandbox_id), None)

    def error(self, sandbox_id: str) -> Lost | None:
        """For a call to one of them."""
        held = self._held.get(sandbox_id)
        if held is None:
            return None
        state = "its processes still run" if held.alive else "it has ended"
        return Lost(f"sandbox {sandbox_id} cannot be used: {held.reason}; {state}", sandbox_id=sandbox_id,
                    hint=f"rock rm {sandbox_id} ends it; rock doctor store tells what is damaged")  # fmt: skip

    async def remove(self, sandbox_id: str, others: list[str]) -> None:
        """End one and remove all that it used; its damaged record is set aside. others: ids of all other sandboxes."""
        held = self._held.get(sandbox_id)
        if held is None:
            return
        data = held.data
        if data is not None:
            runtime = self._runtimes[held.runtime]
            if "slot" in data and "pid" in data and "container" not in data:
                data = {"cgroups": {}, **data}
                await runtime.destroy(Handle(held.runtime, sandbox_id, Isolation.NONE, {}, data))
            else:
                await runtime.sweep(others)
        await asyncio.to_thread(self._state_dir.set_aside, sandbox_id)
        await asyncio.to_thread(self._state_dir.remove, sandbox_id)
        self._held.pop(sandbox_id, None)
        if not self._held:
            await asyncio.to_thread(self._state_dir.sweep, self.spools)
            self.spools = []
