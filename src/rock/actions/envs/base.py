"""The shape of an environment in ROCK: what its users annotate with."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Env(Protocol):
    """`rock.RockEnv` fits it."""

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...


__all__ = ["Env"]
