"""Environments with tensors of torch, against those with arrays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; `make gym-extras` installs it and runs this")
gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from tests.conftest import RunningServer

import rock.gym
import rock.gym.torch
from rock import errors

WORLDS = str(Path(__file__).parent / "worlds")
pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes


@pytest.fixture(autouse=True)
def server_of_environments(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)


def test_one_environment() -> None:
    with rock.gym.torch.SandboxEnv("CartPole-v1") as there, rock.gym.SandboxEnv("CartPole-v1") as home:
        assert isinstance(there, gymnasium.Env) and there.action_space == home.action_space
        observation, info = there.reset(seed=3)
        assert observation.dtype is torch.float32 and observation.device.type == "cpu" and info == {}
        assert observation.tolist() == home.reset(seed=3)[0].tolist()
        for action in (torch.tensor(1), torch.tensor(0, dtype=torch.int32), np.int64(1), 0):
            found, other = there.step(action), home.step(int(action))
            assert found[0].tolist() == other[0].tolist()
            assert [part.dtype for part in found[1:4]] == [torch.float32, torch.bool, torch.bool]
            assert all(part.shape == () for part in found[1:4]) and found[1].item() == 1.0
        again = gymnasium.make(there.spec)
        assert isinstance(again.unwrapped, rock.gym.torch.SandboxEnv) and isinstance(again.reset()[0], torch.Tensor)
        again.close()


def test_every_kind_of_value() -> None:
    for kind in ("picture", "discrete", "binary", "many", "text", "dict", "tuple", "sequence", "graph"):
        with rock.gym.torch.SandboxEnv(WORLDS, trust_remote_code=True, kind=kind) as there:
            there.action_space.seed(1)
            first, _ = there.reset(seed=4)
            action = there.action_space.sample()
            found = there.step(rock.gym.torch.to_torch(action))[0]
            assert there.observation_space.contains(rock.gym.torch.to_numpy(found)), kind
            assert there.call("same", action), kind
            if kind == "picture":
                assert first.dtype is torch.uint8 and tuple(first.shape) == (210, 160, 3)
            if kind == "dict":
                assert first["z"].dtype is torch.float64 and isinstance(first["a"]["x"], torch.Tensor)


def test_memory_is_shared() -> None:
    array = np.arange(6.0).reshape(2, 3)
    tensor = rock.gym.torch.to_torch({"x": (array,)})["x"][0]
    array[1, 2] = 7
    assert tensor[1, 2] == 7 and rock.gym.torch.to_numpy(tensor).ctypes.data == array.ctypes.data
    array.flags.writeable = False
    assert rock.gym.torch.to_torch(array).data_ptr() != array.ctypes.data


def test_vectors() -> None:
    there = rock.gym.torch.SandboxVectorEnv("CartPole-v1", 3, autoreset_mode="SameStep")
    home = rock.gym.SandboxVectorEnv("CartPole-v1", 3, autoreset_mode="SameStep")
    assert isinstance(there, gymnasium.vector.VectorEnv)
    assert there.reset(seed=1)[0].tolist() == home.reset(seed=1)[0].tolist()
    ends = 0
    for _ in range(15):
        found = there.step(torch.ones(3, dtype=torch.int64))
        other = home.step(np.ones(3, np.int64))
        assert [part.dtype for part in found[:4]] == [torch.float32, torch.float32, torch.bool, torch.bool]
        assert [part.tolist() for part in found[:4]] == [part.tolist() for part in other[:4]]
        for number in range(3) if "final_obs" in found[4] else ():
            final = found[4]["final_obs"][number]
            ends += final is not None
            assert (final is None) == (not found[2][number])
            assert final is None or final.tolist() == other[4]["final_obs"][number].tolist()
    assert ends
    there.close()
    home.close()
    there = rock.gym.torch.SandboxVectorEnv("CartPole-v1", 2, autoreset_mode="Disabled")
    there.reset(seed=1)
    there.reset(options={"reset_mask": torch.tensor([True, False])})
    there.close()


def test_devices() -> None:
    with rock.gym.torch.SandboxEnv("CartPole-v1", device="meta") as env:
        assert env.reset()[0].device.type == "meta"
    missing = [] if torch.cuda.is_available() else ["cuda"]
    for name in (*missing, "nonsense", "cpu:x"):
        with pytest.raises(errors.InvalidConfig, match="device="):
            rock.gym.torch.SandboxEnv("CartPole-v1", device=name)


def test_torch_is_imported_by_those_who_want_it() -> None:
    import subprocess

    code = "import sys, rock.gym; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
