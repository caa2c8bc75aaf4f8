"""Environments for asyncio: the same answers as the blocking ones, without holding up the event loop."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

import numpy as np
from tests.conftest import RunningServer

import rock
from rock import errors
from rock.gym import SandboxEnv, make_async

GUESS = "game:GuessTheNumber-v0-easy"
WORLDS = str(Path(__file__).parent / "worlds")
SLOW = '''
import time
import gymnasium
import numpy as np


class Slow(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (300_000,), np.uint8)
    action_space = gymnasium.spaces.Discrete(100)

    def reset(self, seed=None, options=None):
        return np.zeros(300_000, np.uint8), {}

    def step(self, action):
        time.sleep(action / 10)
        return np.full(300_000, action, np.uint8), 1.0, False, False, {}


def make_env():
    return Slow()
'''
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True, params=["pipes", "http"])
def way(request: pytest.FixtureRequest, env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    monkeypatch.setenv("ROCK_ENV_PIPES", "1" if request.param == "pipes" else "0")
    return str(request.param)


def test_the_same_as_the_blocking_one() -> None:
    guesses = [f"\\boxed{{{guess}}}" for guess in (5, 3, 8)]

    async def main() -> list[Any]:
        async with await rock.make_async(GUESS) as env:
            seen: list[Any] = [await env.reset(seed=7)]
            seen += [await env.step(guess) for guess in guesses]
            assert env.env_id == GUESS and await env.get_attr("turn_count") == 3
            return seen

    found = asyncio.run(main())
    with rock.make(GUESS) as env:
        assert found == [env.reset(seed=7), *(env.step(guess) for guess in guesses)]


def test_many_tasks(way: str) -> None:
    async def play(number: int) -> int:
        env = await rock.make_async(GUESS)
        async with env:
            assert bool(env.player.link.ways) == (way == "pipes")
            await env.reset(seed=number)
            for guess in range(4):
                await env.step(f"\\boxed{{{guess}}}")
        return number

    async def main() -> list[int]:
        return await asyncio.gather(*(play(number) for number in range(24)))

    assert asyncio.run(main()) == list(range(24))


def test_a_slow_step_holds_up_nothing(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(SLOW)

    async def main() -> None:
        async with await make_async(str(tmp_path), trust_remote_code=True, step_timeout=2.0) as env:
            assert env.observation_space.shape == (300_000,)
            await env.reset()
            ticks = 0

            async def clock() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            ticking = asyncio.create_task(clock())
            observation = (await env.step(5))[0]  # half a second, and 300 kB
            assert ticks > 15 and (observation == 5).all() and observation.dtype == np.uint8
            first, second = await asyncio.gather(env.step(1), env.step(2))  # one after the other
            assert (first[0][0], second[0][0]) == (1, 2)
            began = time.monotonic()
            with pytest.raises(errors.CommandTimeout):
                await env.step(99)
            assert time.monotonic() - began < 8
            ticking.cancel()

    asyncio.run(main())


def test_a_step_that_is_cancelled(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(SLOW)

    async def main() -> None:
        async with await make_async(str(tmp_path), trust_remote_code=True) as env:
            await env.reset()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await env.step(4)
            observation = (await env.step(4))[0]  # the same number in the episode: it is done once
            assert (observation == 4).all()
            assert (await env.step(0))[0][0] == 0

    asyncio.run(main())


def test_errors_and_ends() -> None:
    async def main() -> None:
        with pytest.raises(errors.NotFound):
            await rock.make_async("game:Nothing")
        async with await make_async(WORLDS, trust_remote_code=True, world="Bad") as env:
            await env.reset(seed=1)
            with pytest.raises(errors.EnvironmentRaised):
                await env.step("raise")
            with pytest.raises(errors.EnvironmentEnded):
                await env.step("die")
        with pytest.raises(errors.Conflict, match="is closed"):
            await env.step("fine")

    asyncio.run(main())


def test_the_blocking_one_is_there() -> None:
    async def main() -> None:
        async with await make_async("CartPole-v1") as env:
            assert isinstance(env.env, SandboxEnv) and env.action_space.n == 2
            observation, _ = await env.reset(seed=1)
            assert env.observation_space.contains(observation)
            with pytest.raises(AttributeError):
                _ = env.nothing_of_the_kind

    asyncio.run(main())
