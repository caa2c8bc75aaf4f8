"""Environments that are no gymnasium.Env: objects with the same members, and the interface of gym before 0.26."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

import numpy as np
from tests.conftest import RunningServer

from rock import errors
from rock.gym import SandboxEnv, SandboxVectorEnv

ENVS = '''
import random

import gymnasium
import numpy as np
from gymnasium import spaces


class Duck:
    """Gymnasium's members, and nothing else: no metadata, render_mode, spec or close."""

    observation_space = spaces.Box(0, 10, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        self.count = seed or 0
        return np.array([self.count, 0], np.float32), {"seed": seed}

    def step(self, action):
        self.count += 1
        return np.array([self.count, action], np.float32), 1.0, self.count >= 3, False, {}


class Old:
    """gym before 0.26: reset() answers an observation alone, and step four values."""

    observation_space = spaces.Discrete(1000)
    action_space = spaces.Discrete(2)
    metadata = {"render.modes": ["rgb_array"]}

    def seed(self, seed):
        self.random = random.Random(seed)

    def reset(self):
        self.count = 0
        return self.random.randrange(1000)

    def step(self, action):
        self.count += 1
        done = self.count >= 2
        return self.random.randrange(1000), 1, done, {"TimeLimit.truncated": True} if done and action else {}

    def render(self, mode="human"):
        return np.full((2, 2, 3), 7, np.uint8)

    def close(self):
        self.closed = True


class Bare:
    observation_space = spaces.Discrete(1000)
    action_space = spaces.Discrete(2)

    def reset(self):
        return random.randrange(1000)

    def step(self, action):
        return random.randrange(1000), 0.0, False, {}


class Mixed(gymnasium.Env):
    """A gymnasium.Env whose step still answers four values."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        return 1

    def step(self, action):
        return 2, 0.5, True, {"TimeLimit.truncated": action == 1}


class Three(Mixed):
    def step(self, action):
        return 1, 2, 3


class NoSpaces:
    def reset(self): ...
    def step(self, action): ...


def make_env(kind="Duck"):
    return globals()[kind]()
'''

Make = Callable[..., Any]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def make(env_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    (tmp_path / "env.py").write_text(ENVS)
    made: list[Any] = []

    def new(kind: str, count: int = 0) -> Any:
        options: dict[str, Any] = {"trust_remote_code": True, "kind": kind}
        source = str(tmp_path)
        made.append(SandboxVectorEnv(source, count, **options) if count else SandboxEnv(source, **options))
        return made[-1]

    yield new
    for env in made:
        env.close()


def test_an_object_with_the_members_of_an_environment(make: Make) -> None:
    env = make("Duck")
    observation, info = env.reset(seed=1)
    assert (observation.tolist(), info) == ([1, 0], {"seed": 1})
    seen = [env.step(2)[1:4] for _ in range(2)]
    assert seen == [(1.0, False, False), (1.0, True, False)]
    assert env.render() is None and env.metadata == {} and env.spec is None
    assert env.get_attr("count") == 3
    env.set_attr("count", 9)
    assert env.step(0)[0].tolist() == [10, 0]


def test_the_older_interface(make: Make) -> None:
    env = make("Old")
    first, info = env.reset(seed=4)
    assert info == {} and env.reset(seed=4)[0] == first
    assert env.step(0)[1:] == (1.0, False, False, {})
    assert env.step(1)[2:] == (False, True, {"TimeLimit.truncated": True})
    env.reset(seed=5)
    env.step(0)
    assert env.step(0)[2:4] == (True, False)
    assert env.render().shape == (2, 2, 3)
    with pytest.raises(errors.EnvironmentRaised, match="takes no options"):
        env.reset(options={"x": 1})


def test_a_seed_without_a_way_to_give_it(make: Make) -> None:
    """It seeds the process's own random state, so an episode can be repeated all the same."""
    env = make("Bare")

    def episode() -> list[int]:
        return [env.reset(seed=8)[0], *(env.step(0)[0] for _ in range(5))]

    assert episode() == episode()


def test_an_env_of_gymnasium_with_older_answers(make: Make) -> None:
    env = make("Mixed")
    assert env.reset() == (1, {})
    assert env.step(0)[2:4] == (True, False)
    assert env.step(1)[2:4] == (False, True)


def test_vectors_of_them(make: Make) -> None:
    env = make("Old", 3)
    observations, _ = env.reset(seed=1)
    assert observations.shape == (3,) and len(set(observations.tolist())) > 1
    _, rewards, terminations, truncations, _ = env.step(np.array([0, 0, 0]))
    assert rewards.tolist() == [1.0] * 3 and not terminations.any() and not truncations.any()
    frame = env.render(env_index=1)
    assert frame is None or frame.shape == (2, 2, 3)
    with pytest.raises(errors.EnvironmentRaised, match="env_index=3 is out of range"):
        env.render(env_index=3)


def test_what_is_no_environment(make: Make) -> None:
    with pytest.raises(errors.EnvironmentRaised, match="it has no observation_space, action_space"):
        make("NoSpaces")
    env = make("Three")
    env.reset()
    with pytest.raises(errors.EnvironmentRaised, match="step returned a tuple of 3"):
        env.step(0)
