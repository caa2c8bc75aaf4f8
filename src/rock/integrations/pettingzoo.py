"""Games of several agents on a server, with the interfaces of PettingZoo.

    from rock.integrations.pettingzoo import SandboxAECEnv, SandboxParallelEnv

    env = SandboxParallelEnv("pettingzoo.butterfly.pistonball_v6", packages=["pettingzoo[butterfly]"])
    env = SandboxAECEnv("pettingzoo.classic.tictactoe_v3", packages=["pettingzoo", "pygame"])

A step is one request. Requires pettingzoo, and the extra "gym".
"""

from __future__ import annotations

import os
from typing import Any

from pettingzoo import AECEnv, ParallelEnv

from rock import errors
from rock.envs.client import EnvironmentHandle
from rock.gym.arguments import Arguments
from rock.gym.contract import EnvSandbox, Space, space_of
from rock.gym.source import Making, described, sandbox_of

PACKAGES = ("pettingzoo",)
_BY_AGENT = ("rewards", "terminations", "truncations")


class _Remote:
    """The common part: the game in its sandbox, its spaces, and its end."""

    _player: EnvironmentHandle

    def _open(self, source: str, interface: str, options: dict[str, Any]) -> None:
        self._closed = True
        self._process = os.getpid()
        self.source = source
        known = Arguments.__dataclass_fields__.keys() - {"source", "kwargs", "limits"}
        given = {name: value for name, value in options.items() if name in known}
        kwargs = {name: value for name, value in options.items() if name not in known}
        if "://" not in source and not source.startswith(("/", ".", "~")):
            given["packages"] = list(given.get("packages") or (() if given.get("base_image") else PACKAGES))
        self._player, found = Making(Arguments(source, kwargs, **given), {"agents": interface}).make()
        self._closed = False
        try:
            self._describe(source, found)
        except BaseException:
            self.close()
            raise

    def _describe(self, source: str, found: Any) -> None:
        about = described(self._player)
        try:
            self.possible_agents: list[str] = [str(agent) for agent in about["possible_agents"]]
            pairs = {name: [space_of(one) for one in about[name]] for name in ("observation_spaces", "action_spaces")}
            self.observation_spaces = dict(zip(self.possible_agents, pairs["observation_spaces"], strict=True))
            self.action_spaces = dict(zip(self.possible_agents, pairs["action_spaces"], strict=True))
            if about["state_space"] is not None:
                self.state_space = space_of(about["state_space"])
            self.metadata = dict(about["metadata"])
            self.render_mode = about["render_mode"]
        except (KeyError, TypeError, ValueError) as error:
            raise errors.ServerError(f"malformed answer: no description of a game ({error})") from None
        self.agents: list[str] = []
        self.sandbox: EnvSandbox = sandbox_of(source, found, self._player)

    @property
    def sandbox_id(self) -> str:
        return self._player.link.sandbox_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, sandbox_id={self.sandbox_id!r})"

    __str__ = __repr__

    def observation_space(self, agent: str) -> Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Space:
        return self.action_spaces[agent]

    def state(self) -> Any:
        """The state of the whole game, of the few that have one."""
        return self.call("state")

    def render(self) -> Any:
        self._check_open()
        return self._player.call("render")

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """The result of a method of the game."""
        self._check_open()
        return self._player.call("call", name, list(arguments), keywords)

    def get_attr(self, name: str) -> Any:
        """An attribute of the game."""
        self._check_open()
        return self._player.call("get", name)

    def close(self) -> None:
        """End its process. No effect when that was done."""
        if not self._closed and self._process == os.getpid():
            self._closed = True
            self._player.link.close_env(self._player.number)
            self._player.link.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            try:
                self.close()
            except Exception:  # no caller to report to; the sandbox has an idle timeout
                pass

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict(f"{self.source} is closed", hint="make a new one")

    def _fields(self, found: Any, *names: str) -> list[Any]:
        """Fields of a result, and the current agents; ServerError when one is missing."""
        try:
            self.agents = list(found["agents"])
            return [found[name] for name in names]
        except (KeyError, TypeError):
            raise errors.ServerError("malformed answer of an environment: no result of a game of agents") from None


class SandboxParallelEnv(_Remote, ParallelEnv):  # type: ignore[misc]
    """A game in which all agents act at once.

    source: a module of PettingZoo ("pettingzoo.butterfly.pistonball_v6"), or a folder, an hf:// repository or an image
    with an env.py whose make_env returns such a game; a game with the AEC interface is converted.
    options: `packages`, `base_image`, `memory`, `base_url` and the others of `rock.gym.SandboxEnv`; any other is an
    argument of the game. A module needs its own packages; the default is ["pettingzoo"].
    """

    def __init__(self, source: str, /, **options: Any) -> None:
        self._open(source, "parallel", options)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """(observations, infos) by agent."""
        self._check_open()
        found, infos = self._player.reset(seed, options)
        (observations,) = self._fields(found, "observations")
        return observations, infos

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        """(observations, rewards, terminations, truncations, infos) by agent."""
        self._check_open()
        found, _, _, _, infos = self._player.step(actions)
        observations, rewards, terminations, truncations = self._fields(found, "observations", *_BY_AGENT)
        return observations, rewards, terminations, truncations, infos


class SandboxAECEnv(_Remote, AECEnv):  # type: ignore[misc]
    """A game in which the agents act in turns. Arguments are those of `SandboxParallelEnv`."""

    def __init__(self, source: str, /, **options: Any) -> None:
        self._open(source, "aec", options)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        self._check_open()
        self._take(*self._player.reset(seed, options))

    def step(self, action: Any) -> None:
        """The action of the selected agent; None when it has ended."""
        self._check_open()
        found, _, _, _, infos = self._player.step(action)
        self._take(found, infos)

    def observe(self, agent: str) -> Any:
        """An agent's observation. That of the selected agent came with the step."""
        self._check_open()
        return self._observation if agent == self.agent_selection else self.call("observe", agent)

    def _take(self, found: Any, infos: Any) -> None:
        names = ("selection", "observation", "cumulative", *_BY_AGENT)
        (self.agent_selection, self._observation, self._cumulative_rewards, self.rewards, self.terminations,
         self.truncations) = self._fields(found, *names)  # fmt: skip
        self.infos = infos
