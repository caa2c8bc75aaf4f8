"""A fake cluster in its own thread: API server, scheduler, kubelets, controllers."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import uvicorn

from rock.cli.serve.serve import http_over, listen
from rock.testing.kubernetes.api import ApiServer, Faults
from rock.testing.kubernetes.custom import CUSTOM, Controllers
from rock.testing.kubernetes.hosts import Hosts
from rock.testing.kubernetes.nodes import PODS, EmbeddedRocklet, Idle, Machine, Nodes, RockletProcess
from rock.testing.kubernetes.objects import KINDS, Object, Objects, key_of

T = TypeVar("T")
Runs = Literal["idle", "rocklet", "fake"]


class FakeCluster:
    """A context manager. nodes: their number, or pods by node. runs: what is in a pod: nothing, a real rocklet, or one
    with the fake runtime. start_seconds: of a pod. processes: that run the rocklets with the fake runtime; 0 is the
    thread of the cluster. custom: with the resources and controllers of OpenSandbox and agent-sandbox (custom.py).
    environment: more variables of real rocklets.

    url: of the API server; kubeconfig: the path of a file with it. token: required as a bearer token; kubectl sends
    none over HTTP. Its methods may be called from any thread.
    """

    def __init__(
        self, nodes: int | dict[str, int] = 1, runs: Runs = "idle", *, start_seconds: float = 0.0, token: str = "",
        faults: Faults | None = None, processes: int = 0, custom: bool = False, **environment: str,
    ) -> None:  # fmt: skip
        self.url = ""
        self.kubeconfig = ""
        self.faults = faults or Faults()
        self.objects = Objects((*KINDS, *CUSTOM) if custom else KINDS)
        self._custom = custom
        self.api = ApiServer(self.objects, self.faults, token)
        self._nodes_wanted = nodes if isinstance(nodes, dict) else {f"node-{n}": 10_000 for n in range(1, nodes + 1)}
        self._runs = runs
        self._seconds = start_seconds
        self._token = token
        self._environment = environment
        self._hosts = Hosts(processes) if processes else None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: uvicorn.Server | None = None
        self.nodes: Nodes

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start serving; raises the reason of a failure."""
        self._folder = tempfile.TemporaryDirectory(prefix="rock-cluster-", ignore_cleanup_errors=True)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="fake cluster", daemon=True)
        self._thread.start()
        ready.result()
        self.kubeconfig = str(Path(self._folder.name) / "kubeconfig")
        Path(self.kubeconfig).write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {"token": self._token} if self._token else {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": "default"}}],
        }))  # fmt: skip

    def stop(self) -> None:
        """End everything. Idempotent."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive() and self._http is not None:
            self.faults.down = False
            self._loop.call_soon_threadsafe(self.objects.close_watches)
            self._loop.call_soon_threadsafe(setattr, self._http, "should_exit", True)
        if self._thread is not None:
            self._thread.join(60)
            self._thread = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def call(self, work: Callable[[], T]) -> T:
        """Call a function in the thread of the cluster."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(run)
        return done.result(60)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, as `cluster.run(cluster.nodes.lose("node-1"))`."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def pods(self, namespace: str = "") -> list[Object]:
        return self.call(lambda: self.objects.list(PODS, namespace))

    def pod(self, name: str) -> Object:
        """The pod of that name, in any namespace. StopIteration when there is none."""
        return next(pod for pod in self.pods() if key_of(pod)[1] == name)

    def create(self, body: Object, namespace: str = "default") -> Object:
        """Create an object of any kind."""
        kind = next(kind for kind in self.objects.kinds if kind.kind == body["kind"])
        return self.call(lambda: self.objects.create(kind, namespace if kind.namespaced else "", body))

    def _machine(self, pod: Object) -> Machine:
        assert self._folder is not None
        home = Path(self._folder.name) / "pods" / str(pod["metadata"]["uid"])
        if self._runs == "idle":
            return Idle()
        if self._runs == "fake" and self._hosts is not None:
            return self._hosts.machine(home)
        if self._runs == "fake":
            return EmbeddedRocklet(home)
        return RockletProcess(home, **self._environment)

    def _run(self, ready: Future[None]) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _serve(self, ready: Future[None]) -> None:
        listener = listen("127.0.0.1", 0)
        self._loop = asyncio.get_running_loop()
        self.nodes = Nodes(self.objects, self._machine, self._seconds)
        if self._custom:
            Controllers(self.objects, self.nodes)
        self._http = http_over(self.api)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name, pods in self._nodes_wanted.items():
            self.nodes.add_node(name, pods)
        self.nodes.open()
        try:
            ready.set_result(None)
            await self._http.serve(sockets=[listener])
        finally:
            await self.nodes.close()
            if self._hosts is not None:
                await self._hosts.close()
            listener.close()
