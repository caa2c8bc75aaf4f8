"""Environments of a ROCK server, blocking: `make`, `reset`, `step`, `close`, as in GEM.

The names are those of the modules here, imported on first use, so that `import rock.envs` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rock.envs.aio import AsyncEnv, make_async
    from rock.envs.gem import RockEnv, list_envs, make

__all__ = ["AsyncEnv", "RockEnv", "list_envs", "make", "make_async"]

_AIO = ("AsyncEnv", "make_async")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("rock.envs.aio" if name in _AIO else "rock.envs.gem"), name)
