"""examples/tree_search.py as a user runs it: forks of a sandbox and of an environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock.sync import Client

EXAMPLE = Path(__file__).parents[2] / "examples/tree_search.py"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_search_finds_the_edits_and_leaves_nothing(env_server: RunningServer, tmp_path: Path) -> None:
    picture = tmp_path / "tree.svg"
    done = subprocess.run([sys.executable, str(EXAMPLE), "--svg", str(picture), "--moves", "12"], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "ROCK_BASE_URL": env_server.url})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 4 tests pass after: " in done.stdout and "best reward: " in done.stdout
    assert "stats.py | 6 +++---" in done.stdout  # of the best child alone
    drawn = ET.parse(picture).getroot()
    assert len(drawn.findall("{*}circle")) == len(drawn.findall("{*}text")) > 10
    with Client(env_server.url) as client:
        assert client.list_sandboxes(states="pending,running") == [] or all(
            one.image != "host" for one in client.list_sandboxes(states="pending,running"))
        for one in client.list_snapshots():
            client.delete_snapshot(one.snapshot_id)
