"""GEM's interfaces for environments on a ROCK server: vectors, and ids for `gem.make`.

    vec = rock.make_vec(["game:Sokoban-v0-easy"] * 8)
    rock.register_gem()                       # from now on `gem.make(id)` makes an environment on the server

Requires numpy; `register_gem` requires GEM (`pip install gem-llm`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Self

try:
    import numpy as np
except ImportError as error:
    raise ImportError(f"rock.envs.vector needs numpy ({error}): pip install 'rock-sandbox[gym]'") from error

from rock import errors
from rock.envs.client import EnvironmentCall, EnvironmentClient, EnvironmentHandle
from rock.envs.gem import RockEnv, list_envs

Array = np.ndarray[Any, Any]
Vector = tuple[list[Any], Array, Array, Array, list[dict[str, Any]]]
_MAKERS = 8  # environments created concurrently


class AutoresetMode(Enum):
    """When an ended environment is reset: by the next step, or by the same one."""

    NEXT_STEP = "NextStep"
    SAME_STEP = "SameStep"


class RockVectorEnv:
    """Environments of GEM, each in its own process, stepped together by one request per sandbox.

    As in GEM, SAME_STEP returns the first observation and info of the new episode, and those of the end are lost;
    NEXT_STEP resets with the next step. An unseeded reset draws a new seed per process, so it differs from GEM in one
    process.

    When an environment raises, the others are still stepped, and its error is raised afterwards.
    """

    def __init__(
        self,
        env_ids: Sequence[str],
        env_fns: Sequence[Callable[[], Any]],
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        try:
            self.autoreset_mode = AutoresetMode(getattr(autoreset_mode, "value", autoreset_mode))
        except ValueError:
            raise errors.InvalidConfig(f"no autoreset mode {autoreset_mode!r}", hint="NextStep or SameStep") from None
        self.env_ids = list(env_ids)
        self.num_envs = len(env_fns)
        self.envs = _made(env_fns)
        self._plain = all(isinstance(env, RockEnv) for env in self.envs)
        self._observations: list[Any] = [None] * self.num_envs
        self._infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self._rewards = np.zeros(self.num_envs, np.float64)
        self._terminations = np.zeros(self.num_envs, np.bool_)
        self._truncations = np.zeros(self.num_envs, np.bool_)
        self._ended = np.zeros(self.num_envs, np.bool_)

    def reset(
        self, seed: int | Sequence[int | None] | None = None, **options: dict[str, Any]
    ) -> tuple[list[Any], list[dict[str, Any]]]:
        """Start episodes: (observations, infos). An int seeds environment i with seed + i.

        options: `env3_kwargs` are passed to the reset of environment 3.
        """
        if seed is None:
            seeds: Sequence[int | None] = [None] * self.num_envs
        else:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
        if len(seeds) != self.num_envs:
            raise errors.InvalidConfig(f"{len(seeds)} seeds for {self.num_envs} environments",
                                       hint=f"give one number, or a sequence of {self.num_envs} seeds")
        specs = {i: {"seed": seeds[i], **options.pop(f"env{i}_kwargs", {})} for i in range(self.num_envs)}
        if options:
            raise errors.InvalidConfig(f"reset has no option {', '.join(options)}",
                                       hint="give seed=, or env0_kwargs={...} for environment 0")
        self._reset(specs)
        for flags in (self._terminations, self._truncations, self._ended):
            flags[:] = False
        return deepcopy(self._observations), deepcopy(self._infos)

    def step(self, actions: Sequence[Any] | Mapping[int, Any]) -> Vector:
        """Step all environments, or with {index: action} some: (observations, rewards float64, terminations bool,
        truncations bool, infos), in the order of `actions`."""
        if not isinstance(actions, Mapping):
            if isinstance(actions, str) or len(actions) != self.num_envs:
                raise errors.InvalidConfig(f"{len(actions)} actions for {self.num_envs} environments",
                                           hint=f"give a sequence of {self.num_envs} actions, or a mapping such as "
                                                f"{{0: action}} to step some")
            actions = dict(enumerate(actions))
        if unknown := [i for i in actions if i not in range(self.num_envs)]:
            raise errors.InvalidConfig(f"there is no environment {unknown[0]} among {self.num_envs}",
                                       hint=f"use an index from 0 to {self.num_envs - 1}")
        late = {i for i in actions if self.autoreset_mode is AutoresetMode.NEXT_STEP and self._ended[i]}
        problem = self._step({i: action for i, action in actions.items() if i not in late})
        again = late or set()
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            again = {i for i in actions if self._terminations[i] or self._truncations[i]}
        if again:
            self._reset({i: {} for i in again})
        for i in late:
            self._rewards[i], self._terminations[i], self._truncations[i] = 0.0, False, False
        np.logical_or(self._terminations, self._truncations, out=self._ended)
        if problem is not None:
            raise problem
        chosen = list(actions)
        return (
            [deepcopy(self._observations[i]) for i in chosen],
            self._rewards[chosen],
            self._terminations[chosen],
            self._truncations[chosen],
            [deepcopy(self._infos[i]) for i in chosen],
        )

    def close(self) -> None:
        """End their processes."""
        for env in self.envs:
            env.unwrapped.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- concurrent requests ----

    def _reset(self, specs: Mapping[int, dict[str, Any]]) -> None:
        def asked(i: int, player: EnvironmentHandle) -> EnvironmentCall:
            return player.ask_reset(specs[i].get("seed"), specs[i].get("options"))

        found = self._all(specs, asked, EnvironmentHandle.was_reset, lambda i: self.envs[i].reset(**specs[i]))
        for i, result in found.items():
            if isinstance(result, BaseException):
                raise result
            self._observations[i], self._infos[i] = result

    def _step(self, actions: Mapping[int, Any]) -> BaseException | None:
        """Step; returns the first error. The other environments complete."""
        found = self._all(actions, lambda i, player: player.ask_step(actions[i]), EnvironmentHandle.was_stepped,
                          lambda i: self.envs[i].step(actions[i]))  # fmt: skip
        problem: BaseException | None = None
        for i, result in found.items():
            if isinstance(result, BaseException):
                problem = problem or result
                continue
            self._observations[i], self._rewards[i], self._terminations[i], self._truncations[i] = result[:4]
            self._infos[i] = result[4]
        return problem

    def _all(
        self,
        numbers: Mapping[int, Any],
        asked: Callable[[int, EnvironmentHandle], EnvironmentCall],
        read: Callable[[EnvironmentHandle, Any], Any],
        alone: Callable[[int], Any],
    ) -> dict[int, Any]:
        """Results by number. Environments with wrappers run in sequence, because wrappers are not concurrent."""
        if not self._plain:
            return {i: _result(alone, i) for i in numbers}
        by_link: dict[str, list[int]] = {}
        for i in numbers:
            by_link.setdefault(self.envs[i].sandbox_id, []).append(i)
        results: dict[int, Any] = {}
        for members in by_link.values():
            players = [self.envs[i].player for i in members]
            link: EnvironmentClient = players[0].link
            found = link.ask_all([asked(i, player) for i, player in zip(members, players, strict=True)])
            for i, player, item in zip(members, players, found, strict=True):
                results[i] = _result(partial(read, player), item)
        return {i: results[i] for i in numbers}


def _result(work: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return work(argument)
    except errors.RockError as error:
        return error


def _made(env_fns: Sequence[Callable[[], Any]]) -> list[Any]:
    """Create environments concurrently; on a failure, close the created ones."""
    with ExitStack() as undo, ThreadPoolExecutor(_MAKERS) as pool:
        futures = [pool.submit(make) for make in env_fns]
        for future in futures:
            if future.exception() is None:
                undo.callback(future.result().unwrapped.close)
        made = [future.result() for future in futures]
        undo.pop_all()
        return made


def make_vec(
    env_ids: str | Sequence[str],
    wrappers: Sequence[Callable[[Any], Any]] | None = None,
    vec_kwargs: Sequence[Mapping[str, Any]] | None = None,
    async_mode: bool = False,
    seed: int = 0,
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    **kwargs: Any,
) -> RockVectorEnv:
    """One environment per id, as `gem.make_vec` creates them; they run concurrently for any `async_mode`.

    vec_kwargs: arguments of each. kwargs: of all, also those of `RockEnv`. Environment i is created with seed=seed + i.
    """
    ids = [env_ids] if isinstance(env_ids, str) else list(env_ids)
    if vec_kwargs is not None and len(vec_kwargs) != len(ids):
        raise errors.InvalidConfig(f"{len(vec_kwargs)} vec_kwargs for {len(ids)} environments",
                                   hint=f"give one dictionary for each environment, {len(ids)} in all")

    def maker(i: int) -> Callable[[], Any]:
        def make() -> Any:
            env: Any = RockEnv(ids[i], **{"seed": seed + i, **(vec_kwargs[i] if vec_kwargs else {}), **kwargs})
            for wrapper in wrappers or ():
                env = wrapper(env)
            return env

        return make

    return RockVectorEnv(ids, [maker(i) for i in range(len(ids))], autoreset_mode)


def register_gem(
    ids: Sequence[str] | None = None, *, prefix: str = "", base_url: str | None = None, api_key: str | None = None
) -> list[str]:
    """Let `gem.make` and `gem.make_vec` create environments on the server; returns the registered ids.

    ids: defaults to all ids of the server, and to the ids without a level of older releases. prefix: "" replaces GEM's
    own environments of those names, so code for GEM works unchanged; another one, such as "rock/", adds them beside
    GEM's own. Unsupported: GEM is not installed.
    """
    try:
        from gem.envs.registration import ENV_REGISTRY, EnvSpec
    except ImportError as error:
        raise errors.Unsupported(f"GEM is not installed here: {error}", hint="pip install gem-llm") from None
    if ids is None:
        ids = []
        for row in list_envs(base_url=base_url, api_key=api_key):
            if row.get("protocol") == "gem":
                ids += [row["id"], *row.get("aliases", ())]
    where = {key: value for key, value in (("base_url", base_url), ("api_key", api_key)) if value is not None}
    for env_id in ids:
        name = prefix + env_id
        arguments = {"remote_id": env_id, **where}
        ENV_REGISTRY[name] = EnvSpec(id=name, entry_point="rock.envs.vector:remote", kwargs=arguments)
    return [prefix + env_id for env_id in ids]


class _Remote(RockEnv):
    """The result of `gem.make`: GEM sets `env_id` and `entry_point` on it."""

    entry_point: str


def remote(remote_id: str, **kwargs: Any) -> RockEnv:
    """The entry point of registered ids."""
    return _Remote(remote_id, **kwargs)
