"""The composition root: builds store, admin, proxy and rocklet from the settings, and serves them on one port."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import uvicorn

from rock import __version__, faults
from rock import settings as environment
from rock.admin.app import Admin
from rock.admin.auth import Authenticated
from rock.admin.preflight import require_key_beyond_loopback, role_of
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.cli.serve import group
from rock.cli.serve.control import Control, LocalWorker, direct_to, door_of, lease_of, page_of, reach_with
from rock.cli.serve.dialects import e2b_of
from rock.cli.serve.gateway import RemoteGateway, ServerGateway
from rock.cli.serve.home import Home, Reserve, make_private
from rock.cli.serve.identity import Identity
from rock.cli.serve.observing import observe
from rock.cli.serve.processes import Processes, check_left, count_of, forget, has_sandboxes
from rock.cli.serve.protocols import Protocols
from rock.cli.serve.tls import tls_of
from rock.errors import Conflict, InvalidConfig, Unsupported
from rock.host import resources
from rock.http import multiplexing
from rock.http.asgi import Answer, App, Receive, Request, Scope, Send, answer
from rock.http.connections import HEAD_WITHIN, Admission, HttpConnection
from rock.http.direct import DirectRequests
from rock.http.forwarding import RemoteApp
from rock.http.middleware import dropping
from rock.http.relay import RelayedCalls
from rock.http.tunnels import SCHEME, Tunnels
from rock.images.store import ImageStore
from rock.protocol.routes import FRAMES_OFFERED, ROUTES
from rock.protocol.sandbox import parse_size
from rock.proxy.app import Proxy, is_data
from rock.rocklet.api.sandboxes import Api
from rock.rocklet.images.store import Images
from rock.rocklet.membership import IDENTITY, FencingToken, Joining, Membership, servers_of
from rock.rocklet.node import Node
from rock.runtime import plugins
from rock.runtime.base import Runtime
from rock.settings import Settings
from rock.store.base import Store
from rock.store.sqlite import SqliteStore
from rock.store.timed import timed
from rock.telemetry import set_up_logs

log = logging.getLogger("rock.server")
T = TypeVar("T")
_QUEUE = 2048  # listen backlog: connections that the kernel queues
_AT_ONCE = 16  # maximum accepted connections per loop iteration; uvloop accepts one


def make_runtimes(settings: Settings, images: Images) -> dict[str, Runtime]:
    """Every runtime of this machine, by name."""
    from rock.runtime.fake import FakeRuntime
    from rock.runtime.process.portable import PlainRuntime
    from rock.runtime.process.runtime import ProcessRuntime, can_hold_init

    process = ProcessRuntime if can_hold_init() else PlainRuntime
    runtimes: dict[str, Runtime] = {"process": process(settings.run_dir / "process", settings.container_image),
                                    "fake": FakeRuntime()}
    if sys.platform == "linux" and can_hold_init():
        from rock.runtime.docker.runtime import DockerRuntime
        from rock.runtime.gvisor.runtime import GvisorRuntime
        from rock.runtime.landlock.runtime import LandlockRuntime
        from rock.runtime.namespace.runtime import NamespaceRuntime

        folder, guests = settings.run_dir / "namespace", settings.home / "guest-python"
        # GPUs cannot be divided: the first of several processes assigns all of them.
        runtimes["docker"] = DockerRuntime(settings.run_dir / "docker", guests, settings.docker_host,
                                           gpus=settings.process == 0)
        runtimes["gvisor"] = GvisorRuntime(settings.run_dir / "gvisor", guests, images.store)
        runtimes["landlock"] = LandlockRuntime(settings.run_dir / "landlock")
        runtimes["namespace"] = NamespaceRuntime(folder, settings.pool_size, images.store, _resolvers(settings),
                                                 disk_limit=_disk_limit(settings),
                                                 snapshot_memory=_snapshot_memory(settings))
    runtimes |= plugins.load(
        lambda name: plugins.RuntimeContext(settings.run_dir / "runtimes" / name, images.store, settings.pool_size)
    )
    if settings.runtime not in runtimes:
        names = ", ".join(sorted(runtimes))
        raise InvalidConfig(f"no runtime {settings.runtime!r} (there are: {names})", hint="set ROCK_RUNTIME")
    return runtimes


def make_store(settings: Settings) -> Store:
    """The store of ROCK_STORE: a file, or a PostgreSQL database. InvalidConfig, Unsupported."""
    return timed(_store_of(settings))


def _store_of(settings: Settings) -> Store:
    scheme, separator, _ = settings.store.partition("://")
    if not separator:
        file = Path(settings.store).expanduser().absolute() if settings.store else settings.database
        return SqliteStore(file, shared=role_of(settings.role) != "all")
    if scheme not in ("postgresql", "postgres"):
        raise InvalidConfig(f"ROCK_STORE: there is no store for {scheme}://", hint="a file, or postgresql://...")
    try:
        from rock.store.postgres import PostgresStore
    except ImportError:
        raise Unsupported("ROCK_STORE: PostgreSQL needs asyncpg", hint="pip install 'rock-sandbox[postgres]'") from None
    return PostgresStore(settings.store)


def _snapshot_memory(settings: Settings) -> int | None:
    """Bytes for the memory of copied processes; None is the default. InvalidConfig."""
    if settings.snapshot_memory in ("", "0"):
        usual = None if settings.share == 1 else resources.read()[0] // 4 // settings.share
        return usual if not settings.snapshot_memory else 0
    try:
        return parse_size(settings.snapshot_memory, "memory") // settings.share
    except ValueError as error:
        raise InvalidConfig(f"ROCK_SNAPSHOT_MEMORY: {error}", hint="use a size like 4g, or 0") from None


def _disk_limit(settings: Settings) -> int:
    """Limit in bytes of the files of a sandbox without `disk`; 0 is no limit. InvalidConfig."""
    if settings.disk_limit == "0":
        return 0
    try:
        return parse_size(settings.disk_limit, "disk")
    except ValueError as error:
        raise InvalidConfig(f"ROCK_DISK_LIMIT is not a size: {error}",
                            hint="use a size like 10g, or 0 for none") from None


def _resolvers(settings: Settings) -> list[str]:
    from rock.egress.dns import parse_server

    try:
        for text in settings.resolvers:
            parse_server(text)
    except ValueError as error:
        raise InvalidConfig(f"ROCK_NETWORK_RESOLVERS is not a list of resolvers: {error}",
                            hint="write addresses like 203.0.113.1:53, separated by commas") from None
    return settings.resolvers


class Rocklet:
    """The sandboxes of this machine, their home and their routes. `runtimes`: replaces the default set."""

    def __init__(
        self, settings: Settings, runtimes: dict[str, Runtime] | None = None, home: Home | None = None
    ) -> None:  # fmt: skip
        require_key_beyond_loopback(settings.host, settings.api_key)
        self.home = home or Home(settings.home)
        self.images = Images(ImageStore.of(settings))
        runtimes = make_runtimes(settings, self.images) if runtimes is None else runtimes
        self.node = Node(runtimes, settings.runtime, settings.run_dir, settings.sandbox_limit, self.images,
                         settings.env_lease, settings.host_mount_folders, bool(settings.join),
                         settings.idle_after, settings.share, settings.server_home)  # fmt: skip
        self.router = Api(self.node, settings.reconnect_timeout).router()
        self.router.add(ROUTES["health"], _health)
        multiplexing.add_route(self.router, settings.multiplex)
        self.membership = membership_of(settings, self.node)
        self._remote_gateway: RemoteGateway | None = None
        if settings.join:
            self._remote_gateway = RemoteGateway(servers_of(settings.join, None))
            self.node.gateway = self._remote_gateway
        fenced = FencingToken(settings.run_dir / "fence").over(self.router)
        app = RelayedCalls(
            fenced if self.membership is None else self.membership.over(fenced), settings.reconnect_timeout
        )
        self.observed = observe(settings, "rocklet", node=self.node)
        checked = Authenticated(self.observed.measured(app), settings.api_key, **door_of(settings, self.home))
        lease = self.membership.lease if self.membership is not None else lambda: None
        self.app = self.observed.over(DirectRequests(checked, settings.api_key, lease))
        self.direct = self.observed.over(DirectRequests(checked, settings.api_key, lease, only=True))

    def let_go(self) -> None:
        """Prepare for a stop of the server."""
        self.node.let_go()

    @property
    def left(self) -> int:  # sandboxes that survive it
        return self.node.count

    async def open(self, *, later: bool = False) -> None:
        self.home.take()
        try:
            await self.node.open(later=later and self.membership is None)  # a lost lease ends all sandboxes at once
        except BaseException:
            await self.node.close()  # other runtimes may be open already
            self.home.release()
            raise
        self.observed.open()
        if self.membership is not None:
            try:
                await self.membership.open()
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """Stop serving; sandboxes survive and are found again by the next server."""
        if self.membership is not None:
            await self.membership.close()
        await self.observed.close()
        await self.node.close()
        if self._remote_gateway is not None:
            await self._remote_gateway.close()
        self.home.release()


def membership_of(settings: Settings, node: Node) -> Membership | None:
    """The membership of this machine, if it joins a server. InvalidConfig."""
    if not settings.join:
        return None
    servers = servers_of(settings.join, settings.api_key)
    name = settings.worker_name or re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:63]
    tunnel = None
    if settings.tunnel == "on":
        if settings.advertise or settings.tls_cert or settings.api_key is None:
            raise InvalidConfig("ROCK_TUNNEL excludes ROCK_ADVERTISE and ROCK_TLS_CERT, and requires a key",
                                hint="servers reach this worker by its tunnels only; give it --token")
        own = "127.0.0.1" if settings.host in ("0.0.0.0", "") else "::1" if settings.host == "::" else settings.host
        tunnel = own, settings.port
        url = f"{SCHEME}{name}"
    else:
        url = settings.advertise or f"{'https' if settings.tls_cert else 'http'}://{_reached_at(settings, servers[0])}"
    if settings.lease_lost not in ("stop", "keep"):
        raise InvalidConfig(f"ROCK_LEASE_LOST={settings.lease_lost} is not a known choice", hint="use stop or keep")
    return Membership(node, Joining(servers, name, url.rstrip("/"), settings.lease_lost == "keep", tunnel,
                                    settings.api_key),
                      settings.process_dir / IDENTITY)  # fmt: skip


def _reached_at(settings: Settings, server: RemoteApp) -> str:
    """HOST:PORT by which servers reach this machine: the listening address, or the local address towards them."""
    host = settings.host
    if host in ("0.0.0.0", "::", ""):
        try:
            family, kind, _, _, address = socket.getaddrinfo(server.host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # connecting a UDP socket sends nothing
                host = str(probe.getsockname()[0])
        except OSError as error:
            raise InvalidConfig(f"where servers reach this machine is not known: {error}",
                                hint="--advertise http://HOST:PORT") from None  # fmt: skip
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


async def _health(_: Request) -> Answer:
    return answer({"status": "ok", "version": __version__})


class Server:
    """All roles in one process, as one ASGI application with its own lifecycle. `runtimes`: see Rocklet."""

    def __init__(self, settings: Settings, runtimes: dict[str, Runtime] | None = None) -> None:
        self.settings = settings
        self.rocklet = Rocklet(settings, runtimes)
        self.home, self.node = self.rocklet.home, self.rocklet.node
        # Not the host name, which changes with the network: every sandbox would then belong to an unknown worker.
        name = "local"
        self.store = make_store(settings)
        fixed: dict[str, Worker] = {name: LocalWorker(name, self.node)}
        tunnels = Tunnels()
        worker_registry = WorkerRegistry(fixed, {name: self.rocklet.router}, lambda: self.store.workers,
                      reach_with(settings.worker_key or settings.api_key, tunnels), lease_of(settings))  # fmt: skip
        worker_registry.direct = direct_to(settings, settings.worker_key or settings.api_key)
        self._proxy = Proxy(self.store, worker_registry.apps, local=name)
        self.admin = Admin(settings, self.store, worker_registry, ["write", "read", "worker"], self._proxy, tunnels)
        self.admin.service.records.on_step.append(lambda _, after: self._proxy.noted(after))
        if isinstance(self.store, SqliteStore):
            self.store.reserve = self.home.reserve
        self._identity = Identity(settings.run_dir, self.store, settings.store_changed, self.node)
        self.admin.opened = self._identity.check
        self.observed = self.rocklet.observed = observe(settings, "server", self.store, self.node)
        self.gateway = None
        self._routes = self.admin.app
        if settings.gateway == "on":
            self.gateway = ServerGateway(settings, self._proxy, self.admin)
            self._routes = self.gateway.over(self.admin.app)
            self.node.gateway = self.gateway.endpoint
        self.e2b = e2b_of(settings, self.admin, self.store, self._proxy)
        if self.e2b is not None:
            self._routes = self.e2b.over(self._routes)
        self.page = page_of(settings, self.admin, self.store)
        routed = self.admin.audit.over(self.admin.configuration.over(self._route))
        self.protocols = Protocols(routed)
        self._routes = self.protocols.over(self._routes)
        checked = Authenticated(self.observed.measured(self.page.inside(routed) if self.page else routed),
                              settings.api_key, self.admin.keys, settings.worker_key,
                              **door_of(settings, self.home))  # fmt: skip
        app: App = self.page.over(checked) if self.page else checked
        app = app if self.e2b is None else self.e2b.before_authentication(app)
        self.app = self.observed.over(app if self.gateway is None else self.gateway.before_authentication(app))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # cancelled by the shutdown
            if scope["type"] != "lifespan" and is_data(scope["path"]):
                await self._proxy(scope, receive, send)
            else:
                await self._routes(scope, receive, send)

    def let_go(self) -> None:
        """Prepare for a stop of the server."""
        self.rocklet.let_go()
        if self.gateway is not None:
            self.gateway.gateway.let_go()

    @property
    def left(self) -> int:
        return self.rocklet.left

    async def open(self) -> None:
        check_left(self.settings, 1)
        await self.rocklet.open(later=True)
        try:
            self._identity.check_there()
            await self.admin.open()
            await forget(self.settings, self.store.workers, 1)
            if self.gateway is not None:
                try:
                    await self.gateway.open()
                except BaseException:
                    await self.admin.close()
                    raise
        except BaseException:
            await self.rocklet.close()
            raise
        self.node.recovery.begin()

    async def close(self) -> None:
        """Stop serving; sandboxes survive and are found again by the next server."""
        await self.protocols.close()
        if self.gateway is not None:
            await self.gateway.close()
        if self.e2b is not None:
            await self.e2b.close()
        if self.page is not None:
            await self.page.close()
        await self.admin.close()
        await self.rocklet.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; Conflict when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol: asyncio sets TCP_NODELAY on connections of such a listener only. Without it, a response of two
    # writes waits 40 ms for the delayed acknowledgment of its first.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_QUEUE)
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="choose another with --port, or stop what listens there",
        ) from None
    listener.setblocking(False)
    return listener


class _Uvicorn(uvicorn.Server):
    """Disables uvicorn's signal handlers, see `stop_on_signals`. The backlog is larger than the number accepted at
    once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_QUEUE)  # the event loop has set its own backlog

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_over(
    app: App, settings: Settings | None = None, *, admission: Admission | None = None, head_within: float = HEAD_WITHIN,
    ends_within: int = 5, frames: bool = False,
) -> uvicorn.Server:
    """An HTTP server over an application, without sockets. admission: limits its connections. head_within: timeout in
    seconds for the head of a request. ends_within: seconds that requests have at a stop. frames: tell clients that
    connections can be upgraded. InvalidConfig for an invalid certificate."""
    tls = {} if settings is None else tls_of(settings)
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(HttpConnection, admission=admission or Admission(), head_within=head_within)),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=ends_within,
        server_header=False,
        proxy_headers=False,  # no sender of these headers is a known proxy
        ws_max_size=16 << 20,
        backlog=_AT_ONCE,
        headers=[(FRAMES_OFFERED, "1")] if frames else None,
        **tls,
    )
    return _Uvicorn(config)


