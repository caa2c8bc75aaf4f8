"""Environments of several agents: those of PettingZoo, with its parallel or its AEC interface.

A result is one dict, so that the client needs one request for a step. Parallel: {"agents", "observations", "rewards",
"terminations", "truncations"} by agent. AEC: {"agents", "selection", "observation" of the selected agent, "rewards",
"cumulative", "terminations", "truncations"}. The infos of the agents are the info.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rock.guest.environments.spaces import metadata_of, spec_of

PARALLEL = "parallel"
AEC = "aec"
_MAKERS = {PARALLEL: ("parallel_env",), AEC: ("env", "raw_env")}  # functions of a module of PettingZoo
_BY_AGENT = ("rewards", "terminations", "truncations")


def made_by(module: str, interface: str, kwargs: dict[str, Any]) -> Any:
    """The environment of a module, such as pettingzoo.classic.tictactoe_v3."""
    found = importlib.import_module(module)
    maker: Callable[..., Any] | None = None
    for name in _MAKERS[interface]:
        maker = maker or getattr(found, name, None)
    if maker is None:
        raise TypeError(f"{module} has no {_MAKERS[interface][0]}, so it has no {interface} interface")
    return maker(**kwargs)


def interface_of(made: Any, interface: str) -> Any:
    """The result of a make_env with the requested interface, converted where PettingZoo can convert it."""
    if not hasattr(made, "possible_agents"):
        raise TypeError(f"make_env made a {type(made).__name__}, which has no possible_agents")
    turns = hasattr(made, "agent_iter")
    if turns == (interface == AEC):
        return made
    from pettingzoo.utils import conversions

    return conversions.parallel_to_aec(made) if interface == AEC else conversions.aec_to_parallel(made)


class _Agents:
    """The common part of both interfaces."""

    vector = False

    def __init__(self, env: Any) -> None:
        self.env = env
        odd = [agent for agent in env.possible_agents if type(agent) is not str]
        if odd:
            raise TypeError(f"the agent {odd[0]!r} has no name: agents are strings")

    def call(self, what: str, arguments: list[Any]) -> Any:
        method = getattr(self, f"_{what}", None)
        if method is None:
            raise AttributeError(f"there is nothing named {what!r} to ask an environment for")
        return method(*arguments)

    def layers(self) -> list[Any]:
        found: list[Any] = [self.env]
        while "env" in getattr(found[-1], "__dict__", {}) and found[-1].__dict__["env"] not in found:
            found.append(found[-1].__dict__["env"])
        return found

    def close(self) -> None:
        self.env.close()

    def _describe(self) -> dict[str, Any]:
        env, agents = self.env, list(self.env.possible_agents)
        try:
            state = spec_of(env.state_space)
        except (AttributeError, NotImplementedError):
            state = None  # few have one
        return {"possible_agents": agents, "state_space": state,
                "observation_spaces": [spec_of(env.observation_space(agent)) for agent in agents],
                "action_spaces": [spec_of(env.action_space(agent)) for agent in agents],
                "metadata": metadata_of(env.metadata), "render_mode": getattr(env, "render_mode", None)}  # fmt: skip

    def _get(self, name: str) -> Any:
        return getattr(self.env, name)

    def _set(self, name: str, value: Any) -> None:
        setattr(self.env, name, value)

    def _call(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        return getattr(self.env, name)(*arguments, **keywords)

    def _render(self) -> Any:
        return self.env.render()


class Parallel(_Agents):
    """All agents act at once."""

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        observations, infos = self.env.reset(seed=seed, options=options)
        return {"agents": list(self.env.agents), "observations": observations}, infos

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        observations, rewards, terminations, truncations, infos = self.env.step(action)
        found = {"agents": list(self.env.agents), "observations": observations, "rewards": rewards,
                 "terminations": terminations, "truncations": truncations}  # fmt: skip
        return found, 0.0, False, False, infos


class Aec(_Agents):
    """One agent acts after the other: AEC."""

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        self.env.reset(seed=seed, options=options)
        return self._state()

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        self.env.step(action)
        found, infos = self._state()
        return found, 0.0, False, False, infos

    def _state(self) -> tuple[dict[str, Any], Any]:
        env, agents = self.env, list(self.env.agents)
        selected = env.agent_selection if agents else None
        found = {"agents": agents, "selection": selected,
                 "observation": None if selected is None else env.observe(selected),
                 "cumulative": dict(env._cumulative_rewards)}  # fmt: skip
        found.update({name: dict(getattr(env, name)) for name in _BY_AGENT})
        return found, dict(env.infos)
