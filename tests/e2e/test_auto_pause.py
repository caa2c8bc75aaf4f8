"""Automatic pauses: an idle sandbox uses no CPU, and the next request continues it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.conftest import RunningServer
from tests.waiting import until

from rock.errors import Conflict, InvalidConfig, Unsupported
from rock.host import swapping
from rock.protocol.sandbox import Usage
from rock.sync import Client, Sandbox, SandboxConfig

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.02; done"


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, auto_pause=0.4) as made:
        yield made
    for one in Client(server.url).list_snapshots():
        Client(server.url).delete_snapshot(one.snapshot_id)


def usage(box: Sandbox) -> Usage:
    return box.usage()


def paused(box: Sandbox) -> bool:
    return bool(usage(box).auto_paused)


def count(box: Sandbox) -> int:
    return int(box.files.read_text("/tmp/count") or 0)


def test_an_idle_sandbox_is_paused_and_continues_with_the_next_call(box: Sandbox) -> None:
    box.run("cd /tmp; x=5")
    box.processes.start(COUNT)
    until(lambda: paused(box))
    cpu = usage(box).cpu_seconds
    time.sleep(0.3)
    assert usage(box).cpu_seconds == cpu  # nothing runs; a look at the usage does not wake it
    assert box.run("echo $x $PWD").output.split() == ["5", "/tmp"]
    first = count(box)
    until(lambda: count(box) > first)  # the background process continues
    until(lambda: paused(box))
    assert box.execute("echo again").stdout == "again\n"
    until(lambda: paused(box))
    taken = box.checkpoint(memory="session")
    assert taken.memory == "session"
    until(lambda: paused(box))
    box.rollback(taken)
    assert box.run("echo $x").output.strip() == "5"


def test_requests_in_progress_prevent_a_pause(box: Sandbox) -> None:
    assert box.run("sleep 1; echo done").output.strip() == "done"
    lines = list(box.stream("for i in 1 2 3; do echo $i; sleep 0.5; done"))
    assert "".join(str(line) for line in lines).count("3") >= 1
    until(lambda: paused(box))
    outputs: list[str] = []
    threads = [threading.Thread(target=lambda: outputs.append(box.execute("echo one").stdout)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == ["one\n"] * 8


def test_a_pause_by_request_is_not_ended_by_a_call(box: Sandbox) -> None:
    until(lambda: paused(box))
    box.pause()
    with pytest.raises(Conflict, match="paused"):
        box.run("true")
    assert not paused(box)
    box.resume()
    assert box.run("echo on").output == "on\n"


def test_memory_is_swapped_out_where_there_is_swap_space(box: Sandbox) -> None:
    until(lambda: paused(box))
    until(lambda: usage(box).swapped_bytes is not None)
    found = usage(box)
    if swapping.free_swap():
        assert found.swapped_bytes and found.not_swapped is None
    else:
        assert (found.swapped_bytes, found.not_swapped) == (0, "this machine has no free swap space")


def test_only_private_memory_is_advised() -> None:
    lines = ["00400000-00401000 r-xp 00000000 08:01 12 /bin/true", "7f0000000000-7f0000002000 rw-p 00000000 00:00 0",
             "7f1000000000-7f1000001000 rw-s 00000000 00:01 99 /dev/zero", "7fff0000-7fff1000 rw-p 0 00:00 0 [stack]",
             "7f2000000000-7f2000001000 rw-p 00000000 08:01 12 /lib/x.so", "bad"]
    assert swapping.ranges(lines) == [(0x7F0000000000, 0x2000), (0x7FFF0000, 0x1000)]
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; x = b'a' * 10**7; time.sleep(60)"])
    try:
        time.sleep(0.2)
        if swapping.free_swap():
            assert swapping.swap_out([sleeper.pid]) >= 0
        else:
            with pytest.raises(Unsupported, match="swap space"):
                swapping.swap_out([sleeper.pid])
        swapping._advise(sleeper.pid)  # the call itself works without swap space too
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
    with pytest.raises(OSError):
        swapping._advise(2**22 - 1)


def test_a_crash_of_the_server_leaves_it_usable(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_FAULTS="")
    box = Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, auto_pause=0.3)
    box.start()
    box.run("x=7")
    until(lambda: paused(box))
    server.kill()
    server.start()
    again = Sandbox.connect(box.sandbox_id or "", base_url=server.url)
    assert again.run("echo $x").output.strip() == "7"
    until(lambda: paused(again))
    text = subprocess.run(["curl", "-s", f"{server.url}/metrics"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"^rock_auto_pauses_total(\{worker=[^}]*\})? [1-9]", text, re.MULTILINE)
    again.stop()  # a paused one ends as others do


def test_what_is_refused(server: RunningServer, own_server: Callable[..., RunningServer]) -> None:
    with pytest.raises(InvalidConfig):
        Sandbox(SandboxConfig(image="host", auto_pause=0, base_url=server.url))
    with pytest.raises(InvalidConfig):
        Sandbox("host", auto_pause=-1.0)
