"""Sandboxes of this machine that do not run, and whose files are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass

from rock.errors import Lost, Unavailable
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.rocklet.shelf import Shelf
from rock.rocklet.supervisor import Supervisor
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
        self._read: Counter[str] = Counter()  # how many archives and images are being made of each

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._resting

    def ids(self) -> list[str]:
        return sorted(self._resting)

    def configs(self) -> dict[str, SandboxConfig]:
        """Of all of them, by id."""
        return {name: found.config for name, found in self._resting.items()}

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
    def reading(self, sandbox_id: str) -> Iterator[Resting]:
        """One of them, which stays where it is meanwhile. Lost."""
        found = self._resting.get(sandbox_id)
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
        if sandbox_id in self._resting:
            return
        assert isinstance(runtime, Keeps)
        handle = await runtime.unpack(sandbox_id, config, files, data)
        self._shelf.rest(config, handle)
        self._resting[sandbox_id] = Resting(config, runtime, handle)

    def awake(self, sandbox_id: str) -> None:
        """It runs, and has the record of one that does."""
        del self._resting[sandbox_id]

    async def remove(self, sandbox_id: str) -> None:
        """Remove its files. Nothing happens to one that is not at rest."""
        found = self._resting.get(sandbox_id)
        if found is not None:
            self._refuse_read(sandbox_id)
            await found.runtime.destroy(found.handle)
            await asyncio.to_thread(self._shelf.remove, sandbox_id)
            self._resting.pop(sandbox_id, None)
