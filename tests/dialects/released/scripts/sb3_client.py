"""`SandboxVecEnv` with stable-baselines3: the contract of a VecEnv beside a local DummyVecEnv, and learning."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import torch
from checks import check, raises
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from rock.errors import Conflict, InvalidConfig, Unsupported
from rock.integrations.stable_baselines3 import SandboxVecEnv

torch.set_num_threads(1)  # more of them wait for each other in so small a network
warnings.simplefilter("ignore")


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(np.array_equal(one, other))


def side_by_side(env_id: str, steps: int, **options: Any) -> int:
    """Compare with DummyVecEnv; returns the number of episodes that ended."""
    local = DummyVecEnv([lambda: gymnasium.make(env_id, **options) for _ in range(3)])
    remote = SandboxVecEnv(env_id, 3, **options)
    ended = 0
    try:
        assert remote.observation_space == local.observation_space and remote.action_space == local.action_space
        local.seed(7)
        remote.seed(7)
        assert equal(remote.reset(), local.reset())
        local.action_space.seed(1)
        for _ in range(steps):
            actions = np.array([local.action_space.sample() for _ in range(3)])
            wanted, found = local.step(actions), remote.step(actions)
            for one, other in zip(found[:3], wanted[:3], strict=True):
                assert equal(one, other) and getattr(one, "dtype", 0) == getattr(other, "dtype", 0), (one, other)
            for one, other in zip(found[3], wanted[3], strict=True):
                assert one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one), (one, other)
            ended += int(found[2].sum())
    finally:
        local.close()
        remote.close()
    return ended


with check("the same observations, rewards, ends and infos as DummyVecEnv: CartPole, discrete actions"):
    assert side_by_side("CartPole-v1", 120) > 3
with check("the same as DummyVecEnv: Pendulum, continuous actions, ends by truncation"):
    assert side_by_side("Pendulum-v1", 201) == 3
with check("observations that are tuples stay tuples"):
    envs = SandboxVecEnv("Blackjack-v1", 2)
    assert isinstance(envs.reset(), tuple)
    envs.close()
with check("PPO learns CartPole: longer episodes than chance, which balances for some 22 steps"):
    envs = VecMonitor(SandboxVecEnv("CartPole-v1", 4))
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=10, learning_rate=2e-3, seed=1, device="cpu")
    model.learn(6_000)
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert sum(lengths[-20:]) / 20 > 44, lengths
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=5)
    assert mean > 44, mean
    envs.close()
with check("DQN, with wrappers that change and stack observations"):
    envs = VecNormalize(VecFrameStack(SandboxVecEnv("CartPole-v1", 2), 4))
    DQN("MlpPolicy", envs, learning_starts=50, seed=1, device="cpu").learn(200)
    envs.close()
with check("make_vec_env is unchanged with single environments"):
    from rock.gym import SandboxEnv

    envs = make_vec_env(lambda: SandboxEnv("CartPole-v1"), n_envs=2)
    assert envs.reset().shape == (2, 4)
    envs.close()

vec = SandboxVecEnv("CartPole-v1", 3, render_mode="rgb_array")
with check("get_attr, set_attr and env_method with indices"):
    vec.reset()
    assert vec.get_attr("gravity") == [9.8] * 3
    vec.set_attr("gravity", 1.0, indices=[1])
    vec.set_attr("length", 0.25)
    assert vec.get_attr("gravity") == [9.8, 1.0, 9.8] and vec.get_attr("gravity", 1) == [1.0]
    assert vec.get_attr("length") == [0.25] * 3
    assert len(vec.env_method("reset", seed=3)) == 3 and len(vec.env_method("reset", seed=3, indices=[0, 2])) == 2
    assert not vec.has_attr("no_such_attribute")
    with raises(AttributeError, "no_such_method"):
        vec.env_method("no_such_method", indices=0)
    with raises((InvalidConfig, IndexError)):
        vec.env_method("reset", indices=[3])
with check("render: images of each, tiled"):
    assert len(vec.get_images()) == 3 and vec.render().shape[2] == 3 and vec.render_mode == "rgb_array"
with check("seeds and options are those of the next reset alone"):
    vec.seed(5)
    first = vec.reset()
    assert not equal(vec.reset(), first)
    vec.seed(5)
    assert equal(vec.reset(), first)
    vec.set_options({"low": -0.01, "high": 0.01})
    assert np.abs(vec.reset()).max() <= 0.01
    assert np.abs(vec.reset()).max() > 0.01
    vec.set_options([{"low": -0.01, "high": 0.01}, {}, {}])
    with raises(Unsupported, "options"):
        vec.reset()
    vec.set_options(None)
with check("a wait without a step is an error"), raises(Conflict, "step_async"):
    vec.reset()
    vec.step_wait()
with check("the observations may be changed"):
    observations = vec.reset()
    observations += 1
    assert vec.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
vec.close()
vec.close()
with check("another autoreset mode is rejected"), raises(Unsupported, "autoreset_mode"):
    SandboxVecEnv("CartPole-v1", 2, autoreset_mode="NextStep")
