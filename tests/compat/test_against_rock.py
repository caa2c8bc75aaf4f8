"""bench/against_rock.py runs: with one server, and with two next to each other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_rock import NEWEST, RlRock
from tests.conftest import RunningServer

BENCH = Path(__file__).parent.parent.parent / "bench" / "against_rock.py"

pytestmark = [pytest.mark.compat, pytest.mark.timeout(600)]


@pytest.mark.parametrize("second", [False, True])
def test_it_measures(rl_rock: Callable[[str], RlRock], server: RunningServer, tmp_path: Path, second: bool) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("ROCK_", "PYTHON"))}
    environ |= {"ROCK_LOGGING_PATH": str(tmp_path)} | ({"ROCK_THEIRS": server.url} if second else {})
    command = [str(rl_rock(NEWEST).python), str(BENCH), "--ours", server.url, "--runs", "1", "--group", "2"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {line[:42].strip(): line[42:].split() for line in done.stdout.splitlines()}
    assert ("ROCK_THEIRS names none" in done.stdout) is not second and "failed" not in done.stdout
    for name in ("start", "create_session", "arun in a session", "execute", "stop"):
        assert [float(value) > 0 for value in rows[name]] == [True] * (4 if second else 2)
    assert len(rows["group of 2: start, a command in each"]) == (4 if second else 2)
