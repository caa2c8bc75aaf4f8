"""An admin without local sandboxes: it commands remote rocklets, from ROCK_WORKERS or joined; and the local worker.

Several admins may share a database; one of them is the leader (admin/workers/leader.py). Requests to sandboxes are
forwarded to their worker. `LocalWorker` connects admin and rocklet within one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from rock.admin.app import Admin
from rock.admin.auth import Authenticated, RoleFilter, names_of, servers
from rock.admin.preflight import require_key_beyond_loopback, role_of
from rock.admin.workers.batching import CreateBatch
from rock.admin.workers.client import FENCE, Transport, WireWorker, Worker
from rock.admin.workers.registry import Reached, WorkerRegistry
from rock.cli.serve.dialects import e2b_of
from rock.cli.serve.gateway import RemoteGateway, ServerGateway, endpoint_of
from rock.cli.serve.home import Home
from rock.cli.serve.identity import Identity
from rock.cli.serve.observing import metrics_of, observe
from rock.cli.serve.processes import Processes, check_left, forget
from rock.cli.serve.protocols import Protocols
from rock.errors import InvalidConfig, RockError, Unavailable, Unsupported
from rock.http import unix
from rock.http.asgi import App, Receive, Scope, Send
from rock.http.forwarding import RemoteApp
from rock.http.relay import RelayedCalls
from rock.http.tunnels import SCHEME, Tunnels
from rock.protocol import routes
from rock.protocol.action import ConnectionList
from rock.protocol.configuration import NodeConfiguration
from rock.protocol.keys import POD_PREFIX, pod_key
from rock.protocol.node import (
    PROCESS,
    RESERVED,
    ImageState,
    Lease,
    NodeCommit,
    NodeEvents,
    NodeImage,
    NodeInventory,
    NodeSandbox,
    NodeStatus,
    NodeVolume,
    NodeVolumes,
    WorkerInfo,
)
from rock.protocol.pools import NodePools, NodePoolStates
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.protocol.snapshots import NodeCheckpoint, NodeForkable, NodeImport, NodeSnapshot, NodeSnapshots
from rock.proxy.app import Proxy, is_data
from rock.rocklet.node import Node
from rock.settings import Settings
from rock.store.base import Store
from rock.store.sqlite import SqliteStore
from rock.ui.live import Live
from rock.ui.page import Page

_LONG = ("/commit", "/wake")
_EVENTS = routes.ROUTES["node_events"].path
_REFUSED = orjson.dumps(routes.REFUSED)[1:-1]  # in the details of a response
_MADE_AT_ONCE = 2000  # concurrent creates per worker; high, so that long pulls do not block others
_SHUNNED = 5.0  # seconds without new sandboxes for a worker that refused a connection
_USUAL = 100.0  # timeout in seconds of a worker's response


def _makes(method: str, path: str) -> bool:
    """Whether the request creates something, which has no time limit."""
    return method == "PUT" or path.endswith(_LONG) or path == routes.ROUTES["node_image"].path


def _fenced(fence: int | None) -> dict[str, str]:
    return {} if fence is None else {routes.FENCE: str(fence)}


def transport_to(url: str, key: str | None) -> Transport:
    """The transport of a WireWorker; each request carries the fencing token of its lease."""
    from rock.sdk.transport import Transport as Client  # the SDK, which a server without remote workers does not need

    clients: dict[int | None, Client] = {}

    async def carry(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        fence = FENCE.get()
        client = clients.get(fence)
        if client is None:
            clients.clear()  # of expired leases
            client = clients[fence] = Client(url, key, _fenced(fence), reconnect_timeout=0)
        try:
            return 200, await client.call(method, f"{path}?{query}" if query else path, body,
                                          timeout=None if _makes(method, path) else _USUAL)  # fmt: skip
        except RockError as error:
            return error.status, orjson.dumps(error.to_wire(), default=repr)

    return carry


def commands_over(remote: RemoteApp, name: str, gone: asyncio.Event, unreached: Callable[[], None]) -> Transport:
    """The transport of a WireWorker over kept-alive connections. When its worker is `gone`, and `remote` closed,
    pending requests raise Unavailable: a disconnected machine does not close its connections. unreached: called when
    the worker refuses a connection, or commands of this epoch."""
    making = asyncio.Semaphore(_MADE_AT_ONCE)

    async def ask(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        headers = _fenced(FENCE.get())
        async with asyncio.timeout(None if _makes(method, path) else _USUAL):
            probed = path != _EVENTS  # an event request is a long poll without a time limit
            try:
                return await remote.request(method, path, query, body, headers, probed=probed)
            except Unavailable as error:
                if gone.is_set() or method == "POST" or error.details.get("unsent"):
                    raise
            # A kept-alive connection may just have closed; a repeated request is executed once.
            try:
                return await remote.request(method, path, query, body, headers, probed=probed)
            except Unavailable as error:
                if error.details.get("unsent"):
                    unreached()
                    raise Unavailable(error.message, hint=error.hint, details=routes.SENT) from None  # the first one
                raise

    async def carry(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        try:
            async with making if method == "PUT" and not query.startswith("check=") else contextlib.nullcontext():
                status, reply = await ask(method, path, query, body)
                if status == Unavailable.status and _REFUSED in reply:
                    unreached()  # until it has joined again
                return status, reply
        except TimeoutError:
            error: RockError = Unavailable(f"worker {name} was silent for {_USUAL:g} s", hint="retry")
        except Unavailable as raised:
            error = raised
            if error.details.get("unsent"):
                unreached()
            if gone.is_set():
                error = Unavailable(f"worker {name} was lost while it was asked", hint="retry", details=routes.OUTAGE)
        return error.status, orjson.dumps(error.to_wire(), default=repr)

    return carry


def reach_with(
    key: str | None, tunnels: Tunnels, pods: bool = False, processes: Processes | None = None
) -> Callable[[WorkerInfo], Reached]:
    """The connection factory for workers that join. pods: the rocklets of sandbox pods have keys of their own.
    processes: rocklets that this server has started."""
    crowd = CreateBatch()

    def reach(info: WorkerInfo) -> Reached:
        gone = asyncio.Event()
        failed_at = float("-inf")

        def unreached() -> None:
            nonlocal failed_at
            failed_at = time.monotonic()

        command = {routes.EPOCH: f"{info.name}/{info.epoch}"}
        of_pod = pods and key is not None and info.name.startswith(POD_PREFIX)
        own = {} if key is None else {routes.OTHER_KEY: pod_key(key, info.name) if of_pod else key}
        dial = partial(tunnels.dial, info.name, info.holder) if info.url.startswith(SCHEME) else None
        if processes is not None and info.url.startswith(PROCESS):
            own, dial = {routes.OTHER_KEY: processes.key}, partial(unix.dial, processes.socket_of(info.name))
        data, long = RemoteApp(info.url, own, dial=dial), RemoteApp(info.url, {**own, **command}, dial=dial)
        carry = commands_over(long, info.name, gone, unreached)

        async def close() -> None:
            gone.set()
            await worker.close()
            await data.close()
            await long.close()

        worker = WireWorker(info.name, carry, long.stream, crowd)
        return Reached(worker, data, close, lambda: time.monotonic() - failed_at < _SHUNNED)

    return reach


def direct_to(
    settings: Settings, key: str | None, processes: Processes | None = None
) -> Callable[[WorkerInfo], tuple[dict[str, Any], str] | None]:
    """Where clients send direct requests to a worker, and the key that signs their tokens; None where they do not.
    InvalidConfig."""
    if settings.direct not in ("off", "machine", "all"):
        raise InvalidConfig(f"ROCK_DIRECT={settings.direct} is not a known choice", hint="use off, machine or all")

    def direct(info: WorkerInfo) -> tuple[dict[str, Any], str] | None:
        if info.url.startswith(PROCESS):
            if processes is None or settings.direct == "off":
                return None
            port = info.status.direct_port if info.status is not None else 0
            return {"path": str(processes.direct_socket_of(info.name)), "port": port}, processes.key
        if settings.direct != "all" or key is None or not info.url.startswith(("http://", "https://")):
            return None  # tunnels have no address
        if settings.tls_cert and not info.url.startswith("https://"):
            return None  # the client uses TLS
        return {"url": info.url}, pod_key(key, info.name) if info.name.startswith(POD_PREFIX) else key

    return direct


def lease_of(settings: Settings) -> Lease:
    """The lease durations of joined workers. Unsupported."""
    return Lease.of(settings.worker_lease, settings.worker_grace)


def workers_of(text: str) -> dict[str, str]:
    """Parse "name=url,name=url" to URLs by name; "none" is empty. InvalidConfig."""
    found: dict[str, str] = {}
    if text.strip() == "none":
        return found
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, url = part.partition("=")
        if not separator or not name or not url.startswith(("http://", "https://")):
            raise InvalidConfig(f"ROCK_WORKERS: {part!r} names no worker", hint="NAME=http://HOST:PORT,NAME=...")
        if name in found:
            raise InvalidConfig(f"ROCK_WORKERS: {name} is named twice",
                                hint="give each worker one name")
        found[name] = url
    return found


def door_of(settings: Settings, home: Home) -> dict[str, Any]:
    """The arguments of Authenticated other than its keys."""
    return {"owner_key": home.owner_key, "names": names_of(settings.host, settings.public_names),
            "checks_host": bool(settings.public_names)}  # fmt: skip


def refusal_of(auth: Authenticated) -> Callable[[Scope], Awaitable[RockError | None]]:
    """Why a request must not be forwarded to a server of the other role. A session of the web page is authenticated
    there, from the same store."""

    async def refusal(scope: Scope) -> RockError | None:
        if scope["path"].startswith(routes.PAGE + "/") and not auth.is_keyless:
            return None
        return await auth.problem(scope)

    return refusal


def page_of(settings: Settings, admin: Admin, store: Store) -> Page | None:
    """The web page of a server; None with ROCK_UI=off."""
    return Page(lambda: store.access, Live(store), admin.audit.note) if settings.ui == "on" else None


class Control:
    """Store, admin and proxy, over remote workers; for one role (admin/auth.py), or for both."""

    def __init__(self, settings: Settings, store: Store, processes: int = 1) -> None:
        """processes: rocklets of this machine that it starts, if there are several."""
        role = role_of(settings.role)
        require_key_beyond_loopback(settings.host, settings.api_key)
        urls = workers_of(settings.workers)
        if settings.archive not in ("", "off") and urls:
            raise Unsupported("ROCK_ARCHIVE: files of ROCK_WORKERS are not archived", hint="let them join")
        self.home = Home(settings.home)
        self.store = store
        key = settings.worker_key or settings.api_key
        # Not as Authorization, which may be for a program inside
        headers = {} if key is None else {routes.OTHER_KEY: key}
        self._remotes = [RemoteApp(url, headers) for url in urls.values()]
        apps: dict[str, App] = dict(zip(urls, self._remotes, strict=True))
        fixed: dict[str, Worker] = {name: WireWorker(name, transport_to(url, key)) for name, url in urls.items()}
        tunnels = Tunnels()
        self.processes = None
        self._settings = settings
        if processes > 1:
            self.processes = Processes(settings, processes, settings.api_key or self.home.owner_key)
        self.worker_registry = WorkerRegistry(fixed, apps, lambda: store.workers, reach_with(
            key, tunnels, settings.scheduler == "kubernetes", self.processes), lease_of(settings))  # fmt: skip
        self.worker_registry.direct = direct_to(settings, key, self.processes)
        self._proxy = Proxy(store, self.worker_registry.apps, builder=RESERVED if self.processes else None)
        settings = replace(settings, archive=settings.archive or ("" if self.processes else "off"))
        roles = ["write", "read"] if role == "all" else [role]
        self.admin = Admin(settings, store, self.worker_registry, roles, self._proxy, tunnels, role != "read")
        if isinstance(store, SqliteStore):
            store.reserve = self.home.reserve
        self._identity = None
        if role != "read":  # a reader ends no sandboxes
            self._identity = Identity(settings.run_dir, store, settings.store_changed, None)
            self.admin.opened = self._identity.check
        if self.processes is not None:
            self.worker_registry.processes = self.processes.urls
        self.observed = observe(settings, "admin", store)
        if self.processes is not None:
            self.observed.processes = partial(metrics_of, self.worker_registry, self.processes.names)
        # a server of the other role may forward requests
        routed = self.admin.audit.over(self.admin.configuration.over(self._route))
        relayed = RelayedCalls(routed, settings.reconnect_timeout)
        self.gateway: ServerGateway | None = None
        self._remote_gateway: RemoteGateway | None = None
        self.protocols = Protocols(routed)
        self._routes = self.protocols.over(self.admin.app)
        if settings.gateway == "on" and role != "read":
            self.gateway = ServerGateway(settings, self._proxy, self.admin)
            self._routes = self.gateway.over(self._routes)
        self.e2b = e2b_of(settings, self.admin, store, self._proxy)
        if self.e2b is not None:
            self._routes = self.e2b.over(self._routes)
        self.page = page_of(settings, self.admin, store)
        checked = Authenticated(self.observed.measured(self.page.inside(relayed) if self.page else relayed),
                              settings.api_key, self.admin.keys, settings.worker_key,
                              **door_of(settings, self.home))  # fmt: skip
        app: App = self.page.over(checked) if self.page else checked
        # Forwarded requests arrive from a local socket, so a server without a key would treat every client as the
        # owner.
        if role == "read":
            writers = self._others(settings.writer)
            app = RoleFilter(app, "read", writers, refusal_of(checked))
            if writers:
                self._remote_gateway = RemoteGateway(writers)
                app = endpoint_of(self._remote_gateway, app)
        elif role == "write":
            app = RoleFilter(app, "write", self._others(settings.reader), refusal_of(checked))
        app = app if self.e2b is None else self.e2b.before_authentication(app)
        self.app = self.observed.over(app if self.gateway is None else self.gateway.before_authentication(app))

    def _others(self, text: str) -> list[RemoteApp]:
        found = servers(text)
        self._remotes += found
        return found

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and is_data(scope["path"]):
            await self._proxy(scope, receive, send)
        else:
            await self._routes(scope, receive, send)

    def let_go(self) -> None:
        """Prepare for a stop of the server."""
        if self.gateway is not None:
            self.gateway.gateway.let_go()
        if self.processes is not None:
            self.processes.let_go()

    @property
    def left(self) -> int:
        """Sandboxes of the processes of this machine, which survive a stop."""
        return 0 if self.processes is None else self.worker_registry.sandboxes_of(self.processes.names)

    async def open(self) -> None:
        self.home.take()
        try:
            if self.processes is not None:
                check_left(self._settings, self.processes.count)
            if self._identity is not None:
                self._identity.check_there()
            await self.admin.open()
            if self.processes is not None:
                await forget(self._settings, self.store.workers, self.processes.count)
            if self.gateway is not None:
                try:
                    await self.gateway.open()
                except BaseException:
                    await self.admin.close()
                    raise
        except BaseException:
            self.home.release()
            raise
        self.observed.open()

    async def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.home.release)
            await self.observed.close()
            await self.protocols.close()
            if self.gateway is not None:
                await self.gateway.close()
            if self._remote_gateway is not None:
                await self._remote_gateway.close()
            if self.e2b is not None:
                await self.e2b.close()
            for remote in self._remotes:
                await remote.close()
            if self.page is not None:
                await self.page.close()
            await self.admin.close()
            if self.processes is not None:  # without requests of the admin, they end at once
                await self.processes.close()


# ---- local worker ----

class LocalWorker:
    """Implements admin.worker.Worker by direct calls to the rocklet of this process."""

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

    async def pause(self, sandbox_id: str) -> NodeSandbox:
        return await self._node.pause(sandbox_id)

    async def resume(self, sandbox_id: str) -> NodeSandbox:
        return await self._node.resume(sandbox_id)

    async def commit(self, sandbox_id: str, spec: NodeCommit) -> NodeImage:
        return await self._node.commits.commit(sandbox_id, spec)

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

    async def events(self, after: int, wait: float, boot: str = "") -> NodeEvents:
        try:
            return await self._node.ends.since(after, wait, boot)
        except Unavailable:  # this server stops, and soon cancels its caller
            await asyncio.sleep(wait)
            raise

    async def volumes(self) -> NodeVolumes:
        return self._node.volumes.inventory()

    async def create_volume(self, volume_id: str, spec: NodeVolume) -> NodeVolumes:
        return await self._node.volumes.create(volume_id, spec)

    async def delete_volume(self, volume_id: str) -> NodeVolumes:
        return await self._node.delete_volume(volume_id)

    async def configure(self, spec: NodeConfiguration) -> NodeConfiguration:
        return await self._node.configuration.configure(spec)

    async def pools(self) -> NodePoolStates:
        return self._node.pools.states()

    async def define_pools(self, spec: NodePools) -> NodePoolStates:
        return await self._node.pools.define(spec)

    async def snapshots(self) -> NodeSnapshots:
        return self._node.snapshots.inventory()

    async def checkpoint(self, sandbox_id: str, spec: NodeCheckpoint) -> NodeSnapshot:
        return await self._node.snapshots.checkpoint(sandbox_id, spec)

    async def forkable(self, sandbox_id: str) -> NodeForkable:
        return await self._node.snapshots.forkable(sandbox_id)

    async def rollback(self, sandbox_id: str, snapshot_id: str) -> NodeSandbox:
        return await self._node.rollback(sandbox_id, snapshot_id)

    def export_snapshot(self, snapshot_id: str) -> AsyncGenerator[bytes]:
        return self._node.snapshots.export(snapshot_id)

    async def import_snapshot(self, snapshot_id: str, spec: NodeImport, data: AsyncIterator[bytes]) -> NodeSnapshot:
        return await self._node.snapshots.take_in(snapshot_id, spec, data)

    async def delete_snapshot(self, snapshot_id: str) -> NodeSnapshots:
        return await self._node.snapshots.delete(snapshot_id)