def make_server(settings: Settings, role: type[Server] | type[Rocklet]) -> Server | Rocklet | Control:
    """The application of a process with these settings."""
    if role is Server:
        count = count_of(settings)
        if count > 1 or not has_sandboxes(settings):
            return Control(settings, make_store(settings), count)
        return Server(settings)
    home = Home(settings.home)
    home.take()
    try:
        group.settle(settings)
        return Rocklet(settings, home=home)
    except BaseException:
        home.release()
        raise


async def serve(settings: Settings, role: type[Server] | type[Rocklet] = Server) -> None:
    """Serve until SIGTERM or SIGINT."""
    tls_of(settings)
    port = (listener := listen(settings.host, settings.port)).getsockname()[1]
    try:
        server = make_server(replace(settings, port=port), role)
        await server.open()
    except BaseException:
        listener.close()
        raise
    processes = server.processes if isinstance(server, Control) else None
    sockets = [listener] if processes is None else [listener, processes.listen()]
    try:
        app = dropping(server.app) if faults.active else server.app
        http = http_over(app, settings, frames=settings.multiplex == "on")

        async def drain() -> None:
            try:
                await server.observed.drain(settings.drain_seconds)
            finally:
                server.let_go()

        membership = server.membership if isinstance(server, Rocklet) else None
        if membership is not None:  # rock worker drain --self
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, membership.leave)
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, membership.evacuate)
        with stop_on_signals(http, drain):
            serving: asyncio.Task[None] | None = None
            if processes is not None:  # they join by one of the sockets
                serving = asyncio.create_task(http.serve(sockets=sockets), name="http")
                await _opened(processes, http, serving)
            server.home.write(settings.host, port, settings.tls_cert, membership is not None)
            reserve = asyncio.create_task(server.home.reserve.keep(), name="reserve")
            _announce(settings, port)
            await (serving or http.serve(sockets=sockets))
            reserve.cancel()
            await asyncio.gather(reserve, return_exceptions=True)
    finally:
        left = server.left
        await server.close()
        for one in sockets:
            one.close()
        if left:
            print(f"{left} sandboxes stay alive; `rock admin start` finds them again", flush=True)


