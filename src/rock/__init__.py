"""ROCK: isolated environments for agentic reinforcement learning.

    env = rock.make("game:Sokoban-v0-easy")
    sandbox = rock.Sandbox(image="host")

The names below are imported on first use, so that `import rock` is fast. `rock.gym`, `rock.make_vec` and
`rock.register_gem` are available where numpy and Gymnasium or GEM are installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rock import gym as gym
    from rock.envs.aio import AsyncEnv, make_async
    from rock.envs.gem import RockEnv, list_envs, make
    from rock.envs.vector import make_vec as make_vec
    from rock.envs.vector import register_gem as register_gem
    from rock.errors import (
        BadRequestRockError,
        CommandRockError,
        InternalServerRockError,
        RockError,
        RockException,
        codes,
        raise_for_code,
    )
    from rock.sdk.sandbox import Sandbox, SandboxConfig, SandboxGroup, SandboxGroupConfig

__version__ = "0.1.0"

_HOMES = {
    "rock.envs.aio": ("AsyncEnv", "make_async"),
    "rock.envs.gem": ("RockEnv", "list_envs", "make"),
    "rock.envs.vector": ("make_vec", "register_gem"),
    "rock.errors": (
        "BadRequestRockError",
        "CommandRockError",
        "InternalServerRockError",
        "RockError",
        "RockException",
        "codes",
        "raise_for_code",
    ),
    "rock.sdk.sandbox": ("Sandbox", "SandboxConfig", "SandboxGroup", "SandboxGroupConfig"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncEnv",
    "BadRequestRockError",
    "CommandRockError",
    "InternalServerRockError",
    "RockEnv",
    "RockError",
    "RockException",
    "Sandbox",
    "SandboxConfig",
    "SandboxGroup",
    "SandboxGroupConfig",
    "codes",
    "list_envs",
    "make",
    "make_async",
    "raise_for_code",
]


def __getattr__(name: str) -> Any:
    if name == "gym":
        return import_module("rock.gym")
    if name not in _HOME:
        raise AttributeError(f"module 'rock' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
