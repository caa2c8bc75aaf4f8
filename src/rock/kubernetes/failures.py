"""Why a pod does not start, or has ended: the status of a pod, or of the object that made it -> a failure. Pure.

    waiting container   InvalidImageName, ErrImagePull, ImagePullBackOff, ...   the image or the template
    condition           PodScheduled=False, reason Unschedulable                no node has the capacity
    terminated          OOMKilled, another exit                                 the container
    phase Failed        Evicted, Preempted, node lost                           the node or the cluster
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rock.errors import ImageError, InvalidConfig, NoCapacity, RockError, SandboxError
from rock.protocol.sandbox import Cause

Object = dict[str, Any]

_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
                    "RegistryUnavailable"})  # fmt: skip
_TEMPLATE = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError",
                       "CreatePodSandboxError", "InvalidMetadata", "InvalidConfiguration", "EnvVarsInjectionRejected",
                       "VolumeClaimTemplatesError", "TemplateNotFound", "WarmPoolNotFound"})  # fmt: skip
_EXPIRED = frozenset({"ClaimExpired", "SandboxExpired"})
_NODE = frozenset({"NodeLost", "Preempting", "Preempted", "Shutdown", "NodeShutdown", "Terminated",
                   "UnexpectedAdmissionError", "OutOfcpu", "OutOfmemory", "OutOfpods", "NodeAffinity"})  # fmt: skip
_DISRUPTED = {
    "PreemptionByScheduler": "was preempted by a pod of a higher priority",
    "DeletionByTaintManager": "was removed from its node, which has a taint (the node may be lost)",
    "EvictionByEvictionAPI": "was evicted, as by a drain of its node",
    "DeletionByPodGC": "was removed, because its node is gone",
    "TerminationByKubelet": "was ended by its node, which is short of resources or shuts down",
}
_HINTS = {
    "ErrImagePull": "check the name of the image, and imagePullSecrets of the pod template",
    "Unschedulable": "request less, add nodes, or check nodeSelector, tolerations and the quota of the namespace",
    "OOMKilled": "request more memory",
    "EnvVarsInjectionRejected": "set envVarsInjectionPolicy of the SandboxTemplate to Allowed",
    "WarmPoolNotFound": "create the SandboxWarmPool, or correct the pool of the pod template",
    "Evicted": "request more of the resource that is short, or set ephemeral-storage in the pod template",
}


@dataclass(frozen=True)
class Failure:
    """reason: the word of Kubernetes. cause: of the end of a running sandbox. message: a sentence. heals: the cluster
    may repair it by itself, as an autoscaler that adds a node."""

    reason: str
    cause: Cause
    message: str
    heals: bool = False

    def error(self, sandbox_id: str) -> RockError:
        """The error of a start that failed because of it."""
        kind: type[RockError] = SandboxError
        if self.reason in _IMAGE:
            kind = ImageError
        elif self.reason == "Unschedulable":
            kind = NoCapacity
        elif self.reason in _TEMPLATE:
            kind = InvalidConfig
        hint = _HINTS.get("ErrImagePull" if self.reason in _IMAGE else self.reason, "kubectl describe pod shows more")
        return kind(self.message, hint=hint, sandbox_id=sandbox_id, details={"kubernetes": self.reason})


def failure_of(pod: Object) -> Failure | None:
    """The failure of a pod; None while it starts or runs."""
    status = _mapping(pod.get("status"))
    name = str(_mapping(pod.get("metadata")).get("name"))
    disrupted = _condition(status, "DisruptionTarget", "True")
    terminal = status.get("phase") in ("Failed", "Succeeded")
    if terminal and (found := _ended(status, name, disrupted)) is not None:
        return found
    for container in _containers(status):
        state = _mapping(container.get("state"))
        waiting, over = _mapping(state.get("waiting")), state.get("terminated")
        reason = str(waiting.get("reason") or "")
        said = _short(waiting.get("message"))
        if reason in _IMAGE:
            return Failure(reason, Cause.START_FAILED, f"pod {name}: the image {container.get('image')!r} cannot be "
                           f"pulled ({reason}{said})")  # fmt: skip
        if reason in _TEMPLATE:
            return Failure(reason, Cause.START_FAILED, f"pod {name}: its container cannot be made ({reason}{said})")
        if isinstance(over, dict) and not container.get("init"):
            return _terminated(over, name)
    if terminal:
        return Failure("Ended", Cause.LOST, f"pod {name} ended")
    unscheduled = _condition(status, "PodScheduled", "False")
    if unscheduled is not None and unscheduled.get("reason") == "Unschedulable":
        return Failure("Unschedulable", Cause.START_FAILED,
                       f"pod {name}: no node has room for it{_short(unscheduled.get('message'))}", heals=True)
    if node_is_silent(pod):
        node = _mapping(pod.get("spec")).get("nodeName")
        return Failure("NodeLost", Cause.LOST, f"pod {name}: the cluster does not hear of its node {node}", heals=True)
    return None


def node_is_silent(pod: Object) -> bool:
    """Whether the cluster does not hear of the node of a pod that runs."""
    ready = _condition(_mapping(pod.get("status")), "Ready", "False")
    return ready is not None and str(ready.get("reason")) in ("NodeStatusUnknown", "NodeNotReady")


def deleted(pod: Object) -> Failure:
    """The failure of a pod that is gone."""
    known = failure_of(pod)
    if known is not None and not known.heals:
        return known
    name = str(_mapping(pod.get("metadata")).get("name"))
    disrupted = _condition(_mapping(pod.get("status")), "DisruptionTarget", "True")
    reason = str(disrupted.get("reason")) if disrupted is not None else ""
    if reason in _DISRUPTED:
        return Failure(_word(reason), Cause.LOST, f"pod {name} {_DISRUPTED[reason]}")
    return Failure("Deleted", Cause.LOST, f"pod {name} was deleted")


def failure_of_batch(found: Object) -> Failure | None:
    """The failure of a BatchSandbox of OpenSandbox with one replica."""
    status, name = _mapping(found.get("status")), str(_mapping(found.get("metadata")).get("name"))
    if status.get("phase") == "Failed":
        failed = _condition(status, "PodFailed", "True") or {}
        reason, said = str(failed.get("reason") or "Failed"), _short(failed.get("message"))
        cause = Cause.START_FAILED if reason in _IMAGE | _TEMPLATE else Cause.LOST
        return Failure(reason, cause, f"BatchSandbox {name} failed ({reason}{said})")
    if _number(status.get("taskFailed")) or _number(status.get("taskSucceed")):
        return Failure("TaskEnded", Cause.EXITED, f"BatchSandbox {name}: the rocklet in its pod ended")
    return None


def failure_of_claim(found: Object) -> Failure | None:
    """The failure of a Sandbox or a SandboxClaim of agent-sandbox."""
    status, meta = _mapping(found.get("status")), _mapping(found.get("metadata"))
    name = f"{found.get('kind')} {meta.get('name')}"
    finished = _condition(status, "Finished", "True")
    if finished is not None:
        return Failure(str(finished.get("reason")), Cause.EXITED, f"{name}: the container of its pod ended "
                       f"({finished.get('reason')})")  # fmt: skip
    ready = _condition(status, "Ready", "False")
    if ready is None:
        return None
    reason, said = str(ready.get("reason") or ""), _short(ready.get("message"))
    if reason in _TEMPLATE:
        return Failure(reason, Cause.START_FAILED, f"{name} cannot have a pod ({reason}{said})")
    if reason in _EXPIRED:
        return Failure(reason, Cause.DEADLINE, f"{name} expired ({reason}{said})")
    if reason == "ReconcilerError":  # as by a ResourceQuota, which the controller meets again until there is room
        return Failure(reason, Cause.START_FAILED, f"{name}: its controller reports {reason}{said}", heals=True)
    return None


def gone(kind: str, name: str) -> Failure:
    """The failure of an object that was deleted by another client."""
    return Failure("Deleted", Cause.LOST, f"{kind} {name} was deleted")


def _ended(status: Object, name: str, disrupted: Object | None) -> Failure | None:
    """The failure of a pod as a whole, in a terminal phase."""
    reason, said = str(status.get("reason") or ""), _short(status.get("message"))
    if reason == "Evicted":
        full = "ephemeral" in said or "storage" in said
        return Failure("Evicted", Cause.DISK_FULL if full else Cause.LOST, f"pod {name} was evicted by its node{said}")
    if reason in _NODE:
        word = "Preempted" if reason == "Preempting" else reason
        return Failure(word, Cause.LOST, f"pod {name} ended: {word}{said}")
    if disrupted is not None and str(disrupted.get("reason")) in _DISRUPTED:
        word = str(disrupted.get("reason"))
        return Failure(_word(word), Cause.LOST, f"pod {name} {_DISRUPTED[word]}")
    if reason == "DeadlineExceeded":
        return Failure(reason, Cause.DEADLINE, f"pod {name} exceeded activeDeadlineSeconds of its template")
    return None


def _word(reason: str) -> str:
    return {"PreemptionByScheduler": "Preempted", "EvictionByEvictionAPI": "Evicted",
            "DeletionByTaintManager": "NodeLost", "DeletionByPodGC": "NodeLost"}.get(reason, reason)  # fmt: skip


def _terminated(over: Object, name: str) -> Failure:
    reason = str(over.get("reason") or "Error")
    if reason == "OOMKilled":
        return Failure(reason, Cause.OUT_OF_MEMORY, f"pod {name}: its container ran out of memory (OOMKilled)")
    return Failure(reason, Cause.EXITED, f"pod {name}: its container ended with status {over.get('exitCode')} "
                   f"({reason}{_short(over.get('message'))})")  # fmt: skip


def _containers(status: Object) -> list[Object]:
    """Statuses of all containers; `init` marks init containers, whose normal end is no failure."""
    found = []
    for key in ("initContainerStatuses", "containerStatuses"):
        rows = status.get(key)
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                over = _mapping(_mapping(row.get("state")).get("terminated"))
                init = key == "initContainerStatuses" and not over.get("exitCode")
                found.append({**row, "init": init})
    return found


def _condition(status: Object, kind: str, value: str) -> Object | None:
    rows = status.get("conditions")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("type") == kind and row.get("status") == value:
            return row
    return None


def _mapping(value: object) -> Object:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _short(message: object) -> str:
    text = str(message or "").strip()
    return f": {text[:300]}" if text else ""
