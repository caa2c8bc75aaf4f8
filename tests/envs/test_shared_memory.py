"""Large answers by shared memory: the same as by the pipes and at home, and nothing is left when they end."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from at_home import WORLDS, alike, worlds
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tests.conftest import RunningServer

from rock import errors
from rock.envs.client import EnvironmentHandle
from rock.guest.environments.frames import STEP
from rock.gym import SandboxEnv, SandboxVectorEnv
from rock.gym.source import INSIDE

PART = 16 << 20
pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes


@pytest.fixture
def url(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    return env_server.url


@pytest.fixture(params=["memory", "pipes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ROCK_ENV_SHARED", "1" if request.param == "memory" else "0")
    yield request.param


def memory_of(env: Any) -> Any:
    return env._player.link.ways[env._player.number]._memory


def there(**kwargs: Any) -> SandboxEnv:
    return SandboxEnv(str(WORLDS), trust_remote_code=True, **kwargs)


def another(env: SandboxEnv) -> EnvironmentHandle:
    """An environment in the sandbox of this one."""
    spec = {"env_id": "worlds", "protocol": "gym", "kwargs": {"world": "Large"}, "folder": INSIDE, "root": INSIDE}
    return EnvironmentHandle(env._player.link, env._player.link.make(spec, 60))


@pytest.mark.parametrize("kind", ["picture", "large"])
def test_the_same_as_at_home(url: str, way: str, kind: str) -> None:
    home = worlds().World(kind, length=40)
    with there(world="World", kind=kind, length=40) as env:
        assert (memory_of(env) is not None) == (way == "memory")
        alike(env.reset(seed=3), home.reset(seed=3))
        kept = [env.step(0) for _ in range(20)]  # what was given away does not change when more comes
        for found in kept:
            alike(found, home.step(0))
        first = kept[0][0]["near"] if kind == "large" else kept[0][0]
        first[:] = 0
        alike(env.step(0), home.step(0))
        assert env._player.link.ways


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vectors_are_the_same_as_at_home(url: str, mode: AutoresetMode) -> None:
    home = SyncVectorEnv([lambda: worlds().World("large", length=3)] * 3, autoreset_mode=mode)
    env = SandboxVectorEnv(str(WORLDS), 3, trust_remote_code=True, kind="large", length=3, autoreset_mode=mode)
    try:
        assert memory_of(env) is not None
        alike(env.reset(seed=5), home.reset(seed=5))
        for count in range(7):
            alike(env.step(np.zeros(3, np.int64)), home.step(np.zeros(3, np.int64)))
            if mode is AutoresetMode.DISABLED and count % 3 == 2:
                mask = np.array([True, False, True])
                alike(env.reset(options={"reset_mask": mask}), home.reset(options={"reset_mask": mask.copy()}))
                env.reset(seed=count)
                home.reset(seed=count)
    finally:
        env.close()
        home.close()


def test_any_size(url: str) -> None:
    """Of less than 16 KiB, or more than its part of the memory holds, it comes by the pipe."""
    with there(world="Large") as env:
        env.reset()
        seen = memory_of(env)[:50]
        for size in (1, 4095, 16_000, 16 << 10, 70_000, PART - 200, PART - 40, PART, PART + 1, 18 << 20, 20_000):
            alike(env.step(size)[0], np.arange(size, dtype=np.uint8))
            before, seen = seen, memory_of(env)[:50]
            assert (seen != before) == (16 << 10 <= size < PART - 100), size
        assert env._player.link.ways


def test_over_the_server(url: str) -> None:
    """The rocklet reads the memory then. A second response of an environment does not replace one that is not read."""
    home = worlds().World("picture", length=40)
    with there(world="World", kind="picture", length=40) as env, there(world="Large") as sizes:
        alike(env.reset(seed=3), home.reset(seed=3))
        sizes.reset()
        for one in (env, sizes):
            one._player.link.ways[one._player.number].close()
        alike(env.step(0), home.step(0))
        player = env._player
        for found in player.link.ask_all([player._ask(STEP, 0, player.index + n) for n in range(4)]):
            alike(player.was_stepped(found), home.step(0))
        for size in (1, 16_000, 70_000, 1 << 20, PART - 40, PART + 1, 20_000):
            alike(sizes.step(size)[0], np.arange(size, dtype=np.uint8))
        assert not player.link.ways and not sizes._player.link.ways


# ---- what is not trusted


def test_what_changes_while_it_is_read(url: str) -> None:
    """It is copied out before anything looks at it: a value, or bytes that are none, and nothing between."""
    with there(world="Large") as env:
        env.reset()
        env.call("storm")
        values = refused = 0
        end = time.monotonic() + 2
        while time.monotonic() < end or not values + refused:
            try:
                found = env.step(100_000)[0]
                values += 1
                assert not isinstance(found, np.ndarray) or (found == found).all()
            except errors.ServerError as error:
                refused += 1
                assert "malformed" in str(error)
        assert env._player.link.ways and refused


@pytest.mark.parametrize("how", ["half a head", "half a frame", "no bytes"])
def test_it_dies_within_an_answer(url: str, how: str) -> None:
    with there(world="Large") as env:
        env.reset()
        with pytest.raises(errors.EnvironmentEnded):
            env.step(how)
        with pytest.raises(errors.RockError):
            env.step(0)


@pytest.mark.parametrize("how", ["a byte now and then", "answers to something else"])
def test_an_answer_that_never_ends(url: str, how: str) -> None:
    with there(world="Large", step_timeout=3) as env:
        env.reset()
        with pytest.raises(errors.CommandTimeout):
            env.step(how)


def test_nobody_can_change_its_size(url: str) -> None:
    with there(world="Large") as env:
        env.reset()
        assert env.call("resized") == ["EPERM"] * 4
        alike(env.step(50_000)[0], np.arange(50_000, dtype=np.uint8))


# ---- what is left


def held() -> tuple[int, int]:
    """Descriptors of this process, and its mappings of files in memory."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum("/memfd:" in line for line in lines)


def test_nothing_is_left_in_the_client(url: str) -> None:
    with there(world="Large") as env:
        env.reset()
    before = held()
    for number in range(4):
        env = there(world="Large")
        env.reset()
        env.step(50_000)
        assert held()[1] == before[1] + 1
        if number % 2:
            with pytest.raises(errors.EnvironmentEnded):
                env.step("half a frame")
        else:
            env._player.link.ways[env._player.number]._door.send(b"garbage")  # they are taken back
            with pytest.raises(errors.RockError):
                for _ in range(400):  # until the server has seen it
                    env.step(1)
                    time.sleep(0.05)
        env.close()
    assert held() == before


def test_what_an_environment_wrote_is_given_back(url: str) -> None:
    with there(world="Large") as env:
        other = another(env)
        env.reset()
        env.step(10 << 20)
        before = other.call("call", "blocks", [], {})
        assert before > 10 << 20
        with pytest.raises(errors.EnvironmentEnded):
            env.step("no bytes")
        assert other.call("call", "blocks", [], {}) < before - (9 << 20)
        env._player.link.close_env(other.number)
