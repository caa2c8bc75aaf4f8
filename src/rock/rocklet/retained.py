"""Stopped sandboxes of this machine with retained files, and the quarantine of sandboxes with damaged records."""

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
    """One stopped sandbox. `runtime` implements Keeps."""

    config: SandboxConfig
    runtime: Runtime
    handle: Handle


class RetainedSandboxes:
    """The stopped sandboxes, by id. The state directory holds their records, so that the next rocklet process knows
    them too."""

    def __init__(self, state_dir: StateDirectory) -> None:
        self._state_dir = state_dir
        self._stopped: dict[str, StoppedSandboxes] = {}
        self._read: Counter[str] = Counter()  # number of archives and images in progress by sandbox

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._stopped

    def ids(self) -> list[str]:
        return sorted(self._stopped)

    def configs(self) -> dict[str, SandboxConfig]:
        """Configs of all stopped sandboxes, by id."""
        return {name: found.config for name, found in self._stopped.items()}

    async def recover(self, config: SandboxConfig, runtime: Runtime, handle: Handle) -> bool:
        """Recover a sandbox that is stopped, or was being stopped or started; False when its files are missing."""
        assert isinstance(runtime, Keeps)
        try:
            kept = await runtime.rest(handle)
        except Lost:
            return False
        self._state_dir.rest(config, kept)
        self._stopped[handle.id] = StoppedSandboxes(config, runtime, kept)
        return True

    async def rest(self, supervisor: Supervisor, grace: float) -> NodeSandbox:
        """Stop a running sandbox and retain its files. Lost when its files are missing."""
        handle = await supervisor.rest(grace)
        self._stopped[supervisor.id] = StoppedSandboxes(supervisor.config, supervisor.runtime, handle)
        return self.describe(supervisor.id)

    def describe(self, sandbox_id: str) -> NodeSandbox:
        found = self._stopped.get(sandbox_id)
        if found is None:
            return NodeSandbox(sandbox_id=sandbox_id)
        return NodeSandbox(sandbox_id=sandbox_id, kept=True, runtime=found.handle.runtime)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> tuple[Runtime, Handle]:
        """Start a sandbox from its files. Its record still marks it as stopped; the caller writes another. Lost."""
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
        """Pack its files as a layer's tar, see `Keeps.pack`. Lost."""
        with self.reading(sandbox_id) as found:
            assert isinstance(found.runtime, Keeps)
            async with contextlib.aclosing(found.runtime.pack(found.handle, limit)) as stream:
                async for part in stream:
                    yield part

    @contextlib.contextmanager
    def reading(self, sandbox_id: str) -> Iterator[StoppedSandboxes]:
        """A stopped sandbox, protected against changes in this context. Lost."""
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
        """Restore a sandbox that was archived; one that is here already stays unchanged. See `Keeps.unpack`."""
        if sandbox_id in self._stopped:
            return
        assert isinstance(runtime, Keeps)
        handle = await runtime.unpack(sandbox_id, config, files, data)
        self._state_dir.rest(config, handle)
        self._stopped[sandbox_id] = StoppedSandboxes(config, runtime, handle)

    def awake(self, sandbox_id: str) -> None:
        """The sandbox runs, and its record marks it as running."""
        del self._stopped[sandbox_id]

    async def remove(self, sandbox_id: str) -> None:
        """Remove its files. No effect when the sandbox is not stopped."""
        found = self._stopped.get(sandbox_id)
        if found is not None:
            self._refuse_read(sandbox_id)
            await found.runtime.destroy(found.handle)
            await asyncio.to_thread(self._state_dir.remove, sandbox_id)
            self._stopped.pop(sandbox_id, None)


# ---- quarantine ----
#
# A sandbox with a damaged record is left alive, is not usable, and is ended on request.



@dataclass(frozen=True)
class _Held:
    """A quarantined sandbox. data: the runtime's own record of it, None when there is none."""

    reason: str
    runtime: str
    data: dict[str, Any] | None

    @property
    def alive(self) -> bool:
        pid, start = (self.data or {}).get("pid"), (self.data or {}).get("start")
        return isinstance(pid, int) and isinstance(start, int) and process_tree.lives(pid, start)


class Quarantine:
    """The quarantined sandboxes of this machine, by id. folder: the run folder, where each runtime has a folder with
    its own records."""

    def __init__(self, state_dir: StateDirectory, runtimes: Runtimes, folder: Path) -> None:
        self._state_dir = state_dir
        self._runtimes = runtimes
        self._folder = folder
        self._held: dict[str, _Held] = {}
        self.spools: list[str] = []  # spool folders that may belong to them: a damaged record does not name its folder

    def __contains__(self, sandbox_id: object) -> bool:
        return sandbox_id in self._held

    def ids(self) -> list[str]:
        return sorted(self._held)

    def add(self, sandbox_id: str, why: str) -> bool:
        """Add a sandbox; returns whether it is alive."""
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
        """The error for a request to a quarantined sandbox."""
        held = self._held.get(sandbox_id)
        if held is None:
            return None
        state = "its processes still run" if held.alive else "it has ended"
        return Lost(f"sandbox {sandbox_id} cannot be used: {held.reason}; {state}", sandbox_id=sandbox_id,
                    hint=f"rock rm {sandbox_id} ends it; rock doctor store tells what is damaged")  # fmt: skip

    async def remove(self, sandbox_id: str, others: list[str]) -> None:
        """End a sandbox and remove all its resources; its damaged record is set aside. others: ids of all other
        sandboxes."""
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
