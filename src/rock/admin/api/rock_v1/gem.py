"""Environments in the ROCK dialect. There is no envelope: an error is an HTTP status with `{"detail"}`.

What ROCK's clients hold as a sandbox's id names one environment here, as "sandbox/number/environment": environments of
one package set share a sandbox, and an id that says all needs no memory of ours.
"""

from __future__ import annotations

from typing import Any

from rock.admin.api.rock_v1.data import DataPlane
from rock.admin.api.rock_v1.envelope import AboutSandbox, Asked, Failed, Name, Row, body_of, detailed
from rock.admin.desk import Desks
from rock.envhub import registry
from rock.errors import NotFound, Unavailable
from rock.protocol.env import OpenEnv
from rock.protocol.keys import Access
from rock.protocol.sandbox import State
from rock.wire.asgi import Request

_LONGEST_START = 290.0  # seconds: clients give up after 300


class MakeRequest(Asked):
    env_id: Name


class ResetRequest(AboutSandbox):
    seed: int | None = None


class StepRequest(AboutSandbox):
    action: str


class Gem:
    """Handlers of environments, by method and path."""

    def __init__(self, desks: Desks, data: DataPlane) -> None:
        self._desks = desks
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
        host = await self._desks(request.scope).open_env(OpenEnv(env_id=env_id), _LONGEST_START)
        if host.state is not State.RUNNING:
            raise Unavailable(f"the sandbox for {env_id} has not started within {_LONGEST_START:g} s", hint="retry")
        made = await self._data.json(request, "make_env", host.sandbox_id, {"env_id": env_id})
        return {"sandbox_id": f"{host.sandbox_id}/{made['env']}/{env_id}"}

    async def reset(self, request: Request) -> Any:
        wish = await body_of(request, ResetRequest)
        host, number, _ = _parts(wish.sandbox_id)
        return await self._data.json(request, "reset_env", host, {"seed": wish.seed}, env=number)

    async def step(self, request: Request) -> Any:
        wish = await body_of(request, StepRequest)
        host, number, _ = _parts(wish.sandbox_id)
        return await self._data.json(request, "step_env", host, {"action": wish.action}, env=number)

    async def close(self, request: Request) -> dict[str, Any]:
        """End the environment. Its sandbox stays for others of its kind, and is stopped when it is idle."""
        sandbox_id = (await body_of(request, AboutSandbox)).sandbox_id
        host, number, _ = _parts(sandbox_id)
        await self._desks(request.scope).load(host)
        try:
            await self._data.bytes(request, "close_env", host, env=number)
        except (Failed, NotFound):
            pass  # it ended before
        return {"sandbox_id": sandbox_id}

    async def list(self, request: Request) -> dict[str, Any]:
        """The environment of an id, as long as its sandbox runs."""
        host, _, env_id = _parts((await body_of(request, AboutSandbox)).sandbox_id)
        running = (await self._desks(request.scope).get(host)).is_alive
        return {"env_id": [env_id] if running else []}


def _parts(sandbox_id: str) -> tuple[str, str, str]:
    host, _, rest = sandbox_id.partition("/")
    number, _, env_id = rest.partition("/")
    if not number.isdigit() or not env_id:
        raise NotFound(f"there is no environment {sandbox_id!r}", hint="use the sandbox_id that make answered")
    return host, number, env_id
