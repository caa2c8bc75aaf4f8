"""The objects of a fake cluster: versions, conflicts, watches, finalizers, owners. No I/O.

    Objects.create/update/patch/delete ──► a new resourceVersion ──► every watch
    Objects.compact ──► older watches get 410
"""

from __future__ import annotations

import asyncio
import copy
import datetime
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name

MOST_EVENTS = 50_000  # remembered for watches


class Refused(Exception):
    """An error response: HTTP status, reason and message as an API server sends them."""

    def __init__(self, status: int, reason: str, message: str, seconds: int = 0) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.seconds = status, reason, message, seconds


@dataclass(frozen=True)
class Kind:
    """group_version: "v1" or GROUP/VERSION. resource: the plural name. parts: subresources."""

    group_version: str
    resource: str
    kind: str
    namespaced: bool = True
    parts: tuple[str, ...] = ("status",)
    short: tuple[str, ...] = ()


KINDS = (
    Kind("v1", "pods", "Pod", parts=("status", "eviction", "log"), short=("po",)),
    Kind("v1", "nodes", "Node", namespaced=False, short=("no",)),
    Kind("v1", "namespaces", "Namespace", namespaced=False, short=("ns",)),
    Kind("v1", "services", "Service", short=("svc",)),
    Kind("v1", "secrets", "Secret", parts=()),
    Kind("v1", "configmaps", "ConfigMap", parts=(), short=("cm",)),
    Kind("v1", "serviceaccounts", "ServiceAccount", parts=(), short=("sa",)),
    Kind("v1", "persistentvolumeclaims", "PersistentVolumeClaim", short=("pvc",)),
    Kind("v1", "events", "Event", parts=(), short=("ev",)),
    Kind("apps/v1", "deployments", "Deployment", parts=("status", "scale"), short=("deploy",)),
    Kind("apps/v1", "statefulsets", "StatefulSet", parts=("status", "scale"), short=("sts",)),
    Kind("apps/v1", "replicasets", "ReplicaSet", parts=("status", "scale"), short=("rs",)),
    Kind("apps/v1", "daemonsets", "DaemonSet", short=("ds",)),
    Kind("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", short=("pdb",)),
    Kind("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", parts=(), short=("netpol",)),
    Kind("networking.k8s.io/v1", "ingresses", "Ingress", short=("ing",)),
    Kind("node.k8s.io/v1", "runtimeclasses", "RuntimeClass", namespaced=False, parts=()),
    Kind("rbac.authorization.k8s.io/v1", "roles", "Role", parts=()),
    Kind("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding", parts=()),
)


@dataclass(eq=False)
class Watch:
    """Events for one client: (type, object, version). `ended`: the server closes it."""

    kind: Kind
    matches: Callable[[Object], bool]
    queue: asyncio.Queue[tuple[str, Object] | None] = field(default_factory=asyncio.Queue)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def key_of(found: Object) -> Key:
    meta = found.get("metadata") or {}
    return str(meta.get("namespace") or ""), str(meta.get("name") or "")


