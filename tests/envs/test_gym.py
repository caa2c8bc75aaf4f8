"""Environments of Gymnasium in sandboxes, against the same ones in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from at_home import WORLDS, alike, worlds
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tests.conftest import RunningServer

from rock import errors
from rock.gym import SandboxEnv, SandboxVectorEnv

Make = Callable[..., SandboxEnv]
pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes


@pytest.fixture(scope="module", autouse=True, params=["pipes", "http"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How environments are played: by their own pipes, or through the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROCK_ENV_PIPES", "1" if request.param == "pipes" else "0")
        yield request.param


def test_the_way_is_taken(make: Make, way: str) -> None:
    assert bool(make("CartPole-v1")._player.link.ways) == (way == "pipes")


@pytest.fixture
def make(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """SandboxEnv, closed after the test."""
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    made: list[SandboxEnv] = []

    def new(source: str, **options: Any) -> SandboxEnv:
        made.append(SandboxEnv(source, **options))
        return made[-1]

    yield new
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def bad(env_server: RunningServer, way: str) -> Iterator[SandboxEnv]:
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="Bad", base_url=env_server.url) as env:
        yield env


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [("CartPole-v1", {}), ("FrozenLake-v1", {"is_slippery": True}), ("gym://Taxi-v4", {}), ("Blackjack-v1", {}),
     ("Pendulum-v1", {}), ("Acrobot-v1", {})],
)  # fmt: skip
def test_the_same_as_at_home(make: Make, env_id: str, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = gymnasium.make(env_id.removeprefix("gym://"), **kwargs)
    there = make(env_id, **kwargs)
    assert isinstance(there, gymnasium.Env)
    assert there.observation_space == home.observation_space and there.action_space == home.action_space
    assert there.metadata == home.metadata and there.spec is not None and there.spec.id == home.spec.id  # type: ignore[union-attr]
    for seed in (0, 7):
        alike(there.reset(seed=seed), home.reset(seed=seed))
        home.action_space.seed(seed)
        for _ in range(60):
            action = home.action_space.sample()
            found = there.step(action)
            alike(found, home.step(action))
            if found[2] or found[3]:
                alike(there.reset(), home.reset())
    home.close()


@pytest.mark.parametrize("kind", list(worlds().KINDS))
def test_every_kind_of_space(make: Make, kind: str) -> None:
    home = worlds().World(kind)
    there = make(str(WORLDS), trust_remote_code=True, kind=kind)
    assert there.observation_space == home.observation_space and there.action_space == home.action_space
    alike(there.reset(seed=4, options={"a": (1, None)}), home.reset(seed=4, options={"a": (1, None)}))
    there.action_space.seed(1)
    for _ in range(2):
        action = there.action_space.sample()
        found = there.step(action)
        assert there.observation_space.contains(found[0])
        alike(found, home.step(action))
        assert there.call("same", action)


def test_gymnasium_s_own_check(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of CartPole itself
        check_env(make("CartPole-v1", render_mode="rgb_array"))


def test_what_else_an_environment_has(make: Make) -> None:
    env = make(str(WORLDS), trust_remote_code=True, render_mode="rgb_array")
    env.reset(seed=1)
    env.step(0)
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.shape == (4, 5, 3) and (frame == 1).all()
    assert env.call("add", 2, right=np.int64(5)) == 7
    assert env.get_attr("length") == 3 == env.get_wrapper_attr("length")
    env.set_attr("length", 9)
    assert env.get_attr("length") == 9
    assert env.has_wrapper_attr("count") and not env.has_wrapper_attr("nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        env.get_wrapper_attr("nonsense")
    recorded = gymnasium.wrappers.RecordEpisodeStatistics(env)
    recorded.reset()
    results = [recorded.step(1) for _ in range(9)]
    assert results[-1][4]["episode"]["l"] == 9
    env.close()
    env.close()
    with pytest.raises(errors.Conflict, match="closed"):
        env.step(0)


def test_a_step_is_done_once_and_in_turn(make: Make) -> None:
    env = make("CartPole-v1")
    env.reset(seed=1)
    player = env._player
    first = env.step(1)
    player.index = 0
    alike(env.step(0), first)  # the same number again: the same answer, whatever the action
    assert player.index == 1
    second = env.step(1)
    assert (second[0] != first[0]).any()
    player.index = 7
    with pytest.raises(errors.Conflict, match="step 7 was asked for, and step 2"):
        env.step(1)
    assert player.index == 2
    env.step(1)


# ---- environments that misbehave


def test_an_exception_is_told_and_survived(bad: SandboxEnv) -> None:
    bad.reset(seed=1)
    with pytest.raises(errors.EnvironmentRaised, match="OddError: on purpose") as caught:
        bad.step("raise")
    assert caught.value.type == "OddError" and 'raise OddError("on purpose")' in caught.value.traceback
    with pytest.raises(errors.EnvironmentRaised, match="object"):
        bad.step("object")
    assert np.isnan(bad.step("go on")[1])


def test_nan_and_what_cannot_travel(bad: SandboxEnv) -> None:
    bad.reset(seed=1)
    observation, reward, _, _, info = bad.step("odd")
    assert observation.tobytes() == np.array([np.nan, -0.0], np.float32).tobytes() and np.isnan(reward)
    assert info["file"]["$type"] == "_io.TextIOWrapper" and info["fine"] == 1 and info[3] == "three"
    assert np.isnan(info["nan"]) and info["set"] == {1} and info["bytes"] == b"\xff"


def test_garbage_on_its_streams_is_harmless(bad: SandboxEnv) -> None:
    bad.reset(seed=1)
    bad.step("garbage")
    assert bad.step("fine")[4] == {}


def test_a_dead_environment_is_told(make: Make) -> None:
    env = make(str(WORLDS), trust_remote_code=True, world="Bad")
    env.reset()
    with pytest.raises(errors.EnvironmentEnded, match="exited with status 7: these are my last words") as caught:
        env.step("die")
    assert caught.value.details == {"stderr": "these are my last words\n", "exit": 7}
    with pytest.raises(errors.EnvironmentEnded):
        env.reset()


def test_one_that_hangs_is_killed(make: Make) -> None:
    env = make(str(WORLDS), trust_remote_code=True, world="Bad", step_timeout=1.0)
    env.reset()
    with pytest.raises(errors.CommandTimeout, match="step took longer than 1 s; it was killed"):
        env.step("hang")
    with pytest.raises(errors.CommandTimeout):
        env.reset()


def test_garbage_in_every_pipe_costs_no_more_than_the_environment(make: Make) -> None:
    bad, good = (make(str(WORLDS), trust_remote_code=True, world="Bad") for _ in range(2))
    bad.reset()
    good.reset()
    with pytest.raises(errors.RockError):
        bad.step("every descriptor")
        bad.step("fine")
    assert good.step("fine")[4] == {}


def test_what_cannot_be_made(make: Make, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="CartPole"):
        make("CartPol-v1")
    with pytest.raises(errors.EnvironmentRaised, match="TypeError"):
        make("CartPole-v1", nonsense=1)
    with pytest.raises(errors.InvalidConfig, match="trust_remote_code"):
        make(str(WORLDS))
    with pytest.raises(errors.InvalidConfig, match=r"no env\.py"):
        make(str(tmp_path), trust_remote_code=True)
    with pytest.raises(errors.InvalidConfig, match="no known kind"):
        make("docker://x")
    with pytest.raises(errors.InvalidConfig, match="not a package name with versions"):
        make("CartPole-v1", packages=["--index-url=x"])
    with pytest.raises(errors.InvalidConfig, match="cannot be sent"):
        make("CartPole-v1").step(object())


# ---- vectors


def both(url: str, count: int, mode: AutoresetMode, kind: str = "dict") -> tuple[SandboxVectorEnv, SyncVectorEnv]:
    there = SandboxVectorEnv(str(WORLDS), count, kind=kind, trust_remote_code=True, autoreset_mode=mode, base_url=url)
    return there, SyncVectorEnv([lambda: worlds().World(kind)] * count, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("kind", ["dict", "picture", "tuple"])
def test_vectors_are_the_same_as_at_home(env_server: RunningServer, mode: AutoresetMode, kind: str) -> None:
    there, home = both(env_server.url, 3, mode, kind)
    assert isinstance(there, gymnasium.vector.VectorEnv) and there.num_envs == 3
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space", "metadata"):
        assert getattr(there, name) == getattr(home, name), name
    alike(there.reset(seed=5), home.reset(seed=5))
    there.action_space.seed(2)
    for number in range(8):
        action = there.action_space.sample()
        found = there.step(action)
        alike(found, home.step(action))
        ended = found[2] | found[3]
        if mode is AutoresetMode.SAME_STEP and ended.any():
            assert {"final_obs", "_final_obs", "final_info"} <= set(found[4])
        if mode is AutoresetMode.DISABLED and ended.any():
            mask = np.array([True, False, number > 4])
            options = {"reset_mask": mask}
            alike(there.reset(seed=[1, 2, 3], options=dict(options)), home.reset(seed=[1, 2, 3], options=dict(options)))
            home.reset(seed=number)
            there.reset(seed=number)
    there.close()


def test_what_else_a_vector_has(env_server: RunningServer) -> None:
    envs = SandboxVectorEnv("CartPole-v1", 2, base_url=env_server.url, render_mode="rgb_array")
    envs.reset(seed=[3, 4])
    assert envs.get_attr("gravity") == (9.8, 9.8)
    envs.set_attr("gravity", [1.0, 2.0])
    assert envs.get_attr("gravity") == (1.0, 2.0)
    assert len(envs.call("render")) == 2 and envs.render()[1].shape == (400, 600, 3)
    recorded = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    recorded.reset(seed=1)
    ended = [recorded.step(np.array([1, 1])) for _ in range(40)]
    assert any("episode" in info for *_, info in ended)
    with pytest.raises(errors.EnvironmentRaised):
        envs.step(np.array([5, 5]))
    envs.close()
    with pytest.raises(errors.InvalidConfig, match="autoreset mode"):
        SandboxVectorEnv("CartPole-v1", 2, autoreset_mode="whenever")


def test_other_ways_to_make_vectors(env_server: RunningServer) -> None:
    for mode in ("async", "vector_entry_point", None):
        envs = SandboxVectorEnv("CartPole-v1", 2, vectorization_mode=mode, base_url=env_server.url)
        observations, _ = envs.reset(seed=1)
        assert observations.shape == (2, 4)
        assert envs.step(np.array([0, 1]))[1].tolist() == [1.0, 1.0]
        envs.close()
