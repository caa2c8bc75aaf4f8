"""One environment of Gymnasium in a sandbox, as a `gymnasium.Env`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from rock import errors
from rock.envs.aio import AsyncEnv, made
from rock.envs.client import Report
from rock.gym.arguments import START_TIMEOUT, STEP_TIMEOUT, AnyPath, Arguments, Config, Network, for_single
from rock.gym.contract import EnvContract, Placed, space_of
from rock.gym.source import Making, described, sandbox_of


class SandboxEnv(Placed, gymnasium.Env[Any, Any]):
    """An environment in its own process, in a sandbox on the server.

    source: an id of Gymnasium ("CartPole-v1", "gym://CartPole-v1", "module:Id-v0"); "hf://ORG/REPO@COMMIT", or a
        folder, with an env.py that defines `make_env(**kwargs)`; "image://NAME", an image of the server with an env.py.
    base_image: the image whose own Python hosts it; it must contain gymnasium, and nothing is installed.
    packages: requirements beside gymnasium, in pip's syntax; only wheels are accepted. imports: modules that register
        it. rlmesh_package: the requirement of RLMesh, like "rlmesh==0.1.0", for an environment that imports it.
    trust_remote_code: required for hf:// and folders. allow_unpinned_hf: accept the current commit of a branch or tag.
    task: "suite" or "suite/task", where make_env creates several.
    config: limits of a dedicated sandbox, as a SandboxConfig; or a mapping, or a JSON or TOML file with one, which
        make_env receives as `config`. memory, cpus, network: individual limits.
    capabilities: reject an environment without them: "render", and for vectors "vector", "next_step", "same_step",
        "disabled".
    override: a folder whose files replace those of the source, or a file to add beside env.py.
    cwd: the folder with env.py, in the source or (absolute) in the image. repo_root: a folder that contains the source,
        sent as a whole. build_memory: None, "off" or "auto", as nothing is built.
    base_url, api_key: default to ROCK_BASE_URL and ROCK_API_KEY. exclusive: a dedicated sandbox.
    start_timeout, step_timeout: seconds. progress: as of `rock.make`.
    kwargs: passed to gymnasium.make or make_env: render_mode, ...; JSON types only.

    Errors: NotFound (no such environment), EnvironmentRaised (with `type` and `traceback`; it stays usable),
    EnvironmentEnded (with its last lines and exit status), CommandTimeout (it was killed), InvalidConfig, Unsupported,
    ImageError, Unavailable.
    """

    def __init__(
        self,
        source: str,
        /,
        *,
        base_image: str | None = None,
        rlmesh_package: str | None = None,
        packages: Sequence[str] | None = None,
        imports: Sequence[str] | None = None,
        trust_remote_code: bool = False,
        allow_unpinned_hf: bool = False,
        build_memory: str | None = None,
        task: str | None = None,
        config: Config | None = None,
        capabilities: Sequence[str] | None = None,
        override: AnyPath | None = None,
        cwd: AnyPath | None = None,
        repo_root: AnyPath | None = None,
        memory: str | None = None,
        cpus: float | None = None,
        network: Network | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        exclusive: bool = False,
        start_timeout: float = START_TIMEOUT,
        step_timeout: float | None = STEP_TIMEOUT,
        progress: Report = None,
        **kwargs: Any,
    ) -> None:
        self._closed = True
        self._process = os.getpid()
        self.source = source
        for_single(kwargs)
        options: dict[str, Any] = {
            "base_image": base_image, "rlmesh_package": rlmesh_package, "packages": packages, "imports": imports,
            "trust_remote_code": trust_remote_code, "allow_unpinned_hf": allow_unpinned_hf,
            "build_memory": build_memory, "task": task, "config": config, "capabilities": capabilities,
            "override": override, "cwd": cwd, "repo_root": repo_root, "memory": memory, "cpus": cpus,
            "network": network, "base_url": base_url, "api_key": api_key, "exclusive": exclusive,
            "start_timeout": start_timeout, "step_timeout": step_timeout,
            "progress": progress,
        }  # fmt: skip
        asked = Arguments(source, kwargs, **options)
        self._player, found = Making(asked).make()
        self._closed = False
        try:
            about = described(self._player)
            asked.check(about)
            self.observation_space = space_of(about["observation_space"])
            self.action_space = space_of(about["action_space"])
            self.metadata = about["metadata"]
            self.render_mode = about["render_mode"]
            self.spec = _spec_of(about["spec"], {"rock_source": source, **options, **kwargs})
            self._contract = EnvContract.of(about, self.observation_space, self.action_space)
            self._sandbox = sandbox_of(source, found, self._player)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"SandboxEnv({self.source!r}, sandbox_id={self.sandbox_id!r}, env_number={self._player.number})"

    __str__ = __repr__

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same start."""
        self._check_open()
        super().reset(seed=seed)
        return self._player.reset(seed, options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step: (observation, reward, terminated, truncated, info).

        The request carries its step number, so that a repetition after a lost response is executed once.
        """
        self._check_open()
        return self._player.step(action)

    def render(self, *, env_index: int = 0) -> Any:
        """A frame according to its render_mode: height x width x 3 of uint8, text, or None.

        env_index: 0, as for a vector of one; another value raises EnvironmentRaised (IndexError).
        """
        self._check_open()
        return self._player.call("render", *([env_index] if env_index else []))

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
        """An attribute of this object, else of the environment inside; AttributeError when both lack it."""
        if hasattr(self, name):
            return getattr(self, name)
        try:
            return self.get_attr(name)
        except errors.EnvironmentRaised as error:
            if error.type != "AttributeError":
                raise
            raise AttributeError(f"{self!r} has no attribute {name!r}, inside neither") from error

    def close(self) -> None:
        """End its process. No effect when that was done."""
        if self._closed:
            return
        self._closed = True
        self._player.link.close_env(self._player.number)
        self._player.link.close()

    def __del__(self) -> None:
        # A forked child has a copy, whose end must not close the environment.
        if not getattr(self, "_closed", True) and self._process == os.getpid():
            try:
                self.close()
            except Exception:  # no caller to report to; the sandbox has an idle timeout
                pass

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict(f"{self.source} is closed", hint="make a new one")


def _spec_of(found: Any, kwargs: dict[str, Any]) -> EnvSpec | None:
    """The specification to create it again with gymnasium.make(env.spec)."""
    if found is None:
        return None
    return EnvSpec(
        id=str(found["id"]), entry_point="rock.gym:remake", reward_threshold=found["reward_threshold"],
        nondeterministic=bool(found["nondeterministic"]), max_episode_steps=found["max_episode_steps"], kwargs=kwargs,
    )  # fmt: skip


async def make_async(source: str, /, **options: Any) -> AsyncEnv[SandboxEnv]:
    """`SandboxEnv` for asyncio: creates it in a thread; `reset` and `step` are awaitable."""
    env = await made(lambda: SandboxEnv(source, **options))
    return AsyncEnv(env, env._player)


def remake(rock_source: str, **options: Any) -> SandboxEnv:
    """The entry point in the spec of a SandboxEnv."""
    return SandboxEnv(rock_source, **options)
