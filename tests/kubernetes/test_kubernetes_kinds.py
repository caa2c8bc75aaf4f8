"""Sandboxes by objects of controllers: BatchSandbox and Pool of OpenSandbox, Sandbox and SandboxClaim of agent-sandbox.
The fake controllers act as the documents of both projects state."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.errors import ImageError, InvalidConfig, Unsupported
from rock.kubernetes.informer import name_of
from rock.kubernetes.kinds import KINDS
from rock.kubernetes.templates import ID_LABEL, POOL_LABEL, pod_name
from rock.protocol.configuration import Configuration
from rock.protocol.keys import POD_PREFIX
from rock.protocol.sandbox import Cause
from rock.sync import Sandbox
from rock.testing.kubernetes import FakeCluster
from rock.testing.kubernetes.custom import CUSTOM
from rock.testing.kubernetes.nodes import PODS, POOLED
from tests.cluster.machines import KEY, TOKEN
from tests.kubernetes.pod_world import FULL, TEMPLATES, World
from tests.waiting import until

ON_DEMAND = {"ports": {"proxy": 8091}, "pool": {"name": "python", "image": "x:1", "cpus": 2, "memory": "64m"}}
ROWS: dict[str, dict[str, Any]] = {
    "BatchSandbox": {"default": {**TEMPLATES["default"], "enable_resource_speedup": True}, "pooled": ON_DEMAND,
                     "reused": {"pool": {**ON_DEMAND["pool"], "name": "reused"}},
                     "absent": {"pool": {**ON_DEMAND["pool"], "name": "absent"}}},
    "Sandbox": {"default": TEMPLATES["default"]},
    "SandboxClaim": {"default": ON_DEMAND, "absent": {"pool": {**ON_DEMAND["pool"], "name": "absent"}},
                     "strict": {"pool": {**ON_DEMAND["pool"], "name": "strict"}}},
}  # fmt: skip
BY_KIND = {kind.kind: kind for kind in CUSTOM}


class Controlled(World):
    """A cluster with both controllers, and a server that uses one kind of object."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder, ROCK_KUBERNETES_KIND=kind)
        self.kind = kind
        self.cluster = FakeCluster(2, "fake", custom=True)
        self.templates = ROWS[kind]

    def objects(self) -> list[dict[str, Any]]:
        return self.cluster.call(lambda: self.cluster.objects.list(BY_KIND[self.kind], "boxes"))

    def sandbox_pods(self) -> list[str]:
        """Pods that are not of a Pool."""
        pods = self.cluster.pods("boxes")
        return [name_of(pod) for pod in pods if POOLED not in (pod["metadata"].get("labels") or {})]

    def pod_of(self, sandbox: Sandbox) -> dict[str, Any]:
        host = sandbox.info().worker
        (found,) = [pod for pod in self.cluster.pods("boxes")
                    if pod["metadata"]["labels"].get("rock.sandbox/worker") == host]  # fmt: skip
        return found

    def stop(self) -> None:
        self.server.stop()
        self.cluster.stop()


