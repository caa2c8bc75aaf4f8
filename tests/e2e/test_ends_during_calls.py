"""Every call in the middle of which its sandbox ends has one typed error; creates go on when the launcher dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.faults.world import World
from tests.leaks import home_of

from rock.errors import Exited, Expired
from rock.runtime.namespace import records
from rock.sync import Sandbox, SandboxConfig


@pytest.fixture(scope="module", params=["namespace", "joined"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(request.param, tmp_path_factory.mktemp(f"ends-{request.param}"), "namespace")
    yield made
    made.close()


def box_of(world: World) -> Sandbox:
    made = Sandbox(SandboxConfig(base_url=world.server.url, api_key=world.key, image="host", memory="256m", cpus=1.0))
    made.start()
    return made


def pid_1(world: World, box: Sandbox) -> int:
    """As this machine sees it."""
    folder = home_of(world.holder.home, box.sandbox_id) / "run" / "namespace"
    found = [records.read(folder, slot) for slot in records.slots(folder)]
    return next(int(record["pid"]) for record in found if record.get("id") == box.sandbox_id)


def during(end: Callable[[], object], *calls: Callable[[], Any]) -> list[Any]:
    """What calls raise in the middle of which something happens."""
    outcomes: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    end()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


@pytest.mark.parametrize(("how", "kind", "text"), [("stop", Expired, "stopped"), ("kill", Exited, "pid 1")])
def test_one_error_for_every_call(world: World, how: str, kind: type[Exception], text: str) -> None:
    box = box_of(world)
    box.create_session(session="other")
    process = box.processes.start(["sleep", "600"])
    pid = pid_1(world, box)
    end: Callable[[], object] = box.stop if how == "stop" else lambda: os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    seen = during(
        end,
        lambda: box.arun("sleep 600"),
        lambda: box.execute(["sleep", "600"]),
        lambda: list(box.stream(["sleep", "600"])),
        lambda: list(box.stream("sleep 600", session="other")),
        lambda: process.wait(60),
        lambda: list(process.follow()),
        lambda: box.execute(["sleep", "600"], stdin="x" * 3_000_000),
    )  # fmt: skip
    assert time.monotonic() - began < 30  # none was tried again for a minute
    assert [type(error) for error in seen] == [kind] * len(seen), seen
    assert all(text in str(error) and not error.retryable for error in seen), seen
    after = [lambda: box.arun("true"), lambda: box.execute("true"), lambda: box.fs.read("/etc/hostname"),
             lambda: box.processes.list(), lambda: box.fs.write("/tmp/x", "x")]  # fmt: skip
    for call in after:
        with pytest.raises(kind, match=text):
            call()
    box.stop()


@pytest.mark.parametrize("who", ["launcher", "zygote"])
def test_the_next_create_succeeds_when_it_was_killed(world: World, who: str) -> None:
    box = box_of(world)  # so that both run
    for _ in range(3):
        pids = world.launchers() if who == "launcher" else world.zygotes()
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        another = box_of(world)
        assert another.execute(["echo", "here"]).stdout == "here\n"
        another.stop()
    assert box.execute(["echo", "still"]).stdout == "still\n"
    box.stop()
