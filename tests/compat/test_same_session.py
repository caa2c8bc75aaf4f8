"""One scripted session with both SDKs, rl-rock and ours: the same results, but for what the guide from-rock.md says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rl_rock import NEWEST, RlRock, run_script
from tests.conftest import RunningServer

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).with_name("same_session.py")
GUIDE = ROOT / "docs" / "guides" / "from-rock.md"

# What ROCK's own way would fetch from a place that tests have no business with.
INSTALL = 'mkdir -p runtime-env/bin && ln -s "$(command -v python3)" runtime-env/bin/python'

REFUSED = {"raised": ["RockException", "BadRequestRockError"]}
# Steps whose results differ on purpose: the row of the guide's table that says so, and what ours is.
DIFFERENCES: dict[str, tuple[str, Any]] = {
    "status": ("a status other than 0 in `arun`", ["why", 3]),
    "ignore": ('`check="ignore"`', [3]),
    "nohup status": ("a status other than 0 in the background", ["one", 3, ""]),
    "nohup no program": ("a status other than 0 in the background", [127]),
    "script status": ("a status other than 0 in the background", ["why", 3]),
    "nohup late": (
        "out of time in the background",
        ["early", None, "X did not complete X (timeout: 2s); it is left running as X"],
    ),
    "nohup no session": ("a background command in a session that is not open", REFUSED),
    "nohup size": ("the size of an output that is not read", "File size: 3893 bytes"),
    "session twice": ("a session of a name that is taken", REFUSED),
    "without a session again": ("`arun` without a session", ["/tmp"]),
    "execute no program": ("`execute` of what is not there", REFUSED),
    "execute no folder": ("`execute` of what is not there", REFUSED),
    "execute late": ("`execute` out of time", [None]),
    "read nothing": ("a file that is missing", REFUSED),
    "write nowhere": ("a file that cannot be written", REFUSED),
    "upload nowhere": ("a file that cannot be written", REFUSED),
    "download": ("`fs.download_file`", [True]),
    "status after": ("`get_status` of a stopped sandbox", [False]),
    "url": ("`sandbox.url`", ""),
}

pytestmark = [pytest.mark.compat, pytest.mark.timeout(600)]


@pytest.fixture
def both(
    rl_rock: Callable[[str], RlRock], server: RunningServer, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rl-rock saw, and what we did, at the same time."""
    theirs = rl_rock(NEWEST)
    folders = [tmp_path / name for name in ("theirs", "ours")]
    for folder in folders:
        folder.mkdir()
    more = {"ROCK_RTENV_PYTHON_V31114_INSTALL_CMD": INSTALL}
    script = [str(SCRIPT)]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(theirs.script, script, server.url, folders[0], 300.0, **more)
        path = str(ROOT / "src")
        python = Path(sys.executable)
        two = pool.submit(run_script, python, script, server.url, folders[1], 300.0, PYTHONPATH=path, **more)
        assert two.result()["client"].startswith(path), "this was not ours"
        return one.result()["seen"], two.result()["seen"]


def catches_the_same(theirs: Any, ours: Any) -> bool:
    """Whether all that a script does with their result it does with ours: a handler for their error has to catch it."""
    if all(isinstance(seen, dict) and seen.keys() == {"raised"} for seen in (theirs, ours)):
        return {*theirs["raised"]} <= {*ours["raised"]}
    return bool(theirs == ours)


def test_both_see_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both
    assert len(theirs) > 140 and theirs.keys() == ours.keys()
    differ = {name: (theirs[name], ours[name]) for name in theirs if not catches_the_same(theirs[name], ours[name])}
    unexpected = {name: seen for name, seen in differ.items() if name not in DIFFERENCES}
    assert not unexpected
    assert differ.keys() == DIFFERENCES.keys()  # what is the same by now has no place in the guide
    assert {name: ours for name, (_, ours) in differ.items()} == {name: ours for name, (_, ours) in DIFFERENCES.items()}


def test_the_guide_has_every_difference() -> None:
    rows = {line.split("|")[1].strip() for line in GUIDE.read_text().splitlines() if line.startswith("| ")}
    assert {row for row, _ in DIFFERENCES.values()} <= rows
