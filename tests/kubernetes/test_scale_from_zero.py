"""A create without any worker waits; an autoscaler that reads the metrics of the server adds the worker."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.errors import NoCapacity, RockError
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox
from rock.testing.kubernetes import FakeCluster
from rock.testing.kubernetes.nodes import SETS
from tests.cluster.machines import KEY, server
from tests.conftest import RunningServer
from tests.kubernetes.test_drain import metric
from tests.kubernetes.test_pods_at_scale import worker_pods
from tests.waiting import until

WAIT = 25.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeCluster, RunningServer]]:
    with FakeCluster(1, "fake") as cluster:
        front = server(tmp_path_factory.mktemp("front") / "home", ROCK_CAPACITY_WAIT=str(WAIT))
        body = worker_pods(front.url)
        body["spec"]["replicas"] = 0
        cluster.create(body, "boxes")
        yield cluster, front
        front.stop()


def scale(cluster: FakeCluster, replicas: int) -> None:
    """As an autoscaler does."""
    def change() -> None:
        found: dict[str, Any] = cluster.objects.get(SETS, "boxes", "rock-worker")
        made = {**found, "spec": {**found["spec"], "replicas": replicas},
                "metadata": {**found["metadata"], "resourceVersion": ""}}  # fmt: skip
        cluster.objects.update(SETS, "boxes", "rock-worker", made)

    cluster.call(change)


def box(front: RunningServer, **fields: Any) -> Sandbox:
    return Sandbox(base_url=front.url, api_key=KEY, image="x:1", memory="8m", cpus=0.01, **fields)


def started_or_not(sandbox: Sandbox) -> None:
    with contextlib.suppress(RockError):
        sandbox.start()


def test_a_create_waits_for_the_first_worker(world: tuple[FakeCluster, RunningServer]) -> None:
    cluster, front = world
    assert cluster.pods("boxes") == [] and metric(front, "rock_slots_wanted") == 0
    waiting, stopped = box(front), box(front)
    errors: list[BaseException] = []

    def start() -> None:
        try:
            waiting.start()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    with Client(front.url, KEY) as client:
        until(lambda: metric(front, "rock_slots_wanted") == 1, 10, "the signal does not count it")
        assert metric(front, "rock_slots") == 0
        (info,) = client.list_sandboxes(states="pending")
        assert info.worker is None and info.phases["worker"].status == "waiting"
        assert "no worker" in info.phases["worker"].message, info.phases
        other = threading.Thread(target=lambda: started_or_not(stopped))
        other.start()
        until(lambda: len(client.list_sandboxes(states="pending")) == 2, 10, "the second is not accepted")
        (second,) = [one for one in client.list_sandboxes(states="pending") if one.sandbox_id != info.sandbox_id]
        assert client.stop_sandbox(second.sandbox_id).state is State.STOPPED, "one that waits can be stopped"
        other.join(20)
        scale(cluster, 1)
        thread.join(WAIT)
        assert errors == [] and waiting.run("echo on").output == "on\n"
        assert waiting.info().worker == "rock-worker-0" and "worker" not in waiting.info().phases
        assert client.get_sandbox(second.sandbox_id).state is State.STOPPED
        assert metric(front, "rock_slots_wanted") == 1 and metric(front, "rock_slots") > 0
        waiting.stop()
        until(lambda: metric(front, "rock_slots_wanted") == 0, 10, "the signal counts an ended sandbox")


def test_a_wait_survives_a_restart_and_ends_with_its_cause(tmp_path: Path) -> None:
    front = server(tmp_path / "home", ROCK_CAPACITY_WAIT="2")
    try:
        with pytest.raises(NoCapacity, match="no worker"):
            box(front).start()
        sandbox = box(front)
        threading.Thread(target=lambda: started_or_not(sandbox), daemon=True).start()
        with Client(front.url, KEY) as client:
            until(lambda: len(client.list_sandboxes(states="pending")) == 1, 10, "it does not wait")
            (info,) = client.list_sandboxes(states="pending")
            port = int(front.url.rpartition(":")[2])
            front.kill()
            front.start(port)
            until(lambda: client.get_sandbox(info.sandbox_id).state is State.STOPPED, 20, "it waits forever")
            ended = client.get_sandbox(info.sandbox_id)
            assert ended.cause is Cause.START_FAILED and "no worker" in (ended.reason or ""), ended
    finally:
        front.stop()
