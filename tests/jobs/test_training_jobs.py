"""Tasks of training sets as trials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock.sync import Client

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(("agent", "score"), [("oracle", 1.0), ("nop", 0.0)])
def test_humaneval(env_server: RunningServer, tmp_path: Path, agent: str, score: float) -> None:
    command = [sys.executable, "-m", "rock", "--base-url", env_server.url, "job", "run", "humaneval", "--agent", agent,
               "--tasks", "humaneval/HumanEval/0,humaneval/HumanEval/7", "--jsonl"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if "cannot be installed" in done.stderr:
        pytest.skip(done.stderr[-300:])
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["avg_score"] == score and summary["total"] == 2
    with Client(env_server.url) as client:
        client.jobs.delete(summary["run_id"])
