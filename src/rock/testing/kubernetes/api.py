"""The API server of a fake cluster, as an ASGI application: what kubectl and client libraries use of a real one.

Discovery, OpenAPI (names of parameters only), CRUD, patches, pages, watches with bookmarks, status, scale, evictions
that respect disruption budgets. Server-side apply merges without owners of fields. Of admission there is
the check of RuntimeClass. There is no schema,
and no authorization but an optional token.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

import orjson

from rock.http.asgi import Receive, Scope, Send
from rock.testing.kubernetes.objects import (
    KINDS,
    Kind,
    Object,
    Objects,
    Refused,
    by_labels,
    json_patched,
    key_of,
    merged,
    selected,
)

_BOOKMARK = 5.0  # seconds between bookmarks
_VERSION = {"major": "1", "minor": "35", "gitVersion": "v1.35.0-fake", "platform": "linux/amd64"}


@dataclass
class Faults:
    """What goes wrong, by fractions of 1 of requests or events. down: no request gets a response. slow: seconds before
    each response. throttled: 429. failing: 500 after the change was made. dropped, duplicated, stale: events of
    watches; a stale one repeats an older event of any object."""

    down: bool = False
    slow: float = 0.0
    throttled: float = 0.0
    failing: float = 0.0
    dropped: float = 0.0
    duplicated: float = 0.0
    stale: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def happens(self, fraction: float) -> bool:
        return fraction > 0 and self.random.random() < fraction


class ApiServer:
    """token: required as a bearer token, if set. counts: requests by (method, resource)."""

    def __init__(self, objects: Objects, faults: Faults | None = None, token: str = "") -> None:
        self.objects = objects
        self.faults = faults or Faults()
        self.counts: dict[tuple[str, str], int] = {}
        self.watches = 0  # open ones
        self._token = token
        self._by_path = {(kind.group_version, kind.resource): kind for kind in objects.kinds}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        faults = self.faults
        if faults.slow:
            await asyncio.sleep(faults.slow)
        while faults.down:  # noqa: ASYNC110 - tests set it from another thread
            await asyncio.sleep(0.05)  # the connection stays open, and nothing comes
        query = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        try:
            self._authenticate(scope)
            if faults.happens(faults.throttled):
                raise Refused(429, "TooManyRequests", "the server has received too many requests", seconds=1)
            body = await _body(receive)
            parts = [unquote(part) for part in scope["path"].strip("/").split("/")]
            await self._route(scope, parts, query, body, receive, send)
        except Refused as error:
            again = {"retry-after": str(error.seconds)} if error.seconds else {}
            await _send_json(send, error.status, _status(error), again)

    def _authenticate(self, scope: Scope) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self._token and given != f"Bearer {self._token}":
            raise Refused(401, "Unauthorized", "Unauthorized")

    async def _route(
        self, scope: Scope, parts: list[str], query: dict[str, str], body: bytes, receive: Receive, send: Send
    ) -> None:
        method = scope["method"]
        if parts[0] in ("api", "apis") and (parts[0] == "api") == (len(parts) > 1 and parts[1] == "v1"):
            skip = 2 if parts[0] == "api" else 3
            group = "v1" if parts[0] == "api" else "/".join(parts[1:3])
            rest = parts[skip:]
            namespace = ""
            if len(rest) >= 3 and rest[0] == "namespaces" and (group, rest[2]) in self._by_path:
                namespace, rest = rest[1], rest[2:]
            if rest and (group, rest[0]) in self._by_path:
                kind = self._by_path[group, rest[0]]
                count = method, kind.resource
                self.counts[count] = self.counts.get(count, 0) + 1
                if method == "GET" and len(rest) == 1 and query.get("watch") in ("1", "true"):
                    await self._watch(kind, namespace, query, receive, send)
                    return
                status, answer = self._resource(scope, kind, namespace, rest[1:], query, body)
                if method != "GET" and self.faults.happens(self.faults.failing):
                    raise Refused(500, "InternalError", "the change was made, and its response was lost")
                await _send_json(send, status, answer)
                return
        found = self._discovery(parts)
        if found is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        await _send_json(send, 200, found)

    # ---- resources ----

    def _resource(
        self, scope: Scope, kind: Kind, namespace: str, rest: list[str], query: dict[str, str], body: bytes
    ) -> tuple[int, Object]:
        method, objects = scope["method"], self.objects
        if not rest:
            if method == "GET":
                return 200, self._page(kind, namespace, query)
            if method == "POST":
                return 201, objects.create(kind, namespace, _parsed(body))
            if method == "DELETE":
                for one in objects.list(kind, namespace, selected(query.get("labelSelector", ""), "")):
                    objects.delete(kind, *key_of(one))
                return 200, _success()
        name, part = rest[0] if rest else "", rest[1] if len(rest) > 1 else ""
        if (part and part not in kind.parts) or len(rest) > 2:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if part == "scale":
            return 200, self._scale(scope, kind, namespace, name, body)
        if part == "eviction" and method == "POST":
            return 201, self._evict(kind, namespace, name, _parsed(body))
        if method == "GET":
            return 200, objects.get(kind, namespace, name)
        if method == "PUT":
            return 200, objects.update(kind, namespace, name, _parsed(body), part)
        if method == "PATCH":
            return self._patch(scope, kind, namespace, name, part, body)
        if method == "DELETE":
            options = _parsed(body) if body else {}
            if "gracePeriodSeconds" in query:
                options["gracePeriodSeconds"] = int(query["gracePeriodSeconds"])
            return 200, objects.delete(kind, namespace, name, options)
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _patch(
        self, scope: Scope, kind: Kind, namespace: str, name: str, part: str, body: bytes
    ) -> tuple[int, Object]:
        content = dict(scope["headers"]).get(b"content-type", b"").decode().partition(";")[0]
        if content == "application/json-patch+json":
            made = json_patched(self.objects.get(kind, namespace, name), orjson.loads(body))
        elif content in ("application/apply-patch+yaml", "application/apply-patch+json"):
            return self._apply(kind, namespace, name, body)
        elif content in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
            old = self.objects.get(kind, namespace, name)
            made = merged(old, _parsed(body), content.startswith("application/strategic"))
        else:
            raise Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {content}")
        return 200, self.objects.update(kind, namespace, name, made, part)

    def _apply(self, kind: Kind, namespace: str, name: str, body: bytes) -> tuple[int, Object]:
        """Server-side apply, without owners of fields."""
        try:
            given = orjson.loads(body)
        except orjson.JSONDecodeError:
            import yaml

            given = yaml.safe_load(body)
        try:
            old = self.objects.get(kind, namespace, name)
        except Refused:
            return 201, self.objects.create(kind, namespace, given)
        return 200, self.objects.update(kind, namespace, name, merged(old, given, True))

    def _page(self, kind: Kind, namespace: str, query: dict[str, str]) -> Object:
        matches = selected(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        rows = self.objects.list(kind, namespace, matches)
        limit = int(query.get("limit") or 0)
        meta: Object = {"resourceVersion": str(self.objects.version)}
        if query.get("continue"):
            version, _, last = query["continue"].partition(":")
            meta["resourceVersion"] = version
            rows = [one for one in rows if "/".join(key_of(one)) > last]
        if limit and len(rows) > limit:
            rows, left = rows[:limit], len(rows) - limit
            last = "/".join(key_of(rows[-1]))
            meta.update({"continue": f"{meta['resourceVersion']}:{last}", "remainingItemCount": left})
        return {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "metadata": meta, "items": rows}

    def _scale(self, scope: Scope, kind: Kind, namespace: str, name: str, body: bytes) -> Object:
        found = self.objects.get(kind, namespace, name)
        if scope["method"] in ("PUT", "PATCH"):
            sent = _parsed(body)
            replicas = (sent.get("spec") or {}).get("replicas", 0)
            version = (sent.get("metadata") or {}).get("resourceVersion")
            made = copy.deepcopy(found)
            made["spec"]["replicas"] = replicas
            if version:
                made["metadata"]["resourceVersion"] = version
            found = self.objects.update(kind, namespace, name, made)
        kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        meta = {key: found["metadata"][key] for key in kept}
        return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta,
                "spec": {"replicas": (found.get("spec") or {}).get("replicas", 1)},
                "status": {"replicas": (found.get("status") or {}).get("replicas", 0), "selector": ""}}  # fmt: skip

    def _evict(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        pod = self.objects.get(kind, namespace, name)
        budgets = next(one for one in KINDS if one.kind == "PodDisruptionBudget")
        for budget in self.objects.list(budgets, namespace):
            spec = budget.get("spec") or {}
            matches = by_labels(spec.get("selector") or {})
            if not matches(pod):
                continue
            pods = self.objects.list(kind, namespace, matches)
            healthy = sum(_is_ready(one) for one in pods)
            least = spec["minAvailable"] if "minAvailable" in spec else len(pods) - spec.get("maxUnavailable", 1)
            if _is_ready(pod) and healthy - 1 < least:
                why = "Cannot evict pod as it would violate the pod's disruption budget."
                raise Refused(429, "TooManyRequests", why, seconds=1)
        if (pod.get("spec") or {}).get("nodeName"):
            conditions = [*((pod.get("status") or {}).get("conditions") or []),
                          {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]
            self.objects.set_status(kind, namespace, name, conditions=conditions)
        self.objects.delete(kind, namespace, name, body.get("deleteOptions") or {})
        return _success()

    # ---- watch ----

    async def _watch(self, kind: Kind, namespace: str, query: dict[str, str], receive: Receive, send: Send) -> None:
        inner = selected(query.get("labelSelector", ""), query.get("fieldSelector", ""))

        def matches(found: Object) -> bool:
            return (not namespace or key_of(found)[0] == namespace) and inner(found)

        streams = query.get("sendInitialEvents") == "true"  # a list as events, which a bookmark ends
        watch = self.objects.watch(kind, matches, "" if streams else query.get("resourceVersion", ""))
        if streams:
            meta = {"resourceVersion": str(self.objects.version), "annotations": {"k8s.io/initial-events-end": "true"}}
            mark = {"kind": kind.kind, "apiVersion": kind.group_version, "metadata": meta}
            watch.queue.put_nowait(("BOOKMARK", mark))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        gone = asyncio.create_task(_disconnected(receive))
        end = asyncio.get_running_loop().time() + float(query.get("timeoutSeconds") or 3600)
        self.watches += 1
        try:
            while not gone.done() and (left := end - asyncio.get_running_loop().time()) > 0:
                waits = asyncio.ensure_future(watch.queue.get())
                await asyncio.wait({waits, gone}, timeout=min(left, _BOOKMARK), return_when=asyncio.FIRST_COMPLETED)
                if not waits.done():
                    waits.cancel()
                    if gone.done():
                        break
                    if query.get("allowWatchBookmarks") in ("1", "true"):
                        await self._send_event(send, "BOOKMARK", {
                            "kind": kind.kind, "apiVersion": kind.group_version,
                            "metadata": {"resourceVersion": str(self.objects.version)}})  # fmt: skip
                    continue
                event = waits.result()
                if event is None or self.faults.down:
                    break
                await self._deliver(send, kind, matches, *event)
        finally:
            self.watches -= 1
            gone.cancel()
            self.objects.unwatch(watch)
            with contextlib.suppress(Exception):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _deliver(
        self, send: Send, kind: Kind, matches: Callable[[Object], bool], event: str, found: Object
    ) -> None:
        faults = self.faults
        if faults.slow:
            await asyncio.sleep(faults.slow)
        if event != "BOOKMARK" and faults.happens(faults.dropped):
            return
        await self._send_event(send, event, found)
        if faults.happens(faults.duplicated):
            await self._send_event(send, event, found)
        if faults.happens(faults.stale):
            older = [row for row in self.objects.past(kind) if matches(row[1])]
            if older:
                await self._send_event(send, *faults.random.choice(older[-200:]))

    async def _send_event(self, send: Send, event: str, found: Object) -> None:
        line = orjson.dumps({"type": event, "object": found}) + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})

    # ---- discovery ----

    def _discovery(self, parts: list[str]) -> Object | None:
        path = "/".join(parts)
        groups: dict[str, list[str]] = {}
        for kind in self.objects.kinds:
            group, separator, version = kind.group_version.partition("/")
            if separator and version not in groups.setdefault(group, []):
                groups[group].append(version)
        if path == "version":
            return dict(_VERSION)
        if path in ("healthz", "readyz", "livez"):
            return {"status": "ok"}
        if path == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*row) for row in groups.items()]}
        if parts[0] == "apis" and len(parts) == 2 and parts[1] in groups:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], groups[parts[1]])}
        versions = {kind.group_version for kind in self.objects.kinds}
        at = path.removeprefix("apis/").removeprefix("api/")
        if parts[0] in ("api", "apis") and at in versions:
            rows = _resources(self.objects.kinds, at)
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": at, "resources": rows}
        if path == "openapi/v3":
            roots = [_root(one) for one in sorted(versions)]
            return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots}}
        if path.startswith("openapi/v3/"):
            wanted = next((one for one in versions if _root(one) == path.removeprefix("openapi/v3/")), None)
            return None if wanted is None else _openapi(self.objects.kinds, wanted)
        return None


def _root(group_version: str) -> str:
    return "api/v1" if group_version == "v1" else f"apis/{group_version}"


def _group(name: str, versions: list[str]) -> Object:
    rows = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": rows, "preferredVersion": rows[0]}


def _resources(kinds: Sequence[Kind], group_version: str) -> list[Object]:
    found: list[Object] = []
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    for kind in kinds:
        if kind.group_version != group_version:
            continue
        found.append({"name": kind.resource, "singularName": kind.kind.lower(), "namespaced": kind.namespaced,
                      "kind": kind.kind, "verbs": verbs, "shortNames": list(kind.short)})  # fmt: skip
        for part in kind.parts:
            row = {"name": f"{kind.resource}/{part}", "singularName": "", "namespaced": kind.namespaced,
                   "kind": kind.kind, "verbs": ["get", "patch", "update"]}  # fmt: skip
            if part == "eviction":
                row.update(group="policy", version="v1", kind="Eviction", verbs=["create"])
            elif part == "scale":
                row.update(group="autoscaling", version="v1", kind="Scale")
            found.append(row)
    return found


def _openapi(kinds: Sequence[Kind], group_version: str) -> Object:
    """Paths with the parameters of a change, by which kubectl sees that the server validates fields itself."""
    group, _, version = group_version.rpartition("/")
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}}
                  for name in ("fieldValidation", "dryRun", "fieldManager")]  # fmt: skip
    paths: Object = {}
    schemas: Object = {}
    for kind in kinds:
        if kind.group_version != group_version:
            continue
        mark = {"group": group, "version": version, "kind": kind.kind}
        place = "/namespaces/{namespace}" if kind.namespaced else ""
        change = {"x-kubernetes-group-version-kind": mark, "x-kubernetes-action": "patch", "parameters": parameters,
                  "responses": {"200": {"description": "OK"}}}  # fmt: skip
        paths[f"/{_root(group_version)}{place}/{kind.resource}/{{name}}"] = {"patch": change}
        schemas[f"fake.{kind.kind}"] = {"type": "object", "x-kubernetes-group-version-kind": [mark]}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.35.0"}, "paths": paths,
            "components": {"schemas": schemas}}  # fmt: skip


# ---- requests ----


def _is_ready(pod: Object) -> bool:
    rows = (pod.get("status") or {}).get("conditions") or []
    return any(row.get("type") == "Ready" and row.get("status") == "True" for row in rows)


def _parsed(body: bytes) -> Object:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "BadRequest", "the body of the request is not a JSON object")
    return found


def _success() -> Object:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}


def _status(error: Refused) -> Object:
    details = {"retryAfterSeconds": error.seconds} if error.seconds else {}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": error.message,
            "reason": error.reason, "details": details, "code": error.status}  # fmt: skip


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, body: Object, headers: dict[str, str] | None = None) -> None:
    data = orjson.dumps(body)
    rows = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    await send({"type": "http.response.start", "status": status,
                "headers": [(key.encode(), value.encode()) for key, value in rows.items()]})  # fmt: skip
    await send({"type": "http.response.body", "body": data})
