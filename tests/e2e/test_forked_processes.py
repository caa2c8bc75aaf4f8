"""Level "processes" over a real server: sessions, background processes, rollback, refusals, restarts, commands."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import home_of, homes
from tests.waiting import until

from rock.errors import Unavailable, Unsupported
from rock.protocol.action import CreateBashSessionRequest
from rock.sync import Client, Sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or platform.machine() != "x86_64",
                                reason="processes are copied by root on x86_64 only")  # fmt: skip
COUNTER = "n=0; while read word; do n=$((n + 1)); echo $n $word; done"
STATE = r"""
cd /tmp; plain=5; say() { echo "said $1"; }; sleep 1000 & sleeper=$!; exec 7<<<$'line 1\nline 2'; read -u 7 first
RANDOM=42; unset BASH_REMATCH; [[ abc =~ b ]]; pushd /usr >/dev/null; (exit 3)
"""
SHOW = r"""
echo "$? $plain $PWD $first $$ $BASHPID $sleeper"; say x; read -u 7 second
echo $second $RANDOM $RANDOM ${BASH_REMATCH[0]}; dirs; jobs -p | wc -l; kill $sleeper; wait $sleeper; echo $?
"""


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as made:
        yield made


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    made = Client(server.url)
    yield made
    for one in reversed(made.list_snapshots()):
        made.delete_snapshot(one.snapshot_id)


def out(box: Sandbox, command: str, session: str = "default") -> str:
    return str(box.run(command, session=session).output).strip()


def test_sessions_and_background_processes_continue_in_children(box: Sandbox, client: Client) -> None:
    box.create_session(CreateBashSessionRequest(session="work"))
    box.run(STATE, session="work")
    box.run("x=1; echo kept > /tmp/file")
    process = box.processes.start(COUNTER)
    process.write_stdin("one\n")
    until(lambda: "1 one" in process.logs().data.decode(), 10)
    assert box.forkable().memory == "processes" and box.forkable().reasons == []
    children = box.fork(3, env={"FRESH": "yes"})
    try:
        taken = client.get_snapshot(children[0].config.snapshot or "")
        assert (taken.memory, taken.files, taken.left_out) == ("processes", "switch", [])
        expected = out(box, SHOW, "work")
        assert expected.startswith("3 5 /usr line 1") and "said x\nline 2" in expected and expected.endswith("143")
        for number, child in enumerate(children):
            assert out(child, SHOW, "work") == expected
            assert out(child, "echo $x $FRESH; cat /tmp/file") == "1 yes\nkept"
            [copy] = child.processes.list()
            assert copy.id == process.id and copy.status().running
            copy.write_stdin(f"two{number}\n")
            until(lambda copy=copy, number=number: f"2 two{number}" in copy.logs().data.decode(), 10)  # type: ignore[misc]
            assert "1 one" not in copy.logs().data.decode(), "earlier output stays with the original"
            copy.kill()
            until(lambda copy=copy: not copy.status().running, 10)  # type: ignore[misc]
        process.write_stdin("two\n")
        until(lambda: "2 two" in process.logs().data.decode(), 10)
    finally:
        for child in children:
            child.stop()


def test_a_rollback_returns_to_the_processes(box: Sandbox, client: Client) -> None:
    box.run("cd /tmp; x=1; sleep 1000 & echo $! > pid")
    process = box.processes.start(COUNTER)
    first = box.checkpoint(memory="processes")
    assert first.memory == "processes" and first.paused_ms > 0
    box.run("x=2; kill $(cat /tmp/pid); cd /; rm /tmp/pid")
    process.kill()
    for _ in range(2):
        box.rollback(first)
        assert out(box, "echo $x $PWD; jobs -p; cat pid").split()[:2] == ["1", "/tmp"]
        assert out(box, "kill -0 $(cat pid) && echo alive") == "alive"
        [again] = box.processes.list()
        again.write_stdin("word\n")
        until(lambda again=again: "1 word" in again.logs().data.decode(), 10)  # type: ignore[misc]
        assert box.checkpoint().parent == first.snapshot_id


def test_auto_reports_why_a_level_is_not_possible(box: Sandbox, client: Client) -> None:
    box.run("x=1")
    server = ("import socket, time\ns = socket.create_server(('127.0.0.1', 0))\n"
              "print('up', flush=True); time.sleep(1000)")  # fmt: skip
    process = box.processes.start(["python3", "-c", server])
    until(lambda: "up" in process.logs().data.decode(), 10)
    found = box.forkable()
    assert found.memory == "session" and "has a socket open" in found.reasons[0] and "python3 -c" in found.reasons[0]
    with pytest.raises(Unsupported, match="has a socket open"):
        box.checkpoint(memory="processes")
    taken = box.checkpoint()
    assert taken.memory == "session" and any("has a socket open" in line for line in taken.left_out)
    box.create_session(CreateBashSessionRequest(session="terminal", pty=(24, 80)))
    assert box.forkable().memory == "files"
    command = [sys.executable, "-m", "rock.cli.main", "forkable", box.sandbox_id or ""]
    environ = {**os.environ, "ROCK_BASE_URL": box.config.base_url or ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.stdout == "files\n" and "a socket open" in done.stderr, done
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert json.loads(done.stdout)["memory"] == "files"
    assert out(box, "echo $x") == "1"


def test_copies_outlive_a_killed_server(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    port = int(server.url.rpartition(":")[2])
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, reconnect_timeout=60) as box:
        box.run("x=1; sleep 1000 & job=$!")
        taken = box.checkpoint(name="base")
        assert taken.memory == "processes"
        [child] = box.fork()
        child.run("x=2")
        server.kill()
        server.start(port)
        assert out(child, "echo $x; kill -0 $job && echo alive") == "2\nalive"
        with Sandbox(snapshot="base", memory="256m", cpus=1.0, base_url=server.url) as later:
            assert out(later, "echo $x; kill -0 $job && echo alive") == "1\nalive", "its memory comes from the disk"
        child.stop()
    client = Client(server.url)
    for one in reversed(client.list_snapshots()):
        client.delete_snapshot(one.snapshot_id)
    until(lambda: not any((home / "run/namespace/snapshots").exists() for home in homes(server.home)), 10)


def test_a_child_that_fails_at_its_end_leaves_nothing(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """The stop of the group comes while the failed child is removed."""
    plan = tmp_path / "plan"
    plan.write_text("")
    server = own_server(ROCK_FAULTS=str(plan))

    def slots() -> int:
        return sum(len([*(home / "run/namespace").glob("n-*")]) for home in homes(server.home))

    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.run("x=1")
        for place in (1, 2, 1, 2, 1, 1):
            plan.with_suffix(".new").write_text(f"node.sessions.attached=error@{place}")
            plan.with_suffix(".new").replace(plan)
            with pytest.raises(Unavailable):
                box.fork(2)
            until(lambda: slots() == 1, 10)
        plan.write_text("")
    client = Client(server.url)
    for one in reversed(client.list_snapshots()):
        client.delete_snapshot(one.snapshot_id)
    until(lambda: not any((home / "run/namespace/snapshots").exists() for home in homes(server.home)), 10)


def test_commands_begin_before_the_checkpoint_returns(own_server: Callable[..., RunningServer]) -> None:
    """The state is that of the moment in which all was stopped, whatever commands do until it is stored."""
    server = own_server(ROCK_FAULTS="namespace.processes.finished=stall:15@1")
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.run("x=before; echo before > /tmp/file")
        with ThreadPoolExecutor(1) as threads:
            taking = threads.submit(box.checkpoint, memory="processes")
            found = home_of(server.home, box.sandbox_id) / "run/namespace/snapshots"
            until(lambda: any(found.glob("*/processes.json")), 60)
            box.run("x=after; echo after > /tmp/file")
            assert not taking.done()
            assert out(box, "echo $x; cat /tmp/file") == "after\nafter"
            taken = taking.result(60)
        with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=server.url) as child:
            assert out(child, "echo $x; cat /tmp/file") == "before\nbefore"
