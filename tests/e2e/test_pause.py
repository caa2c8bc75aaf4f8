"""Pause and resume: processes stop and continue, their memory is kept, and calls meanwhile are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from tests.conftest import RunningServer
from tests.waiting import until

from rock.errors import Conflict, Unsupported
from rock.protocol.sandbox import State
from rock.sync import Client, Sandbox

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.02; done"


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as made:
        yield made


def count(box: Sandbox) -> int:
    return int(box.exec("cat /tmp/count").stdout)


def counting(box: Sandbox) -> None:
    box.processes.start(COUNT)
    until(lambda: box.exec("test -s /tmp/count").exit_code == 0, 30)


def test_processes_stop_and_continue(box: Sandbox, server: RunningServer) -> None:
    client = Client(server.url)
    box.run("x=kept; cd /tmp")
    counting(box)
    box.pause()
    box.pause()
    info = client.get_sandbox(box.sandbox_id or "", usage=True)
    assert info.state is State.RUNNING and info.paused_at and info.usage is not None
    for call in (lambda: box.exec("true"), lambda: box.run("true"), lambda: box.files.read("/tmp/count"),
                 lambda: box.processes.start("true")):  # fmt: skip
        with pytest.raises(Conflict, match="is paused") as caught:
            call()
        assert "resume" in str(caught.value)
    before = used(client, box)
    time.sleep(0.5)
    assert used(client, box) - before < 0.1, "seconds of CPU time of stopped processes"
    box.resume()
    box.resume()
    assert client.get_sandbox(box.sandbox_id or "").paused_at is None
    first = count(box)
    until(lambda: count(box) > first, 10)
    assert box.run("echo $x $PWD").output.strip() == "kept /tmp"


def used(client: Client, box: Sandbox) -> float:
    usage = client.get_sandbox(box.sandbox_id or "", usage=True).usage
    return float(usage.cpu_seconds or 0.0) if usage is not None else 0.0


def test_no_pause_while_a_command_runs(box: Sandbox) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(box.exec("sleep 2").exit_code or 0))
    thread.start()
    time.sleep(0.5)
    with pytest.raises(Conflict, match="requests are in progress"):
        box.pause()
    thread.join()
    assert done == [0]
    box.pause()
    box.resume()


def test_a_paused_sandbox_has_no_idle_timeout(server: RunningServer) -> None:
    with Sandbox("host", memory="256m", idle_timeout=1, base_url=server.url) as box:
        box.pause()
        info = Client(server.url).get_sandbox(box.sandbox_id or "")
        assert info.auto_stop_at is None
        time.sleep(3.5)
        box.resume()
        assert box.exec("true").exit_code == 0
        until(lambda: Client(server.url).get_sandbox(box.sandbox_id or "").state is State.STOPPED, 30)


def test_a_paused_sandbox_can_be_stopped_and_committed(box: Sandbox, server: RunningServer) -> None:
    counting(box)
    box.pause()
    box.commit("team/paused:1")
    with pytest.raises(Conflict, match="is paused"):
        box.exec("true")
    with Sandbox("team/paused:1", memory="256m", base_url=server.url) as copy:
        assert int(copy.files.read("/tmp/count")) > 0
    began = time.monotonic()
    box.stop()
    assert time.monotonic() - began < 10
    with pytest.raises(Conflict, match="stopped"):
        Client(server.url).resume_sandbox(box.sandbox_id or "")


def test_it_stays_paused_over_a_crash_of_the_server(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    client = Client(server.url)
    box = Sandbox("host", memory="256m", base_url=server.url)
    box.start()
    box.run("x=kept")
    counting(box)
    box.pause()
    port = urlsplit(server.url).port or 0
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.start(port)
    assert client.get_sandbox(box.sandbox_id or "").paused_at
    with pytest.raises(Conflict, match="is paused"):
        box.exec("true")
    before = used(client, box)
    time.sleep(0.5)
    assert used(client, box) - before < 0.1
    box.resume()
    first = count(box)
    until(lambda: count(box) > first, 10)
    assert box.run("echo $x").output.strip() == "kept"
    box.stop()


def test_a_pause_at_the_deadline(server: RunningServer) -> None:
    with Sandbox("host", memory="256m", max_lifetime=1.5, on_timeout="pause", base_url=server.url) as box:
        counting(box)
        client = Client(server.url)
        until(lambda: client.get_sandbox(box.sandbox_id or "").paused_at is not None, 30)
        info = client.get_sandbox(box.sandbox_id or "")
        assert info.state is State.RUNNING and info.auto_stop_at is None
        client.update_sandbox(box.sandbox_id or "", timeout=60)
        box.resume()
        assert count(box) > 0
    with pytest.raises(Unsupported, match="on_timeout"):
        Sandbox("host", memory="256m", max_lifetime=9, on_timeout="pause", runtime="fake", base_url=server.url).start()
