"""Environments of SkyRL-gym: commands in a sandbox, and environments of the server.

    import rock.integrations.skyrl_gym as rock_skyrl

    rock_skyrl.register()          # env_class "rock_bash" and "rock_env" in the rows of a data set
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import skyrl_gym
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from rock import errors
from rock.envs.gem import RockEnv, make
from rock.sync import Sandbox

LABELS = {"rock.integration": "skyrl_gym"}  # of all sandboxes of these classes
_SHOWN = 20_000  # bytes of an output that the model sees
_BLOCK = re.compile(r"```(?:bash|sh|shell)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_BASH = ("image", "setup", "reward", "timeout", "max_turns", "sandbox")
_ENV = ("env_id", "seed", "max_turns", "options")


def register() -> None:
    """Register "rock_bash" and "rock_env" with SkyRL-gym."""
    for name, kind in (("rock_bash", BashEnv), ("rock_env", ServerEnv)):
        skyrl_gym.register(id=name, entry_point=f"{__name__}:{kind.__name__}")


def _options(names: tuple[str, ...], config: Any, extras: Any) -> dict[str, Any]:
    """The options of an environment: those of its configuration, and of `extra_info` or `rock` of its row."""
    found: dict[str, Any] = dict(config or {})
    row = (extras or {}).get("rock") or ((extras or {}).get("extra_info") or {}).get("rock") or {}
    found.update({name: value for name, value in dict(row).items() if value is not None})
    unknown = found.keys() - set(names)
    if unknown:
        raise errors.InvalidConfig(f"unknown options: {', '.join(sorted(map(str, unknown)))}",
                                   hint=f"the options are {', '.join(names)}")
    return found


class BashEnv(BaseTextEnv):  # type: ignore[misc]
    """The model answers with a ```bash block, which runs in the sandbox. A response without one ends the episode.

    Options, in the configuration of the environment or in `rock` of a row: image, setup (a command before the first
    turn), reward (a command; its exit code 0 is the reward 1.0), timeout (seconds of a command, 60), max_turns (10),
    sandbox (options of `rock.Sandbox`). metadata of a step has "exit_code", or "error" when the sandbox has ended: such
    a rollout has the reward 0.0 and `metadata["failed"]`, so that the trainer can leave it out.
    """

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        options = _options(_BASH, env_config, extras)
        if not options.get("image") or not options.get("reward"):
            raise errors.InvalidConfig("image or reward is missing", hint="set both in the configuration or the row")
        self.max_turns = int(options.get("max_turns", 10))
        self._timeout = float(options.get("timeout", 60.0))
        self._setup, self._reward = options.get("setup"), str(options["reward"])
        fields = {str(name): value for name, value in dict(options.get("sandbox") or {}).items()}
        fields["labels"] = {**LABELS, **fields.get("labels", {})}
        fields.setdefault("idle_timeout", 3600)
        self._sandbox = Sandbox(str(options["image"]), **fields)
        self._failed = False

    def init(self, prompt: Any) -> tuple[Any, dict[str, Any]]:
        """Start the sandbox."""
        self._sandbox.start()
        try:
            if self._setup:
                self._sandbox.exec(self._setup, timeout=self._timeout, check=True)
        except BaseException:
            self.close()
            raise
        return prompt, {"sandbox_id": self._sandbox.sandbox_id}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        block = _BLOCK.search(action)
        try:
            if block is None:
                return self._end({})
            done = self._sandbox.exec(block[1], timeout=self._timeout, max_output_bytes=_SHOWN)
            metadata: dict[str, Any] = {"exit_code": done.exit_code, "timed_out": done.timed_out}
            if self.turns >= self.max_turns:
                return self._end(metadata)
        except (errors.SandboxError, errors.Unavailable, errors.NotFound) as error:
            self._failed = True
            return BaseTextEnvStepOutput(observations=[], reward=0.0, done=True,
                                         metadata={"failed": True, "error": f"{type(error).__name__}: {error}"})
        text = done.output + (f"\n[longer than {self._timeout:g} seconds; killed]" if done.timed_out else "")
        text += "" if done.exit_code in (0, None) else f"\n[exit code {done.exit_code}]"
        return BaseTextEnvStepOutput(observations=[{"role": "user", "content": text}], reward=0.0, done=False,
                                     metadata=metadata)  # fmt: skip

    def _end(self, metadata: dict[str, Any]) -> BaseTextEnvStepOutput:
        judged = self._sandbox.exec(self._reward, timeout=self._timeout)
        reward = float(judged.exit_code == 0)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True,
                                     metadata={**metadata, "reward_output": judged.output[-_SHOWN:]})

    def get_metrics(self) -> dict[str, Any]:
        return {"turns": self.turns, "failed": float(self._failed)}

    def close(self) -> None:
        """Stop the sandbox. No effect when that was done."""
        self._sandbox.stop()


class ServerEnv(BaseTextEnv):  # type: ignore[misc]
    """An environment of GEM on the server; the response of the model is the action.

    Options, in the configuration or in `rock` of a row: env_id, seed, max_turns (100), options (of `rock.make`). The
    first observation is added to the prompt.
    """

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        options = _options(_ENV, env_config, extras)
        if not options.get("env_id"):
            raise errors.InvalidConfig("env_id is missing", hint="set it in the configuration or the row")
        self.max_turns = int(options.get("max_turns", 100))
        self._seed = options.get("seed")
        self._env: RockEnv = make(str(options["env_id"]), **dict(options.get("options") or {}))

    def init(self, prompt: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self._env.reset(seed=None if self._seed is None else int(self._seed))
        return [*prompt, {"role": "user", "content": str(observation)}], dict(info)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        observation, reward, terminated, truncated, info = self._env.step(action)
        done = bool(terminated or truncated) or self.turns >= self.max_turns
        observations = [] if done else [{"role": "user", "content": str(observation)}]
        metadata = {**info, "terminated": bool(terminated), "truncated": bool(truncated)}
        return BaseTextEnvStepOutput(observations=observations, reward=float(reward), done=done, metadata=metadata)

    def get_metrics(self) -> dict[str, Any]:
        return {"turns": self.turns}

    def close(self) -> None:
        """End its process. No effect when that was done."""
        self._env.close()
