"""A fake cluster and a server that makes pods in it, for tests of pod mode."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from rock.kubernetes.informer import name_of
from rock.kubernetes.templates import pod_name
from rock.protocol.sandbox import SandboxInfo, State
from rock.sync import Client, Sandbox
from rock.testing.kubernetes import FakeCluster
from tests.cluster.machines import KEY, server
from tests.conftest import RunningServer
from tests.waiting import until

FULL = bool(os.environ.get("ROCK_TEST_KUBERNETES"))
TEMPLATES = {
    "default": {"template": {"spec": {"containers": [{
        "name": "main", "image": "{{ image }}",
        "resources": {"requests": {"cpu": "{{ cpus }}", "memory": "{{ memory }}"}}}]}}},
    "kata": {"template": {"spec": {"runtimeClassName": "kata", "containers": [{"name": "main", "image": "x"}]}}},
    "gpu": {"template": {"spec": {"nodeSelector": {"accelerator": "{{ accelerator_type }}"},
                                  "containers": [{"name": "main", "image": "{{ image }}"}]}}},
}  # fmt: skip


class World:
    """A cluster and a server that makes pods in it."""

    def __init__(self, folder: Path, runs: Any = "fake", nodes: Any = 2, processes: int = 0,
                 **settings: str) -> None:
        self.cluster = FakeCluster(nodes, runs, processes=processes)
        self.folder = folder
        self._settings = settings
        self.templates: dict[str, Any] = TEMPLATES
        self.server: RunningServer

    def start(self) -> None:
        self.cluster.start()
        templates = self.folder / "templates.json"
        templates.write_text(json.dumps({"templates": self.templates}))
        self.port = free_port()
        self.server = server(
            self.folder / "home", self.port, ROCK_SCHEDULER="kubernetes", ROCK_KUBERNETES_TEMPLATES=str(templates),
            ROCK_KUBERNETES_CONFIG=self.cluster.kubeconfig, ROCK_KUBERNETES_NAMESPACE="boxes",
            ROCK_ADVERTISE=f"http://127.0.0.1:{self.port}", ROCK_KUBERNETES_QPS="2000",
            ROCK_KUBERNETES_UNSCHEDULABLE="0", ROCK_KUBERNETES_RESYNC="3", **self._settings)  # fmt: skip

    def heal(self) -> None:
        """Switch all faults off."""
        faults = self.cluster.faults
        for name in ("slow", "throttled", "failing", "dropped", "duplicated", "stale"):
            setattr(faults, name, 0.0)
        faults.down = False

    def expire_watches(self) -> None:
        """End all watches; their resourceVersions are too old to continue."""
        self.cluster.call(self.cluster.objects.compact)
        self.cluster.call(self.cluster.objects.close_watches)

    def stop(self) -> None:
        try:
            self.server.stop()
            until(lambda: self.pods() == [], 60, "pods are left")
        finally:
            self.cluster.stop()

    def client(self) -> Client:
        return Client(self.server.url, KEY)

    def sandbox(self, **fields: Any) -> Sandbox:
        return Sandbox(base_url=self.server.url, api_key=KEY, image="x:1", memory="64m", **fields)

    def pods(self) -> list[str]:
        return [name_of(pod) for pod in self.cluster.pods("boxes")]

    def pod_of(self, sandbox: Sandbox) -> dict[str, Any]:
        return self.cluster.pod(pod_name(sandbox.sandbox_id))

    def ended(self, sandbox: Sandbox, seconds: float = 15.0) -> SandboxInfo:
        """The record of a sandbox, once it has ended."""
        with self.client() as client:
            until(lambda: client.get_sandbox(sandbox.sandbox_id).state is State.STOPPED, seconds, "it does not end")
            return client.get_sandbox(sandbox.sandbox_id)

    def workers(self) -> list[str]:
        with self.client() as client:
            return [info.name for info in client.list_workers()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
