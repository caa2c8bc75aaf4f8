"""Environments of Gymnasium in sandboxes: a real `gymnasium.Env` and a real `gymnasium.vector.VectorEnv`.

    env = rock.gym.SandboxEnv("CartPole-v1")
    envs = rock.gym.SandboxVectorEnv("CartPole-v1", 8)

Needs the extra: pip install "rock-sandbox[gym]".
"""

from __future__ import annotations

from rock.gym.env import SandboxEnv, remake
from rock.gym.vector import SandboxVectorEnv

__all__ = ["SandboxEnv", "SandboxVectorEnv", "remake"]
