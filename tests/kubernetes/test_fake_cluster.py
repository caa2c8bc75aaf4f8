"""The fake cluster, by what real clients see of it: kubectl, lightkube, and our own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.errors import Conflict, InvalidConfig, NotFound, Unavailable, Unsupported
from rock.kubernetes.access import Access, from_kubeconfig
from rock.kubernetes.client import Api, Expired, path_of
from rock.kubernetes.informer import Informer, name_of
from rock.testing.kubernetes import FakeCluster
from tests.kubernetes import programs
from tests.packages import CannotBeHad
from tests.waiting import until

PODS = path_of("pods", "default")


def pod(name: str, **spec: object) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "x"}},
            "spec": {"containers": [{"name": "main", "image": "x:1"}], **spec}}  # fmt: skip


DEPLOYMENT = {
    "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
    "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
             "template": {"metadata": {"labels": {"app": "web"}},
                          "spec": {"containers": [{"name": "main", "image": "x:1"}]}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(nodes=2) as made:
        yield made


class Kubectl:
    def __init__(self, cluster: FakeCluster, folder: Path) -> None:
        options = ["--kubeconfig", cluster.kubeconfig, "--cache-dir", str(folder / "cache")]
        self._words = [str(programs.kubectl()), *options]
        self._folder = folder

    def __call__(self, *words: str, fails: str = "") -> str:
        done = subprocess.run([*self._words, *words], capture_output=True, text=True, timeout=60)
        if fails:
            assert done.returncode != 0 and fails in done.stderr, done.stderr
        else:
            assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> str:
        file = self._folder / "objects.json"
        file.write_text("\n".join(json.dumps(one) for one in objects))
        return self("apply", "-f", str(file))


@pytest.fixture
def kubectl(cluster: FakeCluster, tmp_path: Path) -> Kubectl:
    try:
        return Kubectl(cluster, tmp_path)
    except CannotBeHad as error:
        pytest.skip(str(error))


def names(cluster: FakeCluster, prefix: str) -> list[str]:
    return [name_of(one) for one in cluster.pods() if name_of(one).startswith(prefix)]


def test_kubectl(cluster: FakeCluster, kubectl: Kubectl) -> None:
    """apply, get, scale, label, drain and delete, as a user has them."""
    assert "created" in kubectl.apply(DEPLOYMENT)
    until(lambda: len(names(cluster, "web-")) == 2, 10)
    assert "unchanged" in kubectl.apply(DEPLOYMENT)
    changed = json.loads(json.dumps(DEPLOYMENT))
    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "x:2"
    assert "configured" in kubectl.apply(changed)
    image = kubectl("get", "deployment", "web", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
    assert image == "x:2"
    kubectl("scale", "deployment", "web", "--replicas", "5")
    until(lambda: len(names(cluster, "web-")) == 5, 10)
    kubectl("rollout", "status", "deployment/web", "--timeout", "20s")
    assert kubectl("get", "pods", "-l", "app=web", "-o", "name").count("pod/web-") == 5
    kubectl("get", "pod", "none", fails="NotFound")
    kubectl("annotate", "deployment", "web", "a=b")
    kubectl("drain", "node-1", "--ignore-daemonsets", "--timeout", "40s", "--grace-period", "1", "--force")
    until(lambda: len(names(cluster, "web-")) == 5, 10)
    assert {one["spec"]["nodeName"] for one in cluster.pods() if name_of(one).startswith("web-")} == {"node-2"}
    kubectl("uncordon", "node-1")
    kubectl("delete", "deployment", "web", "--timeout", "20s")
    until(lambda: names(cluster, "web-") == [], 10)


def test_kubectl_respects_a_disruption_budget(cluster: FakeCluster, kubectl: Kubectl) -> None:
    kubectl.apply(pod("kept", nodeSelector={"kubernetes.io/hostname": "node-2"}),
                  {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "budget"},
                   "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "x"}}}})  # fmt: skip
    kubectl("wait", "--for=condition=Ready", "pod/kept", "--timeout", "20s")
    kubectl("drain", "node-2", "--force", "--timeout", "3s", fails="violate the pod's disruption budget")
    kubectl("uncordon", "node-2")
    kubectl("delete", "pdb/budget", "pod/kept", "--grace-period", "1")


LIGHTKUBE = """
import sys
from lightkube import Client, KubeConfig
from lightkube.core.exceptions import ApiError
from lightkube.models.core_v1 import Container, PodSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Pod
client = Client(config=KubeConfig.from_file(sys.argv[1]))
made = client.create(Pod(metadata=ObjectMeta(name="light", labels={"by": "lightkube"}),
                         spec=PodSpec(containers=[Container(name="main", image="x:1")])))
