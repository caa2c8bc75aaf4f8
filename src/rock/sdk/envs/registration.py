"""`make`, under ROCK's path."""

from rock.envs.gem import make

__all__ = ["make"]
