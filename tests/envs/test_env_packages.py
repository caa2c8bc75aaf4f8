"""Environments of other distributions: `packages=`, a folder's requirements.txt, and `rock env add --packages`.

minigrid is installed from the package index once and kept in ROCK_TEST_CACHE; larger packages with ROCK_TEST_PACKAGES=1
(`make env-packages`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

import numpy as np
from tests.conftest import RunningServer

import rock
from rock import errors
from rock.envhub.packages import GYM, image_of, requirements_of, with_packages
from rock.gym import SandboxEnv
from rock.images.registry.reference import parse

WANTED = "ROCK_TEST_PACKAGES"
GRID = "MiniGrid-Empty-5x5-v0"
pytestmark = pytest.mark.timeout(1200)  # the first run installs the packages
large = pytest.mark.skipif(
    not os.environ.get(WANTED), reason=f"installs large packages: `make env-packages`, or {WANTED}=1"
)


@pytest.fixture(autouse=True)
def address(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    yield env_server.url


def played(env: Any, steps: int = 5) -> Any:
    """The last observation of a few random steps, each inside its space."""
    with env:
        env.action_space.seed(1)
        observation, _ = env.reset(seed=1)
        for _ in range(steps):
            observation, reward, *_ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation) and np.isfinite(reward)
        return observation


@pytest.mark.parametrize(
    "packages",
    [["minigrid"], ["ale-py>=0.11,<1"], ["Pillow [xmp] == 11.0", "numpy"], ['mujoco>=3 ; python_version < "4"'],
     [f"package-{number}>=1.{number}" for number in range(32)]],
)  # fmt: skip
def test_every_set_has_a_valid_image_name(packages: list[str]) -> None:
    image = image_of(with_packages(GYM, packages))
    assert parse(image).familiar == f"{image}:latest"
    found = requirements_of(f"{image}:latest") or ()
    assert {one.replace(" ", "") for one in packages} == {one.replace(" ", "") for one in found[1:]}


@pytest.mark.parametrize(
    "package", ["--index-url=x", "https://a/b.whl", "./x", "a @ file:///x", "x; import os", "x;$(id)"]
)
def test_only_names_and_versions_are_packages(package: str) -> None:
    with pytest.raises(errors.InvalidConfig, match="not a package name"):
        with_packages(GYM, [package])


@pytest.mark.parametrize("image", ["with-gym-!", "with-gym-aaaaaaaa", "with-none-mfwgk", "with-gym-"])
def test_a_name_that_encodes_no_requirements(image: str) -> None:
    with pytest.raises(errors.InvalidConfig, match="no environment image"):
        requirements_of(image_of(image))


def test_packages_of_an_environment() -> None:
    assert played(SandboxEnv(GRID, packages=["minigrid"], imports=["minigrid"]))["image"].shape == (7, 7, 3)
    with SandboxEnv(GRID, packages=["minigrid"], imports=["minigrid"], exclusive=True) as env:
        assert env.reset(seed=3)[0]["mission"]


def test_requirements_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("# what the grid needs\nminigrid  # from the index\n")
    (tmp_path / "env.py").write_text(
        f"import gymnasium, minigrid\n\ndef make_env(**kwargs):\n    return gymnasium.make({GRID!r}, **kwargs)\n"
    )
    assert played(SandboxEnv(str(tmp_path), trust_remote_code=True))["image"].shape == (7, 7, 3)


def test_a_registered_name_with_packages(address: str) -> None:
    def command(*words: str) -> str:
        return subprocess.run([sys.executable, "-m", "rock.cli.main", "env", *words], check=True, capture_output=True,
                              text=True, env={**os.environ, "ROCK_BASE_URL": address}, timeout=1000).stdout  # fmt: skip

    assert "with/Grid@1" in command("add", "with/Grid", GRID, "--packages", "minigrid", "--imports", "minigrid")
    assert "sha256:" in command("build", "with/Grid")
    assert "minigrid" in command("show", "with/Grid")
    assert played(SandboxEnv("with/Grid"))["image"].shape == (7, 7, 3)
    with rock.make("with/Grid") as env:
        assert env.reset(seed=1)[1] == {}


@large
@pytest.mark.parametrize(
    ("env_id", "packages", "imports"),
    [("ALE/Pong-v5", ["ale-py>=0.11"], ["ale_py"]), ("HalfCheetah-v5", ["gymnasium[mujoco]"], [])],
)
def test_large_packages(env_id: str, packages: list[str], imports: list[str]) -> None:
    played(SandboxEnv(env_id, packages=packages, imports=imports))


@large
def test_pettingzoo(tmp_path: Path) -> None:
    """One agent's side of a game of several agents, as a folder's make_env has it."""
    (tmp_path / "requirements.txt").write_text("pettingzoo\n")
    (tmp_path / "env.py").write_text(PETTINGZOO)
    with SandboxEnv(str(tmp_path), trust_remote_code=True) as env:
        observation, info = env.reset(seed=1)
        assert observation.shape == (3, 3, 2) and info["agent"] == "player_1"


PETTINGZOO = '''
import gymnasium
import numpy as np
from pettingzoo.classic import tictactoe_v3


class Side(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (3, 3, 2), np.int8)
    action_space = gymnasium.spaces.Discrete(9)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.game = tictactoe_v3.env()
        self.game.reset(seed=seed)
        return self.game.last()[0]["observation"], {"agent": self.game.agent_selection}

    def step(self, action):
        self.game.step(action)
        observation, reward, terminated, truncated, _ = self.game.last()
        return observation["observation"], reward, terminated, truncated, {"agent": self.game.agent_selection}


def make_env():
    return Side()
'''
