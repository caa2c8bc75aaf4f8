"""`rock worker drain --self`, the preStop hook of worker pods, and the signals of an autoscaler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rock.sync import Client, Sandbox
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import RunningServer
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[RunningServer, list[Machine]]]:
    front = server(tmp_path / "server")
    machines = []
    for name in ("w1", "w2"):
        machine = Machine(tmp_path / name, "--join", front.url, "--token", TOKEN, "--name", name, ROCK_RUNTIME="fake",
                          ROCK_SANDBOX_LIMIT="2000")  # fmt: skip
        machine.start()
        machines.append(machine)
    with Client(front.url, KEY) as client:
        until(lambda: len(client.list_workers()) == 2, 20, "they do not join")
    yield front, machines
    front.stop()
    for machine in machines:
        machine.end()


def drain(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ROCK_HOME": str(machine.home), "ROCK_API_KEY": TOKEN}
    environment.pop("ROCK_BASE_URL", None)
    return subprocess.run([sys.executable, "-m", "rock", "worker", "drain", *words], env=environment,
                          capture_output=True, text=True, timeout=60)  # fmt: skip


def metric(front: RunningServer, name: str) -> float:
    request = urllib.request.Request(f"{front.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def box(front: RunningServer) -> Sandbox:
    sandbox = Sandbox(base_url=front.url, api_key=KEY, image="x:1", memory="64m")
    sandbox.start()
    return sandbox


def test_a_worker_drains_itself(world: tuple[RunningServer, list[Machine]]) -> None:
    front, (first, _) = world
    boxes = [box(front) for _ in range(6)]
    on_first = [one for one in boxes if one.info().worker == "w1"]
    assert on_first and len(on_first) < 6
    assert metric(front, "rock_slots_wanted") == 6 and metric(front, "rock_slots") == 4000
    waited: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: waited.append(drain(first, "--self", "--wait", "40")))
    thread.start()
    until(lambda: metric(front, "rock_slots") == 2000, 20, "its slots count still")
    more = [box(front) for _ in range(8)]
    assert {one.info().worker for one in more} == {"w2"}, "it gets no more"
    assert [one.run("echo on").output for one in on_first] == ["on\n"] * len(on_first), "its sandboxes continue"
    assert thread.is_alive(), "it waits for them"
    for one in on_first:
        one.stop()
    thread.join(30)
    assert waited[0].returncode == 0 and "has 0" in waited[0].stdout, waited[0].stderr


def test_a_drain_that_takes_too_long_fails(world: tuple[RunningServer, list[Machine]]) -> None:
    front, machines = world
    sandbox = box(front)
    machine = machines[int((sandbox.info().worker or "w1")[1]) - 1]
    done = drain(machine, "--self", "--wait", "1")
    assert done.returncode != 0 and "still has 1 sandboxes" in done.stderr
    for other in machines:
        drain(other, "--self")
    until(lambda: metric(front, "rock_slots") == 0, 20, "the others have slots")


def test_what_drain_needs(world: tuple[RunningServer, list[Machine]], tmp_path: Path) -> None:
    _, (first, _) = world
    assert "give the name of a worker, or --self" in drain(first).stderr
    assert "give the name of a worker, or --self" in drain(first, "w1", "--self").stderr
    nothing = Machine(tmp_path / "nothing")
    assert "no rocklet that joined" in drain(nothing, "--self").stderr
    alone = Machine(tmp_path / "alone", ROCK_RUNTIME="fake")
    alone.start()
    assert "no rocklet that joined" in drain(alone, "--self").stderr, "SIGUSR1 would end it"
    assert alone.note() is not None
    alone.end()
