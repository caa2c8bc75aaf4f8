"""Code blocks in README and docs are run: python ones as scripts, sh ones with `rock` on the PATH and a home of their
own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)


def _blocks() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(*match.groups(), id=f"{page.relative_to(ROOT)}:{line}")


BLOCKS = list(_blocks())


def test_there_are_blocks() -> None:
    kinds = [block.values[0] for block in BLOCKS]
    assert kinds.count("python") >= 4 and kinds.count("sh") >= 1
    assert set(kinds) <= {"python", "sh", "text"}


def _run(arguments: list[str], **environment: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(arguments, env={**os.environ, "PATH": path, **environment}, cwd=ROOT, text=True, timeout=1100,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "words", "code"), [b for b in BLOCKS if b.values[0] == "python"])
def test_python_block(request: pytest.FixtureRequest, kind: str, words: str, code: str) -> None:
    server: RunningServer = request.getfixturevalue("env_server" if "env" in words.split() else "server")
    _run([sys.executable, "-W", "error", "-c", code], ROCK_BASE_URL=server.url)


@pytest.mark.parametrize(("kind", "words", "code"), [b for b in BLOCKS if b.values[0] == "sh"])
def test_sh_block(tmp_path: Path, kind: str, words: str, code: str, free_port: Callable[[], int]) -> None:
    port = str(free_port())
    script = "\n".join(line for line in code.splitlines() if not line.startswith(". .venv"))
    _run(["sh", "-euxc", script], ROCK_HOME=str(tmp_path / "home"), ROCK_PORT=port,
         ROCK_BASE_URL=f"http://127.0.0.1:{port}")  # fmt: skip


def test_the_table_of_runtimes_is_what_they_declare() -> None:
    _run([sys.executable, "tools/runtimes.py", "--check"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
