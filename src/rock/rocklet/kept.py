"""Sandboxes of this machine that do not run, and whose files are kept."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from rock.errors import Lost
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.supervisor import Shelf, Supervisor
from rock.runtime.base import Handle, Keeps, Runtime

log = logging.getLogger("rock.node")


@dataclass(frozen=True)
class Resting:
    """One of them. `runtime` is a Keeps."""

    config: SandboxConfig
    runtime: Runtime
    handle: Handle


class KeptSandboxes:
    """Those at rest, by id. Their records are on the shelf, so that the rocklet after this one knows them too."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._resting: dict[str, Resting] = {}

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._resting

    def ids(self) -> list[str]:
        return sorted(self._resting)

    async def recover(self, config: SandboxConfig, runtime: Runtime, handle: Handle) -> bool:
        """Take over one that is at rest, or was on its way there or back; False when its files are gone."""
        assert isinstance(runtime, Keeps)
        try:
            kept = await runtime.rest(handle)
        except Lost:
            return False
        self._shelf.rest(config, kept)
        self._resting[handle.id] = Resting(config, runtime, kept)
        return True

    async def rest(self, supervisor: Supervisor, grace: float) -> NodeSandbox:
        """Bring a running one to rest. Lost when its files are gone."""
        handle = await supervisor.rest(grace)
        self._resting[supervisor.id] = Resting(supervisor.config, supervisor.runtime, handle)
        return self.describe(supervisor.id)

    def describe(self, sandbox_id: str) -> NodeSandbox:
        found = self._resting.get(sandbox_id)
        if found is None:
            return NodeSandbox(sandbox_id=sandbox_id)
        return NodeSandbox(sandbox_id=sandbox_id, kept=True, runtime=found.handle.runtime)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> tuple[Runtime, Handle]:
        """Make it again over its files. Its record still says that it rests: the caller writes another. Lost."""
        found = self._resting.get(sandbox_id)
        if found is None:
            raise Lost(f"the files of sandbox {sandbox_id} are not on this machine", sandbox_id=sandbox_id)
        assert isinstance(found.runtime, Keeps)
        try:
            return found.runtime, await found.runtime.wake(found.handle, config)
        except Lost:
            await self.remove(sandbox_id)
            raise

    def awake(self, sandbox_id: str) -> None:
        """It runs, and has the record of one that does."""
        del self._resting[sandbox_id]

    async def remove(self, sandbox_id: str) -> None:
        """Remove its files. Nothing happens to one that is not at rest."""
        found = self._resting.get(sandbox_id)
        if found is not None:
            await found.runtime.destroy(found.handle)
            await asyncio.to_thread(self._shelf.remove, sandbox_id)
            self._resting.pop(sandbox_id, None)
