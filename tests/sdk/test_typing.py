"""Type checkers see the options: examples are correct, and incorrect calls are rejected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRONG = ROOT / "tests" / "typing" / "incorrect_calls.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("mypy")
    cache = ROOT / ".mypy_cache"
    files = [WRONG, *sorted((ROOT / "examples").glob("*.py"))]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", cache / "typing", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_each_incorrect_call_is_rejected(report: str) -> None:
    found = {int(number) for number in re.findall(r"incorrect_calls\.py:(\d+): error:", report)}
    lines = WRONG.read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if "# wrong" in line}
    assert len(marked) >= 30
    assert not {lines[number - 1].strip() for number in marked - found}, "mypy accepts these"
    assert not {lines[number - 1].strip() for number in found - marked}, "mypy rejects other lines too"


def test_examples_are_correct(report: str) -> None:
    assert not [line for line in report.splitlines() if line.startswith("examples") and ": error:" in line]
