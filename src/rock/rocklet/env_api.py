"""Routes of environments, over rocklet/envs.py."""

from __future__ import annotations

from rock.envhub import registry
from rock.errors import InvalidConfig
from rock.protocol.env import MakeEnv, ResetEnv, StepEnv
from rock.protocol.routes import ROUTES
from rock.rocklet.node import Node
from rock.rocklet.once import Once
from rock.rocklet.supervisor import Supervisor
from rock.wire.asgi import Answer, Request, Router, answer


class EnvApi:
    def __init__(self, node: Node, once: Once) -> None:
        self.node = node
        self.once = once

    def _find(self, request: Request) -> tuple[Supervisor, int]:
        text = request.path.get("env", "0")
        if not text.isdigit():
            raise InvalidConfig(f"no such environment: {text!r}", hint="use the number that make_env answered")
        return self.node.get(request.path["sandbox_id"]), int(text)

    async def make_env(self, request: Request) -> Answer:
        sandbox, _ = self._find(request)
        wish = await request.model(MakeEnv)
        env_id = registry.find(wish.env_id).id  # an alias is another name for it

        async def work() -> Answer:
            with sandbox.active():
                number = await (await sandbox.environments()).make(env_id, wish.kwargs)
            return answer({"env": number, "env_id": env_id, "sandbox_id": sandbox.id}, 201)

        return await self.once.do(request, work())

    async def reset_env(self, request: Request) -> Answer:
        sandbox, number = self._find(request)
        wish = await request.model(ResetEnv)

        async def work() -> Answer:
            with sandbox.active():
                observation, info = await (await sandbox.environments()).reset(number, wish.seed)
            return answer({"observation": observation, "info": info})

        return await self.once.do(request, work())

    async def step_env(self, request: Request) -> Answer:
        sandbox, number = self._find(request)
        wish = await request.model(StepEnv)

        async def work() -> Answer:
            with sandbox.active():
                result = await (await sandbox.environments()).step(number, wish.action)
            observation, reward, terminated, truncated, info = result
            return answer(
                {
                    "observation": observation,
                    "reward": reward,
                    "terminated": terminated,
                    "truncated": truncated,
                    "info": info,
                }
            )

        return await self.once.do(request, work())

    async def close_env(self, request: Request) -> Answer:
        sandbox, number = self._find(request)
        with sandbox.active():
            await (await sandbox.environments()).close_env(number)
        return answer({"env": number, "sandbox_id": sandbox.id})


def add_routes(router: Router, node: Node, once: Once) -> None:
    api = EnvApi(node, once)
    for name in ("make_env", "reset_env", "step_env", "close_env"):
        router.add(ROUTES[name], getattr(api, name))
