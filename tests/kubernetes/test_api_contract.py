"""What ROCK needs of an API server: the same tests on the fake one, and on a real one that KUBECONFIG names with
ROCK_TEST_APISERVER, the process id of its kube-apiserver. `make real-apiserver` runs them on both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rock.errors import Conflict, InvalidConfig, NotFound
from rock.kubernetes.access import from_kubeconfig
from rock.kubernetes.client import Api, Expired, path_of
from rock.kubernetes.informer import Informer, name_of, uid_of, version_of
from rock.protocol.sandbox import State
from rock.sync import Client, Sandbox
from rock.testing.kubernetes import FakeCluster
from tests.cluster.machines import KEY, server
from tests.kubernetes.pod_world import TEMPLATES, free_port
from tests.kubernetes.real_nodes import RealNodes
from tests.waiting import until

REAL = os.environ.get("ROCK_TEST_APISERVER")
PODS = path_of("pods", "default")


def one(name: str) -> str:
    return path_of("pods", "default", name)


def pod(name: str, app: str = "x", **meta: object) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": app}, **meta},
            "spec": {"containers": [{"name": "main", "image": "x:1"}], "schedulerName": "none"}}  # fmt: skip


@pytest.fixture(scope="module", params=["fake", "real"])
def kubeconfig(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "fake":
        with FakeCluster(nodes=1) as cluster:
            yield cluster.kubeconfig
    elif REAL is None:
        pytest.skip("no real API server: make real-apiserver")
    else:
        yield os.environ["KUBECONFIG"]


@pytest.fixture
def run(kubeconfig: str) -> Callable[[Callable[[Api], Awaitable[None]]], None]:
    """Runs a test with a client; its pods are removed after it."""

    async def bounded(work: Callable[[Api], Awaitable[None]]) -> None:
        api = Api(from_kubeconfig(Path(kubeconfig)), qps=3000)
        try:
            async with asyncio.timeout(90):
                await work(api)
        finally:
            for left in (await api.list(PODS))[0]:
                await api.patch(one(name_of(left)), {"metadata": {"finalizers": None}})
                await api.delete(one(name_of(left)), uid_of(left), grace=0)
            await api.close()

    return lambda work: asyncio.run(bounded(work))


Run = Callable[[Callable[[Api], Awaitable[None]]], None]


def test_objects(run: Run) -> None:
    async def work(api: Api) -> None:
        made = await api.create(PODS, pod("a"))
        assert made["status"]["phase"] == "Pending" and uid_of(made) and version_of(made)
        with pytest.raises(Conflict) as conflict:
            await api.create(PODS, pod("a"))
        assert conflict.value.details == {"status": 409, "reason": "AlreadyExists"}
        with pytest.raises(NotFound):
            await api.get(one("none"))
        for kind in ("configmaps", "secrets"):  # without namespaces of others
            assert isinstance((await api.list(path_of(kind, "default")))[0], list)
        with pytest.raises(InvalidConfig):
            await api.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": pod("b")["spec"]})

    run(work)


def test_changes_and_deletions_have_preconditions(run: Run) -> None:
    async def work(api: Api) -> None:
        made = await api.create(PODS, pod("a"))
        changed = await api.patch(one("a"), {"metadata": {"annotations": {"a": "b"}}})
        assert version_of(changed) > version_of(made) and changed["metadata"]["annotations"] == {"a": "b"}
        stale = {"metadata": {"resourceVersion": str(version_of(made)), "annotations": {"a": "c"}}}
        with pytest.raises(Conflict) as conflict:
            await api.patch(one("a"), stale)
        assert conflict.value.details["reason"] == "Conflict"
        with pytest.raises(Conflict):
            await api.delete(one("a"), "another-uid", grace=0)
        with pytest.raises(Conflict):
            await api.delete(one("a"), uid_of(made), grace=0, version=str(version_of(made)))
        await api.delete(one("a"), uid_of(made), grace=0, version=str(version_of(changed)))
        await api.delete(one("a"), uid_of(made), grace=0)
        with pytest.raises(NotFound):
            await api.get(one("a"))
        assert uid_of(await api.create(PODS, pod("a"))) != uid_of(made)

    run(work)


def test_a_finalizer_delays_a_deletion(run: Run) -> None:
    async def work(api: Api) -> None:
        made = await api.create(PODS, pod("a", finalizers=["example.com/held"]))
        await api.delete(one("a"), uid_of(made), grace=0)
        held = await api.get(one("a"))
        assert held["metadata"]["deletionTimestamp"] and uid_of(held) == uid_of(made)
        await api.patch(one("a"), {"metadata": {"finalizers": None}})
        with pytest.raises(NotFound):
            await api.get(one("a"))

    run(work)


def test_a_status_is_changed_apart(run: Run) -> None:
    async def work(api: Api) -> None:
        await api.create(PODS, pod("a"))
        changed = await api.patch(f"{one('a')}/status", {"status": {"phase": "Running", "podIP": "10.1.2.3"}})
        assert changed["status"]["phase"] == "Running"
        again = await api.patch(one("a"), {"status": {"phase": "Failed"}, "metadata": {"labels": {"b": "c"}}})
        assert again["status"]["phase"] == "Running", "only the part status changes it"

    run(work)


def test_lists_have_pages_and_selectors(run: Run) -> None:
    async def work(api: Api) -> None:
        for start in range(0, 520, 40):
            await asyncio.gather(*(api.create(PODS, pod(f"p{number}", "y" if number % 2 else "x"))
                                   for number in range(start, min(start + 40, 520))))  # fmt: skip
        before = api.requests.get("GET", 0)
        found, version = await api.list(PODS)
        assert len(found) == 520 and version.isdigit() and api.requests["GET"] - before == 2
        assert len((await api.list(PODS, "app=y"))[0]) == 260
        assert len((await api.list(PODS, "app in (x,z),app!=y"))[0]) == 260

    run(work)


async def events(api: Api, version: str, count: int, selector: str = "") -> list[tuple[str, str]]:
    found = []
    async for kind, event in api.watch(PODS, version, selector):
        if kind != "BOOKMARK" and found[-1:] != [(kind, name_of(event))]:  # the server may change an object itself
            found.append((kind, name_of(event)))
        if len(found) == count:
            break
    return found


def test_a_watch_continues_at_a_version(run: Run) -> None:
    """Also by a selector, which an object begins and ceases to match."""

    async def work(api: Api) -> None:
        await api.create(PODS, pod("before"))
        _, version = await api.list(PODS)
        made = await api.create(PODS, pod("a"))
        await api.patch(one("a"), {"metadata": {"labels": {"app": "y"}}})
        await api.patch(one("a"), {"metadata": {"labels": {"more": "1"}}})
        await api.delete(one("a"), uid_of(made), grace=0)
        assert await events(api, version, 3) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
        assert await events(api, version, 2, "app=x") == [("ADDED", "a"), ("DELETED", "a")]
        assert await events(api, version, 3, "app=y") == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]

    run(work)


def test_a_version_that_is_too_old_expires(run: Run) -> None:
    async def work(api: Api) -> None:
        made = await api.create(path_of("configmaps", "default"), {"metadata": {"generateName": "old-"}, "data": {}})
        with pytest.raises(Expired):
            while True:  # until the real one has compacted its store, which it does every ten seconds
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        async for kind, _ in api.watch(path_of("configmaps", "default"), "1"):
                            assert kind in ("ADDED", "BOOKMARK")
        await api.delete(path_of("configmaps", "default", name_of(made)), uid_of(made))

    run(work)


def test_the_informer_agrees(run: Run) -> None:
    async def work(api: Api) -> None:
        gone: list[str] = []
        informer = Informer(api, PODS, "app=x", lambda found, is_gone: gone.append(name_of(found)) if is_gone else None,
                            resync=2.0)  # fmt: skip
        informer.open()
        await asyncio.wait_for(informer.synced.wait(), 20)
        for number in range(30):
            made = await api.create(PODS, pod(f"i{number}"))
            if number % 3 == 0:
                await api.delete(one(f"i{number}"), uid_of(made), grace=0)
        wanted = {f"i{number}" for number in range(30) if number % 3}
        for _ in range(200):
            if set(informer.objects) == wanted and len(gone) == 10:
                break
            await asyncio.sleep(0.05)
        assert set(informer.objects) == wanted and sorted(gone) == sorted({f"i{n}" for n in range(0, 30, 3)})
        await informer.close()

    run(work)


# ---- pod mode on the real one ----


class Kubelets:
    """RealNodes in a thread of its own."""

    def __init__(self, kubeconfig: str, folder: Path) -> None:
        self.nodes: RealNodes
        self._kubeconfig, self._folder = kubeconfig, folder
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    @asynccontextmanager
    async def _api(self) -> AsyncIterator[Api]:
        api = Api(from_kubeconfig(Path(self._kubeconfig)), qps=3000)
        yield api
        await api.close()

    def _serve(self) -> None:
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        async with self._api() as api:
            namespace = {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "boxes"}}
            await api.create("/api/v1/namespaces", namespace)
            self.nodes = RealNodes(api, "boxes", self._folder)
            self.nodes.open()
            self._ready.set()
            await self._end.wait()
            await self.nodes.close()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)

    def pods(self) -> list[str]:
        async def work() -> list[str]:
            async with self._api() as api:
                return [name_of(found) for found in (await api.list(path_of("pods", "boxes")))[0]]

        return asyncio.run(work())


@pytest.mark.skipif(REAL is None, reason="no real API server: make real-apiserver")
def test_pod_mode_on_a_real_api_server(tmp_path: Path) -> None:
    """A burst, a restart of the server, and an API server that is suspended for longer than a lease."""
    assert REAL is not None
    many = 40
    kubelets = Kubelets(os.environ["KUBECONFIG"], tmp_path / "pods")
    kubelets.start()
    templates, port = tmp_path / "templates.json", free_port()
    templates.write_text(json.dumps({"templates": TEMPLATES}))
    front = server(tmp_path / "home", port, ROCK_SCHEDULER="kubernetes", ROCK_KUBERNETES_TEMPLATES=str(templates),
                   ROCK_KUBERNETES_CONFIG=os.environ["KUBECONFIG"], ROCK_KUBERNETES_NAMESPACE="boxes",
                   ROCK_ADVERTISE=f"http://127.0.0.1:{port}", ROCK_KUBERNETES_QPS="2000",
                   ROCK_KUBERNETES_RESYNC="3")  # fmt: skip
    try:
        boxes = [Sandbox(base_url=front.url, api_key=KEY, image="x:1", memory="64m") for _ in range(many)]
        with ThreadPoolExecutor(16) as pool, Client(front.url, KEY) as client:
            list(pool.map(lambda box: box.start(), boxes))
            assert set(pool.map(lambda box: box.run("echo on").output, boxes)) == {"on\n"}
            os.kill(int(REAL), signal.SIGSTOP)
            try:
                stopping = list(pool.map(lambda box: client.stop_sandbox(box.sandbox_id), boxes[:2]))
                assert [info.state for info in stopping] == [State.STOPPING] * 2
                front.kill()
                front.start(port)
                end = time.monotonic() + 12
                while time.monotonic() < end:
                    assert {box.run("echo on").output for box in boxes[2:6]} == {"on\n"}, "an outage ends nothing"
                    time.sleep(0.5)
            finally:
                os.kill(int(REAL), signal.SIGCONT)
            until(lambda: len(kubelets.pods()) == many - 2, 60, "accepted stops are not executed")
            assert set(pool.map(lambda box: box.run("echo on").output, boxes[2:])) == {"on\n"}
            assert set(kubelets.nodes.started.values()) == {1}, "no pod was started twice"
            list(pool.map(lambda box: box.stop(), boxes[2:]))
            until(lambda: kubelets.pods() == [], 60, "pods are left")
    finally:
        front.stop()
        kubelets.stop()