try:
    client.create(made)
except ApiError as error:
    assert error.status.code == 409, error.status
for kind, found in client.watch(Pod, resource_version=made.metadata.resourceVersion):
    if found.metadata.name == "light" and found.status.phase == "Running":
        break
client.patch(Pod, "light", {"metadata": {"annotations": {"a": "b"}}})
assert client.get(Pod, "light").metadata.annotations == {"a": "b"}
assert [one.metadata.name for one in client.list(Pod, labels={"by": "lightkube"})] == ["light"]
client.delete(Pod, "light", grace_period=1)
for kind, found in client.watch(Pod, resource_version=made.metadata.resourceVersion):
    if kind == "DELETED" and found.metadata.name == "light":
        break
print("done")
"""


def test_lightkube(cluster: FakeCluster) -> None:
    try:
        python = programs.client_python()
    except CannotBeHad as error:
        pytest.skip(str(error))
    done = subprocess.run([python, "-W", "ignore", "-c", LIGHTKUBE, cluster.kubeconfig], capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.stdout.strip() == "done", done.stderr


# ---- our own client ----


def access(cluster: FakeCluster) -> Access:
    return Access(cluster.url)


def test_objects_through_the_client(cluster: FakeCluster) -> None:
    async def work() -> None:
        api = Api(access(cluster))
        made = await api.create(PODS, pod("one"))
        with pytest.raises(Conflict):
            await api.create(PODS, pod("one"))
        with pytest.raises(NotFound):
            await api.get(path_of("pods", "default", "none"))
        with pytest.raises(Conflict, match="Precondition"):
            await api.delete(path_of("pods", "default", "one"), "another-uid")
        changed = await api.patch(path_of("pods", "default", "one"), {"metadata": {"labels": {"a": "b"}}})
        assert changed["metadata"]["labels"] == {"app": "x", "a": "b"}
        await api.delete(path_of("pods", "default", "one"), made["metadata"]["uid"], grace=0)
        await api.delete(path_of("pods", "default", "one"), made["metadata"]["uid"], grace=0)
        await api.close()

    asyncio.run(work())


def test_a_response_does_not_wait_for_an_acknowledgment(cluster: FakeCluster) -> None:
    """A server sends head and body in two writes: with Nagle's algorithm each response took 45 ms."""

    async def work() -> None:
        api = Api(access(cluster), qps=3000)
        await api.list(PODS)
        began = time.monotonic()
        for _ in range(60):
            await api.list(path_of("configmaps", "default"))
        assert time.monotonic() - began < 1.5, "60 requests; 0.1 s without the delay, 2.6 s with it"
        await api.close()

    asyncio.run(work())


def test_pages_and_an_expired_version(cluster: FakeCluster) -> None:
    async def work() -> None:
        api = Api(access(cluster), qps=3000)
        bodies = [pod(f"many-{number}", nodeSelector={"none": "here"}) for number in range(520)]
        cluster.call(lambda: [cluster.objects.create(cluster_kind(), "default", body) for body in bodies])
        before = cluster.api.counts.get(("GET", "pods"), 0)
        found, version = await api.list(PODS)
        assert len([one for one in found if name_of(one).startswith("many-")]) == 520
        assert cluster.api.counts["GET", "pods"] - before == 2, "500 objects are one page"
        cluster.call(lambda: cluster.objects.delete(cluster_kind(), "default", "many-1"))
        cluster.call(cluster.objects.compact)
        with pytest.raises(Expired):
            async for _ in api.watch(PODS, version):
                pass
        await api.close()

    asyncio.run(work())
    left = [number for number in range(520) if number != 1]
    cluster.call(lambda: [cluster.objects.delete(cluster_kind(), "default", f"many-{number}") for number in left])


def cluster_kind() -> Any:
    from rock.testing.kubernetes.nodes import PODS as kind

    return kind


def test_throttling_and_no_server(cluster: FakeCluster) -> None:
    async def work() -> None:
        api = Api(access(cluster))
        cluster.faults.throttled = 0.5
        try:
            for _ in range(3):
                await api.list(PODS)
        finally:
            cluster.faults.throttled = 0.0
        await api.close()
        absent = Api(Access("http://127.0.0.1:9"))
        with pytest.raises(Unavailable, match="not reached"):
            await absent.create(PODS, pod("x"))
        await absent.close()

    asyncio.run(work())


