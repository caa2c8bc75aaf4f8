"""`RockEnv`, under ROCK's path."""

from rock.envs.gem import RockEnv

__all__ = ["RockEnv"]
