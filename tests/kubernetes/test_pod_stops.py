"""A stop that is accepted while the API server of the cluster is away is executed later, also by the next server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rock.errors import RockError, Unavailable
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox
from tests.kubernetes.pod_world import World
from tests.waiting import until


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("stops"))
    made.start()
    yield made
    made.heal()
    made.stop()


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    yield shared
    shared.heal()
    until(lambda: shared.pods() == [], 60, "pods are left")


def started(world: World, count: int) -> list[Sandbox]:
    boxes = [world.sandbox() for _ in range(count)]
    for box in boxes:
        box.start()
    return boxes


def started_or_not(box: Sandbox) -> None:
    """Start one that is stopped meanwhile."""
    with contextlib.suppress(RockError):
        box.start()


def assert_stopped(client: Client, boxes: list[Sandbox]) -> None:
    for box in boxes:
        until(lambda box=box: client.get_sandbox(box.sandbox_id).state is State.STOPPED, 40,  # type: ignore[misc]
              f"{box.sandbox_id} does not stop")  # fmt: skip
        info = client.get_sandbox(box.sandbox_id)
        assert info.cause is Cause.USER and info.reason == "stopped by its user", info


def test_a_stop_waits_for_an_api_server_that_refuses_requests(world: World) -> None:
    """Each request gets 429: more than the five attempts of the client of the API server."""
    boxes = started(world, 2)
    world.cluster.faults.throttled = 1.0
    with world.client() as client:
        with ThreadPoolExecutor(2) as pool:
            infos = list(pool.map(lambda box: client.stop_sandbox(box.sandbox_id), boxes))
        assert [info.state for info in infos] == [State.STOPPING] * 2, "accepted"
        with pytest.raises(Unavailable, match="API server of the cluster does not respond"):
            client.delete_sandbox(boxes[0].sandbox_id, force=True)
        assert len(world.pods()) == 2
        world.cluster.faults.throttled = 0.0
        assert_stopped(client, boxes)
    until(lambda: world.pods() == [], 10, "a pod is leaked")


def test_a_stop_waits_over_a_restart_of_the_server(world: World) -> None:
    """No request gets a response. The next server starts without the cluster, and completes the stops."""
    boxes = started(world, 3)
    starting = world.sandbox()
    world.cluster.faults.down = True
    world.cluster.call(world.cluster.objects.close_watches)
    with world.client() as client, ThreadPoolExecutor(4) as pool:
        start = pool.submit(started_or_not, starting)
        until(lambda: client.list_sandboxes(states="pending") != [], 20, "it is not created")
        pending = client.list_sandboxes(states="pending")[0].sandbox_id
        began = time.monotonic()
        stops = pool.map(lambda name: client.stop_sandbox(name), [*(box.sandbox_id for box in boxes[:2]), pending])
        assert [info.state for info in stops][:2] == [State.STOPPING] * 2
        assert time.monotonic() - began < 25, "a stop does not wait for the end of the outage"
        start.result(30)
    world.server.kill()
    world.server.start(world.port)
    assert boxes[2].run("echo on").output == "on\n", "another sandbox is not affected"
    assert len(world.cluster.pods("boxes")) == 3
    world.cluster.faults.down = False
    with world.client() as client:
        assert_stopped(client, boxes[:2])
        until(lambda: client.get_sandbox(pending).state is State.STOPPED, 40, "the start continues")
    until(lambda: len(world.pods()) == 1, 40, "a pod is leaked")
    assert boxes[2].run("echo on").output == "on\n"
    boxes[2].stop()
