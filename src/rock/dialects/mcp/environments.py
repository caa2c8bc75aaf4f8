"""Tools for environments: a task world with reset and step. A handle is SANDBOX/NUMBER."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rock.dialects import environments
from rock.dialects.mcp.context import ToolContext
from rock.dialects.mcp.tools import Arguments, Result, Tool, json_text
from rock.errors import InvalidConfig, NotFound
from rock.protocol.keys import Access


class Listing(Arguments):
    contains: str = Field(default="", max_length=100, description="Only ids that contain this text.")
    limit: int = Field(default=50, ge=1, le=500)


class Make(Arguments):
    env_id: str = Field(min_length=1, max_length=256, description='An id, like "game:Sokoban-v0-easy", "CartPole-v1" '
                                                                  'or "task:bfcl".')  # fmt: skip
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of its constructor; of a task suite "
                                                                     '{"task_id": "..."}.')  # fmt: skip
    seed: int | None = Field(default=None, description="The seed of the first episode.")


class Handle(Arguments):
    environment: str = Field(min_length=3, max_length=160, description="As env_make returned it.")

    def parts(self) -> tuple[str, str]:
        """The sandbox and the number. InvalidConfig."""
        sandbox_id, slash, number = self.environment.rpartition("/")
        if not slash or not sandbox_id or not (number.isascii() and number.isdigit() and len(number) < 19):
            raise InvalidConfig(f"{self.environment!r} is no environment", hint="use the value that env_make returned")
        return sandbox_id, number


class Reset(Handle):
    seed: int | None = Field(default=None, description="The same seed gives the same start.")


class Step(Handle):
    action: Any = Field(description="The action, as the environment expects it: text, a number or a list.")


async def listed(context: ToolContext, given: Listing) -> Result:
    found = [item for item in (await context.api.json("list_envs"))["items"] if given.contains in item["id"]]
    items = [{name: item[name] for name in ("id", "protocol", "note") if item.get(name)} for item in found]
    shown = items[: given.limit]
    rest = f"\n[{len(items) - len(shown)} more]" if len(items) > len(shown) else ""
    return Result("\n".join(item["id"] for item in shown) + rest, {"environments": shown, "total": len(items)})


async def make(context: ToolContext, given: Make) -> Result:
    kind = await environments.kind_of(context.api, given.env_id)
    made = await environments.make(context.api, kind, given.kwargs)
    sandbox_id, number = made["sandbox_id"], str(made["env"])
    try:
        found = await context.api.json("reset_env", {"seed": given.seed}, sandbox_id=sandbox_id, env=number)
    except BaseException:
        await context.api.bytes("close_env", sandbox_id=sandbox_id, env=number)  # the client never receives its handle
        raise
    data = {"environment": f"{sandbox_id}/{number}", **found}
    return Result(f"environment {data['environment']}\n{_text(found['observation'])}", data)


async def reset(context: ToolContext, given: Reset) -> Result:
    sandbox_id, number = given.parts()
    found = await context.api.json("reset_env", {"seed": given.seed}, sandbox_id=sandbox_id, env=number)
    return Result(_text(found["observation"]), found)


async def step(context: ToolContext, given: Step) -> Result:
    sandbox_id, number = given.parts()
    found = await context.api.json("step_env", {"action": given.action}, sandbox_id=sandbox_id, env=number)
    end = " terminated" if found["terminated"] else " truncated" if found["truncated"] else ""
    return Result(f"{_text(found['observation'])}\n[reward {found['reward']}{end}]", found)


async def close(context: ToolContext, given: Handle) -> Result:
    sandbox_id, number = given.parts()
    try:
        await context.api.bytes("close_env", sandbox_id=sandbox_id, env=number)
    except NotFound as error:
        return Result("the environment was closed before", {"closed": False, "reason": error.message})
    return Result("closed", {"closed": True})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)


TOOLS: list[Tool[Any]] = [
    Tool("env_list", "List environments", "List the environments of the server.", Listing, Access.READ, listed,
         read_only=True),
    Tool("env_make", "Make an environment", "Make an environment, reset it, and return its handle and first "
         "observation.", Make, Access.CREATE, make),
    Tool("env_reset", "Reset an environment", "Start another episode.", Reset, Access.RUN, reset),
    Tool("env_step", "Step an environment", "Perform one action: observation, reward, and whether the episode ended.",
         Step, Access.RUN, step),
    Tool("env_close", "Close an environment", "End the process of an environment.", Handle, Access.RUN, close,
         destructive=True),
]  # fmt: skip
