"""The progress of a start that installs packages: lines on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer, hosting

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without packages; a pip of the tests installs a small package with GEM's interface, slowly."""
    home = tmp_path_factory.mktemp("fresh")
    images = home / "kept-images"
    images.mkdir()
    tools = home / "tools"
    (tools / "pip").mkdir(parents=True)
    (tools / "pip" / "__init__.py").touch()
    (tools / "pip" / "__main__.py").write_text(textwrap.dedent(PIP))
    (home / "home").mkdir()
    with hosting(home / "home", images, PYTHONPATH=str(tools)) as running:
        yield running


# Prints as pip does. It resolves to the requirements as they are, and installs one small module in place of GEM.
PIP = """
import json, sys, time
from pathlib import Path

arguments = sys.argv[1:]
requirements = arguments[arguments.index("--") + 1:]
for requirement in requirements:
    print("Collecting", requirement, flush=True)
    time.sleep(0.3)
if "--report" in arguments:
    items = [{"metadata": {"name": r.partition("==")[0], "version": r.partition("==")[2] or "1"}} for r in requirements]
    Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps({"install": items}))
else:
    print("Installing collected packages: gem-llm", flush=True)
    time.sleep(1.2)
    site = Path(arguments[arguments.index("--target") + 1], "gem")
    (site / "envs").mkdir(parents=True)
    (site / "__init__.py").write_text(
        "class Env:\\n"
        "    def reset(self, seed=None): return 'begin', {}\\n"
        "    def step(self, action): return 'next', 1.0, True, False, {}\\n"
        "def make(env_id, **kwargs): return Env()\\n")
    (site / "envs" / "__init__.py").write_text("import reasoning_gym\\nassert not reasoning_gym.factory.DATASETS\\n")
    (site / "envs" / "registration.py").write_text("ENV_REGISTRY = {'game:Sokoban-v0-easy': 1, 'rg:sokoban': 1}\\n")
"""


def play(server: RunningServer, options: str, stderr: int) -> str:
    code = f"""
import rock

messages = []
env = rock.make({options})
env.reset(seed=1)
env.close()
print(messages)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ROCK_BASE_URL": server.url},
                          stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_progress_of_a_start(fresh: RunningServer, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    try:
        play(fresh, "'game:Sokoban-v0-easy'", terminal)
        shown = os.read(main, 100_000).decode()
    finally:
        os.close(terminal)
        os.close(main)
    assert "fetching" in shown and "resolving" in shown, shown
    lines = [line.rpartition("\r\033[K")[2].strip() for line in shown.split("\n") if line.strip()]
    phases = [line.removeprefix("game:Sokoban-v0-easy: ").split()[0] for line in lines]
    assert phases[-1] == "ready", shown
    assert len(phases) == len(set(phases)), shown  # a line per phase

    # The same set is installed: the host is found, and nothing is shown.
    main, terminal = pty.openpty()
    try:
        play(fresh, "'game:Sokoban-v0-easy'", terminal)
        os.set_blocking(main, False)
        with pytest.raises(BlockingIOError):
            os.read(main, 100_000)
    finally:
        os.close(terminal)
        os.close(main)


def test_no_output_without_a_terminal(fresh: RunningServer, tmp_path: Path) -> None:
    """A function receives the messages of another set; the standard error stays empty."""
    said = tmp_path / "stderr"
    with said.open("wb") as file:
        messages = play(fresh, "'rg:sokoban', progress=lambda text: messages.append(text)", file.fileno())
    assert "packages" in messages or "starting a sandbox" in messages  # an installation may end before the first poll
    assert said.read_bytes() == b""
