"""Sandboxes go on over an upgrade: a server of the commit before is killed, and the present one takes over its home.

The commit is `written_by` of the fixtures; its sources come out of the git history.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from rock.sync import Sandbox, SandboxConfig
from tests.conftest import RunningServer
from tests.leaks import Inventory
from tests.upgrade.homes import HERE
from tests.upgrade.make import OWNER, SETTINGS, done
from tests.waiting import until

pytestmark = pytest.mark.long

COUNT = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; echo x=$x; (exit 41)"
COUNTED = "".join(f"line {i}\n" for i in range(40)) + "x=before\n"


class OldServer(RunningServer):
    """A server of the sources in `source`, by the command line of that commit."""

    def __init__(self, source: Path, home: Path, **environment: str) -> None:
        super().__init__(home, **environment, PYTHONPATH=str(source))

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port", str(port)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the package of the commit before."""
    commit = json.loads((HERE / "sqlite.json").read_text())["written_by"]
    command = ["git", "archive", "--format=tar", f"{commit}:src"]
    packed = subprocess.run(command, cwd=HERE.parents[1], capture_output=True)
    if packed.returncode:
        pytest.skip(f"the history has no commit {commit[:7]}: {packed.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as tar:
        tar.extractall(folder, filter="data")
    found = subprocess.run([sys.executable, "-c", "import rock; print(rock.__file__)"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(folder)}, check=True)  # fmt: skip
    assert found.stdout.strip() == str(folder / "rock" / "__init__.py")
    return folder


@dataclass
class Upgrade:
    """A running server of the commit before. `take_over`: kill it, and start the present one at the same address."""

    runtime: str
    port: int
    old: OldServer
    new: RunningServer

    def take_over(self) -> None:
        self.old.kill()
        self.new.start(self.port)


@pytest.fixture(params=["namespace", "process"])
def upgrade(
    request: pytest.FixtureRequest, source: Path, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Upgrade]:
    home = tmp_path / "home"
    home.mkdir()
    made = Upgrade(request.param, free_port(), OldServer(source, home, **SETTINGS), RunningServer(home, **SETTINGS))
    made.old.start(made.port)
    try:
        yield made
    finally:
        if made.new.process is None:  # the test failed before
            made.take_over()
        made.new.stop()
    made.new.assert_clean(Inventory())


def test_a_session_a_command_and_a_process_go_on(upgrade: Upgrade) -> None:
    url = upgrade.old.url
    config = SandboxConfig(base_url=url, api_key=OWNER, image="host", runtime=upgrade.runtime, memory="256m", cpus=1.0)
    with Sandbox(config) as box:
        box.arun("x=before; cd /tmp")
        process = box.processes.start(["sh", "-c", "echo begun; sleep 600"])
        top = f"/v1/sandboxes/{box.sandbox_id}"
        run = {"command": "echo run >> $HOME/marks; cat $HOME/marks; (exit 5)"}
        execute = {"command": ["sh", "-c", "echo executed >> $HOME/marks; cat $HOME/marks; exit 6"]}
        keyed = {f"{top}/sessions/default/run": run, f"{top}/execute": execute}
        answers = {path: done(url, "POST", path, body, OWNER, "once") for path, body in keyed.items()}
        long = Call(lambda: box.arun(COUNT, timeout=60))
        program = Call(lambda: box.execute(["sh", "-c", "echo in; sleep 3; echo out; exit 7"]))
        until(lambda: box.info().is_alive and _begun(box), why="the program does not begin")
        upgrade.take_over()
        seen = long.result()
        assert (seen.output, seen.exit_code) == (COUNTED, 41)
        ended = program.result()
        assert (ended.stdout, ended.exit_code) == ("in\nout\n", 7)
        for path, body in keyed.items():
            assert done(url, "POST", path, body, OWNER, "once") == answers[path]
        after = box.arun("echo $?; echo $x; pwd; cat $HOME/marks")
        assert after.output == "41\nbefore\n/tmp\nrun\nexecuted\n"
        assert process.status().running
        assert process.logs().data == b"begun\n"
        process.kill()
        info = box.info()
        assert [step.event for step in info.state_history].count("launched") == 1


def _begun(box: Sandbox) -> bool:
    return box.execute(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 3'"]).stdout != "0\n"


class Call:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._answers: list[Any] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._answers.append(call())
        except BaseException as error:
            self._errors.append(error)

    def result(self) -> Any:
        self._thread.join(90)
        if self._errors:
            raise self._errors[0]
        return self._answers[0]
