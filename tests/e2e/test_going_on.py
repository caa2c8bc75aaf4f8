"""What runs when the server is killed goes on, and who asked for it reads on where it stopped."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.world import Server, World
from tests.leaks import Inventory, home_of, take_inventory
from tests.waiting import until

from rock.actions import CreateBashSessionRequest
from rock.errors import Conflict
from rock.protocol.routes import ROUTES
from rock.sync import Sandbox, SandboxConfig
from rock.sync.transport import Transport

PAUSE = 0.5  # seconds in which a command certainly has begun


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("namespace", tmp_path_factory.mktemp("world"))
    yield made
    made.close()
    assert not take_inventory(made.server.home, -1) - Inventory()


@pytest.fixture
def server(world: World) -> Server:
    """A server that comes back at the same address."""
    return world.server


@pytest.fixture
def box(server: Server) -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(base_url=server.url, image="host", memory="256m", cpus=1.0)) as made:
        yield made


def over_a_crash(
    server: Server, call: Callable[[], Any], pause: float = PAUSE, times: int = 1, graceful: bool = False
) -> Any:
    """What a call answers in the middle of which the server is killed, or stopped, and started again."""
    answers: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(times):
        time.sleep(pause)
        if graceful:
            server.stop()
        else:
            server.kill()
        server.start()
    thread.join(60)
    if errors:
        raise errors[0]
    return answers[0]


def spools(server: Server, box: Sandbox) -> Path:
    """Where a sandbox's output and journal are kept."""
    home = home_of(server.home, box.sandbox_id)
    record = json.loads((home / "run" / "records" / (box.sandbox_id or "")).read_text())
    return home / "run" / "spools" / str(record["spools"])


COUNT = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); [ $((i % 100)) = 0 ] && sleep 0.1; done"
COUNTED = "".join(f"line {i}\n" for i in range(2000))


def test_a_session_goes_on_and_each_byte_is_read_once(server: Server, box: Sandbox) -> None:
    box.arun("x=before")
    seen = over_a_crash(server, lambda: box.arun(f"{COUNT}; echo x=$x; (exit 41)"))
    assert (seen.output, seen.exit_code) == (f"{COUNTED}x=before\n", 41)
    after = box.arun("echo $?; echo $x")
    assert after.output == "41\nbefore\n"


def test_streams_that_are_apart_and_another_session(server: Server, box: Sandbox) -> None:
    box.create_session(CreateBashSessionRequest(session="work"))
    call = lambda: box.arun(f"({COUNT}); (echo e1; sleep 1; echo e2) >&2; false", session="work", separate=True)  # noqa: E731
    seen = over_a_crash(server, call)
    assert (seen.output, seen.stderr, seen.exit_code) == (COUNTED, "e1\ne2\n", 1)


def test_a_program_goes_on(server: Server, box: Sandbox) -> None:
    seen = over_a_crash(server, lambda: box.execute(["sh", "-c", f"{COUNT}; echo err >&2; exit 7"]))
    assert (seen.stdout, seen.stderr, seen.exit_code) == (COUNTED, "err\n", 7)


def test_both_go_on_over_a_graceful_stop(server: Server, box: Sandbox) -> None:
    text = "echo x >> /tmp/graceful; echo begun; sleep 2; echo whole; (exit 3)"
    seen = over_a_crash(server, lambda: box.arun(text), graceful=True)
    assert (seen.output, seen.exit_code) == ("begun\nwhole\n", 3)
    done = over_a_crash(server, lambda: box.execute(["sh", "-c", f"cat; {text}"], stdin="in\n"), graceful=True)
    assert (done.stdout, done.exit_code) == ("in\nbegun\nwhole\n", 3)
    until(lambda: not list(spools(server, box).glob("x*")))  # nor is any file left
    assert box.execute(["cat", "/tmp/graceful"]).stdout == "x\nx\n"


def test_two_crashes(server: Server, box: Sandbox) -> None:
    seen = over_a_crash(server, lambda: box.arun("sleep 6; echo whole; (exit 3)", timeout=60), times=2)
    assert (seen.output, seen.exit_code) == ("whole\n", 3)


def test_its_time_goes_on_too(server: Server, box: Sandbox) -> None:
    seen = over_a_crash(server, lambda: box.arun("echo begun; sleep 600", timeout=3))
    assert (seen.output, seen.exit_code, seen.timed_out) == ("begun\n", None, True)
    assert box.arun("echo usable").output == "usable\n"