async def _opened(processes: Processes, http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Wait until the processes serve, or until `serving` ends because of a signal. The error of a process."""
    opening = asyncio.create_task(processes.open(), name="processes")
    try:
        await asyncio.wait({opening, serving}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
    except BaseException:
        http.should_exit = True  # a cancelled server leaves its listeners open, and the loop does not close them
        await asyncio.gather(serving, return_exceptions=True)
        raise
    finally:
        opening.cancel()  # no effect on one that is done
        await asyncio.gather(opening, return_exceptions=True)


def _announce(settings: Settings, port: int) -> None:
    scheme = "https" if settings.tls_cert else "http"
    gc.freeze()  # excludes existing objects from garbage collections, which stop all requests
    gc.enable()
    log.info("serving on %s://%s:%d, home %s, pid %d", scheme, settings.host, port, settings.home, os.getpid())
    print(f"ROCK serves on {scheme}://{settings.host}:{port} (home {settings.home})", flush=True)


@contextlib.contextmanager
def stop_on_signals(http: uvicorn.Server, drain: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """On SIGTERM and SIGINT, stop `http` after `drain`; a second signal skips the wait."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    draining: list[asyncio.Task[None]] = []

    def stop() -> None:
        if draining:
            loop.call_soon(draining[0].cancel)  # after its first step, if both signals arrive together
        else:
            draining.append(asyncio.create_task(end(), name="drain"))

    async def end() -> None:
        try:
            await drain()
        finally:
            http.should_exit = True

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def run_server(settings: Settings, role: type[Server] | type[Rocklet] = Server, *, log_to_file: bool = True) -> None:
    """Serve until a stop. Raises RockError when it cannot start."""
    make_private(settings.home)
    Reserve(settings.home).prepare()
    set_up_logs(settings.log_level, settings.log_dir if log_to_file else None, settings.log_format)
    prepare_process(settings)
    run(group.serve(settings) if role is Rocklet and settings.processes > 1 else serve(settings, role))


def prepare_process(settings: Settings) -> None:
    """Fault points, limits and garbage collection of a server process."""
    faults.arm(settings.faults)
    _raise_file_limit()
    spare_collections()
    if sys.platform == "linux":
        from rock.guest.init import syscalls

        syscalls.run_soon()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run on the servers' event loop: uvloop if installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def spare_collections() -> None:
    """Reduce garbage collections: start-up objects are permanent, and later ones form few cycles. A collection after
    each 700 objects took a tenth of the server's time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def when_input_ends(act: Callable[[], object]) -> None:
    """Call a function, in a thread, when standard input ends: the program that started this process has ended."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        act()

    threading.Thread(target=watch, daemon=True, name="input").start()


def _raise_file_limit() -> None:
    """Raise the soft limit of open files: the usual 1024 suffices for 200 sessions."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


__all__ = [
    "Home",
    "Rocklet",
    "Server",
    "environment",
    "http_over",
    "listen",
    "run",
    "run_server",
    "serve",
    "stop_on_signals",
]
