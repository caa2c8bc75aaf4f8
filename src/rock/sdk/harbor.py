"""Tasks in the format of Harbor and Terminal-Bench 2: a folder each, run in a sandbox each.

    task.toml  instruction.md  environment/  tests/test.sh  solution/solve.sh

`test.sh` writes the reward to /logs/verifier/reward.txt, or several to reward.json. The image is the caller's, or the
one that task.toml names (docker_image), or is built on the server of environment/Dockerfile, once for all instances of
a task. A sandbox, and what its image is built with, has the network that the caller's config says, whatever the task
would like: none, unless told otherwise.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rock import errors
from rock.jobs import rewards
from rock.jobs.harbor_file import read_task_file
from rock.protocol.env import IDLE, new_instance_id
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.client import Client
from rock.sdk.sandbox.sandbox import Sandbox
from rock.sdk.training import Message

REWARDS = "/logs/verifier"
_SHOWN = 20_000  # bytes of a command's output that the agent sees
_SESSION = "agent"
_BLOCK = re.compile(r"```(?:bash|sh|shell)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_SYSTEM = (
    "You work in a Linux sandbox. Answer with shell commands in one ```bash block; their output comes in the next "
    "message. When the task is done, answer without a block."
)


@dataclass(frozen=True)
class HarborTask:
    """A task, as its folder says. Times are seconds. `image`: None where task.toml names none."""

    name: str
    folder: Path
    instruction: str
    image: str | None = None
    memory: str = "2g"
    cpus: float = 1.0
    step_timeout: float = 600.0
    verifier_timeout: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    verifier_env: dict[str, str] = field(default_factory=dict)
    solution_env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HarborTask:
        """Read a task's folder. InvalidConfig names the file that is missing or wrong; Unsupported names the settings
        that ROCK does not provide."""
        folder = Path(folder)
        parts = read_task_file(folder)
        try:
            instruction = (folder / "instruction.md").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            hint = "it has a task.toml, an instruction.md and tests/test.sh"
            raise errors.InvalidConfig(f"{folder} is no task of Harbor: {error}", hint=hint) from None
        if not (folder / "tests" / "test.sh").is_file():
            raise errors.InvalidConfig(f"{folder} has no tests/test.sh", hint="add the script that judges the task")
        box, agent, verifier = parts["environment"], parts["agent"], parts["verifier"]
        memory = box["memory"] if isinstance(box.get("memory"), str) else f"{box.get('memory_mb', 2048)}m"
        try:
            return cls(
                folder.name, folder, instruction, box.get("docker_image"), memory.lower(), float(box.get("cpus", 1)),
                float(agent.get("timeout_sec", 600)), float(verifier.get("timeout_sec", 600)),
                _texts(box.get("env")), _texts(verifier.get("env")), _texts(parts["solution"].get("env")),
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError) as error:
            raise errors.InvalidConfig(
                f"{folder}/task.toml has a wrong value: {error}", hint="correct its type"
            ) from None

    @property
    def built_image(self) -> str:
        """The name of the image that is built of its Dockerfile; InvalidConfig when it has none."""
        if not (self.folder / "environment" / "Dockerfile").is_file():
            hint = "name an image: docker_image in task.toml, or image=; or write environment/Dockerfile"
            raise errors.InvalidConfig(f"task {self.name} has no image", hint=hint)
        place = hashlib.sha256(os.fsencode(self.folder.absolute())).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:60]
        return f"localhost/harbor/{words or 'task'}:{place}"


@dataclass
class _Episode:
    """A task that is being worked on. `score`: once it was judged."""

    task: HarborTask
    sandbox: Sandbox
    score: dict[str, float] | None = None


class HarborTasks:
    """A folder of tasks, with the calls of TrainingSandbox; each instance is a sandbox of its own.

    folder: of tasks, or of one. image: for all of them, instead of what they name. config: limits and network of the
    sandboxes; the task says memory and cpus. idle_timeout: seconds without a call after which a sandbox is stopped.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image: str | None = None,
        base_url: str | None = None,
        bearer_token: str | None = None,
        *,
        idle_timeout: float = IDLE,
        config: SandboxConfig | None = None,
    ) -> None:
        root = Path(folder)
        found = [root] if (root / "task.toml").is_file() else sorted(p.parent for p in root.glob("*/task.toml"))
        if not found:
            raise errors.InvalidConfig(f"there is no task in {root}", hint="a task is a folder with a task.toml")
        self.tasks = {task.name: task for task in map(HarborTask.load, found)}
        self._image = image
        reach = {"base_url": base_url, "api_key": bearer_token}
        self._config = (config or SandboxConfig()).model_copy(
            update={"auto_clear_seconds": max(1, math.ceil(idle_timeout)),
                    **{name: value for name, value in reach.items() if value is not None}}
        )  # fmt: skip
        self._episodes: dict[str, _Episode] = {}
        self._built: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop all sandboxes."""
        for instance_id in list(self._episodes):
            await self.release_instance(instance_id)

    async def get_env_profile(
        self, env_type: str = "harbor", split: str = "train", params: dict[str, Any] | None = None
    ) -> list[str]:
        """Names of the tasks: there are no splits."""
        return list(self.tasks)

    async def create_instance(
        self,
        env_type: str,
        task_id: str,
        instance_id: str | None = None,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Start the task's sandbox: {"state": the instruction, "info": {"instance_id", "task_id", "sandbox_id"}}."""
        task = self.tasks.get(task_id)
        if task is None:
            names = ", ".join(sorted(self.tasks)[:20])
            raise errors.NotFound(f"there is no task {task_id!r}", hint=f"there are: {names}")
        image = (params or {}).get("image") or self._image or task.image or await self._build(task)
        instance_id = instance_id or new_instance_id()
        if instance_id in self._episodes:
            raise errors.Conflict(f"instance {instance_id!r} exists already", hint="release it")
        config = self._config.model_copy(update={"image": image, "memory": task.memory, "cpus": task.cpus,
                                                 "env": {**self._config.env, **task.env}})  # fmt: skip
        sandbox = Sandbox(config)
        await sandbox.start()
        try:
            await sandbox.create_session(session=_SESSION)
        except BaseException:
            await sandbox.close()
            raise
        self._episodes[instance_id] = _Episode(task, sandbox)
        info = {"instance_id": instance_id, "task_id": task_id, "sandbox_id": sandbox.sandbox_id}
        return {"state": [_says(_SYSTEM, "system"), _says(task.instruction)], "info": info}

    async def step(
        self, instance_id: str, action: Message | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run the message's ```bash block; a message without one ends the episode, which is then judged."""
        episode = self._episode(instance_id)
        if episode.score is not None:
            raise errors.InvalidConfig("the episode has ended: it was judged", hint="create a new instance")
        text = action.get("content") if isinstance(action, dict) else None
        if not isinstance(text, str):
            told = "an action is a message with text as its content"
            return _step([_says(told)], 0.0, False, failure="bad_action", error=told)
        blocks = _BLOCK.findall(text)
        if not blocks:
            return _step([], await self.evaluate(instance_id), True, stop_reason="completed")
        seen = await episode.sandbox.arun(
            blocks[0], _SESSION, timeout=episode.task.step_timeout, max_output_bytes=_SHOWN
        )
        if seen.timed_out:
            limit = f"the command took longer than {episode.task.step_timeout:g} s and was killed"
            return _step([_says(f"{seen.output}\n{limit}")], 0.0, False, timed_out=True)
        return _step([_says(f"{seen.output}\n[exit status {seen.exit_code}]")], 0.0, False, exit_code=seen.exit_code)

    async def solve(self, instance_id: str) -> str:
        """Run the task's own solution, as its oracle; answers what that printed. CommandFailed when it failed."""
        episode = self._episode(instance_id)
        if not (episode.task.folder / "solution" / "solve.sh").is_file():
            raise errors.InvalidConfig(
                f"task {episode.task.name} has no solution/solve.sh", hint="the oracle needs this script"
            )
        await self._put(episode.sandbox, episode.task.folder / "solution", "/solution")
        done = await episode.sandbox.execute(
            ["bash", "/solution/solve.sh"], timeout=episode.task.step_timeout, env=episode.task.solution_env,
            max_output_bytes=_SHOWN, check=True,
        )  # fmt: skip
        return done.stdout

    async def evaluate(
        self, instance_id: str, messages: list[Message] | None = None, params: dict[str, Any] | None = None
    ) -> float:
        """Run the tests, once: the agent's session is killed first, and it cannot act any more.

        EnvironmentRaised: the tests gave no reward; `details` has what they printed. CommandTimeout: they are too slow.
        """
        episode = self._episode(instance_id)
        if episode.score is None:
            episode.score = await self._judge(episode)
        return episode.score.get("reward", sum(episode.score.values()) / max(1, len(episode.score)))

    async def rewards(self, instance_id: str) -> dict[str, float]:
        """All rewards by name, where the tests tell several; `evaluate` has the one named "reward", or their mean."""
        await self.evaluate(instance_id)
        return dict(self._episode(instance_id).score or {})

    async def release_instance(self, instance_id: str) -> bool:
        """Stop its sandbox. False when there is none of that name."""
        episode = self._episodes.pop(instance_id, None)
        if episode is None:
            return False
        await episode.sandbox.stop()
        return True

    async def _build(self, task: HarborTask) -> str:
        """The image of its Dockerfile, which is built when it is first needed. CommandFailed, with the line."""
        if task.name not in self._built:
            config = self._config
            image = task.built_image
            async with Client(config.base_url, config.api_key) as client:
                await client.build_image(task.folder / "environment", image, network=config.network, memory=task.memory)
            self._built[task.name] = image
        return self._built[task.name]

    def _episode(self, instance_id: str) -> _Episode:
        found = self._episodes.get(instance_id)
        if found is None:
            raise errors.NotFound(f"Instance {instance_id} not found!", hint="it was released; create a new one")
        return found

    async def _judge(self, episode: _Episode) -> dict[str, float]:
        sandbox, task = episode.sandbox, episode.task
        await sandbox.close_session(_SESSION)
        await sandbox.execute(["rm", "-rf", REWARDS], check=True)  # whatever the agent may have put there
        await sandbox.fs.mkdir(REWARDS)
        await self._put(sandbox, task.folder / "tests", "/tests")
        done = await sandbox.execute(
            ["bash", "/tests/test.sh"], timeout=task.verifier_timeout, env=task.verifier_env, max_output_bytes=_SHOWN
        )
        if done.timed_out:
            raise errors.CommandTimeout(f"the tests of {task.name} took longer than {task.verifier_timeout:g} s",
                                        sandbox_id=sandbox.sandbox_id)  # fmt: skip
        for name in ("reward.json", "reward.txt"):
            try:
                return rewards.read(name, await sandbox.fs.read(f"{REWARDS}/{name}", length=rewards.LARGEST))
            except errors.NotFound:
                continue
            except (ValueError, errors.ClientError) as error:
                raise self._no_reward(episode, f"{name} is no reward: {error}", done.stdout + done.stderr) from None
        raise self._no_reward(episode, "they wrote no reward", done.stdout + done.stderr)

    def _no_reward(self, episode: _Episode, why: str, printed: str) -> errors.EnvironmentRaised:
        details = {"type": "NoReward", "traceback": printed[-_SHOWN:]}
        return errors.EnvironmentRaised(f"the tests of {episode.task.name} gave no reward: {why}",
                                        sandbox_id=episode.sandbox.sandbox_id, details=details)  # fmt: skip

    async def _put(self, sandbox: Sandbox, source: Path, target: str) -> None:
        """Send a folder to where nothing of the agent's is."""
        await sandbox.execute(["rm", "-rf", target], check=True)
        await sandbox.fs.upload_dir(source, target)


def _texts(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("env is a table")
    return {str(name): str(text) for name, text in value.items()}


def _says(content: str, role: str = "user") -> Message:
    return {"role": role, "content": content, **({"tool_calls": []} if role == "user" else {})}


def _step(state: list[Message], reward: float, over: bool, **info: Any) -> dict[str, Any]:
    return {"state": state, "reward": reward, "is_terminated": over, "info": info}
