"""Warm pods: pods of a template that run before a sandbox claims one.

    tend   the leader: a pod for each missing one of a pool; unclaimed pods of other pools are deleted
    claim  PATCH with the resourceVersion that was seen: of two servers, one gets 409 and takes another pod

A warm pod has the label `rock.sandbox/pool`, a digest of its manifest, and no sandbox id. A claim adds the annotation
with the id, so that the cluster itself records which sandbox has which pod. A pod that was claimed is never warm again.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import orjson

from rock.errors import Conflict, InvalidConfig, NotFound, RockError
from rock.kubernetes.client import Api, Object
from rock.kubernetes.failures import Failure
from rock.kubernetes.informer import Informer, name_of, uid_of, version_of
from rock.kubernetes.kinds import Kind
from rock.kubernetes.templates import (
    ID_LABEL,
    POOL_LABEL,
    Joining,
    Template,
    template_for,
    template_name,
    uses,
)
from rock.protocol.configuration import PodPool, full_name
from rock.protocol.keys import POD_PREFIX
from rock.protocol.sandbox import SandboxConfig

log = logging.getLogger("rock.kubernetes")

_UNSEEN = 30.0  # seconds for which a pod that was created counts, although the watch does not report it
_AFTER_FAILURE = 30.0  # seconds without new pods of a pool of which one failed
_AT_ONCE = 50  # pods that one look creates or deletes


class WarmPods:
    """path: of an object by name. joining: what the pod of a name joins by. joined: whether a worker of that name is
    there now. kind, failure: of the objects. claimed: by sandbox, the pod that it has."""

    def __init__(
        self, api: Api, path: Callable[[str], str], informer: Informer, templates: Mapping[str, Template],
        joining: Callable[[str], Joining], joined: Callable[[str], bool], kind: Kind,
        failure: Callable[[str], Failure | None],
    ) -> None:  # fmt: skip
        self._api = api
        self._path = path
        self._informer = informer
        self._templates = templates
        self._joining = joining
        self._joined = joined
        self._kind = kind
        self._failure = failure
        self._pools: dict[str, PodPool] = {}  # by digest
        self._made: dict[str, tuple[str, float]] = {}  # (digest, time) by pods that the watch has not reported
        self._paused: dict[str, float] = {}  # until when, by digest
        self._taking: set[str] = set()  # pods that are being claimed here
        self.claimed: dict[str, str] = {}

    # ---- configuration ----

    def check(self, pools: Sequence[PodPool]) -> None:
        """InvalidConfig for a pool that cannot exist."""
        for pool in pools:
            template = template_for(self._templates, pool.config())
            if template.pool is not None:
                raise InvalidConfig(f"pools.pods: template {pool.template!r} uses a pool of a controller",
                                    hint="use a pod template, or remove the pool here")  # fmt: skip
            if uses(template.body, "sandbox_id"):
                raise InvalidConfig(f"pools.pods: template {pool.template!r} uses sandbox_id, which a warm pod has not",
                                    hint="remove {{ sandbox_id }} from the template, or the pool")  # fmt: skip

    def use(self, pools: Sequence[PodPool]) -> None:
        """Keep these pools from now on; the next look creates and deletes pods."""
        try:
            self.check(pools)
        except InvalidConfig as error:  # stored by a server with other templates
            log.error("the pools stay: %s", error.message)
            return
        self._pools = {self._digest(pool): pool for pool in pools}

    def _digest(self, pool: PodPool) -> str:
        body = self._manifest(pool, POD_PREFIX, Joining(self._joining("").servers, "", self._joining("").instance))
        return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]

    def _manifest(self, pool: PodPool, name: str, joining: Joining) -> Object:
        config = pool.config()
        return self._kind.manifest(name, "", template_for(self._templates, config), config, joining)

    # ---- what the watch reports ----

    def see(self, pod: Object, gone: bool) -> None:
        """A pod changed."""
        name, meta = name_of(pod), pod.get("metadata") or {}
        self._made.pop(name, None)
        sandbox_id = (meta.get("annotations") or {}).get(ID_LABEL)
        if POOL_LABEL not in (meta.get("labels") or {}) or not isinstance(sandbox_id, str):
            return
        if not gone:
            self.claimed[sandbox_id] = name
        elif self.claimed.get(sandbox_id) == name:
            del self.claimed[sandbox_id]

    def _warm(self) -> list[tuple[str, str, Object]]:
        """(pod, digest, object) of all unclaimed pods that are not being deleted."""
        found = []
        for name, pod in self._informer.objects.items():
            meta = pod.get("metadata") or {}
            digest = (meta.get("labels") or {}).get(POOL_LABEL)
            if digest and not meta.get("deletionTimestamp") and not (meta.get("annotations") or {}).get(ID_LABEL):
                found.append((name, str(digest), pod))
        return found

    # ---- claim ----

    async def claim(self, sandbox_id: str, config: SandboxConfig) -> str | None:
        """A warm pod for a sandbox, which is its own from now on; None when there is none."""
        wanted = [pool for pool in self._pools.items() if self._fits(pool[1], config)]
        for digest, _ in sorted(wanted, key=lambda row: (row[1].cpus, row[1].config().memory_bytes)):
            for name, found, pod in self._warm():
                if found != digest or name in self._taking or not self._joined(name):
                    continue
                self._taking.add(name)
                self.claimed[sandbox_id] = name  # a release after a cancelled claim checks whose it is
                try:
                    if await self._take(sandbox_id, name, pod):
                        return name
                    self.claimed.pop(sandbox_id, None)
                finally:
                    self._taking.discard(name)
        return None

    @staticmethod
    def _fits(pool: PodPool, config: SandboxConfig) -> bool:
        own = pool.config()
        return (
            full_name(own.image) == full_name(config.image) and template_name(own) == template_name(config)
            and own.cpus >= config.cpus and own.memory_bytes >= config.memory_bytes and not config.disk_bytes
            and (own.num_gpus or 0) == (config.num_gpus or 0) and own.accelerator_type == config.accelerator_type
        )  # fmt: skip

    async def _take(self, sandbox_id: str, name: str, pod: Object) -> bool:
        change = {"metadata": {"resourceVersion": str(version_of(pod)), "uid": uid_of(pod),
                               "annotations": {ID_LABEL: sandbox_id}}}  # fmt: skip
        try:
            made = await self._api.patch(self._path(name), change)
        except (Conflict, NotFound):
            try:  # a lost response of an attempt that succeeded, or another server
                made = await self._api.get(self._path(name))
            except NotFound:
                return False
        meta = made.get("metadata") or {}
        mine = (meta.get("annotations") or {}).get(ID_LABEL) == sandbox_id
        return mine and not meta.get("deletionTimestamp") and uid_of(made) == uid_of(pod)

    # ---- the leader ----

    async def tend(self) -> None:
        """Create what the pools lack, and delete what no pool has. Unavailable."""
        if not self._informer.synced.is_set():
            return
        now = time.monotonic()
        self._made = {name: row for name, row in self._made.items() if row[1] > now - _UNSEEN}
        counts: dict[str, int] = {}
        for digest, _ in self._made.values():
            counts[digest] = counts.get(digest, 0) + 1
        surplus: list[Object] = []
        for name, digest, pod in self._warm():
            failure = self._failure(name)
            if failure is not None and not failure.heals:
                log.warning("a warm pod failed: %s", failure.message)
                self._paused[digest] = now + _AFTER_FAILURE
                surplus.append(pod)
                continue
            counts[digest] = counts.get(digest, 0) + 1
            pool = self._pools.get(digest)
            if (pool is None or counts[digest] > pool.size) and name not in self._taking:
                surplus.append(pod)
        for pod in surplus[:_AT_ONCE]:
            try:  # with its version: a pod that was claimed meanwhile stays
                await self._api.delete(self._path(name_of(pod)), uid_of(pod), grace=1, version=str(version_of(pod)))
            except Conflict:
                continue
        left = _AT_ONCE
        for digest, pool in self._pools.items():
            if self._paused.get(digest, 0.0) > now:
                continue
            for _ in range(min(left, pool.size - counts.get(digest, 0))):
                await self._add(digest, pool)
                left -= 1

    async def _add(self, digest: str, pool: PodPool) -> None:
        name = f"{POD_PREFIX}warm-{secrets.token_hex(8)}"
        body = self._manifest(pool, name, self._joining(name))
        body["metadata"]["labels"][POOL_LABEL] = digest
        self._made[name] = digest, time.monotonic()  # also when the response is lost: the pod may exist
        try:
            await self._api.create(self._path(""), body)
        except InvalidConfig as error:  # as by a ResourceQuota
            self._made.pop(name, None)
            self._paused[digest] = time.monotonic() + _AFTER_FAILURE
            log.warning("a warm pod is refused: %s", error.message)
        except RockError as error:
            log.warning("a warm pod: %s", error.message)
