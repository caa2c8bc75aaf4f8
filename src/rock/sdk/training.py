"""Training sets: graded tasks of a data set, each instance in a process of its own inside a sandbox."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rock import errors
from rock.protocol.env import (
    IDLE,
    NAMED,
    START_TIMEOUT,
    STEP_TIMEOUT,
    TASK_IMAGES,
    CallResult,
    EnvInfo,
    ForkedEnvs,
    StepResult,
    created,
    new_instance_id,
    overdue,
    stepped,
)
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.sandbox.link import SLACK, parse
from rock.sdk.sandbox.sandbox import Sandbox

DATA = "/tmp/rock-dataset"  # where the user's data folder is inside

Message = dict[str, Any]


def failure_of(error: errors.RockError) -> str:
    """Whose fault an error is, for a trainer that has to mask a sample.

    "environment": the task raised or died, or what ran in the sandbox ended it, by its memory or disk too. "timeout":
    it took too long, and was ended. "infrastructure": the sandbox or the server was lost. "request": what was asked is
    wrong, such as an unknown task or instance.
    """
    if isinstance(error, errors.CommandTimeout):
        return "timeout"
    if isinstance(error, errors.ActionError | errors.Exited | errors.OutOfMemory | errors.DiskFull):
        return "environment"
    return "request" if isinstance(error, errors.ClientError) else "infrastructure"


class TrainingSandbox:
    """A sandbox with the tasks of one training set.

        async with TrainingSandbox(box_type="bfcl") as box:
            ids = await box.get_env_profile("bfcl")
            made = await box.create_instance("bfcl", ids[0])
            done = await box.step(made["info"]["instance_id"], {"role": "assistant", "content": "..."})

    It starts when it is first used, or with `start` or as a context; `close` stops it. With `sandbox_id` it turns to
    one that runs already, which `close` leaves alone.

    base_url, bearer_token: ROCK_BASE_URL and ROCK_API_KEY where they are not given.
    box_type: the training set; without it the first env_type that is asked for says it.
    data: a folder with the set's data, for sets whose packages have none; it is sent into the sandbox.
    step_timeout: seconds for one step, after which the instance is ended. episode_timeout: seconds from create_instance
    on, after which a step is truncated. idle_timeout: seconds without a call after which an instance is released.
    config: limits of the sandbox; its image is the set's.

    Errors are typed; `failure_of` says whose fault one is.
    """

    def __init__(
        self,
        sandbox_id: str | None = None,
        base_url: str | None = None,
        bearer_token: str | None = None,
        box_type: str | None = None,
        *,
        data: str | os.PathLike[str] | None = None,
        step_timeout: float = STEP_TIMEOUT,
        episode_timeout: float | None = None,
        idle_timeout: float = IDLE,
        config: SandboxConfig | None = None,
    ) -> None:
        self.box_type = None if box_type is None else _plain(box_type)
        self._existing = sandbox_id
        self._data = data
        self._step_timeout = step_timeout
        self._episode_timeout = episode_timeout
        self._idle = idle_timeout
        config = config or SandboxConfig(memory="4g", cpus=1.0, auto_clear_seconds=600)
        reach = {"base_url": base_url, "api_key": bearer_token}
        self._config = config.model_copy(update={name: value for name, value in reach.items() if value is not None})
        self._sandbox: Sandbox | None = None

    def __repr__(self) -> str:
        return f"TrainingSandbox({self.box_type or 'no set yet'}, sandbox_id={self.sandbox_id!r})"

    # ---- life

    @property
    def sandbox_id(self) -> str | None:
        """The sandbox, once it runs."""
        return self._existing if self._sandbox is None else self._sandbox.sandbox_id

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox itself, with its files and commands; InvalidConfig before it was started."""
        if self._sandbox is None:
            raise errors.InvalidConfig("the training sandbox was not started", hint="start it, or ask it for something")
        return self._sandbox

    async def start(self) -> None:
        """Start the sandbox and send the data. The set's packages are installed the first time, which takes a minute.

        NotFound: no such set. ImageError: its packages cannot be installed.
        """
        if self._sandbox is not None:
            return
        if self._existing is not None:
            self._sandbox = await Sandbox(self._config).attach(self._existing)
            return
        if self.box_type is None:
            raise errors.InvalidConfig("which training set?", hint='pass box_type, for example "bfcl"')
        wait = max(self._config.startup_timeout, START_TIMEOUT)
        config = self._config.model_copy(update={"image": TASK_IMAGES + self.box_type, "startup_timeout": wait})
        sandbox = Sandbox(config)
        await sandbox.start()
        try:
            if self._data is not None:
                await sandbox.fs.upload_dir(Path(self._data), DATA)
        except BaseException:
            await sandbox.close()
            raise
        self._sandbox = sandbox

    async def close(self) -> None:
        """Stop the sandbox and all its instances, unless it was there before. It may be started again."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None and self._existing is None:
            await sandbox.stop()

    async def __aenter__(self) -> Self:
        if self.box_type is not None or self._existing is not None:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _of(self, env_type: str) -> str:
        """The set that is asked for, which has to be this sandbox's."""
        name = _plain(env_type)
        if self.box_type is None and self._existing is None:
            self.box_type = name
        if self.box_type is not None and name != self.box_type:
            raise errors.InvalidConfig(f"this sandbox has the set {self.box_type!r}, not {name!r}",
                                       hint="use a TrainingSandbox of its own for each set")  # fmt: skip
        await self.start()
        return name

    # ---- tasks

    async def get_env_profile(
        self, env_type: str, split: str = "train", params: dict[str, Any] | None = None
    ) -> list[str]:
        """Ids of the tasks of a split."""
        made = await self._make(await self._of(env_type), {})
        try:
            found = await self._call(str(made.env), "profile", [split, params])
        finally:
            await self._close(str(made.env))
        return [str(id) for id in found]

    async def get_task_ids(
        self, env_type: str, split: str = "train", params: dict[str, Any] | None = None
    ) -> list[str]:
        """As get_env_profile."""
        return await self.get_env_profile(env_type, split, params)

    async def create_instance(
        self,
        env_type: str,
        task_id: str,
        instance_id: str | None = None,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Begin a task: {"state": its first messages, "info": {"instance_id", "task_id", ..}}.

        instance_id: a name of your own choice; taken already is a Conflict. NotFound: no such task.
        """
        env_type = await self._of(env_type)
        instance_id = instance_id or new_instance_id()
        spec: dict[str, Any] = {"task_id": task_id, "params": params or {}}
        if self._episode_timeout is not None:
            spec["time_limit"] = self._episode_timeout
        made = await self._make(env_type, spec, name=instance_id, idle=self._idle, begin=True)
        return created(made, instance_id, task_id)

    async def step(
        self, instance_id: str, action: Message | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Give it the agent's message: {"state": messages, "reward", "is_terminated", "info"}.

        info["failure"] is there when something went wrong: "bad_action" (the state says what, and it goes on), or
        "timeout", with info["truncated"] and info["stop_reason"]: the reward then says nothing of the agent.
        EnvironmentRaised: the task has a fault. EnvironmentEnded: its process is gone.
        """
        body = {"action": {"action": action, "params": params or {}}}
        try:
            done = parse(StepResult, await self._ask("step_env", _named(instance_id), body))
        except errors.CommandTimeout as error:
            return overdue(error)
        return stepped(done)

    async def evaluate(
        self, instance_id: str, messages: list[Message] | None = None, params: dict[str, Any] | None = None
    ) -> Any:
        """Its score as it stands: a number, or a dictionary, as the set has it. The set may take parameters."""
        return await self._call(_named(instance_id), "evaluate", [messages, params])

    async def get_tools_info(
        self, instance_id: str, messages: list[Message] | None = None, params: dict[str, Any] | None = None
    ) -> Any:
        """What the agent may call now; None in sets without tools."""
        return await self._call(_named(instance_id), "tools", [messages, params])

    async def list_tools(
        self, instance_id: str, messages: list[Message] | None = None, params: dict[str, Any] | None = None
    ) -> Any:
        """As get_tools_info."""
        return await self.get_tools_info(instance_id, messages, params)

    async def get_solution(self, instance_id: str) -> list[Message]:
        """Messages that solve it, for checking a set; InvalidConfig where none is known."""
        found: list[Message] = await self._call(_named(instance_id), "solution", [])
        return found

    async def fork_instance(self, instance_id: str, n: int = 1, reseed: bool = False) -> list[str]:
        """Copy an instance at this step: ids of `n` new ones, which continue as it would and are independent of it.

        reseed: draw new seeds in each copy. All or none are made: an error of one releases the others. Unsupported,
        before any change: its process holds something that a copy would share, such as threads or connections.
        """
        names = [new_instance_id() for _ in range(n)]
        body = {"count": n, "reseed": reseed, "names": names, "idle": self._idle}
        made = parse(ForkedEnvs, await self._ask("fork_env", _named(instance_id), body)).items
        failures = [child.error for child in made if child.error is not None]
        if failures or len(made) != n:
            for name, child in zip(names, made, strict=False):
                if child.error is None:
                    await self.release_instance(name)
            raise errors.from_wire(failures[0]) if failures else errors.ServerError("malformed answer: no instances")
        return names

    async def release_instance(self, instance_id: str) -> bool:
        """End it. False when there is none of that name: it was released before."""
        return await self._close(_named(instance_id))

    # ---- requests

    async def _make(self, env_type: str, kwargs: dict[str, Any], **more: Any) -> EnvInfo:
        spec = {"env_id": env_type, "protocol": "task", "kwargs": kwargs, "timeout": self._step_timeout, **more}
        link = self.sandbox
        target = ROUTES["make_env"].url(sandbox_id=link._id())
        timeout = START_TIMEOUT  # the first one waits until the set is imported
        return parse(EnvInfo, await link._transport.json("POST", target, spec, timeout=timeout, key=_key()))

    async def _ask(self, route: str, env: str, body: Any) -> Any:
        await self.start()
        link = self.sandbox
        target = ROUTES[route].url(sandbox_id=link._id(), env=env)
        timeout = self._step_timeout + SLACK  # the server tells when its time is over
        return await link._transport.json("POST", target, body, timeout=timeout, key=_key())

    async def _call(self, env: str, what: str, arguments: list[Any]) -> Any:
        return parse(CallResult, await self._ask("call_env", env, {"what": what, "arguments": arguments})).result

    async def _close(self, env: str) -> bool:
        await self.start()
        link = self.sandbox
        target = ROUTES["close_env"].url(sandbox_id=link._id(), env=env)
        try:
            await link._transport.json("DELETE", target, timeout=SLACK)
        except errors.NotFound:
            return False
        return True


def _plain(name: str) -> str:
    """A set's name as images have it; enumerations of AgentScope have it as their value."""
    return str(getattr(name, "value", name)).lower().replace("_", "-")


def _named(instance_id: str) -> str:
    return NAMED + instance_id


def _key() -> str:
    return os.urandom(16).hex()
