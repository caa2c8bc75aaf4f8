"""The HTTP dialect of ROCK's own clients (rl-rock), on the port of the native API.

    /apis/envs/sandbox/v1/...   sandboxes.py, commands.py, files.py    in the envelope of envelope.py, under HTTP 200
                                ports.py                               responses of programs; the envelope for errors
    /apis/envs/rocklet/v1/ID/...   rocklet.py                plain JSON, the wire format of a sandbox's rocklet
    /apis/v1/envs/gem/...       environments.py              plain JSON, errors as HTTP statuses
    /env/...  /health           environments.py              the same

The dialect has no state of its own: control-plane operations use `TenantService` (admin/tenants.py), and an operation
in a sandbox is the native request of the same name, through the data plane's application in this process.
"""

from __future__ import annotations

from collections.abc import Iterable

from rock.admin.api.rock_v1.commands import Commands
from rock.admin.api.rock_v1.envelope import DataPlane, Row
from rock.admin.api.rock_v1.environments import EnvHub, Gem
from rock.admin.api.rock_v1.files import Files
from rock.admin.api.rock_v1.ports import Ports
from rock.admin.api.rock_v1.rocklet import Rocklet
from rock.admin.api.rock_v1.sandboxes import Commits, Sandboxes
from rock.admin.tenants import TenantServices
from rock.envhub.catalogue import Catalogue
from rock.http.asgi import Answer, App, Receive, Router, Scope, Send, answer
from rock.protocol.route import Route

SANDBOXES, GEM, ROCKLET = "/apis/envs/sandbox/v1", "/apis/v1/envs/gem", "/apis/envs/rocklet/v1"
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")


class RockV1:
    """The dialect's routes over the service of a tenant, the data plane and the catalog of environments. network: of
    sandboxes whose request names none."""

    def __init__(self, tenant_services: TenantServices, data: App, catalogue: Catalogue, network: str) -> None:
        plane = DataPlane(data)
        self._ports = Ports(data)
        self._router = Router("rock-v1")
        sandboxes, commands, files = Sandboxes(tenant_services, network), Commands(plane), Files(plane)
        self._add(
            SANDBOXES, [*sandboxes.routes(), *Commits(tenant_services).routes(), *commands.routes(), *files.routes()]
        )
        self._add(ROCKLET, Rocklet(sandboxes, commands, files, plane).routes())
        self._add(GEM, Gem(tenant_services, plane).routes())
        self._add("", EnvHub(catalogue).routes())

    def _add(self, prefix: str, routes: Iterable[Row]) -> None:
        for method, path, handler, access in routes:
            row = Route(f"rock{path}", method, prefix + path, "control", "ROCK dialect", access=access)
            self._router.add(row, handler)

    def over(self, rest: App) -> App:
        """This dialect's paths, and `rest` for all others."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket") and self._ports.wants(scope):
                await self._ports(scope, receive, send)
            elif scope["type"] != "http":
                await rest(scope, receive, send)
            elif self._router.match(scope["method"], scope["path"]) is not None:
                await self._router(scope, receive, send)
            elif scope["path"].startswith("/apis/"):
                await self._missing(scope["path"]).send(send)
            else:
                await rest(scope, receive, send)

        return app

    def _missing(self, path: str) -> Answer:
        known = any(self._router.match(method, path) for method in _METHODS)
        return answer({"detail": "Method Not Allowed"}, 405) if known else answer({"detail": "Not Found"}, 404)