@pytest.mark.parametrize("faults", [{}, {"dropped": 0.2, "duplicated": 0.3, "stale": 0.4}, {"throttled": 0.3}])
def test_the_cache_is_that_of_the_server(faults: dict[str, float]) -> None:
    """Whatever is dropped, repeated or late, the cache agrees with the server, and every removal was one."""
    with FakeCluster(nodes=2) as cluster:

        async def work() -> None:
            api = Api(access(cluster), qps=3000)
            gone: list[str] = []
            informer = Informer(api, PODS, "app=x", lambda one, is_gone: gone.append(name_of(one)) if is_gone else None,
                                resync=0.5)  # fmt: skip
            informer.open()
            await asyncio.wait_for(informer.synced.wait(), 20)
            for name, value in faults.items():
                setattr(cluster.faults, name, value)
            for number in range(40):
                await asyncio.to_thread(cluster.create, pod(f"p{number}"))
                if number % 3 == 0 and number:
                    kind = cluster_kind()
                    await asyncio.to_thread(
                        cluster.call, lambda n=number, kind=kind: cluster.objects.delete(  # type: ignore[misc]
                            kind, "default", f"p{n - 1}", {"gracePeriodSeconds": 0}))
                if number == 20:
                    await asyncio.to_thread(cluster.call, cluster.objects.compact)
                    await asyncio.to_thread(cluster.call, cluster.objects.close_watches)
            for name in faults:
                setattr(cluster.faults, name, 0.0)
            wanted = {name_of(one): one["metadata"]["uid"] for one in await asyncio.to_thread(cluster.pods)}
            for _ in range(200):
                here = {name: one["metadata"]["uid"] for name, one in informer.objects.items()}
                if here == wanted:
                    break
                await asyncio.sleep(0.05)
            assert here == wanted
            assert not set(gone) & set(wanted), "what was reported as gone is gone"
            await informer.close()
            await api.close()

        asyncio.run(work())


def test_a_token_is_required_and_read_again(tmp_path: Path) -> None:
    with FakeCluster(token="good") as cluster:
        (tmp_path / "token").write_text("bad")
        (tmp_path / "config").write_text(json.dumps({
            "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": cluster.url}}],
            "users": [{"name": "u", "user": {"tokenFile": "token"}}]}))  # fmt: skip

        async def work() -> None:
            api = Api(from_kubeconfig(tmp_path / "config"))
            with pytest.raises(InvalidConfig, match="Unauthorized"):
                await api.create(PODS, pod("x"))
            (tmp_path / "token").write_text("good")
            await api.list(PODS)
            await api.close()

        asyncio.run(work())
    for user in ({"exec": {"command": "x"}}, {"auth-provider": {"name": "x"}}):
        (tmp_path / "config").write_text(json.dumps({
            "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": "http://x"}}], "users": [{"name": "u", "user": user}]}))
        with pytest.raises(Unsupported, match="starts no programs"):
            from_kubeconfig(tmp_path / "config")


def test_rocklets_in_processes_of_their_own() -> None:
    """They serve at the addresses of their pods, end with them, and end with their process."""
    field = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    container = {"name": "main", "image": "x:1", "env": [field, {"name": "ROCK_PORT", "value": "8090"}]}
    with FakeCluster(1, "fake", processes=2) as cluster:
        for name in "abc":
            cluster.create({**pod(name), "spec": {"containers": [container], "terminationGracePeriodSeconds": 0}})
        until(lambda: [one["status"].get("phase") for one in cluster.pods()] == ["Running"] * 3, 20, "pods")

        def serves(name: str) -> bool:
            address = cluster.pod(name)["status"]["podIP"]
            try:
                with socket.create_connection((address, 8090), timeout=5):
                    return True
            except ConnectionRefusedError:
                return False

        assert all(serves(name) for name in "abc")
        hosts = [pid for pid in children() if b"kubernetes.hosts" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(hosts) == 2
        cluster.run(cluster.nodes.fail(cluster.pod("b")))
        assert cluster.pod("b")["status"]["phase"] == "Failed"
        assert [serves(name) for name in "abc"] == [True, False, True]
        os.kill(hosts[0], signal.SIGKILL)  # it had the first and the third
        until(lambda: cluster.pod("a")["status"]["phase"] == "Failed", 20, "the end of a process is not reported")
        assert cluster.pod("c")["status"]["phase"] == "Failed"
    assert not set(hosts) & set(children())


def children() -> list[int]:
    """The processes that this one has started."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
