"""The loopback port of a sandbox to the model gateway: HTTP connections of programs inside, forwarded to /gateway only.

    agent ── 127.0.0.1:PORT inside ──► pid 1 ──► connection in the rocklet ──► /gateway of the server

The connections come from inside, so they pass the same parser and limits as those of other clients. The path of each
request gets the prefix /gateway: no other route is reachable. WebSockets are rejected at once, because agents fall back
to HTTP then. Responses are sent as they arrive, with backpressure in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from rock.errors import RockError, SandboxError, Unsupported
from rock.http.asgi import App, Receive, Scope, Send, refuse_upgrade
from rock.http.connections import Admission, HttpConnection
from rock.protocol.routes import CALL, EPOCH, FENCE, HANDED_ON, OTHER_KEY
from rock.protocol.rows import ENDPOINT
from rock.runtime.base import Handle, Listens, Runtime

log = logging.getLogger("rock.gateway")

_CONNECTIONS = 256  # of one sandbox
_ACCEPTS = 4  # pending accepts: connections that arrive at the same moment need no round trip each
_RETRY = 0.2  # seconds until the next accept after a failure
# Headers by which servers speak to each other. An agent must not send them.
_OURS = frozenset(name.encode() for name in (CALL, EPOCH, FENCE, HANDED_ON, OTHER_KEY))


class Confined:
    """The ASGI application of a port: requests to `app` below /gateway. active: the context of each request."""

    def __init__(self, app: App, active: Callable[[], AbstractContextManager[None]]) -> None:
        self._app = app
        self._active = active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "websocket":
            await refuse_upgrade(scope, receive, send)
            return
        path = scope["path"]
        below = path if path.startswith(ENDPOINT + "/") else ENDPOINT + path
        raw: bytes = scope.get("raw_path") or path.encode()
        if ".." in below.split("/"):
            below, raw = ENDPOINT + "/", b"/"
        raw = raw if raw.startswith(ENDPOINT.encode() + b"/") else ENDPOINT.encode() + raw
        headers = [header for header in scope["headers"] if header[0] not in _OURS]
        scope = {**scope, "path": below, "raw_path": raw, "headers": headers}
        with self._active():
            await self._app(scope, receive, send)


class GatewayPort:
    """The port of one sandbox. app: serves the gateway's routes; None on a worker without a server. active: the context
    of each request, which counts as activity of the sandbox."""

    def __init__(
        self, sandbox_id: str, runtime: Runtime, handle: Handle, app: App | None,
        active: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self._active = active
        self._id = sandbox_id
        self._runtime = runtime
        self._handle = handle
        self._app = app
        self.port: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._config: uvicorn.Config | None = None
        self._state = ServerState()
        self._admission = Admission(_CONNECTIONS, _CONNECTIONS)

    @property
    def connections(self) -> int:
        return len(self._state.connections)

    async def open(self, port: int | None = None) -> int:
        """Listen inside; returns the port. An open port stays, unless another one is requested. Unsupported, Conflict,
        Lost."""
        if self.port is not None and port in (None, self.port):
            return self.port
        if self._app is None:
            raise Unsupported("this worker has no server whose gateway it could forward to", sandbox_id=self._id,
                              hint="let the worker join its server: rocklet --join URL")
        if not isinstance(self._runtime, Listens):
            raise Unsupported(f"the runtime {self._handle.runtime!r} opens no ports in a sandbox", sandbox_id=self._id,
                              hint="use another runtime for agents; `rock doctor` lists those of this machine")
        opened = await self._runtime.listen(self._handle, port or 0)
        await self.close()
        self.port = opened
        self._config = uvicorn.Config(
            cast(Any, Confined(self._app, self._active)),
            http=cast(Any, partial(HttpConnection, admission=self._admission)),
            log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75, server_header=False,
            proxy_headers=False, date_header=False,
        )  # fmt: skip
        self._config.load()
        for _ in range(_ACCEPTS):
            task = asyncio.create_task(self._accept(self._runtime, opened), name=f"gateway-port-{self._id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return opened

    async def _accept(self, runtime: Listens, port: int) -> None:
        while True:
            try:
                fd = await runtime.accept(self._handle, port)
            except SandboxError:
                return  # the sandbox has ended
            except RockError as error:
                log.info("gateway port %d of sandbox %s: %s", port, self._id, error)
                await asyncio.sleep(_RETRY)
                if self.port != port:
                    return
                with contextlib.suppress(RockError):
                    await runtime.listen(self._handle, port)
                continue
            await self._serve(fd)

    async def _serve(self, fd: int) -> None:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:  # pid 1 runs inside, and may return any kind of descriptor
            os.close(fd)
            log.warning("gateway port of sandbox %s: pid 1 returned no connection: %s", self._id, error)
            return
        if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            sock.close()
            return
        config = self._config
        assert config is not None
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def connection() -> asyncio.Protocol:
            kind = cast(Any, config.http_protocol_class)
            return cast(asyncio.Protocol, kind(config=config, server_state=self._state, app_state={}))

        try:
            await asyncio.get_running_loop().connect_accepted_socket(connection, sock)
        except (OSError, ValueError) as error:
            sock.close()
            log.info("gateway port of sandbox %s: a connection broke: %s", self._id, error)

    def cut(self) -> None:
        """Stop accepting, and close all connections. The port inside stays open for the next server process."""
        for task in self._tasks:
            task.cancel()
        for connection in list(self._state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    async def close(self) -> None:
        """Close the port inside and all connections. Idempotent; the sandbox may have ended already."""
        port, self.port = self.port, None
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if port is not None and isinstance(self._runtime, Listens):
            with contextlib.suppress(RockError):
                await self._runtime.unlisten(self._handle, port)
