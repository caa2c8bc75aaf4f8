"""A tool and an agent loop of verl: one sandbox for each trajectory.

    tools:                                             # actor_rollout_ref.rollout.multi_turn.tool_config_path
      - class_name: rock.integrations.verl.SandboxTool
        config: {type: native, timeout: 60}
    - name: rock_agent                                 # actor_rollout_ref.rollout.agent.agent_loop_config_path
      _target_: rock.integrations.verl.SandboxAgentLoop
      image: python:3.11
      reward: pytest -q /tests

verl makes and releases a tool's instance for each call, so the agent loop holds the sandbox of the trajectory.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from rock import errors
from rock.sdk.sandbox import Sandbox

LABELS = {"rock.integration": "verl"}  # of all sandboxes of this module
_SHOWN = 20_000  # bytes of an output that the model sees
_ROW = ("image", "setup", "reward")
_SCHEMA = {
    "type": "function",
    "function": {
        "name": "bash", "description": "Run a shell command in a Linux sandbox and return its output.",
        "parameters": {
            "type": "object", "required": ["command"],
            "properties": {"command": {"type": "string", "description": "The command line."}},
        },
    },
}  # fmt: skip
_current: ContextVar[Sandbox | None] = ContextVar("rock_sandbox", default=None)  # of the trajectory


class SandboxTool(BaseTool):  # type: ignore[misc]
    """Runs commands in the sandbox of the trajectory. config: timeout (seconds of a command, 60)."""

    def __init__(self, config: dict[str, Any], tool_schema: Any = None) -> None:
        super().__init__(config, tool_schema)
        self._timeout = float(config.get("timeout", 60.0))

    def get_openai_tool_schema(self) -> Any:
        """The schema of `bash(command)`, where the configuration has none."""
        return getattr(self, "tool_schema", None) or OpenAIFunctionToolSchema.model_validate(_SCHEMA)

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Run the command: (text, 0.0, {"exit_code", "timed_out"})."""
        sandbox = _current.get()
        if sandbox is None:
            raise errors.Conflict("the trajectory has no sandbox", hint="use the agent loop SandboxAgentLoop")
        command = parameters.get("command")
        if not isinstance(command, str):
            return ToolResponse(text="[the argument `command` is missing, or is no text]"), 0.0, {"exit_code": None}
        done = await sandbox.exec(command, timeout=self._timeout, max_output_bytes=_SHOWN)
        text = done.output
        if done.timed_out:
            text += f"\n[the command took longer than {self._timeout:g} seconds and was killed]"
        elif done.exit_code != 0:
            text += f"\n[exit code {done.exit_code}]"
        return ToolResponse(text=text), 0.0, {"exit_code": done.exit_code, "timed_out": done.timed_out}


class SandboxTrajectory:
    """Mixin of agent loops: the sandbox of a trajectory, and the reward of a command.

    image, setup, reward: of all trajectories; `extra_info["rock"]` of a row replaces them. setup: a command before the
    first turn. reward: a command after the last turn, whose exit code 0 is the reward 1.0, any other 0.0; None leaves
    the reward to verl. timeout: seconds of both. sandbox: options of `rock.Sandbox`.

    When the sandbox ends before the reward, the response is masked, so that it has no gradient, and `extra_fields` has
    "rock_error".
    """

    def __init__(
        self, *args: Any, image: str = "", setup: str | None = None, reward: str | None = None, timeout: float = 600.0,
        sandbox: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._task = {"image": image, "setup": setup, "reward": reward}
        self._limit = timeout
        options: dict[str, Any] = {str(name): value for name, value in dict(sandbox or {}).items()}
        self._options = {"idle_timeout": 3600, **options, "labels": {**LABELS, **dict(options.get("labels") or {})}}

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        row = dict((kwargs.get("extra_info") or {}).get("rock") or {})
        unknown = row.keys() - set(_ROW)
        task = {**self._task, **{name: value for name, value in row.items() if value is not None}}
        if unknown or not task["image"]:
            raise errors.InvalidConfig(f"unknown options: {sorted(unknown)}" if unknown else "there is no image",
                                       hint=f"the options of a row are {', '.join(_ROW)}")
        async with Sandbox(task["image"], **self._options) as sandbox:
            if task["setup"]:
                await sandbox.exec(task["setup"], timeout=self._limit, check=True)
            token = _current.set(sandbox)
            try:
                output = await super().run(sampling_params, **kwargs)  # type: ignore[misc]
            finally:
                _current.reset(token)
            if task["reward"]:
                await self._judge(sandbox, task["reward"], output)
        return output

    async def _judge(self, sandbox: Sandbox, command: str, output: AgentLoopOutput) -> None:
        try:
            done = await sandbox.exec(command, timeout=self._limit)
            output.reward_score = float(done.exit_code == 0)
        except (errors.SandboxError, errors.Unavailable, errors.NotFound) as error:
            output.reward_score = 0.0
            output.response_mask = [0] * len(output.response_mask)
            output.extra_fields = {**output.extra_fields, "rock_error": f"{type(error).__name__}: {error}"}


@register("rock_agent")
class SandboxAgentLoop(SandboxTrajectory, ToolAgentLoop):  # type: ignore[misc]
    """The agent loop with tools of verl, with a sandbox for each trajectory."""
