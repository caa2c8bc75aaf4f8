"""Pod mode: one pod for each sandbox, on a fake cluster, with a real server; rocklets are real processes, or run in the
cluster's process with the fake runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rock.errors import ImageError, InvalidConfig, NoCapacity, RockError, Unsupported
from rock.kubernetes.informer import name_of
from rock.kubernetes.templates import pod_name
from rock.protocol.keys import POD_PREFIX, pod_key
from rock.protocol.node import JoinWorker, NodeStatus
from rock.protocol.sandbox import Cause, Isolation
from rock.sync import Client, Sandbox
from rock.testing.kubernetes import FakeCluster
from rock.testing.kubernetes.nodes import PODS
from tests.cluster.machines import KEY, TOKEN
from tests.kubernetes.pod_world import FULL, World
from tests.waiting import until

MANY = int(os.environ.get("ROCK_TEST_PODS") or (1000 if FULL else 40))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # 1,000 rocklets have more files than one process may open
    world = World(tmp_path_factory.mktemp("pods"), nodes={"node-1": 5000, "node-2": 5000}, processes=3 if FULL else 0)
    world.start()
    yield world
    world.stop()


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    yield shared
    shared.heal()
    with shared.client() as client:
        for info in client.list_sandboxes(states="pending,running,stopping"):
            client.stop_sandbox(info.sandbox_id)
    until(lambda: shared.pods() == [], 60, "pods are left")


def test_a_sandbox_is_a_pod(world: World) -> None:
    before = dict(world.cluster.api.counts)
    with world.sandbox() as sandbox:
        (pod,) = world.cluster.pods("boxes")
        assert name_of(pod) == pod_name(sandbox.sandbox_id)
        assert pod["metadata"]["labels"]["rock.sandbox/sandbox-id"] == sandbox.sandbox_id
        spec = pod["spec"]
        assert spec["restartPolicy"] == "Never" and spec["automountServiceAccountToken"] is False
        container = spec["containers"][0]
        assert container["image"] == "x:1" and container["resources"]["requests"] == {"cpu": "2", "memory": "64Mi"}
        text = json.dumps(pod)
        assert TOKEN not in text and KEY not in text, "no key of the servers is in a pod"
        assert sandbox.run("echo hello").output == "hello\n"
        assert sandbox.info().worker == name_of(pod)
    until(lambda: world.pods() == [], 20, "its pod is left")
    counts = world.cluster.api.counts
    writes = {method: counts.get((method, "pods"), 0) - before.get((method, "pods"), 0) for method in
              ("POST", "PUT", "PATCH", "DELETE")}  # fmt: skip
    assert writes == {"POST": 1, "PUT": 0, "PATCH": 0, "DELETE": 1}, "writes of one sandbox"
    until(lambda: not [name for name in world.workers() if name.startswith(POD_PREFIX)], 40, "its worker is left")


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_an_image_that_cannot_be_pulled_fails_at_once(world: World, reason: str) -> None:
    world.cluster.nodes.images["missing:1"] = reason
    began = time.monotonic()
    with pytest.raises(ImageError, match=f"missing:1.*{reason}") as caught:
        Sandbox(base_url=world.server.url, api_key=KEY, image="missing:1", memory="64m").start()
    assert time.monotonic() - began < 10 and caught.value.details["kubernetes"] == reason
    until(lambda: world.pods() == [], 20, "its pod is left")


def test_no_node_has_room(world: World) -> None:
    with pytest.raises(NoCapacity, match="no node has room"):
        world.sandbox(labels={"rock.kubernetes.template": "gpu"}, gpus=1, gpu_type="A100").start()
    until(lambda: world.pods() == [], 20, "its pod is left")


def test_what_a_pod_cannot_do_is_refused_before_it_exists(world: World) -> None:
    for fields, kind in (({"labels": {"rock.kubernetes.template": "none"}}, InvalidConfig),
                         ({"retain": 60}, Unsupported), ({"oci_runtime": "kata"}, Unsupported)):  # fmt: skip
        with pytest.raises(kind):
            world.sandbox(**fields).start()
    assert world.pods() == []


def test_a_runtime_class_that_does_not_exist(world: World) -> None:
    kata = {"labels": {"rock.kubernetes.template": "kata"}}
    with pytest.raises(Unsupported, match='RuntimeClass "kata" not found'):
        world.sandbox(**kata).start()
    assert doctor(world)["RuntimeClass kata"]["ok"] is False
    world.cluster.create({"kind": "RuntimeClass", "metadata": {"name": "kata"}, "handler": "kata"})
    assert doctor(world)["RuntimeClass kata"] == {"name": "RuntimeClass kata", "ok": True, "hint": "",
                                                  "detail": "handler kata, for template kata"}  # fmt: skip
    with world.sandbox(**kata) as sandbox:
        assert world.pod_of(sandbox)["spec"]["runtimeClassName"] == "kata"


def doctor(world: World) -> dict[str, dict[str, Any]]:
    """Rows of `rock doctor` with the settings of the server, by name."""
    run = subprocess.run([sys.executable, "-m", "rock", "doctor", "--json"], capture_output=True, timeout=120,
                         env={**os.environ, **world.server.environment})  # fmt: skip
    return {row["name"]: row for row in json.loads(run.stdout)}


Fail = Callable[[World, dict[str, Any]], None]
FAILURES: dict[str, tuple[Fail, Cause, str]] = {
    "oom": (lambda w, pod: w.cluster.run(w.cluster.nodes.fail(pod)), Cause.OUT_OF_MEMORY, "OOMKilled"),
    "exit": (lambda w, pod: w.cluster.run(w.cluster.nodes.fail(pod, 3, "Error")), Cause.EXITED, "status 3"),
    "evicted": (lambda w, pod: w.cluster.run(w.cluster.nodes.evict(pod, "The node was low on resource: memory")),
                Cause.LOST, "evicted by its node.*memory"),
    "disk": (lambda w, pod: w.cluster.run(w.cluster.nodes.evict(pod, "Pod ephemeral local storage usage exceeds")),
             Cause.DISK_FULL, "ephemeral"),
    "preempted": (lambda w, pod: w.cluster.run(w.cluster.nodes.preempt(pod)), Cause.LOST, "preempted"),
    "deleted": (lambda w, pod: w.cluster.call(lambda: w.cluster.objects.delete(PODS, "boxes", name_of(pod))),
                Cause.LOST, "was deleted"),
    "forced": (lambda w, pod: w.cluster.call(lambda: w.cluster.objects.delete(
        PODS, "boxes", name_of(pod), {"gracePeriodSeconds": 0})), Cause.LOST, "was deleted"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_the_end_of_a_pod_has_its_cause(world: World, name: str) -> None:
    fail, cause, match = FAILURES[name]
    sandbox = world.sandbox()
    sandbox.start()
    other = world.sandbox()
    other.start()
    began = time.monotonic()
    fail(world, world.pod_of(sandbox))
    info = world.ended(sandbox)
    assert time.monotonic() - began < 12, "before the lease of the worker ends"
    assert info.cause is cause, info
    assert info.reason is not None and __import__("re").search(match, info.reason), info.reason
    assert other.run("echo here").output == "here\n", "another sandbox is not affected"


def test_a_lost_node(world: World) -> None:
    """Its pods stay in the API for minutes; the cluster and the lease agree that they are gone."""
    world.cluster.call(lambda: world.cluster.nodes.add_node("node-3", 100))
    sandbox = world.sandbox()
    for _ in range(3):  # the emptiest node gets it
        sandbox = world.sandbox()
        sandbox.start()
        if world.pod_of(sandbox)["spec"]["nodeName"] == "node-3":
            break
    assert world.pod_of(sandbox)["spec"]["nodeName"] == "node-3"
    world.cluster.run(world.cluster.nodes.lose("node-3"))
    info = world.ended(sandbox, 40)
    assert info.cause is Cause.LOST and "node-3" in (info.reason or ""), info.reason
    for pod in world.cluster.pods("boxes"):
        if pod["spec"].get("nodeName") == "node-3":  # as an operator does, who knows that the machine is gone
            world.cluster.call(lambda pod=pod: world.cluster.objects.finish(  # type: ignore[misc]
                PODS, "boxes", name_of(pod), pod["metadata"]["uid"]))


def test_an_outage_of_the_api_server_ends_nothing(world: World) -> None:
    """Longer than the lease of a worker: the server is not part of running sandboxes. A start waits for its end."""
    boxes = [world.sandbox() for _ in range(3)]
    for box in boxes:
        box.start()
    world.cluster.faults.down = True
    world.cluster.call(world.cluster.objects.close_watches)
    late: list[Any] = []
    waiting = world.sandbox()
    thread = threading.Thread(target=lambda: late.append(waiting.start()))
    thread.start()
    end = time.monotonic() + (60 if FULL else 13)
    while time.monotonic() < end:
        assert [box.run("echo on").output for box in boxes] == ["on\n"] * 3
        time.sleep(0.5)
    assert thread.is_alive()
    world.cluster.faults.down = False
    thread.join(90)
    assert waiting.run("echo late").output == "late\n"
    assert [box.run("echo on").output for box in boxes] == ["on\n"] * 3
    assert {world.cluster.nodes.started[name] for name in world.pods()} == {1}, "no pod was started twice"


def test_faults_of_requests_and_watches(world: World) -> None:
    """Lost responses, throttling, duplicated, dropped and stale events: no loss, no leak, no double start."""
    faults = world.cluster.faults
    # Five failures in a row fail a request: 0.2 each made a stop fail in one run of ten.
    faults.failing, faults.throttled, faults.duplicated, faults.stale, faults.dropped = 0.1, 0.1, 0.3, 0.3, 0.05
    world.cluster.call(world.cluster.objects.compact)
    world.cluster.call(world.cluster.objects.close_watches)
    run_many(world, MANY // 2, half_stopped=True)


def test_many_pods(world: World) -> None:
    """A burst, in which the watch expires twice."""
    before = world.cluster.api.counts.get(("POST", "pods"), 0)
    timers = [threading.Timer(seconds, lambda: (world.cluster.call(world.cluster.objects.compact),
                                                world.cluster.call(world.cluster.objects.close_watches)))
              for seconds in (0.5, 2.0)]  # fmt: skip
    for timer in timers:
        timer.start()
    began = time.monotonic()
    run_many(world, MANY, half_stopped=False)
    print(f"{MANY} pods in {time.monotonic() - began:.1f} s")
    for timer in timers:
        timer.join()
    assert world.cluster.api.counts["POST", "pods"] - before == MANY, "one create for each"


def run_many(world: World, count: int, half_stopped: bool) -> None:
    boxes = [world.sandbox(startup_timeout=600.0) for _ in range(count)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda box: box.start(), boxes))
        if half_stopped:
            list(pool.map(lambda box: box.stop(), boxes[::2]))
            boxes = boxes[1::2]
        outputs = list(pool.map(lambda box: box.run("echo $HOME").exit_code, boxes))
    assert outputs == [0] * len(boxes)
    with world.client() as client:
        running = {info.sandbox_id for info in client.list_sandboxes(states="running", limit=5000)}
    assert running == {box.sandbox_id for box in boxes}, "no sandbox was lost"
    until(lambda: set(world.pods()) == {pod_name(box.sandbox_id) for box in boxes}, 60, "pods are left")
    assert {world.cluster.nodes.started[name] for name in world.pods()} == {1}, "no pod was started twice"
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda box: box.stop(), boxes))


def test_a_restart_of_the_server_keeps_pods_and_collects_orphans(world: World) -> None:
    with world.sandbox() as sandbox:
        world.server.kill()
        orphan = json.loads(json.dumps(world.pod_of(sandbox)))
        orphan["metadata"] = {"name": f"{POD_PREFIX}orphan", "labels": orphan["metadata"]["labels"],
                              "annotations": {"rock.sandbox/id": "orphan"}}  # fmt: skip
        orphan["spec"].pop("nodeName")
        foreign = json.loads(json.dumps(orphan))
        foreign["metadata"]["name"] = "foreign"
        foreign["metadata"]["labels"] = {**orphan["metadata"]["labels"], "app.kubernetes.io/instance": "another"}
        world.cluster.create(orphan, "boxes")
        world.cluster.create(foreign, "boxes")
        world.server.start(world.port)
        until(lambda: f"{POD_PREFIX}orphan" not in world.pods(), 30, "the orphan is left")
        assert sandbox.run("echo still").output == "still\n"
        assert "foreign" in world.pods(), "a pod of another installation is not ours"
    world.cluster.call(lambda: world.cluster.objects.delete(PODS, "boxes", "foreign", {"gracePeriodSeconds": 0}))


def test_the_key_of_a_pod_joins_as_its_worker_only(world: World) -> None:
    """Code in a sandbox may have the key of its pod: it is of no use elsewhere."""
    with world.sandbox() as sandbox:
        own = name_of(world.pod_of(sandbox))
        key = pod_key(TOKEN, own)
        address = world.pod_of(sandbox)["status"]["podIP"]
        with Client(world.server.url, key) as client:
            with pytest.raises(RockError, match="key"):
                client.list_sandboxes()
            status = NodeStatus(host_name="x", host_ip="x", runtime="fake", isolation=Isolation.NONE, cpus=1,
                                memory_total=1, memory_free=1, sandboxes=0, sandbox_limit=1)  # fmt: skip

            def join(name: str, url: str) -> None:
                spec = JoinWorker(name=name, url=url, holder="h" * 20, status=status)
                client.transport.json("POST", "/v1/workers", spec.model_dump(mode="json"))

            with pytest.raises(RockError, match=f"joins as worker {own} only"):
                join(f"{POD_PREFIX}another", f"http://{address}:8090")
            with pytest.raises(RockError, match="address of pod"):
                join(own, "http://127.0.0.1:22")
        with Client(world.server.url, pod_key("wrong", own)) as client, pytest.raises(RockError, match="key"):
            client.list_sandboxes()


def test_a_real_rocklet_in_a_pod(tmp_path: Path) -> None:
    """Rocklets as processes: what the pod's environment gives them is enough."""
    world = World(tmp_path, runs="rocklet")
    world.cluster = FakeCluster(1, "rocklet", ROCK_RUNTIME="process")
    world.start()
    try:
        with world.sandbox() as sandbox:
            assert sandbox.run("echo $((6 * 7))").output == "42\n"
            assert sandbox.info().runtime == "process"
            pid = int(sandbox.run("echo $PPID").output)
        until(lambda: not Path(f"/proc/{pid}").exists(), 20, "its processes are left")
    finally:
        world.stop()
