"""The examples run as scripts, as a user would run them: a server, ROCK_BASE_URL, `python FILE`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RunningServer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SAYS = {
    "one_sandbox.py": "Hello ROCK",
    "one_sandbox_old_imports.py": "Hello Rock",
    "group.py": "Hello",
    "idle_clean_up.py": "test 1200",
    "sokoban.py": "Episode finished!",
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


@pytest.mark.parametrize("name", sorted(SAYS.keys() - {"sokoban.py", "tree_search.py"}))
def test_example(server: RunningServer, name: str) -> None:
    assert SAYS[name] in run_script(EXAMPLES / name, server.url)


@pytest.mark.timeout(1200)
def test_sokoban(env_server: RunningServer) -> None:
    assert SAYS["sokoban.py"] in run_script(EXAMPLES / "sokoban.py", env_server.url, 1200)


def test_the_training_loop(server: RunningServer) -> None:
    """Two steps of two groups of 8 rollouts, each with valid token chains."""
    lines = run_script(EXAMPLES / "train_loop" / "train_loop.py", server.url, 300, "2").splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("rollouts 16" in line and "trained_tokens" in line for line in lines)
