"""What the fault suite found, each as a test that keeps it fixed; the table is in docs/reliability.md. And a share of
the suite itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rock import faults
from rock.errors import Conflict, InvalidConfig, RockError, StorageFull, Unavailable
from rock.sync.transport import Transport
from tests.faults.campaign import campaign
from tests.faults.machine import POINTS
from tests.faults.world import KINDS, World
from tests.waiting import until

SOURCE = Path(faults.__file__).parent
RUNS = int(os.environ.get("ROCK_TEST_FAULTS", "2"))
Make = Callable[[str], World]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    made: dict[str, World] = {}

    def make(kind: str) -> World:
        if kind not in made:
            made[kind] = World(kind, tmp_path_factory.mktemp(kind))
        made[kind].calm()
        return made[kind]

    yield make
    for world in made.values():
        world.close()


def killed(world: World, plan: str, call: Callable[[], Any]) -> None:
    """The server comes to a point at which it is killed, and is started again."""
    world.server.faults(plan)
    with contextlib.suppress(Unavailable):
        call()
    until(lambda: not world.server.alive)
    world.ensure()


def make(world: World, key: str) -> Any:
    return world.ask("create_sandbox", world.config(), key, "wait=30")


def stop(world: World, info: Any) -> None:
    world.ask("stop_sandbox", sandbox_id=info["sandbox_id"])


@pytest.mark.parametrize("point", ["create.saved", "launch.begun", "launch.made", "store.inserted", "process.born",
                                   "node.create.made", "node.create.saved"])  # fmt: skip
def test_a_create_that_was_broken_off_is_finished(worlds: Make, point: str) -> None:
    """Once with pid 1 left behind (process.born), once refused for a network that nobody chose (create.saved)."""
    world = worlds("process")
    killed(world, f"{point}=kill@1", lambda: make(world, f"broken-off-{point}"))
    info = make(world, f"broken-off-{point}")
    assert info["state"] == "running"
    until(lambda: world.pids == 1 and world.records == {info["sandbox_id"]})
    stop(world, info)
    until(lambda: world.pids == 0 and not world.records)


@pytest.mark.parametrize("point", ["stop.saved", "node.destroy.begun", "node.destroy.gone", "node.destroy.forgotten",
                                   "stop.released", "reply.stop_sandbox"])  # fmt: skip
def test_a_stop_that_was_broken_off_is_finished(worlds: Make, point: str) -> None:
    world = worlds("process")
    info = make(world, f"stop-{point}")
    killed(world, f"{point}=kill@1", lambda: stop(world, info))
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped")
    until(lambda: world.pids == 0 and not world.records)


def test_a_kill_that_was_broken_off(worlds: Make) -> None:
    """A tree is stopped before it is killed: a pid 1 that stood still kept the next server waiting for a minute."""
    world = worlds("process")
    info = make(world, "half killed")
    pid = min(world.roots)  # and what it is just forking
    with contextlib.suppress(Unavailable):
        world.server.faults("node.destroy.begun=kill@1")
        stop(world, info)
    until(lambda: not world.server.alive)
    os.kill(pid, signal.SIGSTOP)
    world.ensure()
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped")
    until(lambda: world.pids == 0 and not world.records)


@pytest.mark.parametrize("point", ["run.begun", "run.written", "run.ended", "reply.run"])
def test_a_command_is_run_once(worlds: Make, point: str) -> None:
    world = worlds("process")
    path = {"sandbox_id": make(world, f"once-{point}")["sandbox_id"], "session": "default"}
    body = {"command": "echo x >> $HOME/file; cat $HOME/file; (exit 9)"}
    killed(world, f"{point}=kill@1", lambda: world.ask("run", body, "the-key", **path))
    for _ in range(2):
        seen = world.ask("run", body, "the-key", **path)
        assert (seen["output"], seen["exit_code"]) == ("x\n", 9)
    stop(world, path)


@pytest.mark.parametrize("point", ["execute.started", "execute.ended", "reply.execute"])
def test_a_program_is_run_once(worlds: Make, point: str) -> None:
    """Killed after its end, before that was written down: pid 1 had forgotten the program, and it was run again."""
    world = worlds("process")
    path = {"sandbox_id": make(world, f"once-{point}")["sandbox_id"]}
    body = {"command": ["sh", "-c", "echo x >> $HOME/file; cat $HOME/file; exit 9"]}
    killed(world, f"{point}=kill@1", lambda: world.ask("execute", body, "the-key", **path))
    for _ in range(2):
        seen = world.ask("execute", body, "the-key", **path)
        assert (seen["stdout"], seen["exit_code"]) == ("x\n", 9)
    stop(world, path)


@pytest.mark.parametrize("point", ["process.started", "process.saved"])
def test_a_process_is_started_once(worlds: Make, point: str) -> None:
    """Killed after its start, before it was written down: it ran on, and nobody knew of it. Before its answer was: it
    waited for its input for ever."""
    world = worlds("process")
    path = {"sandbox_id": make(world, f"once-{point}")["sandbox_id"]}
    body = {"command": ["sh", "-c", "echo x >> $HOME/file; cat > $HOME/input; exec sleep 600"], "stdin": "given"}
    killed(world, f"{point}=kill@1", lambda: world.ask("start_process", body, "the-key", **path))
    first = world.ask("start_process", body, "the-key", **path)
    assert [p["process_id"] for p in world.ask("list_processes", **path)["items"]] == [first["process_id"]]
    look = {"command": ["sh", "-c", "cat $HOME/file $HOME/input"]}
    until(lambda: world.ask("execute", look, **path)["stdout"] == "x\ngiven")
    stop(world, path)


@pytest.mark.parametrize("point", ["session.spawned", "session.opened", "reply.create_session"])
def test_a_session_is_opened_once(worlds: Make, point: str) -> None:
    """Killed before the answer: asked again, it was a Conflict with itself."""
    world = worlds("process")
    path = {"sandbox_id": make(world, f"session-{point}")["sandbox_id"]}
    world.ask("run", {"command": "true"}, session="default", **path)
    body = {"session": "mine"}
    killed(world, f"{point}=kill@1", lambda: world.ask("create_session", body, "the-key", **path))
    world.ask("create_session", body, "the-key", **path)
    assert world.ask("run", {"command": "echo works"}, session="mine", **path)["output"] == "works\n"
    stop(world, path)


def test_a_command_after_one_whose_end_is_damaged(worlds: Make) -> None:
    """The shell was assumed to run the first one. The second one was not continued, and its retry ran it again."""
    world = worlds("process")
    path = {"sandbox_id": make(world, "damaged end")["sandbox_id"], "session": "default"}
    world.ask("run", {"command": "true"}, "the first", **path)
    body = {"command": "echo x >> $HOME/file; sleep 1"}
    thread = threading.Thread(target=lambda: _quietly(lambda: world.ask("run", body, "the second", **path)))
    thread.start()
    journals = [file for file in (world.server.home / "run" / "spools").rglob("journal") if file.stat().st_size]
    until(lambda: any(b"the second" in file.read_bytes() for file in journals))
    world.server.kill()
    thread.join()
    journal = next(file for file in journals if b"the second" in file.read_bytes())
    journal.write_bytes(journal.read_bytes().replace(b'{"end"', b'{"enf"', 1))
    world.ensure()
    with contextlib.suppress(Conflict):
        world.ask("run", body, "the second", **path)
    seen = world.ask("execute", {"command": ["sh", "-c", "cat $HOME/file"]}, sandbox_id=path["sandbox_id"])
    assert seen["stdout"] == "x\n"
    stop(world, path)


def _quietly(call: Callable[[], Any]) -> None:
    with contextlib.suppress(Unavailable):
        call()


def test_clocks_that_differ(worlds: Make) -> None:
    """The admin's is ahead: what a worker told of an end seemed to be of an earlier life, and was passed over."""
    world = worlds("apart")
    world.server.faults("clock=+7000")
    info = make(world, "clocks")
    assert world.worker is not None
    world.worker.kill()
    world.ensure()
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped")
    assert world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["cause"] == "lost"


