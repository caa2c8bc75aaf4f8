"""What SandboxEnv may be asked for, what it tells of itself, and Gymnasium's own wrappers and vectors around it."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from tests.conftest import RunningServer

from rock import errors
from rock.gym import SandboxEnv, SandboxVectorEnv
from rock.sync import Client, SandboxConfig

WORLDS = str(Path(__file__).parent / "worlds")
pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes

ENV = """
import gymnasium as gym
from shared.names import NAME

class Env(gym.Env):
    observation_space = gym.spaces.Discrete(10)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, config):
        self.config = config
        self.named = NAME

    def reset(self, *, seed=None, options=None):
        return 0, {}

    def step(self, action):
        return 0, 0.0, False, False, {}

def make_env(config=None):
    return Env(config)
"""


@pytest.fixture(autouse=True)
def server_of_environments(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    return env_server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout, with an environment in a folder of it that imports from its top."""
    for name, text in (("envs/one/env.py", ENV), ("shared/names.py", "NAME = 'shared'\n")):
        (tmp_path / "repo" / name).parent.mkdir(parents=True)
        (tmp_path / "repo" / name).write_text(text)
    return tmp_path / "repo"


# ---- arguments


def test_limits_one_by_one(env_server: RunningServer) -> None:
    with SandboxEnv("CartPole-v1", memory="1g", cpus=0.5, network="host") as env, Client(env_server.url) as client:
        info = client.get_sandbox(env.sandbox_id)
        assert (info.memory, info.cpus, info.network) == ("1g", 0.5, "host")
    config = SandboxConfig(memory="2g", cpus=0.5)
    with SandboxEnv("CartPole-v1", config=config, cpus=1) as env, Client(env_server.url) as client:
        info = client.get_sandbox(env.sandbox_id)
        assert (info.memory, info.cpus) == ("2g", 1.0) and config.cpus == 0.5
    for wrong in ({"memory": "much"}, {"cpus": -1}, {"network": "everywhere"}):
        with pytest.raises(errors.InvalidConfig, match=next(iter(wrong))):
            SandboxEnv("CartPole-v1", **wrong)  # type: ignore[arg-type]


def test_a_configuration_for_make_env(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"level": 3}))
    (tmp_path / "c.toml").write_text("level = 4\n")
    for config, found in (({"level": 2}, {"level": 2}), (tmp_path / "c.json", {"level": 3}),
                          (str(tmp_path / "c.toml"), {"level": 4}), (None, None)):  # fmt: skip
        with SandboxEnv(str(repository / "envs/one"), repo_root=repository, trust_remote_code=True, config=config,
                        memory="1g") as env:  # fmt: skip
            assert env.get_attr("config") == found
    (tmp_path / "list.json").write_text("[1]")
    for wrong in (tmp_path / "none.json", tmp_path / "list.json"):
        with pytest.raises(errors.InvalidConfig, match="config: "):
            SandboxEnv(WORLDS, trust_remote_code=True, config=wrong)


def test_a_repository_around_a_folder(repository: Path, tmp_path: Path) -> None:
    for source, more in ((repository / "envs/one", {"repo_root": repository}), (repository, {"cwd": "envs/one"})):
        with SandboxEnv(str(source), trust_remote_code=True, **more) as env:  # type: ignore[arg-type]
            assert env.get_attr("named") == "shared"
            assert env.sandbox.resolved_source == f"file://{source}"
    with pytest.raises(errors.InvalidConfig, match="is not below repo_root"):
        SandboxEnv(WORLDS, trust_remote_code=True, repo_root=repository)


