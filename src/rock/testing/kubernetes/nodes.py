"""The scheduler, the kubelets and the controllers of a fake cluster, and what runs in its pods: nothing, a rocklet as a
process, or a rocklet in this process with the fake runtime. Each pod has a loopback address of its own, so that all of
them may use the same port."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from rock.cli.serve.serve import Rocklet, http_over, listen
from rock.runtime.fake import FakeRuntime
from rock.settings import Settings, child_environment
from rock.testing.kubernetes.objects import KINDS, Kind, Object, Objects, Refused, by_labels, key_of, now

log = logging.getLogger("rock.testing")

PODS, NODES, DEPLOYMENTS, SETS, SECRETS, CONFIGS = (
    next(kind for kind in KINDS if kind.kind == name)
    for name in ("Pod", "Node", "Deployment", "StatefulSet", "Secret", "ConfigMap")
)
_TOGETHER = 0.01  # seconds in which changes of objects are collected for one look of the controllers
POOLED = "sandbox.opensandbox.io/pool-name"  # a label of pods that only run tasks
COST = "controller.kubernetes.io/pod-deletion-cost"


# ---- machines ----


class Machine(Protocol):
    """What runs in one pod. environment: of its first container."""

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        """Start it; return when it serves."""
        ...

    async def ended(self) -> int:
        """Wait until it ends by itself; its exit status."""
        ...

    async def stop(self, grace: float) -> None:
        """End it, after at most `grace` seconds by force."""
        ...


class Idle:
    """A container that does nothing."""

    def __init__(self) -> None:
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        pass

    async def ended(self) -> int:
        return await asyncio.shield(self._over)

    async def stop(self, grace: float) -> None:
        if not self._over.done():
            self._over.set_result(0)


class RockletProcess:
    """A real `rocklet`, with the environment of the pod."""

    def __init__(self, home: Path, **more: str) -> None:
        self._home = home
        self._more = more
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        given = {**environment, "ROCK_HOST": address, "ROCK_HOME": str(self._home), **self._more}
        with open(self._home / "output.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()",
                env=child_environment(**given), stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # fmt: skip
        note = self._home / "server.json"
        while not note.exists() and self._process.returncode is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)

    async def ended(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM if grace else signal.SIGKILL)
            try:
                async with asyncio.timeout(grace):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        await self._process.wait()


class EmbeddedRocklet:
    """A rocklet in this event loop with the fake runtime: hundreds of pods in one process."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._rocklet: Rocklet | None = None
        self._listener: socket.socket | None = None
        self._http: Any = None
        self._served: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        os.makedirs(self._home, mode=0o700, exist_ok=True)
        given = {"pool_size": 0, "home": self._home, "runtime": "fake", "host": address}
        settings = Settings.read(environment, **given)
        listener = self._listener = listen(address, settings.port)
        rocklet = self._rocklet = Rocklet(settings, {"fake": FakeRuntime()})
        try:
            await rocklet.open()
        except BaseException:
            listener.close()
            self._rocklet = None
            raise
        if self._rocklet is not rocklet:  # it was stopped meanwhile
            return
        self._http = http_over(rocklet.app)
        self._http.main_loop = self._until_stopped
        self._served = asyncio.create_task(self._http.serve(sockets=[listener]), name=f"pod {address}")

    async def _until_stopped(self) -> None:
        """Of its HTTP server, instead of ten checks a second: with 1,000 pods those take half a core."""
        await self._http.on_tick(0)
        await self._stopped.wait()

    async def ended(self) -> int:
        return await asyncio.shield(self._over)

    async def stop(self, grace: float) -> None:
        self._stopped.set()
        rocklet, self._rocklet = self._rocklet, None
        if rocklet is None:
            return
        rocklet.let_go()
        if self._http is not None:
            self._http.should_exit = True
            self._http.force_exit = True
        if self._served is not None:
            await asyncio.gather(self._served, return_exceptions=True)
        for sandbox_id in list(rocklet.node.supervisors):
            with contextlib.suppress(Exception):
                await rocklet.node.destroy(sandbox_id)
        await rocklet.close()
        if self._listener is not None:
            self._listener.close()  # a server that ends while it starts leaves it open
        if not self._over.done():
            self._over.set_result(137)