def test_a_worker_that_was_started_twice(worlds: Make) -> None:
    """The first time it told of what was lost, and was killed before anybody had heard it."""
    world = worlds("apart")
    info = make(world, "twice")
    assert world.worker is not None
    world.worker.kill()
    world.ensure()
    until(lambda: not world.records)
    world.worker.kill()
    world.ensure()
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped")


@pytest.mark.parametrize("action", ["full", "error"])
def test_a_store_that_fails_after_it_has_saved(worlds: Make, action: str) -> None:
    """It was saved, found by its key, and never started."""
    world = worlds("process")
    world.server.faults(f"store.inserted={action}@1")
    info = make(world, f"saved-{action}")
    assert info["state"] == "running" and len(world.records) == 1
    stop(world, info)


@pytest.mark.parametrize("action", ["full", "error"])
@pytest.mark.parametrize("kind", ["process", "joined"])
def test_a_stop_that_a_store_saves_before_it_fails(worlds: Make, kind: str, action: str) -> None:
    """The client got an error, and the sandbox stayed in the state "stopping" until the next stop."""
    world = worlds(kind)
    info = make(world, f"stopping-{kind}-{action}")
    world.server.faults(f"store.saved={action}@1")
    with pytest.raises((StorageFull, Unavailable)):
        stop(world, info)
    world.server.faults("")
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped", 15.0)
    until(lambda: world.pids == 0 and not world.records)


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"])
def test_an_answer_that_was_cut_is_a_broken_connection(part: bytes) -> None:
    """Head and body are two packets: a server that was killed between them looked like one that speaks no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Unavailable) as caught:
            Transport(f"http://127.0.0.1:{listener.getsockname()[1]}", reconnect_timeout=0).json("POST", "/", {})
        thread.join()
        assert caught.value.details == {"sent": True}


# ---- the points ----


def test_a_plan_says_what_happens_when() -> None:
    plan = faults.Plan("a=kill@2, b*=full,c=stall:0.5\nclock=-60")
    assert [plan.at(name) for name in ("a", "a", "a", "b", "bc", "c", "d")] == [
        None, "kill", None, "full", "full", "stall:0.5", None,
    ]  # fmt: skip
    assert plan.clock == -60
    for bad in ("a", "a=b", "a=kill@0", "a=stall", "clock=soon", "a=kill@-1"):
        with pytest.raises(InvalidConfig):
            faults.Plan(bad)


def test_no_point_does_anything_unless_asked() -> None:
    assert not faults.active
    assert time.time is faults._real_time


def test_the_suite_knows_points_that_are_there() -> None:
    text = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    there = set(re.findall(r'faults\.point\("([a-z_.]+)"\)', text))
    assert {name for name in POINTS if not name.startswith("reply.")} <= there


def test_the_settings_refuse_a_plan_that_is_none() -> None:
    with pytest.raises(RockError, match="ROCK_FAULTS"):
        faults.arm("nonsense")
    assert not faults.active


# ---- a share of the suite ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(3600)
def test_randomised_faults(kind: str, tmp_path: Path) -> None:
    if kind == "postgres":
        pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    runs = max(1, RUNS // 2) if "namespace" in kind or kind == "cluster" else RUNS
    counts = campaign(kind, runs, 5, 5, tmp_path, longest=0.5)
    assert counts["runs"] and not counts["problems"], counts


def test_a_rocklet_that_restarts_twice_right_after_the_admin(worlds: Make) -> None:
    """The sandboxes of "apart" are in memory. The admin has no event of the rocklet yet, and the event of the first
    restart is lost by the second one."""
    world = worlds("apart")
    info = make(world, "restarted-after-the-admin")
    world.server.kill()
    world.ensure()
    assert world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "running"
    assert world.worker is not None
    os.kill(world.server.pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            world.worker.kill()
            world.worker.ensure()
    finally:
        os.kill(world.server.pid, signal.SIGCONT)
    until(lambda: world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["state"] == "stopped")
    assert world.ask("get_sandbox", sandbox_id=info["sandbox_id"])["cause"] == "lost"
