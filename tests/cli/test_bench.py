"""`rock bench`, short: that every row is measured, next to its floor. Figures are not judged here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = {
    "create to first command, no pool", "a whole sandbox in the launcher", "create + command + destroy, 8 at once",
    "a command in a session", "the same, server side", "commands a second, 32 sessions", "upload of 100 MB",
    "download of 100 MB", "memory of an idle sandbox, all in", "create to first command, warm pool",
    "base install, distributions", "base install, size", "checkpoint of a sandbox with a bash",
    "its processes are stopped", "rollback and a command", "a child and its first command",
    "a model call of 80 kB", "the first streamed byte of one",
    "a model call in pull mode", "model calls a second, 200 agents at once", "memory of a recorded call of 80 kB",
}  # fmt: skip


COPIES = {"checkpoint of a Python with 100 MB", "it is stopped", "a child of it until it answers",
          "a command of the original meanwhile"}  # fmt: skip
if os.geteuid() == 0 and platform.machine() == "x86_64":
    ROWS |= COPIES


@pytest.mark.timeout(1000)
def test_every_row_is_measured_next_to_its_floor(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rock.cli.main", "bench", "--short", "--json"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environ)
    assert done.returncode == 0, done.stderr
    figures = {row["name"]: row for row in json.loads(done.stdout)["figures"]}
    assert set(figures) == ROWS
    for name, row in figures.items():
        assert row["n"] >= 1 and row["min"] <= row["p50"] <= row["p95"], name
    for name in ("create to first command, no pool", "create to first command, warm pool", "a command in a session"):
        assert figures[name]["ratio"] == figures[name]["p50"] / figures[name]["floor"]["p50"] > 0, name
    assert figures["base install, distributions"]["p50"] <= 40
    assert figures["base install, size"]["p50"] <= 60
    assert list(tmp_path.iterdir()) == [], "bench leaves nothing behind"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", ["create", "command"])
def test_a_profile_names_the_parts_of_every_process(row: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rock.cli.main", "bench", "--short", "--profile", row]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ)
    assert done.returncode == 0, done.stderr
    found = {tuple(line[:32].split(None, 1)) for line in done.stdout.splitlines()[3:]}
    processes = {one for one, _ in found}
    assert processes >= {"client", "server"}
    assert any(part.strip() in ("rocklet", "runtime", "HTTP and queueing") for one, part in found if one == "server")
    assert list(tmp_path.iterdir()) == []
