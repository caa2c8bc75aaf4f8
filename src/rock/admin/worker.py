"""A worker as the admin commands it: the node plane, in this process or over the wire."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel

from rock.errors import from_wire
from rock.protocol.node import NodeEvents, NodeInventory, NodeSandbox, NodeStatus
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig

Transport = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, path, query, body
Model = TypeVar("Model", bound=BaseModel)


class Worker(Protocol):
    """Commands to one rocklet. Errors come back as they were raised there."""

    name: str

    async def check(self, config: SandboxConfig) -> None:
        """Raise what a create would raise at once."""
        ...

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox: ...

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox: ...

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """End it and keep its files; `kept` tells whether they are there."""
        ...

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make it again over its kept files. Lost when there are none."""
        ...

    async def get(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox: ...

    async def list(self) -> NodeInventory: ...

    async def status(self) -> NodeStatus: ...

    async def events(self, after: int, wait: float) -> NodeEvents: ...


class WireWorker:
    """A rocklet that is reached by requests: `transport` carries one."""

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self._transport = transport

    async def _call(self, kind: type[Model], route: str, query: str = "", body: Any = None, **path: str) -> Model:
        row = ROUTES[route]
        data = b"" if body is None else orjson.dumps(body)
        status, reply = await self._transport(row.method, row.url(**path), query, data)
        value = orjson.loads(reply) if reply else {}
        if status >= 400:
            raise from_wire(value, status)
        return kind.model_validate(value)

    async def check(self, config: SandboxConfig) -> None:
        await self._call(_Empty, "node_create", "check=1", config.model_dump(mode="json"), sandbox_id="-")

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_create", "", config.model_dump(mode="json"), sandbox_id=sandbox_id)

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_destroy", f"grace={grace:g}", sandbox_id=sandbox_id)

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_rest", f"grace={grace:g}", sandbox_id=sandbox_id)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_wake", "", config.model_dump(mode="json"), sandbox_id=sandbox_id)

    async def get(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        query = f"touch={int(touch)}&usage={int(usage)}"
        return await self._call(NodeSandbox, "node_get", query, sandbox_id=sandbox_id)

    async def list(self) -> NodeInventory:
        return await self._call(NodeInventory, "node_list")

    async def status(self) -> NodeStatus:
        return await self._call(NodeStatus, "node_status")

    async def events(self, after: int, wait: float) -> NodeEvents:
        return await self._call(NodeEvents, "node_events", f"after={after}&wait={wait:g}")


class _Empty(BaseModel):
    pass
