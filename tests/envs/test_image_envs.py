"""Environments that images have themselves, image://NAME: hosted by the image's own Python, with nothing installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from tests.conftest import RunningServer
from tests.leaks import Inventory

from rock import errors
from rock.gym import SandboxEnv, SandboxVectorEnv
from rock.images.store import ImageStore

pytestmark = pytest.mark.timeout(600)

ENV = """
import os, sys
import gymnasium as gym
import numpy as np

class Env(gym.Env):
    def __init__(self, start):
        self.observation_space = gym.spaces.Box(-1e9, 1e9, (1,), np.float64)
        self.action_space = gym.spaces.Discrete(3)
        self.start = self.state = start
        self.where = [sys.executable, os.getcwd(), gym.__file__]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.start
        return np.array([self.state]), {}

    def step(self, action):
        self.state += int(action)
        return np.array([self.state]), 1.0, self.state > 5, False, {}

def make_env(start=0.0):
    return Env(float(start))
"""


def copy(path: str | Path, root: Path, to: str | None = None) -> None:
    target = root / (to or str(path)).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def python_root(root: Path) -> Path:
    """A root folder with the Python that runs the tests as /usr/local/bin/python3, and the libraries that it needs."""
    library = Path(sysconfig.get_path("stdlib"))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    program = Path(sys.base_prefix, "bin", version)
    copy(program, root, "usr/local/bin/python3")
    left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__",
                                      "config-*", "lib2to3", "tkinter", "_tkinter*", "*.a")  # fmt: skip
    shutil.copytree(library, root / f"usr/local/lib/{version}", ignore=left_out)
    _libraries(root, [program, *Path(library, "lib-dynload").glob("*.so")])
    (root / "tmp").mkdir(mode=0o1777)
    return root


def _libraries(root: Path, programs: list[Path]) -> None:
    told = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True).stdout
    for path in sorted(set(re.findall(r"(/\S+) \(0x", told))):
        copy(path, root)
        copy(path, root, f"usr/lib/{Path(path).name}")


def add_gymnasium(root: Path) -> None:
    """Copy the tests' own gymnasium into it."""
    site = Path(gymnasium.__file__).parent.parent
    target = next((root / "usr/local/lib").glob("python3*")) / "site-packages"
    target.mkdir(exist_ok=True)
    (target.parent / "dist-packages").symlink_to(target.name)  # where Debian's Python looks
    for name in ("gymnasium", "numpy", "numpy.libs", "cloudpickle", "farama_notifications"):
        if (site / name).is_dir():
            shutil.copytree(site / name, target / name, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    shutil.copy(site / "typing_extensions.py", target)
    _libraries(root, list((target / "numpy").rglob("*.so")))


@pytest.fixture(scope="module")
def image_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose images are ones without a Python, with one, and with one that has gymnasium and environments."""
    home = tmp_path_factory.mktemp("image-home")
    store = ImageStore(home / "images")
    root = tmp_path_factory.mktemp("root")
    (root / "nothing").write_text("")
    store.import_any(root, "empty:1")
    python_root(root)
    store.import_any(root, "plain:1")
    add_gymnasium(root)
    for folder, text in (("app", ENV), ("other/place", ENV.replace("start=0.0", "start=5")), ("broken", "")):
        (root / folder).mkdir(parents=True)
        (root / folder / "env.py").write_text(text)
    store.import_any(root, "worlds:1")
    shutil.rmtree(root)
    running = RunningServer(home)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


def test_it_is_played(image_server: RunningServer) -> None:
    with SandboxEnv("image://worlds:1", base_url=image_server.url, start=3) as env:
        assert env.reset(seed=1)[0].tolist() == [3.0]
        assert [env.step(2)[2] for _ in range(2)] == [False, True]
        program, cwd, module = env.get_attr("where")
        assert (program, cwd) == ("/usr/local/bin/python3", "/app")
        assert module.startswith("/usr/local/lib/python3")
        assert env.sandbox.resolved_source == "image://worlds:1" and env.sandbox.sandbox_id == env.sandbox_id
    envs = SandboxVectorEnv("image://worlds:1", 3, cwd="/other/place", base_url=image_server.url)
    observations, _ = envs.reset()
    assert observations.tolist() == [[5.0]] * 3
    assert envs.step(np.array([0, 1, 2]))[2].tolist() == [False, True, True]
    envs.close()


def test_its_python_hosts_others(image_server: RunningServer, tmp_path: Path) -> None:
    with SandboxEnv("CartPole-v1", base_image="worlds:1", base_url=image_server.url) as env:
        home = gymnasium.make("CartPole-v1")
        assert env.reset(seed=3)[0].tolist() == home.reset(seed=3)[0].tolist()
        home.close()
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "requirements.txt").write_text("what-is-in-the-image-already\n")
    with SandboxEnv(str(tmp_path), base_image="worlds:1", trust_remote_code=True, base_url=image_server.url) as env:
        assert env.get_attr("where")[1] == "/tmp/rock-environment"


def test_what_an_image_lacks(image_server: RunningServer) -> None:
    url = image_server.url
    with pytest.raises(errors.ImageError, match="no Python"):
        SandboxEnv("image://empty:1", base_url=url)
    with pytest.raises(errors.ImageError, match=r"Python 3\.\d+\.\d+ \(/usr/local/bin/python3\) has no gymnasium"):
        SandboxEnv("image://plain:1", base_url=url)
    with pytest.raises(errors.InvalidConfig, match=r"no env\.py in /usr"):
        SandboxEnv("image://worlds:1", cwd="/usr", base_url=url)
    with pytest.raises(errors.InvalidConfig, match=r"/broken/env\.py has no function make_env"):
        SandboxEnv("image://worlds:1", cwd="/broken", base_url=url)
    with pytest.raises(errors.ImageError, match="cannot be reached"):
        SandboxEnv("image://127.0.0.1:1/missing:1", base_url=url)
    with pytest.raises(errors.NotFound, match="CartPole"):
        SandboxEnv("CartPol-v1", base_image="worlds:1", base_url=url)


def test_what_does_not_go_with_an_image(image_server: RunningServer) -> None:
    for more in ({"packages": ["x"]}, {"base_image": "y"}, {"override": "/tmp"}, {"repo_root": "/tmp"}, {"cwd": "app"}):
        with pytest.raises(errors.InvalidConfig):
            SandboxEnv("image://worlds:1", base_url=image_server.url, **more)
    with pytest.raises(errors.InvalidConfig, match="names no image"):
        SandboxEnv("image://", base_url=image_server.url)
    with pytest.raises(errors.RockError, match="A B"):
        SandboxEnv("image://A B", base_url=image_server.url)
