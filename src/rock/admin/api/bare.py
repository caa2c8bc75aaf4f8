"""Routes without a framework: server information, health, worker heartbeats, and lazy loading of the other routes.

Probes and clients send these requests first, so they must not wait for an import.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

import orjson

from rock import __version__
from rock.admin.tenants import TenantServices
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import ClientError, Forbidden, RockError, no_such_route
from rock.http import multiplexing
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, answer, answer_model, failure, fit
from rock.http.tunnels import Tunnels
from rock.protocol.keys import Access, caller_of
from rock.protocol.node import Beat, JoinWorker, ServerInfo
from rock.protocol.routes import ROUTES
from rock.settings import Settings

NAMES = ("server_info", "health")


class About:
    """Server information and health: handlers by route name. roles: the roles of the process."""

    def __init__(
        self, tenant_services: TenantServices, worker_registry: WorkerRegistry, settings: Settings, roles: Sequence[str]
    ) -> None:
        self._tenant_services = tenant_services
        self._worker_registry = worker_registry
        self._home = str(settings.home)
        self._roles = list(roles)
        self._multiplex = settings.multiplex
        self._started_at = time.time()

    def add_to(self, router: Router) -> None:
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))
        multiplexing.add_route(router, self._multiplex)

    async def server_info(self, request: Request) -> Answer:
        """Version, isolation and capacity."""
        found = [
            info.status for info in await self._worker_registry.infos() if info.status is not None and not info.is_lost
        ]
        owner = Access.ADMIN in caller_of(request.scope).scopes
        # image names of other tenants are omitted
        seen = found if owner else [status.model_copy(update={"images": []}) for status in found]
        return answer_model(
            ServerInfo(
                version=__version__,
                home=self._home,
                roles=self._roles,
                workers=seen,
                sandboxes=await self._tenant_services(request.scope).count(),
                started_at=self._started_at,
                pid=os.getpid(),
            )
        )

    async def health(self, _: Request) -> Answer:
        """Responds while the server runs."""
        return answer({"status": "ok", "version": __version__})


# ---- heartbeats ----
#
# The routes by which workers join and send heartbeats. A lease must not expire because of an import or a framework.

WORKER_NAMES = ("join_worker", "beat_worker", "worker_tunnel")


class Heartbeats:
    """Handlers by route name."""

    def __init__(self, worker_registry: WorkerRegistry, tunnels: Tunnels) -> None:
        self._worker_registry = worker_registry
        self._tunnels = tunnels

    def add_to(self, router: Router) -> None:
        for name in WORKER_NAMES:
            router.add(ROUTES[name], getattr(self, name))

    async def join_worker(self, request: Request) -> Answer:
        """A rocklet joins, or joins again."""
        spec = await request.model(JoinWorker)
        _own_name(request, spec.name)
        return answer_model(await self._worker_registry.join(spec))

    async def beat_worker(self, request: Request) -> Answer:
        """A heartbeat; Conflict when the epoch of the worker is over."""
        name = request.path["worker"]
        _own_name(request, name)
        return answer_model(await self._worker_registry.beat(name, await request.model(Beat)))

    async def worker_tunnel(self, request: Request, receive: Receive, send: Send) -> None:
        """A connection in the reverse direction, of a rocklet without inbound ports."""
        name = request.path["worker"]
        _own_name(request, name)
        await self._tunnels.serve(name, request, receive, send)


def _own_name(request: Request, name: str) -> None:
    """Forbidden for the key of a sandbox pod that joins as another worker."""
    own = caller_of(request.scope).worker
    if own and own != name:
        raise Forbidden(f"this key joins as worker {own} only", hint="set ROCK_WORKER_NAME of the rocklet to that name")


# ---- lazy loading ----
#
# An application that is built at its first request, and an access check that does not wait for that.

_PAGES = ("/", "/docs", "/redoc", "/openapi.json")
_ASSETS = "/docs/assets/"


class LazyApp:
    """`make` runs in a thread at the first request: its imports take as long as the rest of the start."""

    def __init__(self, make: Callable[[], App]) -> None:
        self._make = make
        self._lock = asyncio.Lock()
        self._app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            async with self._lock:
                if self._app is None:
                    self._app = await asyncio.to_thread(self._make)
        await self._app(scope, receive, send)


def guarded(app: App) -> App:
    """Wrap `app` with the access check of its routes. A path without a route is accessible only to the server's
    owner."""
    control = (route for route in ROUTES.values() if route.plane == "control")
    rows = [(route.method, tuple(route.path.split("/")), route.access) for route in control]

    def found(path: str) -> dict[str, Access]:
        """The access right of each method of a path; of two matching routes, that of the first."""
        given = path.split("/")
        return {kind: needed for kind, parts, needed in reversed(rows) if fit(parts, given) is not None}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            caller, kinds = caller_of(scope), found(path)
            needed = kinds.get("GET" if method == "HEAD" else method)
            if path in _PAGES or path.startswith(_ASSETS):
                needed = Access.OPEN if path == "/" else Access.READ
            try:
                if needed is None and Access.ADMIN not in caller.scopes:
                    raise no_such_route(path, method)
                caller.require(needed or Access.ADMIN)
            except RockError as error:
                await failure(error).send(send)
                return
            if kinds and method not in kinds:
                refused = ClientError(f"{method} {path}: Method Not Allowed")
                headers = [(b"allow", ", ".join(sorted(kinds)).encode())]
                await Answer(orjson.dumps(refused.to_wire()), 405, headers=headers).send(send)
                return
        await app(scope, receive, send)

    return guard
