"""API writes of a burst in both modes, and a burst during which a node, the watch and the API server fail at once.

`make kubernetes` runs 1,000 sandboxes and an outage of a minute; `make test` a short part.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rock.errors import RockError
from rock.kubernetes.templates import pod_name
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox
from rock.testing.kubernetes import FakeCluster
from rock.testing.kubernetes.nodes import PODS
from rock.testing.kubernetes.objects import key_of
from tests.cluster.machines import KEY, TOKEN, server
from tests.kubernetes.pod_world import FULL, World
from tests.waiting import until

MANY = int(os.environ.get("ROCK_TEST_PODS") or (1000 if FULL else 24))
OUTAGE = 60.0 if FULL else 2.0
WRITES = ("POST", "PUT", "PATCH", "DELETE")


def writes(cluster: FakeCluster) -> dict[str, int]:
    """Requests that change objects, by method and resource."""
    return {f"{method} {what}": count for (method, what), count in cluster.api.counts.items() if method in WRITES}


def worker_pods(front: str) -> dict[str, Any]:
    """A StatefulSet of workers that join, as the chart has it."""
    field = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
             for name, path in (("POD_IP", "status.podIP"), ("ROCK_WORKER_NAME", "metadata.name"))]  # fmt: skip
    fixed = {"ROCK_JOIN": front, "ROCK_API_KEY": TOKEN, "ROCK_ADVERTISE": "http://$(POD_IP):8090",
             "ROCK_PORT": "8090", "ROCK_SANDBOX_LIMIT": str(MANY)}  # fmt: skip
    env = [*field, *({"name": name, "value": value} for name, value in fixed.items())]
    labels = {"app": "rock-worker"}
    return {"kind": "StatefulSet", "metadata": {"name": "rock-worker"},
            "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "worker", "image": "rock-worker:1", "env": env}]}}}}  # fmt: skip


def test_a_burst_in_worker_mode_writes_nothing(tmp_path: Path) -> None:
    """Neither a request of ours that changes an object, nor a change of any object: etcd has no part in a create."""
    with FakeCluster(2, "fake") as cluster:
        front = server(tmp_path / "home")
        try:
            cluster.create(worker_pods(front.url), "boxes")
            with Client(front.url, KEY) as client:
                until(lambda: len([one for one in client.list_workers() if one.status is not None]) == 2, 60,
                      "the workers do not join")  # fmt: skip
                until(lambda: all(pod["status"].get("phase") == "Running" for pod in cluster.pods("boxes")), 20, "pods")
                requests, version = writes(cluster), cluster.call(lambda: cluster.objects.version)
                boxes = [Sandbox(base_url=front.url, api_key=KEY, image="x:1", memory="8m", cpus=0.01)
                         for _ in range(MANY)]  # fmt: skip
                began = time.monotonic()
                with ThreadPoolExecutor(32) as pool:
                    list(pool.map(lambda box: box.start(), boxes))
                    taken = time.monotonic() - began
                    infos = client.list_sandboxes(states="running", limit=5000)
                    assert len(infos) == MANY and {info.worker for info in infos} == {"rock-worker-0", "rock-worker-1"}
                    list(pool.map(lambda box: box.stop(), boxes))
                assert writes(cluster) == requests, "requests that change objects"
                assert cluster.call(lambda: cluster.objects.version) == version, "changes of objects"
                print(f"worker mode: {MANY} sandboxes in {taken:.1f} s, 0 API writes, 0 changes of objects")
        finally:
            front.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    nodes = {f"node-{n}": 5000 for n in range(1, 5)}
    made = World(tmp_path_factory.mktemp("scale"), nodes=nodes, processes=2 if FULL else 0)
    made.start()
    yield made
    made.heal()
    with made.client() as client:
        for info in client.list_sandboxes(states="pending,running,stopping", limit=5000):
            client.stop_sandbox(info.sandbox_id)
    made.stop()


def test_writes_of_a_burst_in_pod_mode(world: World) -> None:
    """Two requests of ours for each sandbox, of which there are five changes by the cluster itself."""
    before, version = writes(world.cluster), world.cluster.call(lambda: world.cluster.objects.version)
    boxes = [world.sandbox(startup_timeout=600.0) for _ in range(MANY)]
    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda box: box.start(), boxes))
        taken = time.monotonic() - began
        list(pool.map(lambda box: box.stop(), boxes))
    until(lambda: world.pods() == [], 120, "pods are left")
    made = {what: count - before.get(what, 0) for what, count in writes(world.cluster).items()}
    changes = world.cluster.call(lambda: world.cluster.objects.version) - version
    assert made["POST pods"] == MANY, "one create for each sandbox"
    assert MANY <= made["DELETE pods"] <= MANY * 1.2, made
    assert sum(made.values()) == made["POST pods"] + made["DELETE pods"], made
    print(f"pod mode: {MANY} pods in {taken:.1f} s, {sum(made.values()) / MANY:.3f} API writes and "
          f"{changes / MANY:.3f} changes of objects for each sandbox")  # fmt: skip


def started(box: Sandbox) -> str:
    """Start; "" or the error."""
    try:
        box.start()
    except RockError as error:
        return repr(error)
    return ""


def test_everything_fails_during_a_burst(world: World) -> None:
    """A node is lost, the watch expires, the API server is away, and events are duplicated, stale and dropped, while
    half of the sandboxes run and the other half starts. Only the sandboxes of the lost node end."""
    cluster, faults = world.cluster, world.cluster.faults
    running = [world.sandbox() for _ in range(MANY // 2)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda box: box.start(), running))
    faults.duplicated, faults.stale, faults.dropped, faults.failing, faults.throttled = 0.3, 0.3, 0.03, 0.1, 0.1
    late = [world.sandbox(startup_timeout=600.0) for _ in range(MANY // 2)]
    results: list[str] = []

    def start_late() -> None:
        with ThreadPoolExecutor(32) as pool:
            results.extend(pool.map(started, late))

    thread = threading.Thread(target=start_late)
    thread.start()
    time.sleep(0.3)
    world.expire_watches()
    lost_pods = {key_of(pod)[1] for pod in cluster.pods("boxes") if pod["spec"].get("nodeName") == "node-4"}
    cluster.run(cluster.nodes.lose("node-4"))
    lost_pods |= {key_of(pod)[1] for pod in cluster.pods("boxes") if pod["spec"].get("nodeName") == "node-4"}
    faults.down = True
    cluster.call(cluster.objects.close_watches)
    survivors = [box for box in running if pod_name(box.sandbox_id) not in lost_pods]
    assert len(survivors) >= MANY // 5
    end = time.monotonic() + OUTAGE
    while time.monotonic() < end:
        assert {box.run("echo on").output for box in survivors[:10]} == {"on\n"}, "an outage ends nothing"
        time.sleep(0.5)
    faults.down = False
    world.expire_watches()
    thread.join(600 if FULL else 120)  # a start on a worker that is lost tries for RECONNECT_TIMEOUT
    if thread.is_alive():
        with world.client() as client:
            starting = [pod_name(info.sandbox_id) for info in client.list_sandboxes(states="pending", limit=20)]
        pods = {key_of(pod)[1]: (pod["spec"].get("nodeName"), pod["status"]) for pod in cluster.pods()}
        raise AssertionError(f"starts do not end: {[(name, pods.get(name)) for name in starting]}")
    # A start whose pod was on the lost node may fail; every other one succeeds.
    failed = {pod_name(box.sandbox_id) for box, error in zip(late, results, strict=True) if error}
    assert failed <= lost_pods, [error for error in results if error]
    survivors += [box for box in late if pod_name(box.sandbox_id) not in lost_pods]
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(lambda box: box.run("echo on").output, survivors)) == {"on\n"}, "a sandbox was lost"
    kept = {box.sandbox_id for box in survivors}
    with world.client() as client:
        def running_now() -> set[str]:
            return {info.sandbox_id for info in client.list_sandboxes(states="pending,running,stopping", limit=5000)}

        until(lambda: running_now() == kept, 90, "sandboxes of the lost node do not end")
        causes = {client.get_sandbox(box.sandbox_id).cause for box in running
                  if pod_name(box.sandbox_id) in lost_pods}  # fmt: skip
        assert causes <= {Cause.LOST}
        assert all(client.get_sandbox(box.sandbox_id).state is State.RUNNING for box in survivors[:20])

    def left() -> set[str]:
        """Pods, after an operator has removed those of the machine that is gone."""
        for pod in cluster.pods("boxes"):
            if pod["spec"].get("nodeName") == "node-4" and pod["metadata"].get("deletionTimestamp"):
                cluster.call(lambda pod=pod: cluster.objects.finish(  # type: ignore[misc]
                    PODS, *key_of(pod), pod["metadata"]["uid"]))
        return set(world.pods())

    until(lambda: left() == {pod_name(box.sandbox_id) for box in survivors}, 90, "pods are left")
    names = [pod_name(box.sandbox_id) for box in (*running, *late)]
    assert {cluster.nodes.started.get(name, 0) for name in names} <= {0, 1}, "no pod was started twice"
    print(f"{MANY} sandboxes, an outage of {OUTAGE:g} s: {len(lost_pods)} on the lost node, {len(kept)} kept")
