"""`RockEnv`, under ROCK's path."""

from rock.envs import RockEnv

__all__ = ["RockEnv"]
