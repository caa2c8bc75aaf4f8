"""One environment of Gymnasium in a sandbox, as a `gymnasium.Env`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from rock import errors
from rock.gym.source import START_TIMEOUT, STEP_TIMEOUT, Making, Source, described
from rock.gym.spaces import space_of
from rock.protocol.sandbox import SandboxConfig


class SandboxEnv(gymnasium.Env[Any, Any]):
    """An environment in a process of its own, in a sandbox on the server.

    source: an id of Gymnasium ("CartPole-v1", "gym://CartPole-v1", "module:Id-v0"), or a folder with an env.py that
        defines `make_env(**kwargs)`; that needs trust_remote_code=True, and its requirements.txt is installed.
    packages: what it needs beside gymnasium, as pip names it; only wheels are taken. imports: modules that register it.
    task: "suite" or "suite/task", where make_env makes several.
    base_url, api_key: ROCK_BASE_URL and ROCK_API_KEY where they are not given. config: limits of its sandbox, which is
        then its own; `exclusive` asks for the same. start_timeout, step_timeout: seconds.
    kwargs: go to gymnasium.make or make_env: render_mode, ...; they have to be what JSON holds.

    Errors: NotFound (no such environment), EnvironmentRaised (with `type` and `traceback`; it stays usable),
    EnvironmentEnded (with its last lines and exit status), CommandTimeout (it was killed), InvalidConfig, Unavailable.
    """

    def __init__(
        self,
        source: str,
        /,
        *,
        packages: Sequence[str] = (),
        imports: Sequence[str] = (),
        trust_remote_code: bool = False,
        task: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        config: SandboxConfig | None = None,
        exclusive: bool = False,
        start_timeout: float = START_TIMEOUT,
        step_timeout: float | None = STEP_TIMEOUT,
        **kwargs: Any,
    ) -> None:
        self._closed = True
        self.source = source
        options = {
            "packages": packages, "imports": imports, "trust_remote_code": trust_remote_code, "task": task,
            "base_url": base_url, "api_key": api_key, "config": config, "exclusive": exclusive,
            "start_timeout": start_timeout, "step_timeout": step_timeout,
        }  # fmt: skip
        self._player = Making(
            Source.parse(source, packages, trust_remote_code), kwargs, imports, task, base_url, api_key, config,
            exclusive, start_timeout, step_timeout,
        ).make()  # fmt: skip
        self._closed = False
        try:
            told = described(self._player)
            self.observation_space = space_of(told["observation_space"])
            self.action_space = space_of(told["action_space"])
            self.metadata = told["metadata"]
            self.render_mode = told["render_mode"]
            self.spec = _spec_of(told["spec"], {"rock_source": source, **options, **kwargs})
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"SandboxEnv({self.source!r}, sandbox_id={self.sandbox_id!r}, env_number={self._player.number})"

    __str__ = __repr__

    @property
    def sandbox_id(self) -> str:
        """Where it runs."""
        return self._player.link.sandbox_id

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same start."""
        self._check_open()
        super().reset(seed=seed)
        return self._player.reset(seed, options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step: (observation, reward, terminated, truncated, info).

        It carries its number in the episode, so that one sent again because its answer was lost is done once.
        """
        self._check_open()
        return self._player.step(action)

    def render(self) -> Any:
        """A frame as its render_mode has it: height x width x 3 of uint8, text, or None."""
        self._check_open()
        return self._player.call("render")

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """The result of a method of the environment or of a wrapper around it inside."""
        self._check_open()
        return self._player.call("call", name, list(arguments), keywords)

    def get_attr(self, name: str) -> Any:
        """An attribute of the environment or of a wrapper around it inside."""
        self._check_open()
        return self._player.call("get", name)

    def set_attr(self, name: str, value: Any) -> None:
        self._check_open()
        self._player.call("set", name, value)

    def has_wrapper_attr(self, name: str) -> bool:
        return hasattr(self, name) or bool(not self._closed and self._player.call("has", name))

    def get_wrapper_attr(self, name: str) -> Any:
        """An attribute of this object, else of the environment inside; AttributeError when neither has it."""
        if hasattr(self, name):
            return getattr(self, name)
        try:
            return self.get_attr(name)
        except errors.EnvironmentRaised as error:
            if error.type != "AttributeError":
                raise
            raise AttributeError(f"{self!r} has no attribute {name!r}, inside neither") from error

    def close(self) -> None:
        """End its process. Nothing happens when that was done."""
        if self._closed:
            return
        self._closed = True
        self._player.link.close_env(self._player.number)
        self._player.link.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            try:
                self.close()
            except Exception:  # nobody is there to be told; its sandbox has an idle time
                pass

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict(f"{self.source} is closed", hint="make a new one")


def _spec_of(told: Any, kwargs: dict[str, Any]) -> EnvSpec | None:
    """How to make it again with gymnasium.make(env.spec)."""
    if told is None:
        return None
    return EnvSpec(
        id=str(told["id"]), entry_point="rock.gym:remake", reward_threshold=told["reward_threshold"],
        nondeterministic=bool(told["nondeterministic"]), max_episode_steps=told["max_episode_steps"], kwargs=kwargs,
    )  # fmt: skip


def remake(rock_source: str, **options: Any) -> SandboxEnv:
    """What the spec of a SandboxEnv names as its maker."""
    return SandboxEnv(rock_source, **options)
