"""Custom resources of a fake cluster, and controllers that act as those of OpenSandbox and of agent-sandbox do.

    BatchSandbox   a pod NAME-0 of its template, or a pod of a Pool in which its task runs; addresses in an annotation
    Pool           pods that wait for a BatchSandbox; a pod of one that was deleted is deleted
    Sandbox        a pod of its name, which is made again after it was deleted
    SandboxClaim   a Sandbox of the template of a SandboxWarmPool, with the environment of the claim

One replica of each BatchSandbox; claims always start a Sandbox, as the real controller does for a claim with an
environment.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from rock.testing.kubernetes.nodes import PODS, POOLED, Nodes, is_ready
from rock.testing.kubernetes.objects import Kind, Object, Objects, Refused, key_of

BATCHES = Kind("sandbox.opensandbox.io/v1alpha1", "batchsandboxes", "BatchSandbox", short=("bsbx",))
POOLS = Kind("sandbox.opensandbox.io/v1alpha1", "pools", "Pool")
SANDBOXES = Kind("agents.x-k8s.io/v1beta1", "sandboxes", "Sandbox")
CLAIMS = Kind("extensions.agents.x-k8s.io/v1beta1", "sandboxclaims", "SandboxClaim")
TEMPLATES = Kind("extensions.agents.x-k8s.io/v1beta1", "sandboxtemplates", "SandboxTemplate", parts=())
WARM_POOLS = Kind("extensions.agents.x-k8s.io/v1beta1", "sandboxwarmpools", "SandboxWarmPool")
CUSTOM = (BATCHES, POOLS, SANDBOXES, CLAIMS, TEMPLATES, WARM_POOLS)

_ENDPOINTS = "sandbox.opensandbox.io/endpoints"
_ALLOCATED = "sandbox.opensandbox.io/alloc-status"
_CLEANUP = "batch-sandbox.sandbox.opensandbox.io/task-cleanup"
_FAILING = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError")


class Controllers:
    """Both controllers. `look` is called after changes of their objects and of pods."""

    def __init__(self, objects: Objects, nodes: Nodes) -> None:
        self._objects = objects
        self._nodes = nodes
        self._tasks: dict[str, int | None] = {}  # exit status of the task, by uid of its BatchSandbox
        nodes.controllers.append(self.look)
        nodes.controlled.update(CUSTOM)

    def look(self) -> None:
        for kind, work in ((POOLS, self._pool), (BATCHES, self._batch), (CLAIMS, self._claim),
                           (SANDBOXES, self._sandbox)):  # fmt: skip
            for one in self._objects.list(kind):
                work(one)

    # ---- OpenSandbox ----

    def _batch(self, found: Object) -> None:
        namespace, name = key_of(found)
        spec, uid = found.get("spec") or {}, str(found["metadata"]["uid"])
        if "poolRef" in spec:
            pods = self._pooled(found)
        else:
            if found["metadata"].get("deletionTimestamp"):
                return
            pods = self._own(namespace, uid)
            if not pods and int(spec.get("replicas", 1)):
                self._make(BATCHES, found, spec.get("template") or {}, f"{name}-0",
                           {"batch-sandbox.sandbox.opensandbox.io/pod-index": "0"})  # fmt: skip
                return
        if found["metadata"].get("deletionTimestamp"):
            return
        addresses = [str((pod.get("status") or {}).get("podIP") or "") for pod in pods]
        if any(addresses):
            self._annotate(BATCHES, found, {_ENDPOINTS: json.dumps(addresses)})
        status = found.get("status") or {}
        ready = sum(is_ready(pod) for pod in pods)
        reasons = [reason for pod in pods if (reason := _waiting(pod)) in _FAILING]
        phase = "Succeed" if ready else "Pending"
        conditions: list[Object] = []
        if reasons or status.get("phase") == "Failed":
            phase = "Failed"
            conditions = (status.get("conditions") or []) if status.get("phase") == "Failed" else [
                {"type": "PodFailed", "status": "True", "reason": reasons[0],
                 "message": f"1/1 observed pods failed; primary reason={reasons[0]}"}]  # fmt: skip
        elif ready:
            conditions = [{"type": "Ready", "status": "True", "reason": "PodsReady", "message": ""}]
        task = self._tasks.get(uid)
        ends = {} if uid not in self._tasks else {"taskRunning": int(task is None), "taskSucceed": int(task == 0),
                                                  "taskFailed": int(bool(task))}  # fmt: skip
        self._objects.set_status(BATCHES, namespace, name, replicas=len(pods), allocated=sum(map(bool, addresses)),
                                 ready=ready, phase=phase, conditions=conditions, **ends)  # fmt: skip

    def _pooled(self, found: Object) -> list[Object]:
        """The pod of a BatchSandbox of a Pool: it is allocated, its task is started, and it is deleted at the end."""
        namespace = key_of(found)[0]
        meta, spec, uid = found["metadata"], found["spec"], str(found["metadata"]["uid"])
        allocated = _allocated(found)
        if meta.get("deletionTimestamp"):
            for pod_name in allocated:
                if self._at(PODS, namespace, pod_name) is not None:
                    self._objects.delete(PODS, namespace, pod_name, {"gracePeriodSeconds": 1})
            self._tasks.pop(uid, None)
            self._finalizers(BATCHES, found, [])
            return []
        if _CLEANUP not in (meta.get("finalizers") or []):
            self._finalizers(BATCHES, found, [_CLEANUP])
            return []
        if not allocated:
            free = [pod for pod in self._free(namespace, str(spec["poolRef"])) if is_ready(pod)]
            if free:
                self._annotate(BATCHES, found, {_ALLOCATED: json.dumps({"pods": [key_of(free[0])[1]]})})
            return []
        pod = self._at(PODS, namespace, allocated[0])
        if pod is None:
            return []
        task = ((spec.get("taskTemplate") or {}).get("spec") or {}).get("process")
        if task is not None and uid not in self._tasks:
            self._tasks[uid] = None
            variables = {row["name"]: row["value"] for row in task.get("env") or []}

            def over(status: int) -> None:
                if uid in self._tasks:
                    self._tasks[uid] = status
                    self._nodes.pending.set()

            self._nodes.run_task(pod, variables, over)
        return [pod]

    def _pool(self, found: Object) -> None:
        namespace, name = key_of(found)
        capacity = found["spec"].get("capacitySpec") or {}
        pods = self._own(namespace, str(found["metadata"]["uid"]))
        free = self._free(namespace, name)
        wanted = max(int(capacity.get("bufferMin", 0)) - len(free), int(capacity.get("poolMin", 0)) - len(pods))
        for _ in range(max(0, min(wanted, int(capacity.get("poolMax", 0)) - len(pods)))):
            self._make(POOLS, found, found["spec"].get("template") or {}, "", {POOLED: name})
        self._objects.set_status(POOLS, namespace, name, total=len(pods), allocated=len(pods) - len(free),
                                 available=len(free), revision="1")  # fmt: skip

    def _free(self, namespace: str, pool: str) -> list[Object]:
        """Pods of a pool that no BatchSandbox has and that are not being deleted."""
        taken = {pod for one in self._objects.list(BATCHES, namespace) for pod in _allocated(one)}

        def matches(pod: Object) -> bool:
            meta = pod["metadata"]
            return (meta.get("labels") or {}).get(POOLED) == pool and not meta.get("deletionTimestamp")

        return [pod for pod in self._objects.list(PODS, namespace, matches) if key_of(pod)[1] not in taken]

    # ---- agent-sandbox ----

    def _sandbox(self, found: Object) -> None:
        namespace, name = key_of(found)
        if found["metadata"].get("deletionTimestamp"):
            return
        pods = self._own(namespace, str(found["metadata"]["uid"]))
        if not pods:
            self._make(SANDBOXES, found, (found.get("spec") or {}).get("podTemplate") or {}, name, {})
            return
        status = pods[0].get("status") or {}
        phase = status.get("phase")
        rows = [row for row in status.get("conditions") or [] if row.get("type") == "PodScheduled"]
        word = {"Succeeded": "PodSucceeded", "Failed": "PodFailed"}.get(str(phase))
        if word:
            rows += [{"type": "Ready", "status": "False", "reason": word, "message": ""},
                     {"type": "Finished", "status": "True", "reason": word, "message": ""}]  # fmt: skip
        else:
            ready = is_ready(pods[0])
            rows.append({"type": "Ready", "status": "True" if ready else "False", "message": "",
                         "reason": "DependenciesReady" if ready else "DependenciesNotReady"})  # fmt: skip
        address = status.get("podIP")
        self._objects.set_status(SANDBOXES, namespace, name, conditions=rows, podIPs=[address] if address else [])

    def _claim(self, found: Object) -> None:
        namespace, name = key_of(found)
        if found["metadata"].get("deletionTimestamp"):
            return
        sandbox = self._at(SANDBOXES, namespace, name)
        if sandbox is None:
            try:
                self._start_claim(found)
            except Refused as error:
                row = {"type": "Ready", "status": "False", "reason": error.reason, "message": error.message}
                self._objects.set_status(CLAIMS, namespace, name, conditions=[row])
            return
        status = sandbox.get("status") or {}
        self._objects.set_status(CLAIMS, namespace, name, conditions=status.get("conditions") or [],
                                 sandbox={"name": name, "podIPs": status.get("podIPs") or []})  # fmt: skip

    def _start_claim(self, found: Object) -> None:
        """Create the Sandbox of a claim. Refused with the reason of the condition."""
        namespace, name = key_of(found)
        spec = found["spec"]
        pool = self._at(WARM_POOLS, namespace, str(spec["warmPoolRef"]["name"]))
        if pool is None:
            raise Refused(404, "WarmPoolNotFound", f"SandboxWarmPool {spec['warmPoolRef']['name']} not found")
        wanted = str(pool["spec"]["sandboxTemplateRef"]["name"])
        template = self._at(TEMPLATES, namespace, wanted)
        if template is None:
            raise Refused(404, "TemplateNotFound", f"SandboxTemplate {wanted} not found")
        body = copy.deepcopy(template["spec"]["podTemplate"])
        container = body["spec"]["containers"][0]
        own, given = container.get("env") or [], spec.get("env") or []
        policy, names = template["spec"].get("envVarsInjectionPolicy"), {row["name"] for row in given}
        if given and policy not in ("Allowed", "Overrides"):
            raise Refused(403, "EnvVarsInjectionRejected", "environment variable injection is not allowed")
        if policy == "Allowed" and any(row["name"] in names for row in own):
            raise Refused(403, "EnvVarsInjectionRejected", "environment variable override is not allowed")
        container["env"] = [row for row in own if row["name"] not in names] + given
        more = (spec.get("additionalPodMetadata") or {}).get("labels") or {}
        if any("k8s.io/" in key or "kubernetes.io/" in key for key in more):
            raise Refused(422, "InvalidMetadata", "a label of additionalPodMetadata has a reserved prefix")
        meta = body.setdefault("metadata", {})
        meta["labels"] = {**(meta.get("labels") or {}), **more}
        self._objects.create(SANDBOXES, namespace, {
            "metadata": {"name": name, "ownerReferences": [_owner(CLAIMS, found)]}, "spec": {"podTemplate": body}})

    # ---- objects ----

    def _make(self, kind: Kind, owner: Object, template: Object, name: str, labels: dict[str, str]) -> None:
        body = copy.deepcopy(template)
        meta = body.setdefault("metadata", {})
        namespace, prefix = key_of(owner)
        meta.update(labels={**(meta.get("labels") or {}), **labels}, ownerReferences=[_owner(kind, owner)],
                    **({"name": name} if name else {"generateName": f"{prefix}-"}))  # fmt: skip
        self._objects.create(PODS, namespace, body)

    def _own(self, namespace: str, uid: str) -> list[Object]:
        def matches(pod: Object) -> bool:
            return any(row.get("uid") == uid for row in pod["metadata"].get("ownerReferences") or [])

        return self._objects.list(PODS, namespace, matches)

    def _at(self, kind: Kind, namespace: str, name: str) -> Object | None:
        try:
            return self._objects.get(kind, namespace, name)
        except Refused:
            return None

    def _annotate(self, kind: Kind, found: Object, rows: dict[str, str]) -> None:
        self._change(kind, found, lambda meta: meta.update(annotations={**(meta.get("annotations") or {}), **rows}))

    def _finalizers(self, kind: Kind, found: Object, rows: list[str]) -> None:
        self._change(kind, found, lambda meta: meta.update(finalizers=rows))

    def _change(self, kind: Kind, found: Object, change: Callable[[dict[str, Any]], None]) -> None:
        made = copy.deepcopy(self._objects.get(kind, *key_of(found)))
        change(made["metadata"])
        self._objects.update(kind, *key_of(found), made)


def _owner(kind: Kind, found: Object) -> Object:
    meta = found["metadata"]
    return {"apiVersion": kind.group_version, "kind": kind.kind, "name": meta["name"], "uid": meta["uid"],
            "controller": True}  # fmt: skip


def _allocated(found: Object) -> list[str]:
    text = (found["metadata"].get("annotations") or {}).get(_ALLOCATED)
    return list(json.loads(text)["pods"]) if text else []


def _waiting(pod: Object) -> str:
    for row in (pod.get("status") or {}).get("containerStatuses") or []:
        reason = ((row.get("state") or {}).get("waiting") or {}).get("reason")
        if reason in _FAILING:
            return str(reason)
    return ""
