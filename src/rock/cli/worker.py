"""The rocklet of this process as a worker of the admin of this process: the node plane without a wire."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from rock.protocol.network import ConnectionList
from rock.protocol.node import (
    ImageState,
    NodeCommit,
    NodeEvents,
    NodeImage,
    NodeInventory,
    NodeSandbox,
    NodeStatus,
)
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.rocklet.node import Node


class LocalWorker:
    """What admin.worker.Worker asks for, by calls."""

    def __init__(self, name: str, node: Node) -> None:
        self.name = name
        self._node = node

    async def check(self, config: SandboxConfig) -> None:
        await self._node.runtimes.check(config)

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._node.create(sandbox_id, config)

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._node.destroy(sandbox_id, grace)

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._node.rest(sandbox_id, grace)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._node.wake(sandbox_id, config)

    def pack(self, sandbox_id: str, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        return self._node.kept.pack(sandbox_id, limit)

    async def unpack(
        self, sandbox_id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]
    ) -> NodeSandbox:
        return await self._node.unpack(sandbox_id, config, files, data)

    async def commit(self, sandbox_id: str, wish: NodeCommit) -> NodeImage:
        return await self._node.commits.commit(sandbox_id, wish)

    async def get(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        return await self._node.look(sandbox_id, touch=touch, usage=usage)

    async def connections(self, sandbox_id: str) -> ConnectionList:
        return await self._node.runtimes.connections(sandbox_id)

    async def list(self) -> NodeInventory:
        return self._node.inventory()

    async def image(self, image: str, wait: float = 0.0) -> ImageState:
        return await self._node.images.look(image, wait)

    async def status(self) -> NodeStatus:
        return await self._node.status()

    async def events(self, after: int, wait: float) -> NodeEvents:
        return await self._node.ends.since(after, wait)
