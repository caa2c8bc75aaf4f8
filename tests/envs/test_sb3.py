"""stable-baselines3 learns with environments in sandboxes."""

from __future__ import annotations

import warnings

import pytest

WHY = "stable-baselines3 is not installed here; `make gym-extras` installs it and runs this"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    stable_baselines3 = pytest.importorskip("stable_baselines3", reason=WHY)

# ruff: noqa: E402
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tests.conftest import RunningServer

from rock.gym import SandboxEnv

pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes


def test_its_own_check(env_server: RunningServer) -> None:
    with SandboxEnv("CartPole-v1", base_url=env_server.url) as env:
        check_env(env)


def test_a_short_run_of_ppo(env_server: RunningServer) -> None:
    """Better than chance, which balances the pole for some 22 steps."""
    envs = DummyVecEnv([lambda: Monitor(SandboxEnv("CartPole-v1", base_url=env_server.url)) for _ in range(4)])
    torch.set_num_threads(1)  # more of them wait for each other in so small a network
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=10, learning_rate=2e-3, seed=1, device="cpu")
    model.learn(6_000)
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert sum(lengths[-20:]) / 20 > 44, lengths
    envs.close()
