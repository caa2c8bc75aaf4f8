"""ROCK's own client, rl-rock, in a virtual environment of its own: it has the package name `rock` as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "client_script.py"


class RlRock:
    """One version of the client."""

    def __init__(self, version: str, python: Path) -> None:
        self.version = version
        self.python = python

    def run(self, case: str, url: str, folder: Path, seconds: float = 100.0) -> dict[str, Any]:
        """What a case of client_script.py saw, against the server at `url`."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("ROCK_", "PYTHON"))}
        environ |= {"ROCK_BASE_URL": url, "ROCK_ENVHUB_BASE_URL": url, "ROCK_LOGGING_PATH": str(folder)}
        done = subprocess.run(
            [str(self.python), str(SCRIPT), case],
            env=environ,
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"rl-rock {self.version}: {done.stdout[-2000:]}\n{done.stderr[-8000:]}"
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen.pop("client").startswith(str(self.python.parent.parent)), "this was not rl-rock"
        return dict(seen)


def install(version: str, cache: Path) -> RlRock:
    """The client of that version, installed the first time."""
    folder = cache / "rl-rock" / version
    client = RlRock(version, folder / "bin" / "python")
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [
            str(client.python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            f"rl-rock=={version}",
        ]
        done = subprocess.run(pip, text=True, capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"rl-rock {version} cannot be installed here: {done.stderr.strip()[-300:]}")
        ready.touch()
    return client
