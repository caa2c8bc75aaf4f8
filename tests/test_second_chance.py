"""tools/second_chance.py: who fails once more than alone is told, and who always fails, fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "second_chance.py"
ONCE = """
from pathlib import Path
def test_once():
    seen = Path("seen")
    was = seen.exists()
    seen.touch()
    assert was
"""


@pytest.mark.parametrize(
    ("source", "status", "told", "runs"),
    [
        (ONCE, 0, "PASSED ONLY ALONE test_x.py::test_once", 2),
        ("def test_never(): assert False", 1, "FAILED TWICE test_x.py::test_never", 2),
        ("import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_many(n): assert False", 1, "4 failed", 1),
        ("def test_well(): pass", 0, "1 passed", 1),
        ("import nothing_of_that_name", 2, "error", 1),
    ],
    ids=["once", "never", "many", "well", "broken"],
)
def test_a_second_chance(tmp_path: Path, source: str, status: int, told: str, runs: int) -> None:
    (tmp_path / "test_x.py").write_text(source)
    done = subprocess.run(
        [sys.executable, str(TOOL), "x", "-q", "--tb=no"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status and told in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(" in 0.") == runs, done.stdout