@pytest.fixture(scope="module", params=list(ROWS) if FULL else ["BatchSandbox", "SandboxClaim"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    world = Controlled(tmp_path_factory.mktemp("kinds"), request.param)
    world.start()
    cluster = world.cluster
    for name, policy in (("python", "Delete"), ("reused", "Noop")):
        cluster.create({"kind": "Pool", "metadata": {"name": name}, "spec": {
            "template": {"spec": {"containers": [{"name": "main", "image": "x:1"}]}},
            "recycleStrategy": {"type": policy},
            "capacitySpec": {"bufferMin": 1, "bufferMax": 1, "poolMin": 1, "poolMax": 4}}}, "boxes")  # fmt: skip
    for name, allowed in (("python", "Allowed"), ("strict", "Disallowed")):
        cluster.create({"kind": "SandboxTemplate", "metadata": {"name": name}, "spec": {
            "envVarsInjectionPolicy": allowed,
            "podTemplate": {"spec": {"containers": [{"name": "main", "image": "x:1"}]}}}}, "boxes")  # fmt: skip
        cluster.create({"kind": "SandboxWarmPool", "metadata": {"name": name}, "spec": {
            "replicas": 0, "sandboxTemplateRef": {"name": name}}}, "boxes")  # fmt: skip
    yield world
    world.stop()


@pytest.fixture
def world(shared: Controlled) -> Iterator[Controlled]:
    yield shared
    shared.heal()
    with shared.client() as client:
        for info in client.list_sandboxes(states="pending,running,stopping"):
            client.stop_sandbox(info.sandbox_id)
    until(lambda: not shared.objects() and not shared.sandbox_pods(), 60, "objects or pods are left")


def only(world: Controlled, *kinds: str) -> None:
    if world.kind not in kinds:
        pytest.skip(f"it is about {' and '.join(kinds)}")


def test_a_sandbox_is_an_object(world: Controlled) -> None:
    resource = KINDS[world.kind].resource
    before = dict(world.cluster.api.counts)
    with world.sandbox() as sandbox:
        (found,) = world.objects()
        assert name_of(found) == pod_name(sandbox.sandbox_id) == sandbox.info().worker
        assert found["metadata"]["annotations"][ID_LABEL] == sandbox.sandbox_id
        assert found["metadata"]["labels"]["rock.sandbox/sandbox-id"] == sandbox.sandbox_id
        text = json.dumps(found) + json.dumps(world.pod_of(sandbox))
        assert TOKEN not in text and KEY not in text, "no key of the servers is in the cluster"
        assert sandbox.run("echo hello").output == "hello\n"
        if world.kind == "BatchSandbox":
            assert found["metadata"]["labels"]["batchsandbox.alibabacloud.com/resource-speedup"] == "true"
    until(lambda: not world.objects() and not world.sandbox_pods(), 20, "its object or its pod is left")
    counts = world.cluster.api.counts
    writes = {(method, what): count - before.get((method, what), 0) for (method, what), count in counts.items()
              if method != "GET" and count != before.get((method, what), 0)}  # fmt: skip
    assert writes == {("POST", resource): 1, ("DELETE", resource): 1}, "writes of this server for one sandbox"
    until(lambda: not [name for name in world.workers() if name.startswith(POD_PREFIX)], 40, "its worker is left")


def test_the_end_of_a_pod_has_its_cause(world: Controlled) -> None:
    cluster = world.cluster
    rows = (("oom", Cause.OUT_OF_MEMORY, "OOMKilled"), ("evicted", Cause.LOST, "evicted by its node"),
            ("pod", Cause.LOST, "was deleted"), ("object", Cause.LOST, "was deleted"))  # fmt: skip
    for what, cause, match in rows:
        sandbox = world.sandbox()
        sandbox.start()
        pod, name = world.pod_of(sandbox), pod_name(sandbox.sandbox_id)
        began = time.monotonic()
        if what == "oom":
            cluster.run(cluster.nodes.fail(pod))
        elif what == "evicted":
            cluster.run(cluster.nodes.evict(pod, "The node was low on resource: memory"))
        elif what == "pod":
            cluster.call(lambda pod=pod: cluster.objects.delete(PODS, "boxes", name_of(pod)))  # type: ignore[misc]
        else:
            cluster.call(lambda name=name: cluster.objects.delete(BY_KIND[world.kind], "boxes", name))  # type: ignore[misc]
        info = world.ended(sandbox)
        assert time.monotonic() - began < 12, "before the lease of the worker ends"
        assert info.cause is cause and re.search(match, info.reason or ""), (what, info.cause, info.reason)


def test_a_lost_node(world: Controlled) -> None:
    world.cluster.call(lambda: world.cluster.nodes.add_node("node-lost", 100))
    sandbox = world.sandbox()
    for _ in range(4):
        sandbox = world.sandbox()
        sandbox.start()
        if world.pod_of(sandbox)["spec"]["nodeName"] == "node-lost":
            break
    assert world.pod_of(sandbox)["spec"]["nodeName"] == "node-lost"
    world.cluster.run(world.cluster.nodes.lose("node-lost"))
    info = world.ended(sandbox, 40)
    assert info.cause is Cause.LOST and "node-lost" in (info.reason or ""), info.reason
    for pod in world.cluster.pods("boxes"):
        if pod["spec"].get("nodeName") == "node-lost":  # as an operator does, who knows that the machine is gone
            world.cluster.call(lambda pod=pod: world.cluster.objects.finish(  # type: ignore[misc]
                PODS, "boxes", name_of(pod), pod["metadata"]["uid"]))


def test_an_image_that_cannot_be_pulled(world: Controlled) -> None:
    only(world, "BatchSandbox", "Sandbox")
    world.cluster.nodes.images["missing:1"] = "ErrImagePull"
    with pytest.raises(ImageError, match=r"missing:1.*ErrImagePull"):
        Sandbox(base_url=world.server.url, api_key=KEY, image="missing:1", memory="64m").start()


def test_a_killed_server_finds_its_objects(world: Controlled) -> None:
    """No second start, also with lost responses and duplicated events; what has no sandbox is deleted."""
    with world.sandbox() as sandbox:
        world.server.kill()
        (found,) = world.objects()
        orphan = json.loads(json.dumps(found).replace(sandbox.sandbox_id, "orphan"))
        orphan["metadata"] = {key: orphan["metadata"][key] for key in ("name", "labels", "annotations")}
        assert orphan["metadata"]["name"] == f"{POD_PREFIX}orphan"
        world.cluster.create(orphan, "boxes")
        world.server.start(world.port)
        until(lambda: len(world.objects()) == 1, 30, "the orphan is left")
        assert sandbox.run("echo still").output == "still\n"
        faults = world.cluster.faults
        faults.failing, faults.duplicated, faults.stale = 0.3, 0.3, 0.3
        boxes = [world.sandbox() for _ in range(3)]
        for box in boxes:
            box.start()
        assert [box.run("echo on").output for box in boxes] == ["on\n"] * 3
        started = world.cluster.nodes.started
        assert {started[name_of(world.pod_of(box))] for box in [sandbox, *boxes]} == {1}


def test_warm_objects(world: Controlled) -> None:
    """`pools.pods` of the live configuration keeps objects of each kind with pod templates."""
    configured = Configuration.model_validate({"pools": {"pods": [{"image": "x:1", "memory": "64m", "size": 1}]}})
    with world.client() as client:
        if world.kind == "SandboxClaim":
            with pytest.raises(InvalidConfig, match="uses a pool of a controller"):
                client.set_configuration(configured)
            return
        client.set_configuration(configured)

    def warm() -> list[str]:
        there = world.workers()
        return [name_of(one) for one in world.objects() if POOL_LABEL in one["metadata"]["labels"]
                and ID_LABEL not in one["metadata"].get("annotations", {}) and name_of(one) in there]  # fmt: skip

    until(lambda: len(warm()) == 1, 30, "there is no warm object")
    (name,) = warm()
    sandbox = world.sandbox()
    sandbox.start()
    assert sandbox.info().worker == name and sandbox.run("echo warm").output == "warm\n"
    with world.client() as client:
        client.set_configuration(Configuration())


def allocated(found: dict[str, Any]) -> list[str]:
    """The pods of a Pool that a BatchSandbox has."""
    return list(json.loads(found["metadata"]["annotations"]["sandbox.opensandbox.io/alloc-status"])["pods"])


def test_a_pool_of_opensandbox(world: Controlled) -> None:
    """The rocklet is a task in a pod that ran already, with a key of its own; the pod is deleted with its sandbox."""
    only(world, "BatchSandbox")

    def idle() -> list[str]:
        return [name_of(pod) for pod in world.cluster.pods("boxes")
                if pod["metadata"]["labels"].get(POOLED) == "python" and "deletionTimestamp" not in pod["metadata"]]

    until(lambda: len(idle()) == 1, 20, "the pool is empty")
    (waiting,) = idle()
    pooled = {"labels": {"rock.kubernetes.template": "pooled"}}
    with world.sandbox(**pooled) as sandbox:
        assert sandbox.run("echo pooled").output == "pooled\n"
        (found,) = world.objects()
        assert allocated(found) == [waiting]
        assert "template" not in found["spec"] and TOKEN not in json.dumps(found)
        pod = world.cluster.pod(waiting)
        assert "ROCK_API_KEY" not in json.dumps(pod), "a pod of a pool has no key"
        lost = world.sandbox(**pooled)
        lost.start()
        (other,) = [one for one in world.objects() if name_of(one) == pod_name(lost.sandbox_id)]
        (name,) = allocated(other)
        machine = world.cluster.nodes.machines[world.cluster.pod(name)["metadata"]["uid"]]
        world.cluster.run(machine.stop(0.0))
        info = world.ended(lost)
        assert info.cause is Cause.EXITED and "rocklet in its pod ended" in (info.reason or ""), info.reason
    until(lambda: waiting not in idle(), 20, "a pod that was used is in the pool")
    for template, kind, match in (("reused", Unsupported, "does not delete the pods"),
                                  ("absent", InvalidConfig, "no Pool 'absent'")):  # fmt: skip
        with pytest.raises(kind, match=match):
            world.sandbox(labels={"rock.kubernetes.template": template}).start()
    for fields in ({"cpus": 4}, {"disk": "1g"}):
        with pytest.raises(InvalidConfig, match="uses pool 'python'"):
            world.sandbox(**pooled, **fields).start()
    with pytest.raises(InvalidConfig, match="its pods have the image"):
        Sandbox(base_url=world.server.url, api_key=KEY, image="y:1", memory="64m", **pooled).start()


def test_claims_that_cannot_be(world: Controlled) -> None:
    only(world, "SandboxClaim")
    for template, match in (("absent", "WarmPoolNotFound"), ("strict", "EnvVarsInjectionRejected")):
        with pytest.raises(InvalidConfig, match=match):
            world.sandbox(labels={"rock.kubernetes.template": template}).start()


def test_doctor_reports_the_kind(world: Controlled) -> None:
    kind = KINDS[world.kind]
    for installed in (True, False):
        with FakeCluster(1, custom=installed) as cluster:
            environment = {**os.environ, **world.server.environment, "ROCK_KUBERNETES_CONFIG": cluster.kubeconfig}
            done = subprocess.run([sys.executable, "-m", "rock", "doctor", "--json"], capture_output=True, timeout=120,
                                  env=environment)  # fmt: skip
        (row,) = [row for row in json.loads(done.stdout) if row["name"] == f"kind {kind.name}"]
        assert row["ok"] is installed and kind.resource in row["detail"], row


def refused(folder: Path, kind: str, templates: dict[str, Any], custom: bool = True) -> str:
    """The output of a server that does not start."""
    world = Controlled(folder, "BatchSandbox")
    world.cluster = FakeCluster(1, "fake", custom=custom)
    world._settings = {"ROCK_KUBERNETES_KIND": kind}
    world.templates = templates
    try:
        with pytest.raises(AssertionError) as caught:
            world.start()
        return str(caught.value)
    finally:
        world.cluster.stop()


def test_a_server_that_cannot_use_the_kind_does_not_start(tmp_path: Path) -> None:
    rows = (
        ("Sandbox", ROWS["Sandbox"], False, "the cluster has no sandboxes (agents.x-k8s.io/v1beta1)"),
        ("Pod", ROWS["SandboxClaim"], True, "names a pool, which ROCK_KUBERNETES_KIND=Pod does not use"),
        ("SandboxClaim", ROWS["Sandbox"], True, "uses pools only"),
        ("Deployment", ROWS["Sandbox"], True, "ROCK_KUBERNETES_KIND=Deployment is not a known kind"),
        ("BatchSandbox", {"default": {"pool": {"name": "python"}}}, True, "pool has not name, image, cpus and memory"),
        ("BatchSandbox", {"default": {**ON_DEMAND, **TEMPLATES["default"]}}, True, "both `template` and `pool`"),
    )
    for number, (kind, templates, custom, expected) in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert expected in refused(folder, kind, templates, custom)
