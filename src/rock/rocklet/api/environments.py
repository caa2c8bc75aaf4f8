"""Routes of environments: make, reset, step, batches of frames and leases, over rocklet/environments/host.py."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import orjson

from rock.envhub import datasets, registry
from rock.errors import InvalidConfig, NotFound, RockError
from rock.guest.environments import frames
from rock.guest.environments.frames import HEAD, PLAIN, Frame
from rock.http.asgi import Answer, Request, Router, answer
from rock.protocol.env import (
    LEASED,
    NAMED,
    OWNER_PATTERN,
    CallEnv,
    EnvInfo,
    EnvOwner,
    ForkedEnv,
    ForkedEnvs,
    ForkEnv,
    MakeEnv,
    ResetEnv,
    StepEnv,
)
from rock.protocol.routes import FRAMES_TYPE, ROUTES
from rock.rocklet.api.frames import FRAMES
from rock.rocklet.durability.idempotency import IdempotentCalls
from rock.rocklet.environments.host import EnvHost
from rock.rocklet.environments.registry import Answered
from rock.rocklet.node import Node
from rock.rocklet.sandbox import Supervisor

_FRAMES = 4096  # largest number of frames in one request
_STEP = ("observation", "reward", "terminated", "truncated", "info")
_TYPE = FRAMES_TYPE.encode()


class EnvApi:
    def __init__(self, node: Node, once: IdempotentCalls) -> None:
        self.node = node
        self.once = once

    async def _find(self, request: Request) -> tuple[Supervisor, EnvHost, int]:
        """The environment that a path names: by its number, or as "name:NAME"."""
        text = request.path["env"]
        sandbox = self.node.get(request.path["sandbox_id"])
        named = text.startswith(NAMED)
        if not named and not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidConfig(f"no such environment: {text!r}", hint="use the number that make_env answered")
        # starting a host takes seconds, and a new one has no environments
        if not named and not sandbox.hosts_environments:
            raise NotFound(f"there is no environment {text[:20]}", sandbox_id=sandbox.id, hint="make it first")
        with sandbox.active():
            host = await sandbox.environments()
        return sandbox, host, host.number_of(text.removeprefix(NAMED)) if named else int(text)

    async def make_env(self, request: Request) -> Answer:
        sandbox = self.node.get(request.path["sandbox_id"])
        spec = await request.model(MakeEnv)
        gem = spec.protocol == "gem" and not spec.imports
        env_id = registry.find(spec.env_id).id if gem else spec.env_id  # an alias names the same environment
        if spec.protocol == "task":
            env_id = datasets.find(spec.env_id).name
        more = spec.model_dump(exclude={"env_id", "kwargs", "timeout", "begin"}, exclude_defaults=True)

        async def work() -> Answer:
            made = EnvInfo(env=0, env_id=env_id, sandbox_id=sandbox.id)
            with sandbox.active():
                host = await sandbox.environments()
                number = await host.make(env_id, spec.kwargs, timeout=spec.timeout, **more)
                if spec.begin:
                    try:
                        made.observation, made.info = await host.reset(number)
                    except BaseException:
                        await host.close_env(number)  # the client never received its number
                        raise
            made.env = number
            if spec.owner is not None:
                made.lease = host.lease
            if spec.idle is None:  # otherwise the registry of the host watches it
                made.door = self.node.local_socket.way(host, number)
            return answer(made, 201)

        return await self.once.do(request, work())

    async def fork_env(self, request: Request) -> Answer:
        spec = await request.model(ForkEnv)
        if spec.names is not None and len(spec.names) != spec.count:
            raise InvalidConfig(f"{len(spec.names)} names for {spec.count} children", hint="give one for each, or none")

        async def work() -> Answer:
            sandbox, host, number = await self._find(request)
            with sandbox.active():
                made = await host.fork(number, spec.count, reseed=spec.reseed, names=spec.names, idle=spec.idle,
                                       owner=spec.owner)  # fmt: skip
            failures = [child for child in made if isinstance(child, RockError)]
            if len(failures) == len(made):
                raise failures[0]
            items = [self._forked(host, sandbox.id, child, spec) for child in made]
            return answer(ForkedEnvs(items=items), 201)

        return await self.once.do(request, work())

    def _forked(self, host: EnvHost, sandbox_id: str, child: int | RockError, spec: ForkEnv) -> ForkedEnv:
        if isinstance(child, RockError):
            return ForkedEnv(env=0, sandbox_id=sandbox_id, error=child.to_wire())
        made = ForkedEnv(env=child, env_id=host.environments().get(child, ""), sandbox_id=sandbox_id)
        if spec.owner is not None:
            made.lease = host.lease
        if spec.idle is None:  # as in make_env
            made.door = self.node.local_socket.way(host, child)
        return made

    async def reset_env(self, request: Request) -> Answer:
        spec = await request.model(ResetEnv)

        async def work() -> Answer:
            sandbox, host, number = await self._find(request)
            with sandbox.active():
                observation, info = await host.reset(number, spec.seed, spec.options)
            return answer({"observation": observation, "info": info})

        return await self.once.do(request, work())

    async def step_env(self, request: Request) -> Answer:
        spec = await request.model(StepEnv)

        async def work() -> Answer:
            sandbox, host, number = await self._find(request)
            with sandbox.active():
                result = await host.step(number, spec.action, spec.index)
            return answer(dict(zip(_STEP, result, strict=True)))

        return await self.once.do(request, work())

    async def call_env(self, request: Request) -> Answer:
        spec = await request.model(CallEnv)

        async def work() -> Answer:
            sandbox, host, number = await self._find(request)
            with sandbox.active():
                return answer({"result": await host.call(number, spec.what, spec.arguments)})

        return await self.once.do(request, work())

    async def env_frames(self, request: Request) -> Answer:
        """Exchange frames with environments. This is the hot path: no idempotency key, no model, frames are not parsed
        here."""
        sandbox = self.node.get(request.path["sandbox_id"])
        try:
            asked = list(frames.split(await request.body()))
        except ValueError as error:
            raise InvalidConfig(f"the body is not a sequence of frames: {error}", hint=FRAMES) from None
        if not 1 <= len(asked) <= _FRAMES:
            raise InvalidConfig(f"{len(asked)} frames in one request", hint=f"1 to {_FRAMES} are taken")
        with sandbox.active():
            host = sandbox.env_host
            if host is None or host.failed is not None:
                host = await sandbox.environments()
            answers = await host.exchange(asked)
        parts = [_framed(frame, found) for frame, found in zip(asked, answers, strict=True)]
        return Answer(parts[0] if len(parts) == 1 else b"".join(parts), content_type=_TYPE)

    async def close_env(self, request: Request) -> Answer:
        sandbox, host, number = await self._find(request)
        with sandbox.active():
            await host.close_env(number)
        return answer({"env": number, "sandbox_id": sandbox.id})


    async def renew_envs(self, request: Request) -> Answer:
        return await self._of_owner(request, lambda host, owner: _now(host.renew(owner)))

    async def release_envs(self, request: Request) -> Answer:
        return await self._of_owner(request, lambda host, owner: host.release(owner))

    async def _of_owner(self, request: Request, work: Callable[[EnvHost, str], Awaitable[int]]) -> Answer:
        """Apply a function to the environments of the owner that the path names; NotFound where the sandbox hosts
        none."""
        owner = request.path["owner"]
        if not re.fullmatch(OWNER_PATTERN, owner):
            raise InvalidConfig(f"invalid id of an owner: {owner[:80]!r}",
                                hint="use 16 to 64 letters, digits, `_` and `-`")
        sandbox = self.node.get(request.path["sandbox_id"])
        if not sandbox.hosts_environments:
            raise NotFound("the sandbox hosts no environments", sandbox_id=sandbox.id,
                           hint="open an environment with rock.make, which creates a sandbox for it")
        found = await work(await sandbox.environments(), owner)
        if found and LEASED in sandbox.config.labels:
            sandbox.touch()
        return answer(EnvOwner(owner=owner, environments=found))


async def _now(found: int) -> int:
    return found


def _framed(asked: Frame, found: Answered) -> bytes:
    """A response as a frame. An error is a frame too, so that one failed request does not affect the others."""
    if not isinstance(found, RockError):
        return found  # type: ignore[return-value]  # a bytearray that no other code changes any more
    _, _, number, id, index, _ = asked
    body = orjson.dumps(found.to_wire(), default=repr)
    return HEAD.pack(len(body), frames.ERROR, PLAIN, number, id, index) + body


def add_routes(router: Router, node: Node, once: IdempotentCalls) -> None:
    api = EnvApi(node, once)
    for name in ("make_env", "reset_env", "step_env", "call_env", "fork_env", "env_frames", "renew_envs",
                 "release_envs", "close_env"):  # fmt: skip
        router.add(ROUTES[name], getattr(api, name))
