"""One pod for each sandbox: the reservations of ROCK_SCHEDULER=kubernetes.

    reserve ──► POST object (409: it is ours) ──► watch: fails? its rocklet joined? ──► the name of its worker
    release ──► DELETE with the uid as precondition
    failures    objects and pods of running sandboxes that ended, by the watch, each confirmed by a GET

The object is the pod, or one of a controller that makes the pod (kinds.py). The object has the name of the worker; a
controller's pod has its own name, and the labels of the object. The API server is only how machines are made. While it
does not respond, running sandboxes continue, and creates and stops wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rock.errors import Conflict, InvalidConfig, NoCapacity, NotFound, RockError, Unavailable, Unsupported
from rock.kubernetes.client import Api, Object, path_of
from rock.kubernetes.failures import Failure, deleted, failure_of, node_is_silent
from rock.kubernetes.failures import gone as gone_object
from rock.kubernetes.informer import Informer, name_of, uid_of
from rock.kubernetes.kinds import POD, POOLS, Kind, check_pool
from rock.kubernetes.pools import WarmPods
from rock.kubernetes.templates import (
    ID_LABEL,
    INSTANCE_LABEL,
    OWNER_LABEL,
    WORKER_LABEL,
    Joining,
    PoolRef,
    Template,
    pod_name,
    template_for,
)
from rock.protocol.keys import pod_key
from rock.protocol.sandbox import TEMPLATE_LABEL, SandboxConfig
from rock.scheduler.base import MachineEnd

log = logging.getLogger("rock.kubernetes")

_AGAIN = 1.0  # seconds between attempts while the API server does not respond
_WATCH_LAG = 2.0  # seconds that a join waits until the watch has reported the address of its pod
_MOST_KEPT = 100_000  # failures of pods that are not released yet


@dataclass(frozen=True)
class PodSettings:
    """namespace: of the pods. servers: URLs that rocklets join. worker_key: from which the key of each pod is derived.
    instance: a name of this installation: pods of others in the namespace are not touched. unschedulable: seconds
    that a pod may wait for a node."""

    namespace: str
    servers: str
    worker_key: str
    instance: str = "rock"
    unschedulable: float = 60.0
    resync: float = 60.0
    kind: Kind = POD


class PodReservations:
    """See rock.scheduler.base.Reservations. joined: whether a worker of that name is there now."""

    exclusive = True

    def __init__(
        self, api: Api, templates: Mapping[str, Template], settings: PodSettings, joined: Callable[[str], bool]
    ) -> None:
        settings.kind.check(templates)
        self._api = api
        self._templates = templates
        self._settings = settings
        self._kind = settings.kind
        self._joined = joined
        labels = {OWNER_LABEL: "rock", "app.kubernetes.io/component": "sandbox",
                  "app.kubernetes.io/instance": settings.instance}  # fmt: skip
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        self._objects = Informer(api, self._path(), selector, self._see, settings.resync)
        self._pods = self._objects
        if not self._kind.is_pod:
            selector = f"{INSTANCE_LABEL}={settings.instance},{WORKER_LABEL}"
            self._pods = Informer(api, self._pod_path(), selector, self._see_pod, settings.resync)
        self.warm = WarmPods(api, self._path, self._objects, templates, self._joining, joined, self._kind,
                             self._failure_now)  # fmt: skip
        # All by worker, which is the name of the object:
        self._failures: dict[str, Failure] = {}  # of those that ended and are not released
        self._waiting: dict[str, asyncio.Event] = {}
        self._joining_now: dict[str, asyncio.Event] = {}  # of rocklets that are faster than the watch
        self._made: dict[str, str] = {}  # the name of the pod that a controller made
        self._confirming: dict[str, asyncio.Task[None]] = {}  # by worker, or by "pods/" and the name of a pod

    async def open(self) -> None:
        """InvalidConfig when the cluster has not the kind of object."""
        if not self._kind.is_pod:
            try:
                await self._check_kind()
            except RockError:
                await self._api.close()
                raise
            self._pods.open()
        self._objects.open()

    async def _check_kind(self) -> None:
        try:
            await self._api.get(f"{self._path()}?limit=1", tries=1)
        except NotFound:
            raise InvalidConfig(
                f"the cluster has no {self._kind.resource} ({self._kind.group})",
                hint=f"install the controller and its CRD, or change ROCK_KUBERNETES_KIND={self._kind.name}",
            ) from None
        except Unavailable as error:  # the watch repeats it
            log.warning("whether the cluster has %s is not known: %s", self._kind.resource, error.message)

    async def close(self) -> None:
        """Objects and their pods stay, for the next server."""
        await self._objects.close()
        await self._pods.close()
        for task in list(self._confirming.values()):
            task.cancel()
        await asyncio.gather(*self._confirming.values(), return_exceptions=True)
        await self._api.close()

    def _joining(self, name: str) -> Joining:
        return Joining(self._settings.servers, pod_key(self._settings.worker_key, name), self._settings.instance)

    def _path(self, name: str = "") -> str:
        return path_of(self._kind.resource, self._settings.namespace, name, self._kind.group)

    def _pod_path(self, name: str = "") -> str:
        return path_of("pods", self._settings.namespace, name)

    # ---- what the watch reports ----

    def _see(self, found: Object, gone: bool) -> None:
        """An object changed."""
        worker = name_of(found)
        self.warm.see(found, gone)
        if gone:
            # By a list or an event, both of which a server may send late: only a GET shows that it is gone.
            self._soon(worker, self._confirm(found, self._path(worker), worker))
            return
        failure = self._kind.failure(found)
        if failure is not None and not failure.heals:
            if self._kind.is_pod:
                self._fail(worker, failure)
            else:  # its pod has the exact cause, which the other watch may report later
                self._soon(worker, self._explain(worker, failure))
        self.changed(worker)

    def _see_pod(self, pod: Object, gone: bool) -> None:
        """A pod of a controller's object changed."""
        name = name_of(pod)
        worker = str(((pod.get("metadata") or {}).get("labels") or {}).get(WORKER_LABEL) or "")
        if gone:
            self._soon(f"pods/{name}", self._confirm(pod, self._pod_path(name), worker))
            return
        if self._made.setdefault(worker, name) != name:
            # The controller replaced the pod: what ran in the first one is lost.
            self._fail(worker, deleted(self._pods.objects.get(self._made[worker]) or pod))
        failure = failure_of(pod)
        if failure is not None and not failure.heals:
            self._fail(worker, failure)
        self.changed(worker)

    def _fail(self, worker: str, failure: Failure) -> None:
        if len(self._failures) < _MOST_KEPT:
            self._failures.setdefault(worker, failure)

    def _soon(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        if name in self._confirming:
            work.close()
            return
        self._confirming[name] = task = asyncio.create_task(work, name=f"confirm-{name}")
        task.add_done_callback(lambda _: self._confirming.pop(name, None))

    async def _confirm(self, known: Object, path: str, worker: str) -> None:
        """Record the failure of a worker whose object or pod is gone."""
        is_pod = self._kind.is_pod or path != self._path(worker)
        while True:
            try:
                if uid_of(await self._api.get(path)) == uid_of(known):
                    return
            except NotFound:
                pass
            except RockError as error:
                log.warning("whether %s is gone is not known: %s; trying again", path, error)
                await asyncio.sleep(_AGAIN)
                continue
            self._fail(worker, deleted(known) if is_pod else gone_object(self._kind.name, worker))
            if not is_pod or self._made.get(worker) == name_of(known):
                self._made.pop(worker, None)
            self.changed(worker)
            return

    async def _explain(self, worker: str, failure: Failure) -> None:
        """Record the failure of an object, by the cause that its pod has."""
        name = self._made.get(worker)
        if name is not None and worker not in self._failures:
            with contextlib.suppress(RockError):
                exact = failure_of(await self._api.get(self._pod_path(name)))
                failure = failure if exact is None or exact.heals else exact
        self._fail(worker, failure)
        self.changed(worker)

    def _pod_of(self, worker: str) -> Object | None:
        """The pod of a worker, as the watch reports it."""
        return self._pods.objects.get(worker if self._kind.is_pod else self._made.get(worker, ""))

    def _failure_now(self, worker: str) -> Failure | None:
        """The failure of a worker, which may heal."""
        found = self._failures.get(worker) or failure_of(self._pod_of(worker) or {})
        return found or self._kind.failure(self._objects.objects.get(worker) or {})

    def changed(self, name: str) -> None:
        """A pod changed, or a worker joined or left."""
        for waiting in (self._waiting, self._joining_now):
            event = waiting.get(name)
            if event is not None:
                event.set()

    def failures(self) -> dict[str, MachineEnd]:
        """By worker: machines that ended, and are not released."""
        return {name: MachineEnd(failure.cause, failure.message) for name, failure in self._failures.items()}

    def forget(self, worker: str) -> None:
        """Nothing is left of a machine that ended."""
        self._failures.pop(worker, None)

    def silent(self) -> dict[str, str]:
        """By worker: the reason why the cluster does not hear of its machine."""
        found = {}
        for pod in self._pods.objects.values():
            if node_is_silent(pod):
                node = (pod.get("spec") or {}).get("nodeName")
                labels = (pod.get("metadata") or {}).get("labels") or {}
                worker = name_of(pod) if self._kind.is_pod else str(labels.get(WORKER_LABEL))
                found[worker] = f"the cluster does not hear of node {node} of its pod"
        return found

    def is_here(self, worker: str) -> bool:
        """Whether the pod of a worker may be there, by what the watch reports."""
        return not self._objects.synced.is_set() or worker in self._objects.objects or worker in self._waiting

    async def check_join(self, name: str, host: str) -> None:
        """Unavailable for a worker that does not report the address of its pod: code in a sandbox must not make this
        server connect to another address. A rocklet may be faster than the watch, which is waited for."""
        if self._has_address(name, host):
            return
        event = self._joining_now.setdefault(name, asyncio.Event())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_LAG):
                    while not self._has_address(name, host):
                        event.clear()
                        await event.wait()
        finally:
            if self._joining_now.get(name) is event:
                del self._joining_now[name]
        if not self._has_address(name, host):
            raise Unavailable(f"the address of pod {name} is not known yet, or another one",
                              hint="the rocklet tries again by itself")  # fmt: skip

    def _has_address(self, name: str, host: str) -> bool:
        pod, found = self._pod_of(name), self._objects.objects.get(name)
        of_pod = pod is not None and (pod.get("status") or {}).get("podIP") == host
        return of_pod or (found is not None and host in self._kind.addresses(found))

    def check_names(self, names: Iterable[str]) -> None:
        """InvalidConfig for a template that does not exist."""
        for name in sorted(names):
            if name not in self._templates:
                raise InvalidConfig(f"no pod template {name!r} (there are: {', '.join(sorted(self._templates))})",
                                    hint="correct the name, or add it to ROCK_KUBERNETES_TEMPLATES")  # fmt: skip

    # ---- Reservations ----

    def check(self, config: SandboxConfig) -> None:
        """The errors of a config that do not depend on the cluster. InvalidConfig, Unsupported."""
        template_for(self._templates, config)
        if config.use_kata_runtime or config.oci_runtime is not None:
            raise Unsupported("oci_runtime: runtimeClassName of the pod template decides about the runtime of a pod",
                              hint=f"leave it unset, and select a template by the label {TEMPLATE_LABEL}")
        if config.keeps_files:
            raise Unsupported("files of a sandbox that is a pod are deleted with the pod",
                              hint="leave auto_delete_seconds and auto_archive_seconds unset, and copy files out")

    async def reserve(self, sandbox_id: str, config: SandboxConfig, worker: str | None = None) -> str:
        if worker is not None:
            raise Unsupported("a sandbox that is a pod cannot be restarted", hint="create a new sandbox")
        template = template_for(self._templates, config)
        name = pod_name(sandbox_id)
        body = self._kind.manifest(name, sandbox_id, template, config, self._joining(name))
        if template.pool is not None and self._kind.group == POOLS[0]:
            await self._check_pool(template.pool)
        await self._objects.synced.wait()
        if name not in self._objects.objects:
            warm = self.warm.claimed.get(sandbox_id)
            try:
                warm = warm or await self.warm.claim(sandbox_id, config)
            except Unavailable as error:  # the pod of a claim in doubt is found by the next look
                log.warning("no warm pod for sandbox %s: %s", sandbox_id, error.message)
            name = warm or name
        event = self._waiting[name] = asyncio.Event()
        try:
            if name != self.warm.claimed.get(sandbox_id) and name not in {*self._objects.objects, *self._failures}:
                await self._create(sandbox_id, name, body)
            return await self._started(sandbox_id, name, event)
        finally:
            if self._waiting.get(name) is event:
                del self._waiting[name]

    async def _check_pool(self, pool: PoolRef) -> None:
        """InvalidConfig, Unsupported, Unavailable."""
        group, resource = POOLS
        try:
            check_pool(await self._api.get(path_of(resource, self._settings.namespace, pool.name, group)), pool)
        except NotFound:
            raise InvalidConfig(f"there is no Pool {pool.name!r} in namespace {self._settings.namespace}",
                                hint="create it, or correct the pool of the pod template") from None  # fmt: skip

    async def _create(self, sandbox_id: str, name: str, body: Object) -> None:
        """Create the pod, or find that it exists. NoCapacity, InvalidConfig, Conflict."""
        while True:
            try:
                await self._api.create(self._path(), body)
                return
            except Conflict:
                try:
                    if await self._is_ours(sandbox_id, name):
                        return
                except NotFound:
                    continue
                except Unavailable:
                    pass
                await asyncio.sleep(_AGAIN)  # it is being deleted
            except Unavailable as error:
                # It may have been created: the next attempt finds out.
                log.warning("pod of sandbox %s: %s; trying again", sandbox_id, error.message)
                await asyncio.sleep(_AGAIN)
            except InvalidConfig as error:
                if error.details.get("status") == 403 and "quota" in error.message:
                    raise NoCapacity(error.message, hint="raise the ResourceQuota of the namespace, or stop sandboxes",
                                     details=error.details) from None  # fmt: skip
                if error.details.get("status") == 403 and "RuntimeClass" in error.message:
                    raise Unsupported(f"the cluster has not the RuntimeClass of the pod template: {error.message}",
                                      hint="kubectl get runtimeclass lists those that exist; change runtimeClassName",
                                      details=error.details) from None  # fmt: skip
                raise

    async def _is_ours(self, sandbox_id: str, name: str) -> bool:
        """Whether the pod of this name is of this sandbox; False while it is being deleted. NotFound, Conflict."""
        meta = (await self._api.get(self._path(name))).get("metadata") or {}
        labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
        mine = labels.get("app.kubernetes.io/instance") == self._settings.instance
        if not mine or annotations.get(ID_LABEL) != sandbox_id:
            raise Conflict(f"pod {name} exists and is not of this sandbox", hint="use another namespace, or sandbox_id")
        return not meta.get("deletionTimestamp")

    async def _started(self, sandbox_id: str, name: str, event: asyncio.Event) -> str:
        """Wait for its rocklet. Raises the failure of the pod."""
        waits_since: float | None = None
        while True:
            event.clear()
            if self._joined(name):
                return name
            failure = self._failure_now(name)
            patience: float | None = None
            if failure is not None and failure.heals:
                waits_since = waits_since or time.monotonic()
                patience = waits_since + self._settings.unschedulable - time.monotonic()
                if patience <= 0:
                    raise failure.error(sandbox_id)
            elif failure is not None:
                raise failure.error(sandbox_id)
            else:
                waits_since = None
            try:
                async with asyncio.timeout(patience):
                    await event.wait()
            except TimeoutError:
                continue

    async def release(self, sandbox_id: str) -> None:
        name = self.warm.claimed.get(sandbox_id) or pod_name(sandbox_id)
        while True:
            pod = self._objects.objects.get(name)
            try:
                if pod is None or self._id_of(pod) != sandbox_id:
                    pod = await self._api.get(self._path(name))
                    if self._id_of(pod) != sandbox_id:
                        break
                await self._api.delete(self._path(name), uid_of(pod), grace=1)
                break
            except NotFound:
                break
            except Conflict:  # another pod of this name, as the cache will show
                self._objects.forget(name)
        self._failures.pop(name, None)
        self.warm.claimed.pop(sandbox_id, None)

    @staticmethod
    def _id_of(pod: Object) -> object:
        """The sandbox that has a pod."""
        return ((pod.get("metadata") or {}).get("annotations") or {}).get(ID_LABEL)

    async def held(self) -> set[str]:
        await self._objects.synced.wait()
        found = set()
        for pod in self._objects.objects.values():
            sandbox_id = self._id_of(pod)
            if isinstance(sandbox_id, str) and not (pod.get("metadata") or {}).get("deletionTimestamp"):
                found.add(sandbox_id)
        return found

    async def is_gone(self, worker: str) -> bool:
        """Whether there is no pod of a worker, by a GET. Unavailable."""
        try:
            await self._api.get(self._path(worker))
        except NotFound:
            return True
        return False