def test_files_laid_over_a_source(repository: Path, tmp_path: Path) -> None:
    over = tmp_path / "over"
    (over / "shared").mkdir(parents=True)
    (over / "shared/names.py").write_text("NAME = 'a folder'\n")
    with SandboxEnv(str(repository), cwd="envs/one", trust_remote_code=True, override=over) as env:
        assert env.get_attr("named") == "a folder"
    (tmp_path / "env.py").write_text(ENV.replace("NAME", "'a file'").replace("import 'a file'", "import NAME"))
    more: dict[str, Any] = {"cwd": "envs/one", "trust_remote_code": True}
    with SandboxEnv(str(repository), override=tmp_path / "env.py", **more) as env:
        assert env.get_attr("named") == "a file"
    with pytest.raises(errors.InvalidConfig, match="there is no"):
        SandboxEnv(str(repository), override=tmp_path / "none", **more)


def test_capabilities() -> None:
    with SandboxEnv("CartPole-v1", capabilities=["render"], render_mode="rgb_array") as env:
        assert env.render_mode == "rgb_array"
    with pytest.raises(errors.Unsupported, match="CartPole-v1 has no render, vector"):
        SandboxEnv("CartPole-v1", capabilities=["render", "vector"])
    SandboxVectorEnv("CartPole-v1", 2, autoreset_mode="SameStep", capabilities=["vector", "same_step"]).close()
    with pytest.raises(errors.Unsupported, match=r"has no same_step .*it has next_step, vector"):
        SandboxVectorEnv("CartPole-v1", 2, capabilities=["same_step"])
    with pytest.raises(errors.InvalidConfig, match="no capability 'fly'"):
        SandboxEnv("CartPole-v1", capabilities=["fly"])


def test_what_is_refused() -> None:
    for name, value in (("num_envs", 2), ("vectorization_mode", "sync"), ("autoreset_mode", "SameStep")):
        with pytest.raises(TypeError, match=f"takes no {name}; SandboxVectorEnv does"):
            SandboxEnv("CartPole-v1", **{name: value})  # type: ignore[arg-type]
    more: list[tuple[dict[str, Any], str]] = [
        ({"cwd": "x"}, "cwd does not go"), ({"override": "x"}, "override does not go"),
        ({"repo_root": "x"}, "repo_root does not go"), ({"task": "x"}, "task chooses"),
        ({"packages": "x"}, "packages is a list"), ({"imports": "x"}, "imports is a list"),
        ({"base_image": "x", "packages": ["y"]}, "nothing is inst"),
    ]  # fmt: skip
    for wrong, told in more:
        with pytest.raises(errors.InvalidConfig, match=told):
            SandboxEnv("CartPole-v1", **wrong)
    for package in ("local", "dist/rlmesh-0.1.0-py3-none-any.whl"):
        with pytest.raises(errors.Unsupported, match="is no requirement"):
            SandboxEnv("CartPole-v1", rlmesh_package=package)
    with pytest.raises(errors.InvalidConfig, match="nothing is inst"):
        SandboxEnv("CartPole-v1", rlmesh_package="rlmesh==0.1.0", base_image="x")
    with pytest.raises(errors.Unsupported, match="nothing is built"):
        SandboxEnv("CartPole-v1", build_memory="20g")
    with SandboxEnv("CartPole-v1", build_memory="auto", packages=[], imports=None, trust_remote_code=True):
        pass


# ---- what it tells