# ---- nodes ----


class Nodes:
    """Binds pods to nodes, runs them, and reports their status.

    make: what runs in a pod. seconds: until an accepted pod starts, and for its end. images: of which a pull fails,
    with the reason, as {"missing:1": "ErrImagePull"}.
    """

    def __init__(self, objects: Objects, make: Callable[[Object], Machine], start_seconds: float = 0.0) -> None:
        self.images: dict[str, str] = {}
        self.started: dict[str, int] = {}  # how often the pod of each name was started
        self.machines: dict[str, Machine] = {}  # by uid of the pod
        self._objects = objects
        self._make = make
        self._seconds = start_seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by uid
        self._ending: dict[str, asyncio.Task[None]] = {}  # by uid
        self._addresses = itertools.count(2)
        self._network = 64 + os.getpid() % 128
        self._lost: set[str] = set()  # names of nodes
        self.pending = asyncio.Event()  # set: the controllers look again
        self.controllers: list[Callable[[], None]] = []  # more of them
        self.controlled: set[Kind] = set()  # by these
        self._loop_task: asyncio.Task[None] | None = None
        objects.on_change.append(self._changed)

    def open(self) -> None:
        self._loop_task = asyncio.create_task(self._run(), name="scheduler")

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
        tasks = [*self._tasks.values(), *self._ending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *([self._loop_task] if self._loop_task else []), return_exceptions=True)
        await asyncio.gather(*(machine.stop(1.0) for machine in list(self.machines.values())), return_exceptions=True)
        self.machines.clear()

    def add_node(self, name: str, pods: int = 110, labels: Mapping[str, str] | None = None) -> None:
        body: Object = {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
                        "spec": {}, "status": {"capacity": {"pods": str(pods)}, "allocatable": {"pods": str(pods)},
                                               "conditions": [{"type": "Ready", "status": "True"}]}}  # fmt: skip
        self._objects.create(NODES, "", body)

    # ---- scheduler and controllers ----

    def _changed(self, event: str, kind: Kind, found: Object) -> None:
        if kind is PODS:
            uid = str(found["metadata"]["uid"])
            if event != "DELETED" and found["metadata"].get("deletionTimestamp") and uid not in self._ending:
                self._finish(uid, self._end(found))
            elif event == "DELETED" and uid in self._tasks:  # by force
                self._finish(f"{uid} by force", self._kill(uid))
        if kind in (PODS, NODES, DEPLOYMENTS, SETS) or kind in self.controlled:
            self.pending.set()

    def _finish(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._ending[name] = task = asyncio.create_task(work, name=f"end-{name}")
        task.add_done_callback(lambda _: self._ending.pop(name, None))

    async def _run(self) -> None:
        while True:
            await self.pending.wait()
            self.pending.clear()
            await asyncio.sleep(_TOGETHER)
            try:
                for kind in (DEPLOYMENTS, SETS):
                    for one in self._objects.list(kind):
                        self._control(kind, one)
                for look in self.controllers:
                    look()
                self._schedule()
            except Refused as error:
                log.warning("fake controllers: %s", error.message)

    def _schedule(self) -> None:
        counts: dict[str, int] = {}
        waiting = []
        for pod in self._objects.list(PODS):
            node = (pod.get("spec") or {}).get("nodeName")
            if node and (pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded"):
                counts[node] = counts.get(node, 0) + 1
            elif not node and not pod["metadata"].get("deletionTimestamp") and _is_own(pod):
                waiting.append(pod)
        nodes = self._objects.list(NODES) if waiting else []
        for pod in waiting:
            wanted = (pod.get("spec") or {}).get("nodeSelector") or {}
            fit = [
                node for node in nodes
                if not (node.get("spec") or {}).get("unschedulable") and node["metadata"]["name"] not in self._lost
                and all(node["metadata"]["labels"].get(key) == value for key, value in wanted.items())
                and counts.get(node["metadata"]["name"], 0) < int(node["status"]["capacity"]["pods"])
            ]  # fmt: skip
            if not fit:
                content = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                        "message": f"0/{len(nodes)} nodes are available"}  # fmt: skip
                self._objects.set_status(PODS, *key_of(pod), phase="Pending", conditions=[content])
                continue
            name = min(fit, key=lambda node: counts.get(node["metadata"]["name"], 0))["metadata"]["name"]
            counts[name] = counts.get(name, 0) + 1
            bound = copy.deepcopy(pod)
            bound["spec"]["nodeName"] = name
            bound["metadata"].pop("resourceVersion", None)
            made = self._objects.update(PODS, *key_of(pod), bound)
            uid = str(made["metadata"]["uid"])
            task = asyncio.create_task(self._pod(made), name=f"pod-{uid}")
            self._tasks[uid] = task
            task.add_done_callback(lambda _, uid=uid: self._tasks.pop(uid, None))  # type: ignore[misc]

    def _control(self, kind: Kind, found: Object) -> None:
        """Pods of a Deployment or StatefulSet, without ReplicaSets between."""
        namespace, name = key_of(found)
        uid, spec = found["metadata"]["uid"], found.get("spec") or {}
        matches = by_labels(spec.get("selector") or {})
        own = [pod for pod in self._objects.list(PODS, namespace, matches)
               if any(row.get("uid") == uid for row in pod["metadata"].get("ownerReferences") or [])]  # fmt: skip
        live = [pod for pod in own if not pod["metadata"].get("deletionTimestamp")
                and (pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded")]  # fmt: skip
        wanted = int(spec.get("replicas", 1))
        if kind is SETS:
            there = {pod["metadata"]["name"] for pod in own}
            missing = [f"{name}-{number}" for number in range(wanted) if f"{name}-{number}" not in there]
            extra = [pod for pod in live if int(pod["metadata"]["name"].rpartition("-")[2]) >= wanted]
        else:
            missing = [""] * (wanted - len(live))
            live.sort(key=lambda pod: (int((pod["metadata"].get("annotations") or {}).get(COST, 0)), _age(pod)))
            extra = live[: max(0, len(live) - wanted)]
        for pod_name in missing:
            body = copy.deepcopy(spec.get("template") or {})
            meta = body.setdefault("metadata", {})
            owner = {"apiVersion": kind.group_version, "kind": kind.kind, "name": name, "uid": uid, "controller": True}
            meta.update(ownerReferences=[owner], **({"name": pod_name} if pod_name else {"generateName": f"{name}-"}))
            self._objects.create(PODS, namespace, body)
        for pod in extra:
            self._objects.delete(PODS, *key_of(pod))
        ready = sum(is_ready(pod) for pod in live)
        self._objects.set_status(kind, namespace, name, replicas=len(live), readyReplicas=ready,
                                 availableReplicas=ready, updatedReplicas=len(live),
                                 observedGeneration=found["metadata"].get("generation", 1))  # fmt: skip

    # ---- kubelet ----

    async def _pod(self, pod: Object) -> None:
        key, uid, node = key_of(pod), str(pod["metadata"]["uid"]), pod["spec"]["nodeName"]
        containers = pod["spec"].get("containers") or []
        try:
            await asyncio.sleep(self._seconds)
            if node in self._lost:
                return
            image = str(containers[0].get("image")) if containers else ""
            if image in self.images:
                state = {"waiting": {"reason": self.images[image], "message": f"the fake registry has no {image}"}}
                self._status(pod, "Pending", state, ready=False)
                return
            self._count(key[1])
            number = next(self._addresses)
            address = f"127.{self._network}.{number >> 8 & 255}.{number & 255}"
            machine = Idle() if POOLED in (pod["metadata"].get("labels") or {}) else self._make(pod)
            self.machines[uid] = machine
            # The address is known before the container runs, as the network of a pod is.
            self._status(pod, "Pending", {"waiting": {"reason": "ContainerCreating"}}, ready=False, podIP=address)
            await machine.start(address, self._environment(pod, address))
            if node in self._lost:  # nothing reports for it
                await machine.stop(0.0)
                return
            self._status(pod, "Running", {"running": {"startedAt": now()}}, ready=True, podIP=address, startTime=now())
            status = await machine.ended()
            if node not in self._lost and uid in self.machines:
                self.over(key, uid, status)
        except (Refused, asyncio.CancelledError):
            return
        except Exception as error:
            log.exception("fake pod %s", key[1])
            with contextlib.suppress(Refused):
                self.over(key, uid, 1, message=repr(error))

    def run_task(self, pod: Object, environment: Mapping[str, str], over: Callable[[int], None]) -> None:
        """Run a rocklet in a pod that runs already. over: called with its exit status when it ends by itself."""
        uid = str(pod["metadata"]["uid"])
        name = f"{uid} task"
        self._tasks[name] = task = asyncio.create_task(self._task(pod, uid, environment, over), name=f"task-{uid}")
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _task(self, pod: Object, uid: str, environment: Mapping[str, str], over: Callable[[int], None]) -> None:
        machine = self._make(pod)
        self.machines[uid] = machine
        try:
            await machine.start(pod["status"]["podIP"], environment)
            status = await machine.ended()
        except Exception:
            log.exception("task in fake pod %s", key_of(pod)[1])
            status = 1
        if uid in self.machines:
            over(status)

    def _count(self, name: str) -> None:
        self.started[name] = self.started.get(name, 0) + 1

    def _status(self, pod: Object, phase: str, state: Object, ready: bool, **more: Any) -> None:
        namespace, name = key_of(pod)
        if self._objects.get(PODS, namespace, name)["metadata"]["uid"] != pod["metadata"]["uid"]:
            raise Refused(404, "NotFound", f"pod {name} is another one")
        word = "True" if ready else "False"
        conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": word},
                      {"type": "ContainersReady", "status": word}]  # fmt: skip
        containers = pod["spec"].get("containers") or []
        rows = [{"name": one.get("name"), "image": one.get("image"), "imageID": "", "ready": ready,
                 "restartCount": 0, "state": state}
                for one in containers]  # fmt: skip
        self._objects.set_status(PODS, namespace, name, phase=phase, conditions=conditions, containerStatuses=rows,
                                 **more)  # fmt: skip

    def over(self, key: tuple[str, str], uid: str, status: int, reason: str = "", message: str = "") -> None:
        """A container ended: the pod with restartPolicy Never is over."""
        pod = self._objects.get(PODS, *key)
        if pod["metadata"]["uid"] != uid:
            return
        word = reason or ("Completed" if status == 0 else "Error")
        state = {"terminated": {"exitCode": status, "reason": word, "message": message}}
        self._status(pod, "Failed" if status else "Succeeded", state, ready=False)

    def _environment(self, pod: Object, address: str) -> dict[str, str]:
        """The variables of the first container; references are resolved. Refused for a missing Secret."""
        found: dict[str, str] = {}
        for row in pod["spec"]["containers"][0].get("env") or []:
            source = row.get("valueFrom") or {}
            if "fieldRef" in source:
                path = source["fieldRef"]["fieldPath"]
                namespace, name = key_of(pod)
                value = {"status.podIP": address, "metadata.name": name, "metadata.namespace": namespace,
                         "spec.nodeName": pod["spec"]["nodeName"]}[path]  # fmt: skip
            elif "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                secret = self._objects.get(SECRETS, key_of(pod)[0], reference["name"])
                value = _decoded(secret)[reference["key"]]
            else:
                value = str(row.get("value", ""))
                for name, known in found.items():
                    value = value.replace(f"$({name})", known)
            found[row["name"]] = value
        return found

    async def _kill(self, uid: str) -> None:
        task = self._tasks.get(uid)
        machine = self.machines.pop(uid, None)
        if task is not None:
            task.cancel()
        if machine is not None:
            await machine.stop(0.0)

    async def _end(self, pod: Object) -> None:
        """The kubelet ends a deleted pod, and removes it."""
        uid, node = str(pod["metadata"]["uid"]), (pod.get("spec") or {}).get("nodeName")
        if node in self._lost:
            return  # nothing runs there that could confirm it
        machine = self.machines.pop(uid, None)
        if machine is not None:
            await machine.stop(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))
        task = self._tasks.get(uid)
        if task is not None:
            task.cancel()
        self._objects.finish(PODS, *key_of(pod), uid)

    # ---- failures ----

    async def fail(self, pod: Object, status: int = 137, reason: str = "OOMKilled") -> None:
        """Its container ends, as by the kernel's OOM killer."""
        machine = self.machines.pop(str(pod["metadata"]["uid"]), None)
        if machine is not None:
            await machine.stop(0.0)
        self.over(key_of(pod), str(pod["metadata"]["uid"]), status, reason)

    async def evict(self, pod: Object, message: str) -> None:
        """Its node evicts it, because a resource is short."""
        machine = self.machines.pop(str(pod["metadata"]["uid"]), None)
        if machine is not None:
            await machine.stop(0.0)
        self._objects.set_status(PODS, *key_of(pod), phase="Failed", reason="Evicted", message=message,
                                 containerStatuses=[])  # fmt: skip

    async def preempt(self, pod: Object) -> None:
        """A pod of a higher priority takes its place."""
        rows = [*((pod.get("status") or {}).get("conditions") or []),
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]  # fmt: skip
        self._objects.set_status(PODS, *key_of(pod), conditions=rows)
        self._objects.delete(PODS, *key_of(pod), {"gracePeriodSeconds": 1})

    async def lose(self, node: str, remove_pods: bool = False) -> None:
        """The machine of a node is gone: its containers end without a trace, and later the cluster notices."""
        self._lost.add(node)
        pods = [pod for pod in self._objects.list(PODS) if (pod.get("spec") or {}).get("nodeName") == node]
        gone = [self.machines.pop(str(pod["metadata"]["uid"]), None) for pod in pods]
        await asyncio.gather(*(machine.stop(0.0) for machine in gone if machine is not None))  # all at once
        self._objects.set_status(NODES, "", node, conditions=[{"type": "Ready", "status": "Unknown"}])
        for pod in pods:
            rows = [{"type": "PodScheduled", "status": "True"},
                    {"type": "Ready", "status": "False", "reason": "NodeStatusUnknown"}]  # fmt: skip
            self._objects.set_status(PODS, *key_of(pod), conditions=rows)
            if remove_pods:
                self._objects.finish(PODS, *key_of(pod), pod["metadata"]["uid"])


def _decoded(secret: Object) -> dict[str, str]:
    import base64

    found = {name: base64.b64decode(value).decode() for name, value in (secret.get("data") or {}).items()}
    return {**found, **(secret.get("stringData") or {})}


def _is_own(pod: Object) -> bool:
    """Whether the default scheduler binds it."""
    return bool((pod.get("spec") or {}).get("schedulerName", "default-scheduler") == "default-scheduler")


def is_ready(pod: Object) -> bool:
    rows = (pod.get("status") or {}).get("conditions") or []
    return any(row.get("type") == "Ready" and row.get("status") == "True" for row in rows)


def _age(pod: Object) -> int:
    """Newer pods first."""
    return -int(pod["metadata"]["resourceVersion"])
