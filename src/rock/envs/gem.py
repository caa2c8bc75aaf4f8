"""The blocking interface of GEM: `make`, `reset`, `step`, `close`. Thread-safe.

env = rock.make("game:Sokoban-v0-easy")
observation, info = env.reset(seed=42)
observation, reward, terminated, truncated, info = env.step("\\boxed{up}")
env.close()
"""

from __future__ import annotations

import copy
import os
from types import TracebackType
from typing import Any, Self

from rock import errors
from rock.envs.client import EnvironmentClient, EnvironmentHandle, Report
from rock.protocol.env import OpenEnv
from rock.protocol.sandbox import SandboxConfig

START_TIMEOUT = 1200.0  # the first environment of a package set installs it
STEP_TIMEOUT = 300.0

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class RockEnv:
    """One environment in its own process, in a sandbox on the server.

    env_id: as GEM names it. env_number: its number in the sandbox. sandbox_id: its sandbox.
    base_url, api_key: default to ROCK_BASE_URL and ROCK_API_KEY.
    config: limits of a dedicated sandbox, which `close` stops. `exclusive` requests one too.
    packages: requirements beside GEM, in pip's syntax. imports: modules that register it.
    start_timeout, step_timeout: seconds. progress: how a start that takes over a second is reported: by default on the
    standard error if it is a terminal; False reports nothing, True always, and a function is called with each message.
    kwargs: passed to the environment's constructor.

    Errors are typed: NotFound (no such environment), EnvironmentRaised (it raised, and stays usable), EnvironmentEnded
    (its process is gone), CommandTimeout, Unavailable, ...
    """

    def __init__(
        self,
        env_id: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: SandboxConfig | None = None,
        exclusive: bool = False,
        packages: list[str] | None = None,
        imports: list[str] | None = None,
        start_timeout: float = START_TIMEOUT,
        step_timeout: float | None = STEP_TIMEOUT,
        progress: Report = None,
        **kwargs: Any,
    ) -> None:
        self.env_id = env_id
        self._closed = True
        self._made_of = env_id
        self._process = os.getpid()
        self._options: dict[str, Any] = {
            "base_url": base_url, "api_key": api_key, "config": config, "exclusive": exclusive, "packages": packages,
            "imports": imports, "start_timeout": start_timeout, "step_timeout": step_timeout, "progress": progress,
            **kwargs,
        }  # fmt: skip
        self._link = EnvironmentClient(
            base_url=base_url, api_key=api_key, config=config, exclusive=exclusive, timeout=step_timeout,
            progress=progress,
        )
        spec = OpenEnv(env_id=env_id)
        made: dict[str, Any] = {"env_id": env_id, "kwargs": kwargs}
        if packages:
            spec.packages = packages
        if imports:
            made["imports"] = imports
        try:
            self._link.open(spec, start_timeout)
        except errors.NotFound as unknown:
            spec = self._named(unknown, made, packages or [])
            self._link.open(spec, start_timeout)
        try:
            self._player = EnvironmentHandle(self._link, self._link.make(made, start_timeout))
        except BaseException:
            self._link.close()
            raise
        self._closed = False

    def _named(self, unknown: errors.NotFound, made: dict[str, Any], packages: list[str]) -> OpenEnv:
        """The request for a registered environment of this name; fills in `made`. Raises `unknown` for an unknown
        name."""
        try:
            about = self._link.about(self.env_id)
        except errors.NotFound:
            raise unknown from None
        if about.version is None:
            raise unknown
        if about.source.startswith("hf://"):
            raise errors.InvalidConfig(f"the source of {self.env_id} is {about.source}, which rock.make does not start",
                                       hint="use rock.gym.SandboxEnv for it")
        name = about.source.removeprefix("gym://").removeprefix("image://")
        made.update(env_id=name, protocol=about.protocol, imports=[*about.imports, *made.get("imports", [])])
        spec = OpenEnv(env_id=name, protocol=about.protocol)
        if about.source.startswith("image://"):
            spec.image = name
            made["folder"] = "."
            self._link.exclusive = True  # other environments must not see its files
        if about.asked or packages:
            spec.packages = [*about.asked, *packages]
        return spec

    @property
    def sandbox_id(self) -> str:
        """The id of the sandbox that hosts it; environments of the same packages share one."""
        return self._link.sandbox_id

    @property
    def player(self) -> EnvironmentHandle:
        """The environment's handle, for concurrent requests to several environments."""
        return self._player

    @property
    def env_number(self) -> int:
        """Its number in its sandbox."""
        return self._player.number

    def __repr__(self) -> str:
        return f"RockEnv({self.env_id!r}, sandbox_id={self.sandbox_id!r}, env_number={self.env_number})"

    @property
    def unwrapped(self) -> Self:
        """Itself: wrappers of GEM expect this property."""
        return self

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same start."""
        self._check_open()
        return self._player.reset(seed, options)

    def step(self, action: Any) -> Step:
        """One step: (observation, reward, terminated, truncated, info).

        The request carries its step number, so that a repetition after a lost response is executed once.
        """
        self._check_open()
        observation, reward, terminated, truncated, info = self._player.step(action)
        return observation, float(reward), terminated, truncated, info

    def sample_random_action(self) -> Any:
        """A random action of the environment; EnvironmentRaised without support for it."""
        return self.call("sample_random_action")

    def get_state(self) -> Any:
        """The state of an environment that supports it, for `set_state`."""
        return self.call("get_state")

    def set_state(self, state: Any) -> None:
        """Call `set_state` of the environment. RockError when it has no such method."""
        self.call("set_state", state)

    def fork(self, n: int = 1, *, reseed: bool = False, partial: bool = False) -> list[Self]:
        """`n` copies (1 to 100) of this environment's process at this step. They continue as this one would, with the
        same random state, and are independent of it.

        reseed: draw new seeds in each copy. partial: return the copies that were started, at least one; otherwise an
        error of one closes the others. Unsupported, before any change: its process has threads, processes, connections,
        shared memory, or a library such as torch, and it does not declare fork_safe. QuotaExceeded: the sandbox has no
        room for more processes.
        """
        self._check_open()
        return [self._copy(player) for player in self._player.fork(n, reseed, partial)]

    def _copy(self, player: EnvironmentHandle) -> Self:
        child = copy.copy(self)
        child._player = player
        child._process = os.getpid()
        return child

    def spawn(self, same_state: bool = False, **kwargs: Any) -> Self:
        """Another environment of this id with the same arguments; `kwargs` replace some of them.

        same_state: copies this one's state, by a fork in a shared sandbox. With `kwargs`, in a sandbox of its own, and
        where a fork is refused, the environment needs get_state and set_state (EnvironmentRaised without them): the new
        one is reset once, then its set_state receives the result of get_state here.
        """
        self._check_open()
        if same_state and not kwargs and not self._link.exclusive:
            try:
                return self.fork(1)[0]
            except (errors.Unsupported, errors.NotFound):  # an older server has no forks
                pass
        state = self.get_state() if same_state else None
        child = type(self)(self._made_of, **{**self._options, **kwargs})
        if same_state:
            try:
                child.reset()
                child.set_state(state)
            except BaseException:
                child.close()
                raise
        return child

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """The result of a method of the environment; values that cannot be encoded become {"$type", "$repr"}."""
        self._check_open()
        return self._player.call("call", name, list(arguments), keywords)

    def get_attr(self, name: str) -> Any:
        """The current value of an attribute of the environment."""
        self._check_open()
        return self._player.call("get", name)

    def close(self) -> None:
        """End its process. No effect when that was done, or when its sandbox is gone."""
        if self._closed:
            return
        self._closed = True
        self._link.close_env(self._player.number)
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A forked child has a copy, whose end must not close the environment.
        if not getattr(self, "_closed", True) and self._process == os.getpid():
            try:
                self.close()
            except Exception:  # the lease of its environment expires
                pass

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict(f"{self.env_id} is closed", hint="make a new one")


def make(env_id: str, **options: Any) -> RockEnv:
    """Create an environment, as `gem.make` does; `options` are those of `RockEnv`, and the environment's own."""
    return RockEnv(env_id, **options)


def list_envs(*, base_url: str | None = None, api_key: str | None = None) -> list[dict[str, str]]:
    """The environments of the server: {"id", "protocol", "image", "note"} of each."""
    return EnvironmentClient(base_url=base_url, api_key=api_key).list_envs()


__all__ = ["RockEnv", "Step", "list_envs", "make"]
