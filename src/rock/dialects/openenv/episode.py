"""One environment for one client of OpenEnv: it is made by the first reset, and closed with the client."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

from rock.dialects import environments
from rock.dialects.api import Api
from rock.dialects.environments import Kind
from rock.dialects.openenv import tools
from rock.dialects.openenv.messages import EXECUTION_ERROR, VALIDATION_ERROR, Failure, Reset, failure_of, validated
from rock.errors import EnvironmentEnded, RockError

STEP_TIMEOUT = 300.0  # seconds of a reset or a step, after which the environment is ended
_TASK = ("task_id", "split", "index", "params", "time_limit")


class Episode:
    """One operation at a time. env_id: as in the path."""

    def __init__(self, api: Api, env_id: str) -> None:
        self.env_id = env_id
        self.used_at = time.monotonic()
        self._api = api
        self._kind: Kind | None = None
        self._place: tuple[str, str] | None = None  # the sandbox and the number of the environment
        self._made_of: dict[str, Any] | None = None
        self._lock = asyncio.Lock()
        self._episode: str | None = None
        self._steps = 0
        self._over = False

    # ---- operations ----

    async def reset(self, data: Any) -> dict[str, Any]:
        """Start an episode. Failure."""
        spec: Reset = validated(Reset, data)
        async with self._used():
            kind = await self._known()
            try:
                found = await self._reset_task(kind, spec) if kind.protocol == "task" else await self._reset(kind, spec)
            except RockError as error:
                raise failure_of(error, self._place is None) from None
            self._episode, self._steps, self._over = spec.episode_id or str(uuid.uuid4()), 0, False
            return _data(found["observation"], None, False, {"info": found["info"], "episode_id": self._episode})

    async def step(self, data: Any) -> dict[str, Any]:
        """Perform an action, list the tools, or call one. Failure."""
        if not isinstance(data, dict):
            raise Failure(VALIDATION_ERROR, "the data of a step is not an object")
        if data.get("type") in ("list_tools", "call_tool") and "action" not in data:
            return await self._tool_step(data)
        async with self._used():
            kind = await self._known()
            return await self._step(kind, _action_of(kind, data))

    async def _tool_step(self, data: dict[str, Any]) -> dict[str, Any]:
        if data["type"] == "list_tools":
            return _plain({"tools": [{**tool, "input_schema": tool["inputSchema"]} for tool in await self.tools()]})
        name, arguments = data.get("tool_name"), data.get("arguments")
        try:
            found = await self.call_tool(name, arguments)
        except Failure as error:
            kind = "tool_not_found" if error.code == VALIDATION_ERROR else "execution_error"
            return _plain({"tool_name": str(name)[:100], "result": None,
                           "error": {"error_type": kind, "message": error.message}})  # fmt: skip
        return {**found, "observation": {"tool_name": name, "result": found["observation"]["observation"],
                                         "error": None}}  # fmt: skip

    async def tools(self) -> list[dict[str, Any]]:
        """The tools of the environment, as MCP describes them. Failure."""
        async with self._used():
            kind = await self._known()
            return await self._tools(kind)

    async def call_tool(self, name: Any, arguments: Any) -> dict[str, Any]:
        """A step by the call of a tool: the data of an observation. Failure."""
        async with self._used():
            kind = await self._known()
            offered = [tool["name"] for tool in await self._tools(kind)]
            action = tools.action_of(kind.protocol, offered, name, arguments)
            return await self._step(kind, action)

    @property
    def state(self) -> dict[str, Any]:
        return {"episode_id": self._episode, "step_count": self._steps}

    async def close(self) -> None:
        """End the environment."""
        async with self._lock:
            await self._close()

    # ---- inside ----

    @contextlib.asynccontextmanager
    async def _used(self) -> Any:
        async with self._lock:
            self.used_at = time.monotonic()
            try:
                yield
            finally:
                self.used_at = time.monotonic()

    async def _known(self) -> Kind:
        if self._kind is None:
            try:
                self._kind = await environments.kind_of(self._api, self.env_id)
            except RockError as error:
                raise failure_of(error, True) from None
        return self._kind

    async def _reset(self, kind: Kind, spec: Reset) -> dict[str, Any]:
        """Reset the environment; other arguments of its constructor need another one."""
        if kind.protocol == "gem" and spec.options is not None:
            raise Failure(VALIDATION_ERROR, f"{kind.env_id} has no options; arguments of its constructor are keywords "
                                            "of the reset")  # fmt: skip
        if self._place is None or self._made_of != spec.arguments:
            await self._close()
            made = await environments.make(self._api, kind, spec.arguments, timeout=STEP_TIMEOUT)
            self._place, self._made_of = (made["sandbox_id"], str(made["env"])), spec.arguments
        sandbox_id, number = self._place
        body = {"seed": spec.seed, "options": spec.options}
        try:
            found = await self._api.json("reset_env", body, sandbox_id=sandbox_id, env=number)
        except EnvironmentEnded:
            self._place = None
            raise
        assert isinstance(found, dict)
        return found

    async def _reset_task(self, kind: Kind, spec: Reset) -> dict[str, Any]:
        """Make an instance of a task: an episode of a suite is an instance of its own."""
        given = spec.arguments
        unknown = sorted(set(given) - set(_TASK))
        if unknown or spec.options is not None:
            raise Failure(VALIDATION_ERROR, f"a reset of a task suite has no {', '.join(unknown) or 'options'}; it has "
                                            f"seed, episode_id, {', '.join(_TASK)}")  # fmt: skip
        await self._close()
        task_id = given.get("task_id")
        if task_id is None:
            listed = await task_ids(self._api, kind, str(given.get("split", "train")))
            index = given.get("index", spec.seed or 0)
            if not isinstance(index, int) or not listed or ("index" in given and not 0 <= index < len(listed)):
                raise Failure(VALIDATION_ERROR, f"there is no task {index!r}: the split has {len(listed)} tasks")
            task_id = listed[index % len(listed)]
        kwargs = {"task_id": task_id, "params": given.get("params") or {}}
        if "time_limit" in given:
            kwargs["time_limit"] = given["time_limit"]
        made = await environments.make(self._api, kind, kwargs, timeout=STEP_TIMEOUT, begin=True)
        self._place = made["sandbox_id"], str(made["env"])
        return {"observation": made["observation"], "info": made["info"]}

    async def _step(self, kind: Kind, action: Any) -> dict[str, Any]:
        if self._place is None or self._episode is None:
            raise Failure(EXECUTION_ERROR, "there is no episode; send reset first")
        if self._over:
            raise Failure(EXECUTION_ERROR, "the episode is over; send reset to start another one")
        sandbox_id, number = self._place
        try:
            found = await self._api.json("step_env", {"action": action}, sandbox_id=sandbox_id, env=number)
        except RockError as error:
            if isinstance(error, EnvironmentEnded) or error.code in ("command_timeout", "not_found"):
                self._place = self._episode = None
            raise failure_of(error) from None
        self._steps += 1
        self._over = found["terminated"] or found["truncated"]
        more = {"terminated": found["terminated"], "truncated": found["truncated"], "info": found["info"]}
        return _data(found["observation"], found["reward"], self._over, more)

    async def _tools(self, kind: Kind) -> list[dict[str, Any]]:
        if kind.protocol != "task" or self._place is None:
            return tools.of_environment(kind.protocol)
        sandbox_id, number = self._place
        body: dict[str, Any] = {"what": "tools", "arguments": [None, {}]}
        try:
            found = await self._api.json("call_env", body, sandbox_id=sandbox_id, env=number)
        except RockError as error:
            raise failure_of(error) from None
        return [*tools.of_suite(found["result"]), *tools.of_environment(kind.protocol)]

    async def _close(self) -> None:
        place, self._place = self._place, None
        self._episode = None
        if place is not None:
            with contextlib.suppress(RockError):  # it ended before, or ends by its idle timeout
                await self._api.bytes("close_env", sandbox_id=place[0], env=place[1])


async def task_ids(api: Api, kind: Kind, split: str) -> list[str]:
    """The ids of the tasks of a split, by an instance without a task."""
    made = await environments.make(api, kind, {})
    sandbox_id, number = made["sandbox_id"], str(made["env"])
    try:
        body = {"what": "profile", "arguments": [split, {}]}
        found = await api.json("call_env", body, sandbox_id=sandbox_id, env=number)
    finally:
        await api.bytes("close_env", sandbox_id=sandbox_id, env=number)
    return [str(item) for item in found["result"]]


def _action_of(kind: Kind, data: dict[str, Any]) -> Any:
    """The native action. Failure for a field that the environment does not have."""
    known = {"action", "metadata", "params"} if kind.protocol == "task" else {"action", "metadata"}
    unknown = sorted(set(data) - known)
    if "action" not in data or unknown:
        what = f"has no field {', '.join(unknown)[:200]}" if unknown else "has no field action"
        raise Failure(VALIDATION_ERROR, f"an action of {kind.env_id} {what}; it is {{\"action\": ...}}")
    if kind.protocol == "task":
        return {"action": data["action"], "params": data.get("params") or {}}
    return data["action"]


def _data(observation: Any, reward: float | None, done: bool, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"observation": {"observation": observation}, "reward": reward, "done": done, "metadata": metadata}


def _plain(observation: dict[str, Any]) -> dict[str, Any]:
    return {"observation": observation, "reward": None, "done": False}