def test_output_over_its_cap(server: Server, box: Sandbox) -> None:
    """Head and tail are kept and the rest is counted, whatever part of it a former server has read."""
    text = "head -c 9000000 /dev/zero | tr '\\0' a; sleep 2; head -c 9000000 /dev/zero | tr '\\0' b"
    seen = over_a_crash(server, lambda: box.arun(text, max_output_bytes=100_000, timeout=60), 1.5)
    marker = f"\n[... {18_000_000 - 100_000} bytes dropped ...]\n"
    assert seen.output == "a" * 50_000 + marker + "b" * 50_000
    assert (seen.exit_code, seen.dropped_bytes) == (0, 18_000_000 - 100_000)
    size = max(path.stat().st_size for path in spools(server, box).glob("*.out"))
    assert 100_000 <= size < 3_000_000


def post(server: Server, box: Sandbox, name: str, body: Any, key: str, query: str = "", **path: str) -> Any:
    url = ROUTES[name].url(sandbox_id=box.sandbox_id or "", **path) + query
    return Transport(server.url).json("POST", url, body, key=key)


def test_a_key_has_its_answer_after_a_crash_too(server: Server, box: Sandbox) -> None:
    run = {"command": "echo x >> /tmp/run; cat /tmp/run; (exit 5)"}
    execute = {"command": ["sh", "-c", "echo x >> /tmp/executed; cat /tmp/executed; exit 6"]}
    names = {"run": (run, {"session": "default"}), "execute": (execute, {}),
             "start_process": ({"command": ["sleep", "600"]}, {}),
             "create_session": ({"session": "other"}, {})}  # fmt: skip
    first = {name: post(server, box, name, body, f"key-{name}", **path) for name, (body, path) in names.items()}
    assert (first["run"]["exit_code"], first["execute"]["exit_code"]) == (5, 6)
    server.kill()
    server.start()
    for name, (body, path) in names.items():
        assert post(server, box, name, body, f"key-{name}", **path) == first[name], name
    assert len(box.processes.list()) == 1


def test_what_answers_with_a_stream_is_not_begun_again(server: Server, box: Sandbox) -> None:
    body = {"command": ["sh", "-c", "echo x >> /tmp/streamed; sleep 600"]}

    def call() -> None:
        url = ROUTES["execute"].url(sandbox_id=box.sandbox_id or "") + "?stream=1"
        with pytest.raises(Exception, match=r"broke|ended"), Transport(server.url).open(
            "POST", url, b'{"command": ["sh", "-c", "echo x >> /tmp/streamed; sleep 600"]}', key="streamed"
        ) as stream:  # fmt: skip
            stream.read()

    over_a_crash(server, call)
    with pytest.raises(Conflict, match="was begun already"):
        post(server, box, "execute", body, "streamed", "?stream=1")
    assert box.execute(["cat", "/tmp/streamed"]).stdout == "x\n"


def test_input_that_was_cut_is_told(server: Server, box: Sandbox) -> None:
    """Input of one request; a larger one is streamed, and the piece under way is a Conflict."""
    text = "x" * 1_000_000
    # A rocklet process of its own serves a moment longer than the server, and finds that the connection ended.
    several = os.environ["ROCK_PROCESSES"] != "1"
    try:
        seen = over_a_crash(server, lambda: box.execute(["sh", "-c", "sleep 3; wc -c"], stdin=text))
        assert seen.exit_code in (None, 137) and "while its input was being given" in seen.failure_reason
    except Conflict as error:
        assert several and "its client left" in str(error)
    with pytest.raises(Conflict, match="its client left|killed in the middle" if several else "killed in the middle"):
        over_a_crash(server, lambda: box.execute(["sh", "-c", "echo $$ > /tmp/reads; sleep 3; wc -c"], stdin=text * 3))
    assert box.execute("kill -0 $(cat /tmp/reads)").exit_code != 0  # the program of half an input does not go on


def test_a_spool_that_cannot_be_written_costs_nothing_but_itself(server: Server) -> None:
    """A folder in the place of its journal: as a disk that is full, for whoever is root too."""
    server.stop()  # with it go the open files of sandboxes before
    server.start()
    with Sandbox(SandboxConfig(base_url=server.url, image="host", memory="256m", cpus=1.0)) as box:
        os.makedirs(spools(server, box) / "journal")
        works(box)


def works(box: Sandbox) -> None:
    seen = box.arun("echo fine; (exit 2)")
    assert (seen.output, seen.exit_code) == ("fine\n", 2)
    done = box.execute(["sh", "-c", "echo fine too; exit 3"])
    assert (done.stdout, done.exit_code) == ("fine too\n", 3)
