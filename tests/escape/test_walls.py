"""The mutation tests of the isolation: a few walls here, all of them by `make walls`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.escape.levels import PAGE
from tests.escape.walls import BEGIN, END, SHORT, WALLS, run
from tests.unprivileged import ROOT

pytestmark = pytest.mark.timeout(600)


def test_each_wall_can_be_removed(tmp_path: Path) -> None:
    """The text that a mutation replaces is in the source, and what it becomes is Python."""
    for number, wall in enumerate(WALLS):
        package = tmp_path / str(number)
        for name in (wall.file, *(more[0] for more in wall.also)):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "src" / "rock" / name, package / name)
        wall.remove(package)


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root")
def test_a_missing_wall_is_noticed() -> None:
    results = run([wall for wall in WALLS if wall.name in SHORT])
    assert len(results) == len(SHORT)
    assert {result.wall.name: result.why for result in results if not result.noticed} == {}


def test_the_page_names_every_wall_and_what_notices() -> None:
    part = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    written = {name: noticed for name, _, noticed in lines[1:]}
    assert list(written) == [wall.name for wall in WALLS], "run `make walls`"
    assert [name for name, noticed in written.items() if noticed in ("", "NOTHING")] == []
