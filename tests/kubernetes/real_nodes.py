"""A scheduler and a kubelet for a real API server: pods are rocklets of this process with the fake runtime.

They use the API only: the binding of a pod, its status, and its deletion. One loopback address for each pod.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

from rock.errors import RockError
from rock.kubernetes.client import Api, Object, path_of
from rock.kubernetes.informer import Informer, name_of, uid_of
from rock.testing.kubernetes.nodes import EmbeddedRocklet


class RealNodes:
    """One node that runs the pods of a namespace. started: how often the pod of each name was started."""

    def __init__(self, api: Api, namespace: str, folder: Path) -> None:
        self.started: dict[str, int] = {}
        self._api = api
        self._namespace = namespace
        self._folder = folder
        self._machines: dict[str, EmbeddedRocklet] = {}  # by uid
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by uid
        self._addresses = itertools.count(2)
        self._informer = Informer(api, path_of("pods", namespace), "", self._see, resync=5.0)

    def open(self) -> None:
        self._informer.open()

    async def close(self) -> None:
        await self._informer.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(machine.stop(0.0) for machine in self._machines.values()))

    def _see(self, pod: Object, gone: bool) -> None:
        uid = uid_of(pod)
        ends = gone or bool(pod["metadata"].get("deletionTimestamp"))
        if ends and uid in self._machines:
            self._tasks[f"end {uid}"] = asyncio.create_task(self._end(pod, self._machines.pop(uid)))
        elif not ends and uid not in self._tasks and not pod["spec"].get("nodeName"):
            self._tasks[uid] = asyncio.create_task(self._run(pod))

    async def _run(self, pod: Object) -> None:
        name, uid = name_of(pod), uid_of(pod)
        own = path_of("pods", self._namespace, name)
        try:
            binding = {"kind": "Binding", "apiVersion": "v1", "metadata": {"name": name},
                       "target": {"kind": "Node", "apiVersion": "v1", "name": "node-1"}}  # fmt: skip
            await self._api.create(f"{own}/binding", binding)
            self.started[name] = self.started.get(name, 0) + 1
            address = f"127.{200 + os.getpid() % 50}.0.{next(self._addresses)}"
            container = pod["spec"]["containers"][0]
            environment = {row["name"]: str(row.get("value", "")).replace("$(POD_IP)", address)
                           for row in container["env"] if "value" in row}  # fmt: skip
            await self._api.patch(f"{own}/status", {"status": {"phase": "Pending", "podIP": address}})
            machine = self._machines[uid] = EmbeddedRocklet(self._folder / uid)
            await machine.start(address, environment)
            await self._api.patch(f"{own}/status", {"status": {
                "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": container["name"], "image": container["image"], "imageID": "",
                                       "ready": True, "restartCount": 0, "state": {"running": {}}}]}})  # fmt: skip
        except RockError as error:  # the pod was deleted meanwhile
            print(f"pod {name}: {error}")

    async def _end(self, pod: Object, machine: EmbeddedRocklet) -> None:
        await machine.stop(1.0)
        await self._api.delete(path_of("pods", self._namespace, name_of(pod)), uid_of(pod), grace=0)
