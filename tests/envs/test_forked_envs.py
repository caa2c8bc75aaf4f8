"""Forks of environments in sandboxes: games of GEM and environments of Gymnasium, by pipes and through the server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

import numpy as np
from at_home import alike
from tests.conftest import RunningServer, hosting

import rock
from rock import errors
from rock.guest.environments import values
from rock.gym import SandboxEnv, SandboxVectorEnv, make_async
from rock.sync import Client

pytestmark = pytest.mark.timeout(1200)
GUESS, SOKOBAN = "game:GuessTheNumber-v0-easy", "game:Sokoban-v0-easy"
MOVES = ["up", "down", "left", "right"]
THREADED = '''
import threading, time
import gymnasium
import numpy as np


class Threaded(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, safe):
        self.fork_safe = safe
        threading.Thread(target=time.sleep, args=(1000,), name="simulator", daemon=True).start()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(1), {}

    def step(self, action):
        return self.np_random.random(1), 1.0, False, False, {}


def make_env(safe):
    return Threaded(safe)
'''


@pytest.fixture(autouse=True, params=["pipes", "http"])
def way(request: pytest.FixtureRequest, env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    monkeypatch.setenv("ROCK_ENV_PIPES", "1" if request.param == "pipes" else "0")
    return str(request.param)


def digest(results: Any) -> str:
    """The hash of results, as they are sent."""
    return hashlib.sha256(b"".join(map(bytes, values.encode(results)))).hexdigest()


def play(env: Any, actions: list[Any]) -> str:
    return digest([list(env.step(action)) for action in actions])


def end(envs: list[Any]) -> None:
    for env in envs:
        env.close()


def test_games_of_gem(way: str) -> None:
    """16 children and their parent play the same 20 steps."""
    moves = [f"\\boxed{{{MOVES[i % 4]}}}" for i in range(20)]
    with rock.make(SOKOBAN) as env, rock.make(SOKOBAN) as alone:
        first = [env.reset(seed=5)[0], alone.reset(seed=5)[0]]
        before = play(env, moves[:6])
        assert first[0] == first[1] and before == play(alone, moves[:6])
        children = env.fork(16)
        assert all(type(child) is type(env) and child.sandbox_id == env.sandbox_id for child in children)
        assert len({env.env_number, *(child.env_number for child in children)}) == 17
        found = {play(child, moves) for child in children}
        assert found == {play(env, moves)} == {play(alone, moves)}
        assert digest([env.reset(seed=6)[0]]) == digest([children[0].reset(seed=6)[0]])
        end(children)
        assert env.reset(seed=1)[0]


def test_cartpole(way: str) -> None:
    actions = [i % 2 for i in range(20)]
    with SandboxEnv("CartPole-v1") as env, SandboxEnv("CartPole-v1") as alone:
        for each in (env, alone):
            each.reset(seed=5)
            play(each, actions[:5])
        children = env.fork(16)
        assert {play(child, actions) for child in children} == {play(env, actions)} == {play(alone, actions)}
        starts = {digest(list(each.reset())) for each in (env, *children)}  # unseeded: drawn from the same generator
        assert len(starts) == 1
        env.action_space.seed(3)
        (child,) = env.fork()
        drawn = [env.action_space.sample() for _ in range(30)]
        assert drawn == [child.action_space.sample() for _ in range(30)]
        end([*children, child])


def test_new_seeds(way: str) -> None:
    with SandboxEnv("CartPole-v1") as env:
        env.reset(seed=5)
        children = env.fork(4, reseed=True)
        play_on = [digest([list(each.step(0))]) for each in (env, *children)]
        assert len(set(play_on)) == 1  # the state is the same
        starts = [digest(list(each.reset())) for each in (env, *children)]
        assert len(set(starts)) == 5
        end(children)


def test_a_vector(way: str) -> None:
    actions = np.array([0, 1, 0])
    with contextlib.closing(SandboxVectorEnv("CartPole-v1", 3)) as env:
        env.reset(seed=5)
        env.step(actions)
        children = env.fork(2)
        results = [[each.step(actions) for _ in range(60)] for each in (env, *children)]  # episodes end and begin
        alike(results[0], results[1])
        alike(results[0], results[2])
        assert children[0].num_envs == 3
        end(children)
    with contextlib.closing(SandboxVectorEnv("CartPole-v1", 2, vectorization_mode="async")) as env:
        env.reset(seed=5)
        with pytest.raises(errors.Unsupported, match="has processes"):
            env.fork()
        env.step(np.array([0, 1]))


def test_a_child_that_ends_leaves_the_others(way: str) -> None:
    with rock.make(GUESS) as env:
        env.reset(seed=1)
        one, two = env.fork(2)
        one.close()
        with pytest.raises(errors.Conflict, match="closed"):
            one.step("\\boxed{1}")
        three = two.fork()[0]
        two.close()
        assert three.step("\\boxed{3}")[:4] == env.step("\\boxed{3}")[:4]
        three.close()
        with pytest.raises(errors.InvalidConfig, match="n=0"):
            env.fork(0)
        with pytest.raises(errors.InvalidConfig, match="n=101"):
            env.fork(101)
    with pytest.raises(errors.Conflict, match="closed"):
        env.fork()


def test_a_refusal_names_the_cause(way: str, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(THREADED)
    with SandboxEnv(str(tmp_path), trust_remote_code=True, safe=False) as env:
        env.reset(seed=1)
        with pytest.raises(errors.Unsupported, match=r"2 threads.*\(.+\)") as caught:
            env.fork(3)
        assert "fork_safe = True" in str(caught.value.hint)
        env.step(0)
    with SandboxEnv(str(tmp_path), trust_remote_code=True, safe=True) as env:
        env.reset(seed=1)
        children = env.fork(3)
        assert {play(child, [0] * 5) for child in children} == {play(env, [0] * 5)}
        end(children)


def test_a_sandbox_of_its_own_ends_with_the_last(way: str, env_server: RunningServer) -> None:
    def running() -> set[str]:
        with Client(env_server.url) as client:
            return {info.sandbox_id for info in client.list_sandboxes(states="running")}

    env = rock.make(GUESS, exclusive=True)
    env.reset(seed=1)
    (child,) = env.fork()
    env.close()
    assert child.step("\\boxed{3}") and child.sandbox_id in running()
    child.close()
    assert child.sandbox_id not in running()


def test_spawn_with_the_same_state_forks(way: str) -> None:
    """This works for environments without get_state and set_state too."""
    with rock.make(GUESS) as env:
        env.reset(seed=1)
        env.step("\\boxed{1}")
        with env.spawn(same_state=True) as child:
            assert child.sandbox_id == env.sandbox_id and child.get_attr("turn_count") == 1
            assert child.step("\\boxed{4}") == env.step("\\boxed{4}")
        with pytest.raises(errors.EnvironmentRaised, match="AttributeError"):
            env.spawn(same_state=True, max_turns=5)


def test_asyncio(way: str) -> None:
    async def main() -> None:
        async with await make_async("CartPole-v1") as env:
            await env.reset(seed=2)
            children = await env.fork(8)
            results = await asyncio.gather(*(each.step(1) for each in (env, *children)))
            assert len({digest(list(result)) for result in results}) == 1
            for child in children:
                await child.close()
        async with await rock.make_async(GUESS) as game:
            await game.reset(seed=2)
            (other,) = await game.fork()
            assert await other.step("\\boxed{3}") == await game.step("\\boxed{3}")
            fork = asyncio.ensure_future(game.fork(2))
            await asyncio.sleep(0)
            fork.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fork
            assert await game.step("\\boxed{4}")
            await other.close()

    asyncio.run(main())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, env_images: Path) -> Iterator[RunningServer]:
    """A server that a test may kill, with short leases."""
    with hosting(tmp_path_factory.mktemp("forks"), env_images, ROCK_ENV_LEASE="3") as running:
        yield running


def test_a_killed_server(way: str, killed: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are found again, with their leases."""
    monkeypatch.setenv("ROCK_BASE_URL", killed.url)
    moves = [f"\\boxed{{{MOVES[i % 4]}}}" for i in range(8)]
    with rock.make(SOKOBAN) as env:
        env.reset(seed=5)
        play(env, moves[:2])
        children = env.fork(3)
        port = int(killed.url.rpartition(":")[2])
        killed.kill()
        killed.start(port)
        assert {play(child, moves) for child in children} == {play(env, moves)}
        more = children[0].fork(2)
        time.sleep(4)  # longer than a lease, which this process renews
        assert {play(child, moves) for child in children} == {play(env, moves)}
        end([*children, *more])


def test_leases(way: str, killed: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children without renewals are released, and their parent too."""
    monkeypatch.setenv("ROCK_BASE_URL", killed.url)
    monkeypatch.setenv("ROCK_ENV_PIPES", "0")
    with rock.make(GUESS) as env:
        env.reset(seed=1)
        (child,) = env.fork()
        link, numbers = env.player.link, (env.env_number, child.env_number)
        owner = rock.envs.client.LEASES.owner
        release: Callable[..., Any] = link.transport.json
        answer = release("DELETE", f"/v1/sandboxes/{env.sandbox_id}/envs/owners/{owner}")
        assert answer["environments"] == 2, numbers
        with pytest.raises(errors.NotFound):
            child.step("\\boxed{1}")