class Objects:
    """All objects of some kinds. on_change: called with (type, kind, object) after each change."""

    def __init__(self, kinds: Sequence[Kind] = KINDS) -> None:
        self.kinds = tuple(kinds)
        self.version = 1000
        self.on_change: list[Callable[[str, Kind, Object], None]] = []
        self._found: dict[Kind, dict[Key, Object]] = {kind: {} for kind in self.kinds}
        self._events: deque[tuple[int, Kind, str, Object, Object | None]] = deque()
        self._oldest = self.version  # events above this version are remembered
        self._watches: set[Watch] = set()
        self._names = itertools.count(1)

    # ---- read ----

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        found = self._found[kind].get((namespace, name))
        if found is None:
            raise Refused(404, "NotFound", f'{kind.resource} "{name}" not found')
        return found

    def list(self, kind: Kind, namespace: str = "", matches: Callable[[Object], bool] | None = None) -> list[Object]:
        """In the order of names."""
        rows = sorted(self._found[kind].items())
        return [one for (place, _), one in rows
                if (not namespace or place == namespace) and (matches is None or matches(one))]  # fmt: skip

    # ---- change ----

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        made = copy.deepcopy(body)
        meta = made.setdefault("metadata", {})
        if not meta.get("name"):
            if not meta.get("generateName"):
                raise Refused(422, "Invalid", "metadata.name: Required value: name or generateName is required")
            meta["name"] = f"{meta['generateName']}{next(self._names):05x}"
        if kind.namespaced and meta.setdefault("namespace", namespace) != namespace:
            raise Refused(400, "BadRequest", "the namespace of the object does not match the request")
        key = key_of(made)
        if key in self._found[kind]:
            raise Refused(409, "AlreadyExists", f'{kind.resource} "{key[1]}" already exists')
        if kind.kind == "Pod":
            self._admit(made)
        meta.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
        made.update(apiVersion=kind.group_version, kind=kind.kind)
        if kind.kind == "Pod":
            made["status"] = {"phase": "Pending"}
        self._save("ADDED", kind, made)
        return made

    def _admit(self, pod: Object) -> None:
        """Refused for a pod of a RuntimeClass that does not exist."""
        name = (pod.get("spec") or {}).get("runtimeClassName")
        classes = next(kind for kind in KINDS if kind.kind == "RuntimeClass")
        if name and ("", name) not in self._found[classes]:
            raise Refused(403, "Forbidden", f'pods "{key_of(pod)[1]}" is forbidden: pod rejected: '
                          f'RuntimeClass "{name}" not found')  # fmt: skip

    def update(self, kind: Kind, namespace: str, name: str, body: Object, part: str = "") -> Object:
        """Replace an object, or its status. A resourceVersion in it must be the current one."""
        old = self.get(kind, namespace, name)
        sent = body.get("metadata") or {}
        if sent.get("resourceVersion") not in (None, "", old["metadata"]["resourceVersion"]):
            raise Refused(409, "Conflict", f'Operation cannot be fulfilled on {kind.resource} "{name}": the object has '
                          "been modified; please apply your changes to the latest version and try again")  # fmt: skip
        if sent.get("uid") not in (None, "", old["metadata"]["uid"]):
            raise Refused(409, "Conflict", "Precondition failed: UID in object meta")
        made = copy.deepcopy(old if part == "status" else body)
        if part == "status":
            made["status"] = copy.deepcopy(body.get("status") or {})
        elif "status" in kind.parts and "status" in old:
            made["status"] = copy.deepcopy(old["status"])
        meta = made.setdefault("metadata", {})
        for field_ in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds",
                       "name", "namespace"):  # fmt: skip
            if field_ in old["metadata"]:
                meta[field_] = old["metadata"][field_]
            else:
                meta.pop(field_, None)
        made.update(apiVersion=kind.group_version, kind=kind.kind)
        if _without_version(made) == _without_version(old):
            return old
        if made.get("spec") != old.get("spec"):
            meta["generation"] = int(meta.get("generation") or 0) + 1
        if meta.get("deletionTimestamp") and not meta.get("finalizers") and old["metadata"].get("finalizers"):
            self._remove(kind, made)
            return made
        self._save("MODIFIED", kind, made)
        return made

    def delete(self, kind: Kind, namespace: str, name: str, options: Object | None = None) -> Object:
        """Begin the deletion: pods end by their kubelet, objects with finalizers by their controller."""
        old = self.get(kind, namespace, name)
        options = options or {}
        wanted = options.get("preconditions") or {}
        for field_ in ("uid", "resourceVersion"):
            if wanted.get(field_) not in (None, "", old["metadata"][field_]):
                raise Refused(409, "Conflict", f"Precondition failed: {field_} in precondition: {wanted[field_]}, "
                              f"{field_} in object meta: {old['metadata'][field_]}")  # fmt: skip
        grace = options.get("gracePeriodSeconds")
        if grace is None and kind.kind == "Pod":
            grace = (old.get("spec") or {}).get("terminationGracePeriodSeconds", 30)
        held = kind.kind == "Pod" and grace and (old.get("spec") or {}).get("nodeName")
        if not held and not old["metadata"].get("finalizers"):
            self._remove(kind, old)
            return old
        known = old["metadata"].get("deletionGracePeriodSeconds")
        if "deletionTimestamp" in old["metadata"] and known is not None and known <= (grace or 0):
            return old
        made = copy.deepcopy(old)
        made["metadata"].update(deletionTimestamp=now(), deletionGracePeriodSeconds=grace or 0)
        self._save("MODIFIED", kind, made)
        return made

    def finish(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """A pod ended: its kubelet removes it, unless a finalizer holds it."""
        found = self._found[kind].get((namespace, name))
        if found is not None and found["metadata"]["uid"] == uid and not found["metadata"].get("finalizers"):
            self._remove(kind, found)

    def set_status(self, kind: Kind, namespace: str, name: str, **fields: Any) -> Object:
        """Change fields of the status, as a controller does."""
        old = self.get(kind, namespace, name)
        made = copy.deepcopy(old)
        made["status"] = {**(made.get("status") or {}), **fields}
        if made == old:
            return old
        self._save("MODIFIED", kind, made)
        return made

    def _save(self, event: str, kind: Kind, made: Object) -> None:
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        old = self._found[kind].get(key_of(made))
        self._found[kind][key_of(made)] = made
        self._publish(event, kind, made, old)

    def _remove(self, kind: Kind, found: Object) -> None:
        self._found[kind].pop(key_of(found), None)
        self.version += 1
        gone = copy.deepcopy(found)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._publish("DELETED", kind, gone, found)
        self._collect(str(found["metadata"]["uid"]))

    def _collect(self, uid: str) -> None:
        """Delete what the removed object owned."""
        for kind, rows in self._found.items():
            for one in list(rows.values()):
                owners = one["metadata"].get("ownerReferences") or []
                if owners and all(row.get("uid") == uid for row in owners):
                    self.delete(kind, *key_of(one))

    # ---- watch ----

    def _publish(self, event: str, kind: Kind, found: Object, old: Object | None) -> None:
        self._events.append((self.version, kind, event, found, old))
        while len(self._events) > MOST_EVENTS:
            self._oldest = self._events.popleft()[0]
        for watch in self._watches:
            if watch.kind is kind and (seen := _seen(watch, event, found, old)) is not None:
                watch.queue.put_nowait((seen, found))
        for listener in self.on_change:
            listener(event, kind, found)

    def watch(self, kind: Kind, matches: Callable[[Object], bool], version: str) -> Watch:
        """Events after a version; "" and "0" begin with the current objects. Refused with 410 for one that is too
        old."""
        made = Watch(kind, matches)
        if version in ("", "0"):
            for one in self.list(kind, "", matches):
                made.queue.put_nowait(("ADDED", one))
        else:
            try:
                since = int(version)
            except ValueError:
                raise Refused(400, "BadRequest", f"invalid resourceVersion {version!r}") from None
            if since < self._oldest:
                raise Refused(410, "Expired", f"too old resource version: {since} ({self._oldest})")
            for number, of, event, found, old in self._events:
                if number > since and of is kind and (seen := _seen(made, event, found, old)) is not None:
                    made.queue.put_nowait((seen, found))
        self._watches.add(made)
        return made

    def unwatch(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def close_watches(self) -> None:
        """End all watches, as a restart of the API server does."""
        for watch in self._watches:
            watch.queue.put_nowait(None)

    def compact(self) -> None:
        """Forget all events: a watch from an older version gets 410."""
        self._events.clear()
        self._oldest = self.version

    def past(self, kind: Kind) -> Iterator[tuple[str, Object]]:
        """Remembered events, oldest first; for faults."""
        for _, of, event, found, _ in self._events:
            if of is kind:
                yield event, found


def _seen(watch: Watch, event: str, found: Object, old: Object | None) -> str | None:
    """The type of an event for a watch, whose selector may match only before or only after it."""
    before = old is not None and watch.matches(old)
    after = event != "DELETED" and watch.matches(found)
    if after:
        return "MODIFIED" if before else "ADDED"
    return "DELETED" if before else None


def _without_version(found: Object) -> Object:
    meta = {key: value for key, value in found["metadata"].items() if key not in ("resourceVersion", "managedFields")}
    return {**found, "metadata": meta}


# ---- patches ----

_MERGE_KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "ports":
               "containerPort", "volumeMounts": "mountPath", "conditions": "type", "imagePullSecrets": "name",
               "ownerReferences": "uid"}  # fmt: skip


def merged(old: Any, patch: Any, strategic: bool = False) -> Any:
    """The result of a JSON merge patch; with `strategic`, lists of named elements are merged by their keys."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    made = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if key.startswith("$"):
            if key.startswith("$deleteFromPrimitiveList/"):
                name = key.partition("/")[2]
                made[name] = [one for one in made.get(name) or [] if one not in value]
            elif key == "$retainKeys":
                made = {name: one for name, one in made.items() if name in value}
        elif value is None:
            made.pop(key, None)
        elif strategic and key in _MERGE_KEYS and isinstance(value, list) and isinstance(made.get(key), list):
            made[key] = _merged_list(made[key], value, _MERGE_KEYS[key])
        elif strategic and key == "finalizers" and isinstance(made.get(key), list):
            made[key] = [*made[key], *(one for one in value if one not in made[key])]
        else:
            made[key] = merged(made.get(key), value, strategic)
    return made


def _merged_list(old: list[Any], patch: list[Any], key: str) -> list[Any]:
    if any(not isinstance(one, dict) or key not in one for one in [*old, *patch] if "$patch" not in (one or {})):
        return copy.deepcopy(patch)
    found = {one[key]: one for one in old}
    for one in patch:
        if one.get("$patch") == "delete":
            found.pop(one.get(key), None)
        else:
            found[one[key]] = merged(found.get(one[key]), one, True)
    return list(found.values())


def json_patched(old: Object, operations: list[Object]) -> Object:
    """The result of a JSON patch. Refused for one that does not apply."""
    made = copy.deepcopy(old)
    for row in operations:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in str(row.get("path", "")).split("/")[1:]]
        at: Any = made
        try:
            for part in parts[:-1]:
                at = at[int(part)] if isinstance(at, list) else at[part]
            last, op = parts[-1], row["op"]
            if isinstance(at, list):
                place = len(at) if last == "-" else int(last)
                if op == "add":
                    at.insert(place, row["value"])
                elif op == "replace":
                    at[place] = row["value"]
                elif op == "remove":
                    del at[place]
                elif op == "test" and at[place] != row.get("value"):
                    raise Refused(422, "Invalid", f"the test of {row['path']} failed")
            elif op == "test":
                if at.get(last) != row.get("value"):
                    raise Refused(422, "Invalid", f"the test of {row['path']} failed")
            elif op == "remove":
                del at[last]
            else:
                at[last] = row["value"]
        except (KeyError, IndexError, ValueError, TypeError):
            raise Refused(422, "Invalid", f"the patch of {row.get('path')} does not apply") from None
    return made


# ---- selectors ----


def selected(labels: str, fields: str) -> Callable[[Object], bool]:
    """A predicate of labelSelector and fieldSelector. Refused for an invalid one."""
    rows = [_requirement(text.strip()) for text in _split(labels)]
    wanted = []
    for text in filter(None, fields.split(",")):
        path, separator, value = text.replace("==", "=").partition("=")
        if not separator:
            raise Refused(400, "BadRequest", f"invalid field selector {text!r}")
        wanted.append((path.rstrip("!").split("."), value, path.endswith("!")))

    def matches(found: Object) -> bool:
        own = (found.get("metadata") or {}).get("labels") or {}
        for path, value, negated in wanted:
            at: Any = found
            for part in path:
                at = at.get(part) if isinstance(at, dict) else None
            if (str(at or "") == value) is negated:
                return False
        return all(row(own) for row in rows)

    return matches


def _split(text: str) -> list[str]:
    """Comma-separated requirements; commas in parentheses do not count."""
    found, depth, part = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            found.append(part)
            part = ""
        else:
            part += letter
    return [one for one in [*found, part] if one.strip()]


def _requirement(text: str) -> Callable[[Object], bool]:
    for word, wanted in ((" notin ", False), (" in ", True)):
        name, found, values = text.partition(word)
        if found:
            names = {value.strip() for value in values.strip().strip("()").split(",")}
            return _one_of(name.strip(), names, wanted)
    if "!=" in text:
        name, _, value = text.partition("!=")
        return lambda labels: labels.get(name.strip()) != value.strip()
    if "=" in text:
        name, _, value = text.replace("==", "=").partition("=")
        return lambda labels: labels.get(name.strip()) == value.strip()
    if text.startswith("!"):
        return lambda labels: text[1:].strip() not in labels
    return lambda labels: text in labels


def _one_of(name: str, values: set[str], wanted: bool) -> Callable[[Object], bool]:
    return lambda labels: (labels.get(name) in values) is wanted


def by_labels(selector: Object) -> Callable[[Object], bool]:
    """A predicate of a LabelSelector."""
    labels = selector.get("matchLabels") or {}
    rows = selector.get("matchExpressions") or []

    def matches(found: Object) -> bool:
        own = (found.get("metadata") or {}).get("labels") or {}
        if any(own.get(name) != value for name, value in labels.items()):
            return False
        for row in rows:
            value, values = own.get(row["key"]), row.get("values") or []
            holds = {"In": value in values, "NotIn": value not in values, "Exists": row["key"] in own,
                     "DoesNotExist": row["key"] not in own}.get(row["operator"], False)  # fmt: skip
            if not holds:
                return False
        return True

    return matches
