"""The client of a worker's node plane, in this process or over the network."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

import orjson
from pydantic import BaseModel

from rock.admin.workers.batching import FENCE as FENCE
from rock.admin.workers.batching import CreateBatch, CreateBatcher
from rock.admin.workers.batching import StreamTransport as StreamTransport
from rock.admin.workers.batching import Transport as Transport
from rock.errors import Unavailable, Unsupported, from_wire
from rock.http.event_loop import settled
from rock.protocol.action import ConnectionList
from rock.protocol.configuration import NodeConfiguration
from rock.protocol.node import (
    ImageState,
    NodeCommit,
    NodeEvents,
    NodeFiles,
    NodeImage,
    NodeInventory,
    NodeSandbox,
    NodeStatus,
    NodeVolume,
    NodeVolumes,
)
from rock.protocol.pools import NodePools, NodePoolStates
from rock.protocol.routes import OUTAGE, ROUTES, Frame, FrameParser, pack_frame
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig, travelling
from rock.protocol.snapshots import NodeCheckpoint, NodeForkable, NodeImport, NodeSnapshot, NodeSnapshots

Model = TypeVar("Model", bound=BaseModel)


_NOT_CHECKED = {"sandbox_id", "name", "labels", "user_id", "experiment_id", "namespace", "route_key"}
_MOST_PASSED = 256
_WORTH = 10.0  # seconds


class Worker(Protocol):
    """Commands to one rocklet. Errors are raised as they were raised there."""

    name: str

    async def check(self, config: SandboxConfig) -> None:
        """Raise the errors that a create would raise at once."""
        ...

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox: ...

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox: ...

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """End it and retain its files; `kept` reports whether they exist."""
        ...

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Start it again from its retained files. Lost when there are none."""
        ...

    def pack(self, sandbox_id: str, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The files of a stopped sandbox as a layer's tar, in pieces; the last item describes them. Lost, InvalidConfig
        for files that no layer can contain or that exceed `limit` bytes."""
        ...

    async def unpack(
        self, sandbox_id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]
    ) -> NodeSandbox:
        """Send it such files, for a later `wake`. ImageError when it has another image of that name."""
        ...

    async def pause(self, sandbox_id: str) -> NodeSandbox:
        """Stop its processes for a while. Conflict, Unsupported."""
        ...

    async def resume(self, sandbox_id: str) -> NodeSandbox: ...

    async def commit(self, sandbox_id: str, spec: NodeCommit) -> NodeImage:
        """Commit it to an image, and push it. Errors have `details["stage"]`."""
        ...

    async def get(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox: ...

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """Its connections; an empty list for an unknown sandbox."""
        ...

    async def list(self) -> NodeInventory: ...

    async def image(self, image: str, wait: float = 0.0) -> ImageState:
        """The state of an image; spends up to `wait` seconds on building or pulling it."""
        ...

    async def status(self) -> NodeStatus: ...

    async def events(self, after: int, wait: float, boot: str = "") -> NodeEvents: ...

    async def volumes(self) -> NodeVolumes: ...

    async def create_volume(self, volume_id: str, spec: NodeVolume) -> NodeVolumes:
        """Create a volume, or change its size. StorageFull."""
        ...

    async def delete_volume(self, volume_id: str) -> NodeVolumes:
        """Delete a volume and its files; an unknown one is no error. Conflict while a sandbox uses it."""
        ...

    async def configure(self, spec: NodeConfiguration) -> NodeConfiguration:
        """Apply a version of the live configuration; returns the version that it applies now."""
        ...

    async def pools(self) -> NodePoolStates:
        """The states of its defined pools."""
        ...

    async def define_pools(self, spec: NodePools) -> NodePoolStates:
        """Set all its pools. Idempotent."""
        ...

    async def snapshots(self) -> NodeSnapshots: ...

    async def checkpoint(self, sandbox_id: str, spec: NodeCheckpoint) -> NodeSnapshot:
        """Take a snapshot of a running sandbox; a repetition with the same id returns the same. Conflict, Unsupported,
        StorageFull."""
        ...

    async def forkable(self, sandbox_id: str) -> NodeForkable:
        """The level that a checkpoint would have now. Conflict, Unsupported."""
        ...

    async def rollback(self, sandbox_id: str, snapshot_id: str) -> NodeSandbox:
        """Return a running sandbox to a snapshot. NotFound, Conflict, Unsupported."""
        ...

    def export_snapshot(self, snapshot_id: str) -> AsyncGenerator[bytes]:
        """A snapshot as a tar. NotFound, Unsupported."""
        ...

    async def import_snapshot(self, snapshot_id: str, spec: NodeImport, data: AsyncIterator[bytes]) -> NodeSnapshot:
        """Create a snapshot from such a tar. InvalidConfig, ImageError, StorageFull."""
        ...

    async def delete_snapshot(self, snapshot_id: str) -> NodeSnapshots:
        """Delete a snapshot; an unknown one is no error. One that is in use is hidden, and removed with its last
        user."""
        ...


class _Check:
    """A check in progress; it is canceled when no caller waits for it any more."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.waiting = 0


class WireWorker:
    """A rocklet that is reached by requests: `transport` sends one, `streams` sends one with a long body or response.
    crowd: counts the creates of its server."""

    def __init__(
        self, name: str, transport: Transport, streams: StreamTransport | None = None, crowd: CreateBatch | None = None
    ) -> None:
        self.name = name
        self._transport = transport
        self._streams = streams
        self._passed: dict[bytes, float] = {}  # accepted configs, with the expiry of that result
        self._passed_last: tuple[SandboxConfig | None, float] = (None, 0.0)
        self._checking: dict[bytes, _Check] = {}  # checks in progress by config
        self._creates = CreateBatcher(name, streams, self._create_alone, crowd) if streams is not None else None

    async def close(self) -> None:
        """Send no more commands."""
        checks = [check.task for check in self._checking.values()]
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        if self._creates is not None:
            await self._creates.close()

    async def _call(self, kind: type[Model], route: str, query: str = "", body: Any = None, **path: str) -> Model:
        row = ROUTES[route]
        data = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        return _parsed(kind, *await self._transport(row.method, row.url(**path), query, data))

    async def metrics(self) -> bytes:
        """Its metrics as text. Unavailable and other RockErrors."""
        row = ROUTES["metrics"]
        status, data = await self._transport(row.method, row.path, "", b"")
        if status >= 300:
            raise from_wire(orjson.loads(data), status)
        return data

    async def check(self, config: SandboxConfig) -> None:
        # A burst repeats the same check; the create itself detects later changes.
        if self._passed_last[0] is config and self._passed_last[1] > time.monotonic():
            return
        body = config.model_dump(mode="json", exclude=_NOT_CHECKED | config.unchosen, exclude_none=True)
        key, now = orjson.dumps(body), time.monotonic()
        if (until := self._passed.get(key, 0.0)) > now:
            self._passed_last = config, until
            return
        check = self._checking.get(key)
        if check is None:  # one request for all concurrent callers
            check = self._checking[key] = _Check(asyncio.create_task(self._check(key, body), name=f"check {self.name}"))
            check.task.add_done_callback(lambda _: self._checking.pop(key, None))
        check.waiting += 1
        try:
            await settled(check.task)
        finally:
            check.waiting -= 1
            if not check.waiting:
                check.task.cancel()
        if check.task.cancelled():
            raise Unavailable(f"worker {self.name} was lost while it was asked", hint="retry", details=OUTAGE)
        check.task.result()
        self._passed_last = config, self._passed.get(key, 0.0)

    async def _check(self, key: bytes, body: Any) -> None:
        await self._call(_Empty, "node_create", "check=1", body, sandbox_id="-")
        if len(self._passed) >= _MOST_PASSED:
            self._passed.clear()
        self._passed[key] = time.monotonic() + _WORTH

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        if self._creates is None:
            return await self._create_alone(sandbox_id, config)
        return await self._creates.create(sandbox_id, config)

    async def _create_alone(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_create", "", travelling(config), sandbox_id=sandbox_id)

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_destroy", f"grace={grace:g}", sandbox_id=sandbox_id)

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_rest", f"grace={grace:g}", sandbox_id=sandbox_id)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_wake", "", travelling(config), sandbox_id=sandbox_id)

    async def pause(self, sandbox_id: str) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_pause", sandbox_id=sandbox_id)

    async def resume(self, sandbox_id: str) -> NodeSandbox:
        return await self._call(NodeSandbox, "node_resume", sandbox_id=sandbox_id)

    async def commit(self, sandbox_id: str, spec: NodeCommit) -> NodeImage:
        return await self._call(NodeImage, "node_commit", "", spec.model_dump(mode="json"), sandbox_id=sandbox_id)

    async def pack(self, sandbox_id: str, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        row, parser = ROUTES["node_pack"], FrameParser()
        reply = self._stream(row.method, row.url(sandbox_id=sandbox_id), f"limit={limit}", None)
        async with contextlib.aclosing(reply):
            status = await anext(reply)
            if status != 200:
                body = b"".join([part async for part in reply if isinstance(part, bytes)])
                raise from_wire(orjson.loads(body) if body else {}, int(status))
            async for part in reply:
                assert isinstance(part, bytes)
                for kind, payload in parser.feed(part):
                    if kind is Frame.ERROR:
                        raise from_wire(orjson.loads(payload))
                    yield payload if kind is Frame.STDOUT else ArchivedFiles.model_validate_json(payload)

    async def unpack(
        self, sandbox_id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]
    ) -> NodeSandbox:
        async def body() -> AsyncGenerator[bytes]:
            head = NodeFiles(config=config, files=files)
            yield pack_frame(Frame.RESULT, orjson.dumps(head.model_dump(mode="json")))
            async for part in data:
                yield pack_frame(Frame.STDOUT, part)

        row = ROUTES["node_unpack"]
        async with contextlib.aclosing(self._stream(row.method, row.url(sandbox_id=sandbox_id), "", body())) as reply:
            status = await anext(reply)
            told = b"".join([part async for part in reply if isinstance(part, bytes)])
            return _parsed(NodeSandbox, int(status), told)

    def _stream(
        self, method: str, path: str, query: str, body: AsyncIterator[bytes] | None
    ) -> AsyncGenerator[int | bytes]:
        if self._streams is None:
            raise Unsupported(f"the connection to worker {self.name} does not support the transfer of files",
                              hint="let the worker join the server: `rocklet --join URL`")
        return self._streams(method, path, query, body, b"")

    async def get(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        query = f"touch={int(touch)}&usage={int(usage)}"
        return await self._call(NodeSandbox, "node_get", query, sandbox_id=sandbox_id)

    async def connections(self, sandbox_id: str) -> ConnectionList:
        return await self._call(ConnectionList, "node_connections", sandbox_id=sandbox_id)

    async def list(self) -> NodeInventory:
        return await self._call(NodeInventory, "node_list")

    async def image(self, image: str, wait: float = 0.0) -> ImageState:
        return await self._call(ImageState, "node_image", "", {"image": image, "wait": wait})

    async def status(self) -> NodeStatus:
        return await self._call(NodeStatus, "node_status")

    async def events(self, after: int, wait: float, boot: str = "") -> NodeEvents:
        return await self._call(NodeEvents, "node_events", f"after={after}&wait={wait:g}&boot={boot}")

    async def volumes(self) -> NodeVolumes:
        return await self._call(NodeVolumes, "node_volumes")

    async def create_volume(self, volume_id: str, spec: NodeVolume) -> NodeVolumes:
        return await self._call(NodeVolumes, "node_create_volume", "", spec.model_dump(), volume_id=volume_id)

    async def delete_volume(self, volume_id: str) -> NodeVolumes:
        return await self._call(NodeVolumes, "node_delete_volume", volume_id=volume_id)

    async def configure(self, spec: NodeConfiguration) -> NodeConfiguration:
        return await self._call(NodeConfiguration, "node_configure", "", spec.model_dump(mode="json"))

    async def pools(self) -> NodePoolStates:
        return await self._call(NodePoolStates, "node_pools")

    async def define_pools(self, spec: NodePools) -> NodePoolStates:
        pools = [{**pool.model_dump(mode="json", exclude={"config"}), "config": orjson.loads(travelling(pool.config))}
                 for pool in spec.pools]  # fmt: skip
        body = {"pools": pools, "budget": spec.budget}
        return await self._call(NodePoolStates, "node_define_pools", "", body)

    async def snapshots(self) -> NodeSnapshots:
        return await self._call(NodeSnapshots, "node_snapshots")

    async def checkpoint(self, sandbox_id: str, spec: NodeCheckpoint) -> NodeSnapshot:
        return await self._call(NodeSnapshot, "node_checkpoint", "", spec.model_dump(), sandbox_id=sandbox_id)

    async def forkable(self, sandbox_id: str) -> NodeForkable:
        return await self._call(NodeForkable, "node_forkable", sandbox_id=sandbox_id)

    async def rollback(self, sandbox_id: str, snapshot_id: str) -> NodeSandbox:
        body = {"snapshot_id": snapshot_id}
        return await self._call(NodeSandbox, "node_rollback", "", body, sandbox_id=sandbox_id)

    async def export_snapshot(self, snapshot_id: str) -> AsyncGenerator[bytes]:
        row = ROUTES["node_export_snapshot"]
        async with contextlib.aclosing(self._stream(row.method, row.url(snapshot_id=snapshot_id), "", None)) as reply:
            status = await anext(reply)
            if status != 200:
                body = b"".join([part async for part in reply if isinstance(part, bytes)])
                raise from_wire(orjson.loads(body) if body else {}, int(status))
            async for part in reply:
                assert isinstance(part, bytes)
                yield part

    async def import_snapshot(self, snapshot_id: str, spec: NodeImport, data: AsyncIterator[bytes]) -> NodeSnapshot:
        row = ROUTES["node_import_snapshot"]
        query = urlencode({"tenant": spec.tenant, "name": spec.name or ""})
        reply = self._stream(row.method, row.url(snapshot_id=snapshot_id), query, data)
        async with contextlib.aclosing(reply):
            status = await anext(reply)
            found = b"".join([part async for part in reply if isinstance(part, bytes)])
        return _parsed(NodeSnapshot, int(status), found)

    async def delete_snapshot(self, snapshot_id: str) -> NodeSnapshots:
        return await self._call(NodeSnapshots, "node_delete_snapshot", snapshot_id=snapshot_id)


def _parsed(kind: type[Model], status: int, reply: bytes) -> Model:
    value = orjson.loads(reply) if reply else {}
    if status >= 400:
        raise from_wire(value, status)
    return kind.model_validate(value)


class _Empty(BaseModel):
    pass
