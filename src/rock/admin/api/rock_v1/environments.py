"""Environments and their registry in the ROCK dialect. There is no envelope: an error is an HTTP status with
`{"detail"}`.

The sandbox id of ROCK's clients names one environment here, as "sandbox/number/environment": environments of one
package set share a sandbox, and the complete id needs no state in the server.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rock.admin.api.rock_v1.envelope import AboutSandbox, Asked, DataPlane, Failed, Name, Row, body_of, detailed
from rock.admin.tenants import TenantServices
from rock.envhub import registry
from rock.envhub.catalogue import Catalogue, Registered
from rock.errors import NotFound, Unavailable
from rock.http.asgi import Request
from rock.protocol.env import OpenEnv
from rock.protocol.keys import Access
from rock.protocol.sandbox import State

_LONGEST_START = 290.0  # seconds: clients time out after 300


class MakeRequest(Asked):
    env_id: Name


class ResetRequest(AboutSandbox):
    seed: int | None = None


class StepRequest(AboutSandbox):
    action: str


class Gem:
    """Handlers of environments, by method and path."""

    def __init__(self, tenant_services: TenantServices, data: DataPlane) -> None:
        self._tenant_services = tenant_services
        self._data = data

    def routes(self) -> list[Row]:
        return [
            ("POST", "/make", detailed(self.make), Access.CREATE),
            ("POST", "/reset", detailed(self.reset), Access.RUN),
            ("POST", "/step", detailed(self.step), Access.RUN),
            ("POST", "/close", detailed(self.close), Access.RUN),
            ("POST", "/list", detailed(self.list), Access.READ),
        ]

    async def make(self, request: Request) -> dict[str, Any]:
        env_id = registry.find((await body_of(request, MakeRequest)).env_id).id
        host = await self._tenant_services(request.scope).open_env(OpenEnv(env_id=env_id), _LONGEST_START)
        if host.state is not State.RUNNING:
            raise Unavailable(f"the sandbox for {env_id} has not started within {_LONGEST_START:g} s", hint="retry")
        made = await self._data.json(request, "make_env", host.sandbox_id, {"env_id": env_id})
        return {"sandbox_id": f"{host.sandbox_id}/{made['env']}/{env_id}"}

    async def reset(self, request: Request) -> Any:
        spec = await body_of(request, ResetRequest)
        host, number, _ = _parts(spec.sandbox_id)
        return await self._data.json(request, "reset_env", host, {"seed": spec.seed}, env=number)

    async def step(self, request: Request) -> Any:
        spec = await body_of(request, StepRequest)
        host, number, _ = _parts(spec.sandbox_id)
        return await self._data.json(request, "step_env", host, {"action": spec.action}, env=number)

    async def close(self, request: Request) -> dict[str, Any]:
        """Close the environment. Its sandbox stays for others of its kind, and is stopped after its idle timeout."""
        sandbox_id = (await body_of(request, AboutSandbox)).sandbox_id
        host, number, _ = _parts(sandbox_id)
        await self._tenant_services(request.scope).load(host)
        try:
            await self._data.bytes(request, "close_env", host, env=number)
        except (Failed, NotFound):
            pass  # it ended before
        return {"sandbox_id": sandbox_id}

    async def list(self, request: Request) -> dict[str, Any]:
        """The environment of an id, while its sandbox runs."""
        host, _, env_id = _parts((await body_of(request, AboutSandbox)).sandbox_id)
        running = (await self._tenant_services(request.scope).get(host)).is_alive
        return {"env_id": [env_id] if running else []}


def _parts(sandbox_id: str) -> tuple[str, str, str]:
    host, _, rest = sandbox_id.partition("/")
    number, _, env_id = rest.partition("/")
    if not number.isdigit() or not env_id:
        raise NotFound(f"there is no environment {sandbox_id!r}", hint="use the sandbox_id that make answered")
    return host, number, env_id


# ---- registry ----
#
# EnvHub: environments that users register by name. Plain JSON, without an envelope.

class RegisterRequest(Asked):
    env_name: Name
    image: Name
    owner: str = ""
    description: str = ""
    tags: list[str] = Field(default_factory=list)
    extra_spec: dict[str, Any] | None = None


class AboutEnv(Asked):
    env_name: Name


class ListRequest(Asked):
    owner: str | None = None
    tags: list[str] | None = None


class EnvHub:
    """Handlers of the registry, by method and path."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def routes(self) -> list[Row]:
        return [
            ("POST", "/env/register", detailed(self.register, 422), Access.IMAGES),
            ("POST", "/env/get", detailed(self.get, 422), Access.READ),
            ("POST", "/env/list", detailed(self.list, 422), Access.READ),
            ("POST", "/env/delete", detailed(self.delete, 422), Access.IMAGES),
            ("GET", "/health", detailed(self.health), Access.READ),
        ]

    async def register(self, request: Request) -> dict[str, Any]:
        spec = await body_of(request, RegisterRequest)
        return (await self._catalogue.register(Registered(**spec.model_dump()))).model_dump()

    async def get(self, request: Request) -> dict[str, Any]:
        return (await self._catalogue.get((await body_of(request, AboutEnv)).env_name)).model_dump()

    async def list(self, request: Request) -> dict[str, Any]:
        spec = await body_of(request, ListRequest)
        return {"envs": [env.model_dump() for env in await self._catalogue.list(spec.owner, spec.tags)]}

    async def delete(self, request: Request) -> bool:
        await self._catalogue.delete((await body_of(request, AboutEnv)).env_name)
        return True

    async def health(self, request: Request) -> dict[str, Any]:
        return {"status": "ok"}
