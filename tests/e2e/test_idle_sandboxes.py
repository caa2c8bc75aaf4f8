"""Idle sandboxes with open sessions: the server closes their descriptors, and nothing is lost by that."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.waiting import until

from rock.actions import CreateBashSessionRequest
from rock.errors import SessionClosed
from rock.guest.init import native
from rock.sync import Sandbox, SandboxConfig

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "probed.py"


def create(server: RunningServer) -> Sandbox:
    sandbox = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="64m", auto_clear_seconds=0))
    sandbox.start()
    return sandbox


def descriptors(server: RunningServer) -> collections.Counter[str]:
    """Descriptors of the server by kind, without its connections of TCP, which its clients open and close."""
    found: collections.Counter[str] = collections.Counter()
    for name in os.listdir(f"/proc/{server.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{server.pid}/fd/{name}")
        except OSError:
            continue
        if "/spools/" in target:
            found["spool"] += 1
        elif not target.startswith("/"):
            found[target.removeprefix("anon_inode:").partition(":")[0].strip("[]")] += 1
    found["socket"] = _unix_sockets(server.pid)
    return found


def _unix_sockets(pid: int) -> int:
    with open(f"/proc/{pid}/net/unix", encoding="ascii") as lines:
        known = {line.split()[6] for line in list(lines)[1:]}
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        count += target.startswith("socket:[") and target[8:-1] in known
    return count


def wait_closed(server: RunningServer, before: collections.Counter[str]) -> None:
    """Wait until no more streams and spool files are open than before."""
    until(lambda: all(descriptors(server)[kind] <= before[kind] for kind in ("pipe", "spool")), 20,
          "the descriptors of idle sessions stay open")  # fmt: skip


@pytest.mark.one_process("it counts the descriptors of the process that has the sandboxes")
def test_idle_sessions_hold_one_descriptor_and_keep_their_state(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_IDLE_AFTER="2")
    before = descriptors(server)
    sandboxes = [create(server) for _ in range(6)]
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}; cd /tmp")
    assert descriptors(server)["pipe"] - before["pipe"] >= 4 * len(sandboxes)
    first = sandboxes[0]
    first.create_session(CreateBashSessionRequest(session="terminal", pty=(24, 80)))
    first.create_session(CreateBashSessionRequest(session="ended"))
    shell = first.arun("echo $$", session="ended").output.strip()
    first.arun("(while [ ! -e /tmp/go ]; do sleep 0.2; done; echo late) &")
    wait_closed(server, before)
    more = descriptors(server) - before
    assert more.total() <= len(sandboxes) + 2, more

    # Output and the end of a shell arrive although no stream of it is open.
    first.execute(f"touch /tmp/go; kill -9 {shell}")
    time.sleep(1.0)
    with pytest.raises(SessionClosed, match="ended with status 137"):
        first.arun("echo x", session="ended")
    assert first.arun("echo $x").output == "late\n0\n"
    for number, sandbox in enumerate(sandboxes[1:], 1):
        assert sandbox.arun("echo $x $PWD").output == f"{number} /tmp\n"
    assert "4 2" in first.arun("echo $((2+2)) 2", session="terminal").output

    # A server that is killed while the streams are closed loses nothing either.
    first.arun("rm /tmp/go; (while [ ! -e /tmp/go ]; do sleep 0.2; done; echo later) &")
    wait_closed(server, before)
    first.execute("touch /tmp/go")
    server.kill()
    server.start()
    found = [Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(one.sandbox_id) for one in sandboxes]
    assert found[0].arun("echo $x").output == "later\n0\n"
    assert found[5].arun("echo $x $PWD").output == "5 /tmp\n"


@pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")
def test_neither_a_pause_nor_a_restart_wakes_pid_1(own_server: Callable[..., RunningServer]) -> None:
    """Its Python needs 1.3 MB and 2.6 ms of CPU, which all sandboxes of a server would need at a restart."""
    server = own_server(ROCK_IDLE_AFTER="1")
    before = descriptors(server)
    sandbox = create(server)
    sandbox.arun("x=5")
    [pid] = [record["pid"] for path in server.home.rglob("record.json")
             if (record := json.loads(path.read_text())).get("id") == sandbox.sandbox_id]  # fmt: skip
    wait_closed(server, before)
    assert sandbox.arun("echo $x").output == "5\n"
    assert waits_in_compiled_code(pid)
    server.kill()
    server.start()
    again = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(sandbox.sandbox_id)
    assert again.arun("echo $x").output == "5\n"
    assert waits_in_compiled_code(pid)
    long = "y=" + "z" * 20_000  # its file needs pid 1
    assert again.arun(f"{long}; echo ${{#y}}").output == "20000\n"
    assert not waits_in_compiled_code(pid)
    server.kill()
    server.start()
    again = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(sandbox.sandbox_id)
    assert again.arun("echo $x ${#y}; ls -A /tmp").output == "5 20000\n"


def waits_in_compiled_code(pid: int) -> bool:
    """Whether a pid 1 waits in ppoll, once it waits; its Python waits in epoll_wait."""
    until(lambda: not Path(f"/proc/{pid}/syscall").read_text().startswith("running"))
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == {"x86_64": "271", "aarch64": "73"}[os.uname().machine]


class CountingServer(RunningServer):
    """A server that counts its tasks and timers on request."""

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(PROGRAM), "--host", "127.0.0.1", "--port", str(port)]

    def counts(self) -> dict[str, Any]:
        program = f"import json, probed; print(json.dumps(probed.counts({self.pid})))"
        counted = subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parent, capture_output=True, check=True)
        found: dict[str, Any] = json.loads(counted.stdout)
        return found


def test_an_idle_sandbox_has_no_task_and_no_timer(tmp_path: Path) -> None:
    server = CountingServer(tmp_path, ROCK_IDLE_AFTER="2")
    give_image(tmp_path)
    server.start()
    try:
        create(server).arun(":")
        wait_closed(server, descriptors(server))
        until(lambda: not server.counts()["names"].get("ShellProcess._watch_exit"), 20, "a session has a task")
        before = server.counts()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: create(server).arun(":"), range(50)))
        until(lambda: server.counts()["tasks"] <= before["tasks"], 30, f"{server.counts()}, before {before}")
        until(lambda: server.counts()["timers"] < before["timers"] + 25, 30, "sandboxes have timers")
    finally:
        server.stop()


def test_many_sessions_in_use_close_their_descriptors_before_they_run_out(
        own_server: Callable[..., RunningServer]) -> None:  # fmt: skip
    server = own_server()
    server.kill()
    server.prefix = ["prlimit", "--nofile=400:400"]
    server.start()
    sandboxes = [create(server) for _ in range(40)]  # ten descriptors of each would be 400
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}")
    for number, sandbox in enumerate(sandboxes):
        assert sandbox.arun("echo $x").output == f"{number}\n"
