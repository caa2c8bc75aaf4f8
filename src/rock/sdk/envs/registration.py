"""`make`, under ROCK's path."""

from rock.envs import make

__all__ = ["make"]
