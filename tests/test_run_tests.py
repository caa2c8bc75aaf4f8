"""tools/run_tests.py: retries, totals, immediate failures, and what is left after an interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "run_tests.py"
ONCE = """
from pathlib import Path
def test_once():
    seen = Path("seen")
    was = seen.exists()
    seen.touch()
    assert was
"""
LEAVES = """
import os, subprocess, sys, time
from pathlib import Path
from tests.conftest import RunningServer, give_image
from rock.sync import Sandbox, SandboxConfig

def test_server(tmp_path):
    server = RunningServer(tmp_path / "home")
    server.home.mkdir()
    give_image(server.home)
    server.start()
    sandbox = Sandbox(SandboxConfig(base_url=server.url, image="python:3.11", memory="64m"))
    sandbox.start()
    sandbox.processes.start("exec sleep 98765")
    (Path(os.environ["REPORT"])).write_text(str(server.home))
    time.sleep(600)
"""


def tool(folder: Path, source: str, *, twice: bool = False, **options: Any) -> Any:
    (folder / "test_x.py").write_text(source)
    lanes: list[Any] = [[{"name": "first", "words": ["-q", "test_x.py"]}]]
    if twice:
        (folder / "test_y.py").write_text("def test_y(): pass\n")
        lanes.append([{"name": "second", "words": ["-q", "test_y.py"]}])
    (folder / "groups.json").write_text(json.dumps(lanes))
    command = [sys.executable, str(TOOL), "--groups", "groups.json", "--record", str(folder / "record.json"), "-c",
               "/dev/null", "--rootdir", str(folder), "--tb=short", *options.pop("words", ())]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(folder), **options.pop("environment", {})}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)  # fmt: skip


def ran(folder: Path, source: str, **options: Any) -> tuple[int, str]:
    process = tool(folder, source, **options)
    told = process.communicate(timeout=300)[0]
    return process.returncode, told


@pytest.mark.parametrize(
    ("source", "status", "told", "last"),
    [
        (ONCE, 0, "PASSED ONLY ALONE test_x.py::test_once", "1 passed, 0 failed, 0 skipped"),
        ("def test_never(): assert False", 1, "FAILED TWICE test_x.py::test_never", "0 passed, 1 failed, 0 skipped"),
        ("import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_many(n): assert False", 1, "4 failed",
         "0 passed, 4 failed, 0 skipped"),
        ("def test_well(): pass", 0, "1 passed", "1 passed, 0 failed, 0 skipped"),
        ("import nothing_of_that_name", 1, "status 2", "0 passed, 0 failed, 0 skipped"),
    ],
    ids=["once", "never", "many", "well", "broken"],
)  # fmt: skip
def test_retries(tmp_path: Path, source: str, status: int, told: str, last: str) -> None:
    found, output = ran(tmp_path, source)
    assert (found, output.splitlines()[-1]) == (status, last) and told in output, output
    assert "the whole suite takes about" in output.splitlines()[0]
    assert not list(tmp_path.glob("rock-tests-*")), "the folder of the tests is removed"


HANGS = """
import signal, subprocess, time
from pathlib import Path
def test_hangs():
    if Path("seen").exists():
        return
    Path("seen").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    while True:
        time.sleep(600)
"""


def test_a_group_that_hangs_is_killed_and_runs_once_more(tmp_path: Path) -> None:
    status, output = ran(tmp_path, HANGS, words=["--quiet", "8"])
    assert (status, output.splitlines()[-1]) == (0, "1 passed, 0 failed, 0 skipped"), output
    assert "HANGS: no output for 8 s" in output and "sleep 600" in output and "in test_hangs" in output, output
    assert "once more, alone: the group first" in output
    assert json.loads((tmp_path / "record.json").read_text()) == {"the group first": 1}
    place = Path("/proc", (tmp_path / "seen").read_text(), "cmdline")
    assert not place.exists() or not place.read_bytes(), "it was killed"


def test_a_process_that_keeps_the_output_does_not_delay_the_end(tmp_path: Path) -> None:
    source = "import subprocess\ndef test_leaves(capfd):\n    with capfd.disabled():\n        "
    source += "subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    began = time.monotonic()
    status, output = ran(tmp_path, source)
    assert status == 0 and "1 passed" in output and time.monotonic() - began < 50, output


def test_two_lanes_are_added_up(tmp_path: Path) -> None:
    status, output = ran(tmp_path, "def test_a(): pass\ndef test_b(): import pytest; pytest.skip('x')\n", twice=True)
    assert (status, output.splitlines()[-1]) == (0, "2 passed, 0 failed, 1 skipped"), output


def test_the_third_retry_in_a_row_fails(tmp_path: Path) -> None:
    results = []
    for _ in range(3):
        (tmp_path / "seen").unlink(missing_ok=True)
        results.append(ran(tmp_path, ONCE))
    assert [status for status, _ in results] == [0, 0, 1]
    assert "NEEDED A RETRY IN 3 RUNS IN A ROW" in results[2][1]
    assert ran(tmp_path, ONCE)[0] == 0, "a run without a retry begins the count anew"
    assert json.loads((tmp_path / "record.json").read_text()) == {}


def test_a_failure_is_printed_when_it_happens(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    source = "import time\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(20)\n"
    process = tool(tmp_path, source, environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"})
    began = time.monotonic()
    for line in process.stdout:
        if "assert 1 == 2" in line:
            break
    assert time.monotonic() - began < 18
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130
    process.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="looks at processes of sandboxes, as root")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "REPORT": str(report)}
    process = tool(tmp_path, LEAVES, environment=environment)
    until(report.exists, 60)
    home = report.read_text()
    left = _left(home)
    assert any("rock.cli.server" in line for line in left)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130 and "interrupted" in output, output
    until(lambda: not _left(home), 10, f"left: {_left(home)}")
    assert not list(tmp_path.glob("rock-tests-*")), output


def _left(home: str) -> list[str]:
    """Command lines of processes that a server of that home has to do with, its sandboxes' too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"ROCK_HOME={home}".encode() in environment.split(b"\0") or home in line or "sleep 98765" in line:
            found.append(line)
    return found
