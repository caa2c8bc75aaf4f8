"""ROCK's own client, rl-rock, in a virtual environment of its own: it has the package name `rock` as well."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NEWEST = "1.11.0"
HERE = Path(__file__).parent
SCRIPT = HERE / "client_script.py"


def run_script(
    python: Path, arguments: list[str], url: str, folder: Path, seconds: float, **more: str
) -> dict[str, Any]:
    """The JSON that a script prints last, run by a Python against the server at `url`."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("ROCK_", "PYTHON"))}
    environ |= {"ROCK_BASE_URL": url, "ROCK_ENVHUB_BASE_URL": url, "ROCK_LOGGING_PATH": str(folder), **more}
    done = subprocess.run(
        [str(python), *arguments], env=environ, cwd=folder, text=True, capture_output=True, timeout=seconds
    )
    assert done.returncode == 0, f"{python}: {done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


class RlRock:
    """One version of the client."""

    def __init__(self, version: str, python: Path) -> None:
        self.version = version
        self.python = python

    def run(self, case: str, url: str, folder: Path, seconds: float = 100.0) -> dict[str, Any]:
        """What a case of client_script.py saw, against the server at `url`."""
        return self.script([str(SCRIPT), case], url, folder, seconds)

    def script(self, arguments: list[str], url: str, folder: Path, seconds: float, **more: str) -> dict[str, Any]:
        """What a script printed."""
        seen = run_script(self.python, arguments, url, folder, seconds, **more)
        assert seen.pop("client").startswith(str(self.python.parent.parent)), "this was not rl-rock"
        return seen


def install(version: str, cache: Path) -> RlRock:
    """The client of that version, installed the first time: of the newest what it imports, of others all they name."""
    pins = HERE / f"rl-rock-{version}.txt"
    wanted = ["--no-deps", "-r", str(pins)] if pins.exists() else [f"rl-rock=={version}"]
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:8] if pins.exists() else "all"
    folder = cache / "rl-rock" / f"{version}-{digest}-{sys.implementation.cache_tag}"
    client = RlRock(version, folder / "bin" / "python")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(client.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
            done = subprocess.run([*pip, *wanted], text=True, capture_output=True)
            if done.returncode != 0:
                pytest.skip(f"rl-rock {version} cannot be installed here: {done.stderr.strip()[-300:]}")
            (folder / "ready").touch()
    return client