def test_the_contract() -> None:
    with SandboxEnv("gym://CartPole-v1", render_mode="rgb_array") as env:
        contract = env.env_contract
        assert (contract.id, contract.render_mode, contract.num_envs) == ("CartPole-v1", "rgb_array", 1)
        assert contract.metadata["render_fps"] == 50
        assert contract.observation_space is env.observation_space_spec
        assert (env.observation_space_spec.kind, env.observation_space_spec.shape) == ("box", (4,))
        assert env.observation_space_spec.dtype == "float32"
        assert env.observation_space_spec.to_space() == env.observation_space
        assert env.action_space_spec.to_dict() == {
            "kind": "discrete",
            "shape": [],
            "dtype": "int64",
            "n": 2,
            "start": 0,
        }
        assert env.sandbox.requested_source == "gym://CartPole-v1" == env.sandbox.resolved_source
        assert env.sandbox.sandbox_id == env.sandbox_id and env.sandbox.address.startswith("http://127.0.0.1:")
        plain = json.loads(json.dumps(contract.to_dict()))
        assert plain["observation_space"]["high"][1] == float("inf") and plain["num_envs"] == 1
        with pytest.raises(FrozenInstanceError):
            contract.id = "x"  # type: ignore[misc]
        with pytest.raises(TypeError):
            contract.metadata["x"] = 1  # type: ignore[index]
    envs = SandboxVectorEnv(WORLDS, 3, kind="dict", trust_remote_code=True)
    assert envs.env_contract.num_envs == 3 and envs.env_contract.id == "UnknownEnv-v1"
    assert envs.observation_space_spec.kind == "dict"
    assert envs.observation_space_spec.to_space() == envs.single_observation_space
    assert envs.action_space_spec.to_dict()["spaces"][0][1]["kind"] == "Dict"
    envs.close()


# ---- Gymnasium's own around it


def test_wrappers() -> None:
    env = RecordEpisodeStatistics(TimeLimit(SandboxEnv("CartPole-v1"), 5))
    env.reset(seed=1)
    ended = [env.step(number % 2) for number in range(5)][-1]
    assert ended[3] and ended[4]["episode"]["l"] == 5 and ended[4]["episode"]["r"] == 5.0
    env.close()
    made = SandboxEnv("CartPole-v1")
    again = gymnasium.make(made.spec)
    assert isinstance(again.unwrapped, SandboxEnv) and again.reset(seed=1)[0].tolist() == made.reset(seed=1)[0].tolist()
    again.close()
    made.close()


@pytest.fixture(params=["pipes", "http"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ROCK_ENV_PIPES", "1" if request.param == "pipes" else "0")
    yield request.param


def played(envs: Any) -> list[Any]:
    """What a vector answers to some actions."""
    found: list[Any] = [envs.reset(seed=7)[0].copy()]
    for number in range(30):
        observation, reward, ended, cut, _ = envs.step(np.array([number % 2, 1, 0]))
        found += [observation.copy(), reward.copy(), ended.copy(), cut.copy()]
    return found


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_vectors_of_them(way: str, kind: Any) -> None:
    """AsyncVectorEnv forks, and each child makes an environment of its own."""
    home = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
    envs = kind([lambda: SandboxEnv("CartPole-v1")] * 3)
    for one, other in zip(played(envs), played(home), strict=True):
        np.testing.assert_array_equal(one, other)
    envs.close()
    home.close()


def test_a_fork_leaves_its_parent_s_environments_alone(way: str) -> None:
    kept = [SandboxEnv("CartPole-v1"), SandboxVectorEnv("CartPole-v1", 2)]
    [env.reset(seed=1) for env in kept]

    def child() -> None:
        kept.clear()  # the last references: finalizers run
        SandboxEnv("CartPole-v1").close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for env, action in zip(kept, (0, np.array([0, 1])), strict=True):
        env.step(action)
        env.close()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0, -1])
def test_a_time_limit_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(errors.InvalidConfig, match="step_timeout"):
        SandboxEnv("CartPole-v1", step_timeout=seconds)


def test_an_unknown_vectorization_mode_is_refused_before_start() -> None:
    with pytest.raises(errors.InvalidConfig, match="no vectorization mode 'threads'"):
        SandboxVectorEnv("CartPole-v1", 2, vectorization_mode="threads", base_url="http://127.0.0.1:9")


def test_a_timeout_is_a_timeout_error() -> None:
    error = errors.from_wire(errors.CommandTimeout("too slow", hint="wait").to_wire())
    assert isinstance(error, TimeoutError) and isinstance(error, errors.CommandTimeout)
    assert (str(error), error.message, error.status) == ("too slow (wait)", "too slow", 408)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.hint) == (str(error), "wait")
