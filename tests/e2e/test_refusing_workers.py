"""Three workers, of which one is away, refuses, or comes back in a later epoch: creates go to those that take them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.faults.world import KEY, Server, World
from tests.waiting import until

from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox, SandboxConfig

MOST = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("cluster", tmp_path_factory.mktemp("world"), ROCK_WORKER_LEASE="3", ROCK_WORKER_GRACE="6")
    yield made
    made.close()


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with Client(world.server.url, KEY) as made:
        until(lambda: states(made) == {WorkerState.READY}, 20.0)
        yield made


def states(client: Client) -> set[WorkerState]:
    return {worker.state for worker in client.list_workers()}


def box_of(world: World, **more: Any) -> Sandbox:
    made = Sandbox(SandboxConfig(base_url=world.server.url, api_key=KEY, image="host", memory="128m", cpus=0.5, **more))
    made.start()
    return made


def name_of(world: World, server: Server) -> str:
    return server.home.name.removeprefix("worker-")


def where(client: Client, box: Sandbox) -> str:
    return str(client.get_sandbox(str(box.sandbox_id)).worker)


@contextlib.contextmanager
def boxes(world: World, count: int, **more: Any) -> Iterator[list[Sandbox]]:
    made: list[Sandbox] = []
    try:
        for _ in range(count):
            made.append(box_of(world, **more))
        yield made
    finally:
        for box in made:
            box.stop()


@contextlib.contextmanager
def boxes_with_one_on(world: World, client: Client, name: str) -> Iterator[list[Sandbox]]:
    """As many as it takes until a worker has one: it gets none for a moment after it was away."""
    with boxes(world, 0) as made:
        until(lambda: made.append(box_of(world)) or where(client, made[-1]) == name, 30.0)  # type: ignore[func-returns-value]
        yield made


@pytest.mark.parametrize("away", [0, 2])
def test_a_create_whose_worker_was_killed_goes_to_another(world: World, client: Client, away: int) -> None:
    """That each worker would take such a sandbox was asked a moment ago, so that only the create itself finds out."""
    server = world.workers[away]
    name = name_of(world, server)
    with boxes_with_one_on(world, client, name) as before:
        server.kill()
        try:
            with boxes(world, MOST, reconnect_timeout=0) as made:
                assert name not in {where(client, box) for box in made}
                assert [box.execute(["echo", "here"]).stdout for box in made] == ["here\n"] * MOST
        finally:
            server.start()
        until(lambda: world.records == {box.sandbox_id for box in before})


def test_a_create_that_a_worker_may_have_made_stays_there(world: World, client: Client) -> None:
    """It was killed after it had made the sandbox: made on another worker, it would run twice."""
    for server in world.workers:
        server.faults("node.create.saved=kill@1")
    made: list[Any] = []

    def create() -> None:
        try:
            made.append(box_of(world))
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    until(lambda: any(not server.alive for server in world.workers))
    for server in world.workers:
        server.faults("")
    world.ensure()
    thread.join(60)
    assert isinstance(made[0], Sandbox), made
    assert made[0].execute(["echo", "here"]).stdout == "here\n"
    until(lambda: world.records == {made[0].sandbox_id} and world.pids == 1)
    made[0].stop()


def test_a_worker_that_was_taken_for_lost_and_comes_back(world: World, client: Client) -> None:
    """It stood still for longer than the grace period: its sandboxes are lost, and its epoch is over. Nobody sees an
    error meanwhile, and it gets sandboxes again as soon as it goes on."""
    server = world.workers[1]
    name = name_of(world, server)
    with boxes_with_one_on(world, client, name) as before:
        epoch = next(worker.epoch for worker in client.list_workers() if worker.name == name)
        lost = [box for box in before if where(client, box) == name]
        assert lost
        os.kill(server.pid, signal.SIGSTOP)
        try:
            until(lambda: WorkerState.LOST in states(client), 20.0)
            with boxes(world, 2, reconnect_timeout=0) as made:
                assert name not in {where(client, box) for box in made}
        finally:
            os.kill(server.pid, signal.SIGCONT)
        began, found = time.monotonic(), set()
        while name not in found:  # each create succeeds at once, whoever is still refusing
            with boxes(world, 3, reconnect_timeout=0) as made:
                found |= {where(client, box) for box in made}
            assert time.monotonic() - began < 60
        assert next(worker.epoch for worker in client.list_workers() if worker.name == name) == epoch + 1
        assert {client.get_sandbox(str(box.sandbox_id)).state for box in lost} == {"stopped"}
