"""Many environments of Gymnasium in one process of a sandbox, as a `gymnasium.vector.VectorEnv`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from rock import errors
from rock.envs.client import Report
from rock.gym.arguments import START_TIMEOUT, STEP_TIMEOUT, AnyPath, Arguments, Config, Network
from rock.gym.contract import EnvContract, Placed, space_of
from rock.gym.env import _spec_of
from rock.gym.source import Making, described, sandbox_of

_VECTORIZATION_MODES = ("sync", "async", "vector_entry_point", None)
Arrays = tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]]


class SandboxVectorEnv(Placed, VectorEnv[Any, Any, Any]):
    """`num_envs` environments, stepped together by one request.

    vectorization_mode: "sync" (one after the other), "async" (a process each), "vector_entry_point" (the environment's
        own vector), or None for the default of gymnasium.make_vec. vector_kwargs: passed to that vector.
    autoreset_mode: gymnasium.vector.AutoresetMode or its value: next step (Gymnasium's default), same step, disabled.

    Other arguments are those of `SandboxEnv`.

    Observations are batched as in `observation_space`, rewards are float64[num_envs], flags bool[num_envs].
    """

    def __init__(
        self,
        source: str,
        /,
        num_envs: int,
        *,
        vectorization_mode: str | None = "sync",
        vector_kwargs: dict[str, Any] | None = None,
        autoreset_mode: AutoresetMode | str | None = None,
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
        self.closed = True
        self.source = source
        if vectorization_mode not in _VECTORIZATION_MODES:
            raise errors.InvalidConfig(
                f"no vectorization mode {vectorization_mode!r}",
                hint=f"there are {', '.join(map(repr, _VECTORIZATION_MODES))}",
            )
        vector = {"num_envs": num_envs, "vectorization_mode": vectorization_mode,
                  "vector_kwargs": _vector_kwargs(vector_kwargs, autoreset_mode)}  # fmt: skip
        asked = Arguments(
            source, kwargs, base_image=base_image, rlmesh_package=rlmesh_package, packages=packages, imports=imports,
            trust_remote_code=trust_remote_code, allow_unpinned_hf=allow_unpinned_hf, build_memory=build_memory,
            task=task, config=config, capabilities=capabilities, override=override, cwd=cwd, repo_root=repo_root,
            memory=memory, cpus=cpus, network=network, base_url=base_url, api_key=api_key, exclusive=exclusive,
            start_timeout=start_timeout, step_timeout=step_timeout, progress=progress,
        )  # fmt: skip
        self._process = os.getpid()
        self._player, found = Making(asked, vector).make()
        self.closed = False
        try:
            about = described(self._player)
            asked.check(about)
            self.num_envs = int(about["num_envs"])
            self.observation_space = space_of(about["observation_space"])
            self.action_space = space_of(about["action_space"])
            self.single_observation_space = space_of(about["single_observation_space"])
            self.single_action_space = space_of(about["single_action_space"])
            self.metadata = dict(about["metadata"])
            if "autoreset_mode" in self.metadata:
                self.metadata["autoreset_mode"] = AutoresetMode(self.metadata["autoreset_mode"])
            self.render_mode = about["render_mode"]
            self.spec = _spec_of(about["spec"], {"rock_source": source, **kwargs})
            self._contract = EnvContract.of(about, self.single_observation_space, self.single_action_space)
            self._sandbox = sandbox_of(source, found, self._player)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"SandboxVectorEnv({self.source!r}, {self.num_envs}, sandbox_id={self.sandbox_id!r})"

    __str__ = __repr__

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start episodes: (observations, infos). An int seeds environment i with seed + i.

        options={"reset_mask": bool[num_envs]} resets only some of them.
        """
        self._check_open()
        if seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(
                seed if isinstance(seed, int) else seed[0]
            )
            seed = seed if isinstance(seed, int) else list(seed)
        return self._player.reset(seed, options)

    def step(self, actions: Any) -> Arrays:
        """One step of each: (observations, rewards, terminations, truncations, infos)."""
        self._check_open()
        return self._player.step(actions)

    def render(self, *, env_index: int | None = None) -> Any:
        """A frame of each, or with `env_index` (0 to num_envs - 1) of that one."""
        self._check_open()
        return self._player.call("render", *([] if env_index is None else [env_index]))

    def call(self, name: str, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """The results of a method of each."""
        self._check_open()
        return tuple(self._player.call("call", name, list(arguments), keywords))

    def call_some(self, indices: Sequence[int], name: str, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """The results of a method of the environments at these indices. Needs the vectorization mode "sync"."""
        self._check_open()
        return tuple(self._player.call("call", name, list(arguments), keywords, self._indices(indices)))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each."""
        self._check_open()
        return tuple(self._player.call("get", name))

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each, to one value or to a list of them."""
        self._check_open()
        self._player.call("set", name, values)

    def set_some(self, indices: Sequence[int], name: str, value: Any) -> None:
        """Set an attribute of the environments at these indices. Needs the vectorization mode "sync"."""
        self._check_open()
        self._player.call("set", name, value, self._indices(indices))

    def _indices(self, indices: Sequence[int]) -> list[int]:
        found = [int(index) for index in indices]
        if any(not 0 <= index < self.num_envs for index in found):
            raise errors.InvalidConfig(f"indices={found} are out of range",
                                       hint=f"there are {self.num_envs} environments; the first is 0")
        return found

    def close_extras(self, **kwargs: Any) -> None:
        """End their process. A forked child has a copy, whose end must not close them."""
        if self._process != os.getpid():
            return
        self._player.link.close_env(self._player.number)
        self._player.link.close()

    def _check_open(self) -> None:
        if self.closed:
            raise errors.Conflict(f"{self.source} is closed", hint="make a new one")


def _vector_kwargs(given: dict[str, Any] | None, mode: AutoresetMode | str | None) -> dict[str, Any]:
    options = dict(given or {})
    if mode is not None:
        options["autoreset_mode"] = mode
    chosen = options.get("autoreset_mode")
    if chosen is not None:
        try:
            options["autoreset_mode"] = AutoresetMode(chosen).value
        except ValueError:
            names = ", ".join(repr(item.value) for item in AutoresetMode)
            raise errors.InvalidConfig(f"no autoreset mode {chosen!r}", hint=f"there are {names}") from None
    return options
