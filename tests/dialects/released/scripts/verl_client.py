"""The tool and the agent loop of verl. Its own agent loop calls the tool; a script takes the place of the model."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from checks import check, raises
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.tool_agent_loop import AgentData, ToolAgentLoop
from verl.tools.base_tool import BaseTool

from rock.errors import Conflict, InvalidConfig
from rock.integrations.verl import LABELS, SandboxAgentLoop, SandboxTool, SandboxTrajectory
from rock.sync import Sandbox


def running() -> int:
    return len(Sandbox.list(states="running", labels=LABELS))


def output() -> AgentLoopOutput:
    return AgentLoopOutput(prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], metrics={})


class Scripted:
    """The part of an agent loop that asks a model. Tools are called by the method of verl's own loop."""

    def __init__(self, tool: Any) -> None:
        self.tools = {tool.name: tool}
        self.max_tool_response_length = 100_000
        self.seen: list[str] = []

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        data = AgentData([], [], [], None, None, {}, "request", {})
        calls = [SimpleNamespace(name="bash", arguments=json.dumps({"command": one})) for one in kwargs["commands"]]
        for call in calls:  # each in a task of its own, as the loop of verl has it
            (found,) = await asyncio.gather(ToolAgentLoop._call_tool(self, call, {}, data))
            self.seen.append(found[0].text)
        return output()


class Loop(SandboxTrajectory, Scripted):
    pass


tool = SandboxTool({"type": "native", "timeout": 2})
OPTIONS: dict[str, Any] = {"image": "host", "reward": "grep -q 42 /tmp/answer", "sandbox": {"memory": "512m"}}


def run(loop: Any, *commands: str, **row: Any) -> AgentLoopOutput:
    return asyncio.run(loop.run({}, commands=commands, extra_info={"rock": row}))


with check("the tool has a schema, and the loop is a ToolAgentLoop"):
    assert isinstance(tool, BaseTool) and tool.name == "bash" and issubclass(SandboxAgentLoop, ToolAgentLoop)
    assert tool.get_openai_tool_schema().function.parameters.required == ["command"]
with check("a trajectory: calls share a sandbox, and a command gives the reward"):
    loop = Loop(tool, **OPTIONS)
    done = run(loop, "cat /tmp/state; exit 3", "echo 42 > /tmp/answer", setup="echo ready > /tmp/state")
    assert loop.seen == ["ready\n\n[exit code 3]", ""] and done.reward_score == 1.0 and done.response_mask == [1, 1]
    assert running() == 0
with check("another trajectory has another sandbox; a row replaces the reward"):
    loop = Loop(tool, **OPTIONS)
    assert run(loop, "ls /tmp/answer").reward_score == 0.0 and "No such file" in loop.seen[0]
    assert run(loop, reward="true").reward_score == 1.0
with check("trajectories at the same time"):

    async def many() -> list[AgentLoopOutput]:
        loops = [Loop(tool, **OPTIONS) for _ in range(4)]
        steps = [[f"echo 4{number} > /tmp/answer", "sleep 0.2", "cat /tmp/answer"] for number in range(4)]
        found = await asyncio.gather(*(loop.run({}, commands=one) for loop, one in zip(loops, steps, strict=True)))
        assert [loop.seen[2] for loop in loops] == [f"4{number}\n" for number in range(4)]
        return found

    assert [one.reward_score for one in asyncio.run(many())] == [0.0, 0.0, 1.0, 0.0]
with check("a command that takes too long, and arguments that are invalid"):
    loop = Loop(tool, **OPTIONS)
    run(loop, "sleep 4321")
    assert "killed" in loop.seen[0]
    run(loop, 5)  # type: ignore[arg-type]
    assert "missing" in loop.seen[1]
with check("a sandbox that ended: the response is masked"):

    class Stops(Scripted):
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
            (info,) = Sandbox.list(states="running", labels=LABELS)
            Sandbox.connect(info.sandbox_id).stop()
            return output()

    class Broken(SandboxTrajectory, Stops):
        pass

    done = run(Broken(tool, **OPTIONS))
    assert done.response_mask == [0, 0] and "SandboxStopped" in done.extra_fields["rock_error"], done
with check("without a trajectory, and options that are rejected"):
    with raises(Conflict, "SandboxAgentLoop"):
        asyncio.run(tool.execute("x", {"command": "true"}))
    with raises(InvalidConfig, "memory"):
        run(Loop(tool, **OPTIONS), memory="1g")
    with raises(InvalidConfig, "image"):
        run(Loop(tool))
    assert running() == 0
