"""Every example of every command runs against a server: no usage error, no traceback, no hang. `make long`."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tests.cli.test_commands import commands

from rock.cli.main import app
from rock.cli.parsing import Command
from rock.errors import RockError
from rock.sync import Sandbox
from rock.testing import FakeServer

pytestmark = pytest.mark.long
_ENDLESS = ("rock shell", "rock mcp", "rock ui", "rock admin", "rock stats", "rock forward", "rock tunnel",
            "rock docker", "rock events", "rock logs")  # fmt: skip


def _lines() -> Iterator[tuple[str, str]]:
    for path, command in commands(app, click.Context(app, info_name="rock")):
        assert isinstance(command, Command)
        yield from ((path, line) for line in command.example.splitlines())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server, and a folder and a home of their own; the working directory is ROCK_HOME/work."""
    home = tmp_path_factory.mktemp("examples")
    (home / "work").mkdir()
    with FakeServer() as server:
        yield {**os.environ, "ROCK_BASE_URL": server.url, "ROCK_HOME": str(home), "HOME": str(home),
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "BROWSER": "true"}  # fmt: skip


@pytest.mark.parametrize(("path", "line"), list(_lines()))
def test_an_example_runs(world: dict[str, str], path: str, line: str) -> None:
    """The result may be an error of ROCK, because the fake server has no such image, key or job."""
    folder = Path(world["ROCK_HOME"]) / "work"
    with contextlib.suppress(RockError):  # there is one, unless an earlier example has stopped it
        Sandbox(base_url=world["ROCK_BASE_URL"], name="web", image="python:3.11").start()
    if path.startswith(_ENDLESS) or shlex.split(line)[0] == "eval":
        line = f"timeout --preserve-status 5 bash -c {shlex.quote(line)}"
    done = subprocess.run(["bash", "-c", line], env=world, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=120, errors="replace")  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    missing = "does not exist" in done.stderr  # a file of the example
    assert done.returncode != 2 or missing, done.stderr
