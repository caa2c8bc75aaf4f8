"""An admin and a rocklet as two processes, with a real lease: each is killed for a while, and nothing is done twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.faults.world import KEY, Server, World
from tests.leaks import Inventory, take_inventory
from tests.waiting import slowness, until

from rock.actions import CreateBashSessionRequest
from rock.errors import Conflict, Unavailable
from rock.protocol.node import WorkerState
from rock.protocol.routes import ROUTES
from rock.sync import Client, Sandbox, SandboxConfig
from rock.sync.transport import Transport

BEGUN = 1.0  # seconds in which a command certainly has begun
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("joined", tmp_path_factory.mktemp("world"), "namespace")
    yield made
    made.close()
    for server in filter(None, (made.server, made.worker)):
        assert not take_inventory(server.home, -1) - Inventory()


@pytest.fixture
def box(world: World) -> Iterator[Sandbox]:
    with Sandbox(config(world)) as made:
        made.arun("true")
        yield made


def config(world: World, **more: Any) -> SandboxConfig:
    return SandboxConfig(base_url=world.server.url, api_key=KEY, image="host", memory="256m", cpus=1.0, **more)


def role(world: World, name: str) -> Server:
    return world.server if name == "admin" else world.holder


def while_away(server: Server, seconds: float, *calls: Callable[[], Any], times: int = 1) -> list[Any]:
    """What calls answer in the middle of which a server is killed, to be started again `seconds` later. An error stands
    in the place of an answer."""
    answers: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            answers[number] = calls[number]()
        except BaseException as error:
            answers[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for _ in range(times):
        time.sleep(BEGUN)
        server.kill()
        time.sleep(seconds)
        server.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return answers


@pytest.mark.parametrize("name", ["admin", "rocklet"])
@pytest.mark.parametrize("seconds", [0.1, 2.0, pytest.param(6.0, marks=LONG), pytest.param(25.0, marks=LONG)])
def test_what_runs_is_run_once(world: World, box: Sandbox, name: str, seconds: float) -> None:
    """Commands in a session, programs, and what takes longer than both outages."""
    text = "echo begin >> /tmp/{0}; sleep 4; echo end >> /tmp/{0}; echo out; exit 5"
    box.create_session(CreateBashSessionRequest(session="other"))
    run, executed, started, slept = while_away(
        role(world, name), seconds,
        lambda: box.arun(f"({text.format('run')})", session="other"),
        lambda: box.execute(["sh", "-c", text.format("executed")]),
        lambda: box.processes.start(["sh", "-c", text.format("started")]).wait(60),
        lambda: box.arun("sleep 3; echo whole"),
    )  # fmt: skip
    assert (run.output, run.exit_code) == ("out\n", 5)
    assert (executed.stdout, executed.exit_code) == ("out\n", 5)
    assert started.exit_code == 5
    assert slept.output == "whole\n"
    for once in ("run", "executed", "started"):
        assert box.execute(["cat", f"/tmp/{once}"]).stdout == "begin\nend\n", once


@pytest.mark.parametrize("name", ["admin", "rocklet"])
def test_calls_that_begin_while_a_server_is_away(world: World, box: Sandbox, name: str) -> None:
    """Creates, lists, files and commands wait for it; each is done once."""
    server = role(world, name)
    server.kill()
    made = Sandbox(config(world))
    client = Client(world.server.url, KEY)
    calls: list[Callable[[], Any]] = [
        made.start,
        lambda: box.arun("echo x >> /tmp/begun; cat /tmp/begun"),
        lambda: box.fs.append("/tmp/appended", "line\n"),
        lambda: box.execute(["echo", "here"]).stdout,
        lambda: [chunk.data for chunk in box.stream(["echo", "streamed"])],
        lambda: box.create_session(CreateBashSessionRequest(session="late")),
        lambda: len(client.list_sandboxes(states="running")),
    ]
    answers: list[Any] = [None] * len(calls)

    def work(number: int) -> None:
        try:
            answers[number] = calls[number]()
        except BaseException as error:
            answers[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    time.sleep(2.0)
    server.start()
    for thread in threads:
        thread.join(60)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    assert not errors, errors
    assert answers[1].output == "x\n" and answers[3] == "here\n" and answers[4] == [b"streamed\n"] and answers[6] >= 1
    assert box.fs.read("/tmp/appended") == b"line\n"
    assert made.arun("echo made").output == "made\n"
    made.stop()


def test_no_sandbox_ends_while_the_admin_is_away(world: World, box: Sandbox) -> None:
    """Longer than a lease of 10 s would be held, and several times in a row."""
    pid = box.execute(["sh", "-c", "sleep 600 & echo $!"]).stdout.strip()
    world.server.kill()
    time.sleep(9.0)
    world.server.start()
    for _ in range(2):
        world.server.kill()
        time.sleep(0.5)
        world.server.start()
    assert box.execute(["test", "-d", f"/proc/{pid}"]).exit_code == 0
    with Client(world.server.url, KEY) as client:
        worker = client.list_workers()[0]
        assert worker.epoch == 1
        until(lambda: client.list_workers()[0].state is WorkerState.READY, 20.0)
    with Sandbox(config(world)) as another:
        assert another.execute(["echo", "new"]).stdout == "new\n"


def test_a_worker_that_stands_still_is_unreachable_and_not_lost(world: World, box: Sandbox) -> None:
    """It takes connections and answers nothing: a command fails near its deadline, and its sandboxes stay."""
    assert world.worker is not None
    box.arun("x=kept")
    os.kill(world.worker.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="not reached"):
            box.arun("echo once >> /tmp/still", wait_timeout=10)
        assert time.monotonic() - began < 10 + 1.5 * slowness()
        with Client(world.server.url, KEY) as client:
            until(lambda: client.list_workers()[0].state is WorkerState.UNREACHABLE, 20.0)
            with pytest.raises(Unavailable):
                Sandbox(config(world, reconnect_timeout=0)).start()
            assert client.get_sandbox(str(box.sandbox_id)).state == "running"
    finally:
        os.kill(world.worker.pid, signal.SIGCONT)
    assert box.arun("echo $x; cat /tmp/still").output == "kept\nonce\n"


def post(world: World, box: Sandbox, body: Any, key: str, **options: Any) -> Any:
    url = ROUTES["execute"].url(sandbox_id=box.sandbox_id or "")
    return Transport(world.server.url, KEY, reconnect_timeout=0).json("POST", url, body, key=key, **options)


def test_a_client_that_leaves_ends_its_command_and_the_key_is_a_conflict(world: World, box: Sandbox) -> None:
    body = {"command": ["sh", "-c", "echo begin >> /tmp/left; echo $$ > /tmp/pid; sleep 600"], "timeout": 900}
    with pytest.raises(Unavailable, match="did not respond"):
        post(world, box, body, "left", timeout=1.5)
    pid = box.execute(["cat", "/tmp/pid"]).stdout.strip()
    gone = lambda: box.execute(["test", "-d", f"/proc/{pid}"]).exit_code != 0  # noqa: E731
    until(gone, 8.0, "the command goes on")
    with pytest.raises(Conflict, match="its client left"):
        post(world, box, body, "left", timeout=10)
    assert world.worker is not None
    world.worker.kill()
    world.worker.start()
    with pytest.raises(Conflict, match="its client left"):
        Transport(world.server.url, KEY).json("POST", ROUTES["execute"].url(sandbox_id=box.sandbox_id or ""), body,
                                              key="left", timeout=20)  # fmt: skip
    assert box.execute(["cat", "/tmp/left"]).stdout == "begin\n"
