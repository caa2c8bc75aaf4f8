"""The examples run as scripts, as a user would run them: a server, ROCK_BASE_URL, `python FILE`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.conftest import RunningServer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SAYS = {
    "one_sandbox.py": "Hello ROCK",
    "one_sandbox_old_imports.py": "Hello Rock",
    "group.py": "Hello",
    "idle_clean_up.py": "test 1200",
    "sokoban.py": "Episode finished!",
    "grpo.py": "step 1: solved",
    "tree_search.py": "4 of 4 tests pass",  # tests/envs/test_tree_search.py
}


def run_script(path: Path, url: str, timeout: float = 60.0, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        env={**os.environ, "ROCK_BASE_URL": url}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_there_is_an_expectation_for_each() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS.keys() - {"sokoban.py", "grpo.py", "tree_search.py"}))
def test_example(server: RunningServer, name: str) -> None:
    assert SAYS[name] in run_script(EXAMPLES / name, server.url)


@pytest.mark.timeout(1200)
def test_sokoban(env_server: RunningServer) -> None:
    assert SAYS["sokoban.py"] in run_script(EXAMPLES / "sokoban.py", env_server.url, 1200)


@pytest.mark.timeout(1200)
def test_grpo_learns_and_draws_its_curve(env_server: RunningServer, tmp_path: Path) -> None:
    """From a third of the episodes to more than two thirds in 40 steps; the picture has a point for each step."""
    picture = tmp_path / "curve.svg"
    lines = run_script(EXAMPLES / "grpo.py", env_server.url, 1200, "--steps", "40", "--svg", str(picture)).splitlines()
    parts = [int(line.rpartition(" ")[2].rstrip("%")) for line in lines]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 10", "step 20", "step 30", "step 40"]
    assert parts[0] < 50 and parts[-1] > 70, parts
    curve = ElementTree.parse(picture).find("{http://www.w3.org/2000/svg}polyline")
    assert curve is not None and len(curve.attrib["points"].split()) == 40


def test_the_training_loop(server: RunningServer) -> None:
    """Two steps of two groups of 8 rollouts, each with valid token chains."""
    lines = run_script(EXAMPLES / "train_loop" / "train_loop.py", server.url, 300, "2").splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("rollouts 16" in line and "trained_tokens" in line for line in lines)
