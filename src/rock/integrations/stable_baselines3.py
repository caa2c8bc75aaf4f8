"""Environments of a server as a `VecEnv` of stable-baselines3.

    from rock.integrations.stable_baselines3 import SandboxVecEnv

    envs = VecMonitor(SandboxVecEnv("CartPole-v1", 8))
    PPO("MlpPolicy", envs).learn(100_000)

One request steps all environments. Requires stable-baselines3, and the extra "gym".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from rock import errors
from rock.gym.vector import SandboxVectorEnv

Array = np.ndarray[Any, Any]
Indices = int | Iterable[int] | None


class SandboxVecEnv(VecEnv):  # type: ignore[misc]
    """`num_envs` environments in one process of a sandbox.

    source, options: as of `rock.gym.SandboxVectorEnv`, whose object is `envs`. The autoreset mode is "same step", as
    stable-baselines3 needs it; another one is rejected.
    """

    def __init__(self, source: str, /, num_envs: int, **options: Any) -> None:
        if options.get("autoreset_mode") is not None:
            raise errors.Unsupported("autoreset_mode: a VecEnv of stable-baselines3 resets with the last step",
                                     hint="leave autoreset_mode out")
        wanted = tuple(dict.fromkeys((*(options.pop("capabilities", None) or ()), "same_step")))
        options.pop("autoreset_mode", None)
        self.envs = SandboxVectorEnv(source, num_envs, autoreset_mode="SameStep", capabilities=wanted, **options)
        self._actions: Any = None
        try:
            super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)
        except BaseException:
            self.envs.close()
            raise

    def __repr__(self) -> str:
        return f"SandboxVecEnv({self.envs.source!r}, {self.num_envs}, sandbox_id={self.envs.sandbox_id!r})"

    # ---- episodes

    def reset(self) -> Any:
        """Observations of new episodes, with the seeds and the options that were set for the next reset."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise errors.Unsupported("set_options: the environments have different options",
                                     hint="pass one dict to set_options")
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observations, infos = self.envs.reset(seed=seeds, options=options or None)
        self.reset_infos = infos_of(infos, self.num_envs)
        self._actions = None
        self._reset_seeds()
        self._reset_options()
        return writable(observations)

    def step_async(self, actions: Any) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, Array, Array, list[dict[str, Any]]]:
        """(observations, rewards: float32, dones: bool, infos). At an end, the observation is that of the new episode,
        and the info has "terminal_observation" and "TimeLimit.truncated"."""
        if self._actions is None:
            raise errors.Conflict("step_wait: there is no step to wait for", hint="call step_async before")
        actions, self._actions = self._actions, None
        observations, rewards, terminated, truncated, gathered = self.envs.step(actions)
        final, last = gathered.get("final_obs"), gathered.get("final_info")
        infos = infos_of({k: v for k, v in gathered.items() if not k.removeprefix("_").startswith("final_")},
                         self.num_envs)  # fmt: skip
        endings = infos_of(last, self.num_envs) if isinstance(last, dict) else [{} for _ in infos]
        dones = np.logical_or(terminated, truncated)
        self.reset_infos = [infos[i] if dones[i] else self.reset_infos[i] for i in range(self.num_envs)]
        for index in np.flatnonzero(dones):
            infos[index] = {**endings[index], "TimeLimit.truncated": bool(truncated[index] and not terminated[index])}
            if final is not None:
                infos[index]["terminal_observation"] = final[index]
        for index in np.flatnonzero(~dones):
            infos[index]["TimeLimit.truncated"] = False
        return writable(observations), np.asarray(rewards, dtype=np.float32), dones, infos

    def close(self) -> None:
        """End their process. No effect when that was done."""
        self.envs.close()

    # ---- attributes and methods

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """An attribute of some; AttributeError when they lack it."""
        if attr_name == "render_mode":
            found: Sequence[Any] = [self.envs.render_mode] * self.num_envs
        else:
            found = self._inside(attr_name, lambda: self.envs.get_attr(attr_name))
        return [found[index] for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        if indices is None:
            self.envs.set_attr(attr_name, [value] * self.num_envs)
        else:
            self.envs.set_some(list(self._get_indices(indices)), attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """The results of a method of some; AttributeError when they lack it. Indices need the vectorization mode
        "sync", which is the default."""
        def call() -> Sequence[Any]:
            if indices is None:
                return self.envs.call(method_name, *method_args, **method_kwargs)
            return self.envs.call_some(list(self._get_indices(indices)), method_name, *method_args, **method_kwargs)

        return list(self._inside(method_name, call))

    def _inside(self, name: str, call: Any) -> Any:
        try:
            return call()
        except errors.EnvironmentRaised as error:
            if error.type != "AttributeError":
                raise
            raise AttributeError(f"{self!r} has no attribute {name!r}") from error

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """False for each: a wrapper of this process is around no environment inside."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Any]:
        frames = self.envs.render()
        return [None] * self.num_envs if frames is None else list(frames)


def infos_of(gathered: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The info of each environment, from the gathered infos of a vector: `_NAME` is the mask of NAME."""
    infos: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in gathered.items():
        mask = gathered.get(f"_{name}")
        if name.startswith("_") and name[1:] in gathered:
            continue
        if mask is None:  # of the vector itself
            for info in infos:
                info[name] = value
            continue
        nested = infos_of(value, count) if isinstance(value, dict) else value
        for index in np.flatnonzero(mask):
            infos[index][name] = nested[index]
    return infos


def writable(value: Any) -> Any:
    """The observations as arrays that the algorithm may change."""
    if isinstance(value, dict):
        return {name: writable(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(writable(item) for item in value)
    array = np.asarray(value)
    return array if array.flags.writeable else array.copy()
