"""The model gateway of a server: its composition with the data plane and the loopback ports of sandboxes."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from rock.admin.app import Admin
from rock.errors import from_wire
from rock.gateway.api import GatewayRoutes
from rock.gateway.service import Gateway, Limits
from rock.http.asgi import App, Receive, Scope, Send, call
from rock.http.forwarding import RemoteApp, first_reached
from rock.protocol.keys import OPERATOR
from rock.protocol.routes import ROUTES
from rock.protocol.rows import ENDPOINT
from rock.settings import Settings


class ServerGateway:
    """The gateway, mounted: `before_authentication` for agents, `over` behind it for the API. data: the data plane,
    which reaches the worker of a sandbox."""

    def __init__(self, settings: Settings, data: App, admin: Admin) -> None:
        self._data = data
        limits = Limits(runs=settings.gateway_runs, retain=settings.gateway_retain, orphan=settings.gateway_orphan)
        self.gateway = Gateway(settings.gateway_dir, limits, self._open_port, self._close_port)
        routes = GatewayRoutes(self.gateway, admin.check_sandbox)
        self.before_authentication, self.over = routes.before_authentication, routes.over
        self.endpoint = routes.endpoint
        self.open, self.close = self.gateway.open, self.gateway.close
        admin.service.start_tasks.on_restarted.append(self.gateway.reopen_port)

    async def _open_port(self, sandbox_id: str, port: int | None) -> int:
        answer = await self._ask("open_gateway_port", sandbox_id, orjson.dumps({"port": port}))
        return int(answer["port"])

    async def _close_port(self, sandbox_id: str) -> None:
        await self._ask("close_gateway_port", sandbox_id, b"")

    async def _ask(self, name: str, sandbox_id: str, body: bytes) -> dict[str, int]:
        row = ROUTES[name]
        status, answer = await call(self._data, row.method, row.url(sandbox_id=sandbox_id), body=body, caller=OPERATOR,
                                    headers={"content-type": "application/json"})  # fmt: skip
        found = orjson.loads(answer)
        if status >= 300:
            raise from_wire(found)
        assert isinstance(found, dict)
        return found


class RemoteGateway:
    """The gateway of other servers as an ASGI application, without our key: the secret of a run is the only
    credential."""

    def __init__(self, servers: Sequence[RemoteApp]) -> None:
        self._servers = [RemoteApp(server.url) for server in servers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = self._servers[0] if len(self._servers) == 1 else await first_reached(self._servers)
        await server(scope, receive, send)

    async def close(self) -> None:
        for server in self._servers:
            await server.close()


def endpoint_of(gateway: App, rest: App) -> App:
    """`gateway` for the endpoint of agents, `rest` for all other paths."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["type"] != "lifespan" and scope["path"].startswith(ENDPOINT + "/")
        await (gateway if inside else rest)(scope, receive, send)

    return app
