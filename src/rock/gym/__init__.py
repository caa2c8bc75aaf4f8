"""Environments of Gymnasium in sandboxes: `gymnasium.Env` and `gymnasium.vector.VectorEnv`.

    env = rock.gym.SandboxEnv("CartPole-v1")
    envs = rock.gym.SandboxVectorEnv("CartPole-v1", 8)

Requires the extra: pip install "rock-sandbox[gym]".
"""

from __future__ import annotations

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError(f"rock.gym needs gymnasium ({error}): pip install 'rock-sandbox[gym]'") from error

from rock.gym.env import SandboxEnv, make_async, remake
from rock.gym.serving import EnvServer, RemoteEnv, RemoteVectorEnv
from rock.gym.vector import SandboxVectorEnv

__all__ = ["EnvServer", "RemoteEnv", "RemoteVectorEnv", "SandboxEnv", "SandboxVectorEnv", "make_async", "remake"]
