"""kill -9 of the server at a bad moment: sandboxes live on, and the next server finds them and their sessions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.actions import CreateBashSessionRequest
from rock.errors import Conflict, NoCapacity, RockError, Unavailable
from rock.host import atomic_file
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox, SandboxConfig
from rock.sync.transport import Transport


def make(server: RunningServer, **fields: object) -> Sandbox:
    sandbox = Sandbox(
        SandboxConfig.model_validate({"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0, **fields})
    )
    sandbox.start()
    return sandbox


def again(server: RunningServer, sandbox: Sandbox) -> Sandbox:
    return Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(sandbox.sandbox_id)


@pytest.mark.parametrize("pool", ["0", "2"])
def test_sandboxes_sessions_and_processes_are_found_again(own_server: Callable[..., RunningServer], pool: str) -> None:
    server = own_server(ROCK_POOL_SIZE=pool)
    sandboxes = [make(server) for _ in range(5)]
    for number, sandbox in enumerate(sandboxes):
        sandbox.create_session(CreateBashSessionRequest(session="work"))
        sandbox.arun(f"x={number}; cd /tmp; echo kept > file", session="work")
        sandbox.arun("y=default")
    process = sandboxes[0].processes.start("for i in 1 2 3 4 5 6; do echo line $i; sleep 0.3; done; exit 3")
    server.kill()
    server.start()
    for number, sandbox in enumerate(sandboxes):
        found = again(server, sandbox)
        assert found.arun("echo $x $PWD $(cat file)", session="work").output == f"{number} /tmp kept\n"
        assert found.arun("echo $y").output == "default\n"
    same = again(server, sandboxes[0]).processes.get(process.id)
    assert same.wait(10).exit_code == 3
    assert same.logs().data == b"".join(b"line %d\n" % n for n in range(1, 7))


def test_a_command_that_was_running_does_not_confuse_its_session(own_server: Callable[..., RunningServer]) -> None:
    """Its client never comes back: it has gone on, and the next command has nothing of it."""
    server = own_server()
    sandbox = make(server)
    path = ROUTES["run"].url(sandbox_id=sandbox.sandbox_id or "", session="default")

    def call() -> None:
        body = {"command": "sleep 1.5; echo finished > /tmp/flag; echo old output; false"}
        with pytest.raises(Unavailable):
            Transport(server.url, reconnect_timeout=0).json("POST", path, body)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.4)
    server.kill()
    thread.join(20)
    server.start()
    seen = again(server, sandbox).arun("echo new; cat /tmp/flag")
    assert (seen.exit_code, seen.output) == (0, "new\nfinished\n")


def test_what_died_meanwhile_is_told(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    alive, dead = make(server), make(server)
    # The host's view of the sandbox's pid 1, by the inventory of what the server started.
    before = {item for item in server.inventory().items if item.startswith("process ")}
    dead_shell = dead.arun("echo $$").output
    assert dead_shell
    server.kill()
    assert before
    server.start()
    assert again(server, alive).arun("echo").exit_code == 0
    with Client(server.url) as client:
        assert {i.state for i in client.list_sandboxes()} == {State.RUNNING}
        client.stop_sandbox(dead.sandbox_id)
        assert client.get_sandbox(dead.sandbox_id).cause is Cause.USER


def test_what_a_newer_server_wrote_is_left_to_it(own_server: Callable[..., RunningServer]) -> None:
    """An older server that is tried in between does not understand the record: it ends nothing that it is about."""
    server = own_server()
    sandbox = make(server)
    (file,) = (path for path in server.home.rglob(f"records/{sandbox.sandbox_id}") if path.is_file())
    text = file.read_text()
    (pid,) = (int(json.loads(path.read_text())["pid"]) for path in server.home.rglob("record.json"))
    server.kill()
    record = json.loads(text)
    record["config"]["of_tomorrow"] = 1
    del record["crc"]
    file.write_text(atomic_file.summed(json.dumps(record)))
    server.start()
    logs = [path.read_text() for path in (server.home / "logs").glob("*.log")]
    assert "could not be found again" in "".join(logs)
    assert file.exists() and Path(f"/proc/{pid}").exists()
    server.kill()
    file.write_text(text)
    server.start()


@pytest.fixture
def slow(own_server: Callable[..., RunningServer], tmp_path: Path) -> Iterator[tuple[RunningServer, Path]]:
    """A server for four sandboxes, and the file of its faults."""
    plan = tmp_path / "plan"
    plan.write_text("")
    yield own_server(ROCK_FAULTS=str(plan), ROCK_SANDBOX_LIMIT="4", ROCK_POOL_SIZE="0"), plan
    plan.write_text("")


def test_an_unattached_sandbox_is_listed_counted_and_waited_for(slow: tuple[RunningServer, Path]) -> None:
    server, plan = slow
    sandboxes = [make(server) for _ in range(4)]
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}")
    server.kill()
    plan.write_text("node.recovery.attach=stall:3")
    server.start()
    with Client(server.url) as client:
        listed = client.list_sandboxes(states="running")
        assert {info.sandbox_id for info in listed} == {sandbox.sandbox_id for sandbox in sandboxes}
    with pytest.raises(NoCapacity):
        make(server)
    plan.write_text("")
    found = [again(server, sandbox) for sandbox in sandboxes]
    assert [one.arun("echo $x").output for one in found] == ["0\n", "1\n", "2\n", "3\n"]
    assert server.log().count("found sandbox") == 4  # each once, although a request and the background need it


def test_an_unattached_sandbox_can_be_stopped(slow: tuple[RunningServer, Path]) -> None:
    server, plan = slow
    sandboxes = [make(server) for _ in range(3)]
    server.kill()
    plan.write_text("node.recovery.attach=stall:2")
    server.start()
    with Client(server.url) as client:
        assert client.stop_sandbox(sandboxes[0].sandbox_id or "").state is State.STOPPED
        assert client.get_sandbox(sandboxes[0].sandbox_id or "").cause is Cause.USER
    plan.write_text("")
    assert [again(server, sandbox).arun("echo a").output for sandbox in sandboxes[1:]] == ["a\n"] * 2


@pytest.mark.one_process("each of several processes attaches to its sandboxes before it serves")
def test_a_sandbox_that_ends_before_it_is_attached_is_lost(slow: tuple[RunningServer, Path]) -> None:
    server, plan = slow
    ended, stays = make(server), make(server)
    (record,) = (found for path in server.home.rglob("record.json")
                 if (found := json.loads(path.read_text())).get("id") == ended.sandbox_id)
    server.kill()
    plan.write_text("node.recovery.attach=stall:2")
    server.start()
    os.kill(int(record["pid"]), signal.SIGKILL)
    with Client(server.url) as client:
        until(lambda: client.get_sandbox(ended.sandbox_id or "").state is State.STOPPED)
        assert client.get_sandbox(ended.sandbox_id or "").cause is Cause.LOST
    plan.write_text("")
    assert again(server, stays).arun("echo a").output == "a\n"


@pytest.mark.one_process("each of several processes attaches to its sandboxes before it serves")
def test_a_kill_before_all_sandboxes_are_attached(slow: tuple[RunningServer, Path]) -> None:
    server, plan = slow
    sandboxes = [make(server) for _ in range(4)]
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}")
    for passes in (1, 3):
        server.kill()
        plan.write_text(f"node.recovery.attach=kill@{passes}")
        with contextlib.suppress(AssertionError, RockError):  # it may end before it serves
            server.start()
        assert server.process is not None
        until(lambda: server.process is not None and server.process.poll() is not None)
        plan.write_text("")
        server.start()
    assert [again(server, one).arun("echo $x").output for one in sandboxes] == ["0\n", "1\n", "2\n", "3\n"]


def test_deadlines_survive(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    sandbox = make(server, timeout=3.0)
    server.kill()
    server.start()
    end = time.time() + 8
    with Client(server.url) as client:
        while client.get_sandbox(sandbox.sandbox_id).state is not State.STOPPED:
            assert time.time() < end
            time.sleep(0.1)
        assert client.get_sandbox(sandbox.sandbox_id).cause is Cause.DEADLINE


def test_kill_in_the_middle_of_starts(own_server: Callable[..., RunningServer]) -> None:
    """Whatever was under way: after the next start every record is true, and nothing lives without one."""
    server = own_server()
    acknowledged: list[str] = []

    def create() -> None:
        try:
            acknowledged.append(make(server, reconnect_timeout=0).sandbox_id)
        except RockError:
            pass

    threads = [threading.Thread(target=create) for _ in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(0.12)
    server.kill()
    for thread in threads:
        thread.join(30)
    server.start()
    with Client(server.url) as client:
        end = time.time() + 20
        while any(i.state is State.PENDING for i in client.list_sandboxes()):
            assert time.time() < end
            time.sleep(0.05)
        infos = {i.sandbox_id: i for i in client.list_sandboxes()}
        assert set(acknowledged) <= {name for name, i in infos.items() if i.state is State.RUNNING}
        for name, info in infos.items():
            if info.state is State.RUNNING:
                assert again(server, _named(server, name)).arun("echo ok").output == "ok\n"


def _named(server: RunningServer, name: str) -> Sandbox:
    return Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(name)


def test_two_servers_never_share_a_home(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    twin = RunningServer(server.home)
    with pytest.raises(AssertionError, match="a server is running already"):
        twin.start()
    assert Conflict.code == "conflict"


def test_two_servers_with_two_homes_never_meet(own_server: Callable[..., RunningServer]) -> None:
    one, two = own_server(), own_server()
    here = make(one)
    with Client(two.url) as client:
        assert client.list_sandboxes() == []
    two.kill()
    two.start()
    assert here.arun("echo mine").output == "mine\n"
