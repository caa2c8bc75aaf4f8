"""Environments, under ROCK's path: the same names as in `rock.envs`, and blocking as there."""

from rock.envs.gem import RockEnv, make

__all__ = ["RockEnv", "make"]
