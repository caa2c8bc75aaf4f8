"""The sandbox service scoped to one tenant, and the API keys of tenants.

Resources of other tenants do not exist in this scope: the response, and the work for it, is the same as for an unknown
id. The handlers of the API use the service only through this module. An id never passes from one tenant to another, so
a cached owner stays valid: ids that tenants choose begin with their name and a dash, generated ids are random, and the
ids of the server's owner may not begin with the name of a tenant.
"""

from __future__ import annotations

import functools
import ipaddress
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace

from rock.admin.configuration import LiveConfiguration
from rock.admin.sandboxes.environment_hosts import env_host
from rock.admin.sandboxes.service import Service
from rock.errors import Conflict, Forbidden, InvalidConfig, Unavailable, Unsupported, no_such_sandbox
from rock.http.asgi import Scope
from rock.http.direct import LIFETIME, Grant, proof_of, signed
from rock.protocol import egress
from rock.protocol.action import ConnectionList, DirectAccess, GroupInfo, GroupRequest
from rock.protocol.configuration import QuotaRules, TemplateRules
from rock.protocol.env import OpenEnv
from rock.protocol.keys import Access, Caller, CreateKey, KeyInfo, NewKey, Quota, caller_of, digest_of
from rock.protocol.node import CreateVolume, SandboxList, VolumeInfo
from rock.protocol.pools import PoolInfo, SetPool
from rock.protocol.recordings import RecordedEntries, RecordingInfo
from rock.protocol.sandbox import (
    TEMPLATE_LABEL,
    CommitRequest,
    CommitStatus,
    Isolation,
    SandboxConfig,
    SandboxInfo,
    State,
    UpdateSandbox,
)
from rock.protocol.snapshots import CheckpointRequest, Forkable, ForkRequest, ForkResult, SnapshotInfo
from rock.store.base import Query, Record, Store, member


@functools.cache
def _no_rules() -> TemplateRules:
    return TemplateRules()


class TenantServices:
    """Creates the TenantService for the caller of each request."""

    def __init__(self, service: Service, keys: Keys, live: LiveConfiguration) -> None:
        self._service = service
        self._keys = keys
        self._live = live

    def __call__(self, scope: Scope) -> TenantService:
        return TenantService(self._service, self._keys, caller_of(scope), self._live)


class TenantService:
    """The sandbox service scoped to one tenant. Sandboxes of other tenants raise NotFound."""

    def __init__(self, service: Service, keys: Keys, caller: Caller, live: LiveConfiguration) -> None:
        self._service = service
        self._keys = keys
        self._live = live
        self.caller = caller

    async def load(self, sandbox_id: str) -> Record:
        record = await self._service.store.get(sandbox_id)
        if record is None or (self.caller.tenant is not None and record.tenant != self.caller.tenant):
            raise no_such_sandbox(sandbox_id)
        return record

    async def _own(self, sandbox_id: str) -> None:
        if self.caller.tenant is not None:
            await self.load(sandbox_id)

    # ---- create ----

    async def create(
        self, config: SandboxConfig, key: str | None = None, wait: float = 0.0, sandbox_id: str | None = None
    ) -> SandboxInfo:
        """sandbox_id: the id that the client chose, where the config does not have it."""
        await self._check_id(sandbox_id)
        return await self._service.create(await self._allowed(config), key, wait, self.caller, sandbox_id)

    async def create_group(self, spec: GroupRequest, key: str | None = None, wait: float = 0.0) -> GroupInfo:
        spec = spec.model_copy(update={"config": await self._allowed(spec.config)})
        if spec.config.sandbox_id is not None:
            await self._check_id(member(spec.config.sandbox_id, 0))
        return await self._service.groups.create(spec, key, wait, self.caller)

    async def get_group(self, group_id: str, wait: float = 0.0) -> GroupInfo:
        return await self._service.groups.get(group_id, self.caller.tenant, wait)

    async def stop_group(self, group_id: str) -> GroupInfo:
        return await self._service.groups.stop(group_id, self.caller.tenant)

    async def open_env(self, spec: OpenEnv, wait: float, key: str | None = None) -> SandboxInfo:
        spec = spec.model_copy(update={"config": await self._allowed(spec.config or env_host())})
        return await self._service.envs.open(spec, wait, key, self.caller)

    async def _allowed(self, config: SandboxConfig) -> SandboxConfig:
        """What a tenant requests, checked and with its image rewritten. Forbidden, InvalidConfig."""
        await self._check_id(config.sandbox_id)
        configuration = self._live.current
        if configuration.images.rewrite and config.snapshot is None:
            image = configuration.rewritten(config.image)
            config = config if image == config.image else config.model_copy(update={"image": image})
        config = self._templated(config)
        if Access.ADMIN in self.caller.scopes:
            return config
        if config.network not in ("none", "nat"):
            raise Forbidden(f'this key may not use network "{config.network}", which reaches what the server reaches',
                            hint='network="none" or "nat"')
        allowed = configuration.networks.allowed
        if allowed is not None and config.network not in allowed:
            raise Forbidden(f'this server does not allow network "{config.network}"',
                            hint=f"use {' or '.join(allowed)}" if allowed else "its configuration allows none")
        for text in config.egress or ():
            network = egress.parse(text).network
            if network is not None and (not network.is_global or egress.closed(network.network_address)):
                raise Forbidden(f"this key may not open {text}: it is an address of the server's own networks",
                                hint="an entry of the server's owner may")
        # stored images may be used; the server connects to no internal registry for a tenant
        if _is_near(config.image):
            config = config.model_copy(update={"pull": "never"})
        config = config.model_copy(update={"public_registries": True})
        if config.minimum_isolation is Isolation.NONE:  # a sandbox without isolation has the rights of the server
            config = config.model_copy(update={"minimum_isolation": Isolation.LANDLOCK})
        return config

    def _templated(self, config: SandboxConfig) -> SandboxConfig:
        """The config with the pod template that the rules select. Forbidden, InvalidConfig."""
        rules = self._live.current.templates
        if rules == _no_rules():
            return config
        named, name = config.labels.get(TEMPLATE_LABEL), rules.selected(config)
        if named and rules.allowed is not None and named not in rules.allowed and (
            Access.ADMIN not in self.caller.scopes
        ):
            raise Forbidden(f"this server does not allow this key the pod template {named!r}",
                            hint=f"use one of {', '.join(rules.allowed) or 'none'}, or leave {TEMPLATE_LABEL} unset")
        limit = rules.limits.get(name)
        if limit is not None and (most := limit.exceeded(config)):
            raise InvalidConfig(f"a sandbox of the pod template {name!r} has at most {most}",
                                hint="request less, or name another template")  # fmt: skip
        return config if named else config.model_copy(update={"labels": {**config.labels, TEMPLATE_LABEL: name}})

    async def _check_id(self, sandbox_id: str | None) -> None:
        if sandbox_id is None:
            return
        first, dash, _ = sandbox_id.partition("-")
        if self.caller.tenant is not None:
            if not dash or first != self.caller.tenant:
                raise InvalidConfig(
                    f"sandbox_id {sandbox_id!r}: names that this key chooses begin with {self.caller.tenant}-",
                    hint="or leave it out",
                )
        elif dash and await self._keys.is_tenant(first):
            raise InvalidConfig(f"sandbox_id {sandbox_id!r} is reserved: ids that begin with {first}- belong to a "
                                "tenant", hint="choose another sandbox_id, or leave it out")

    # ---- read ----

    async def get(self, sandbox_id: str, *, wait: float = 0.0, touch: bool = False, usage: bool = False) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.get(sandbox_id, wait=wait, touch=touch, usage=usage)

    async def direct(self, sandbox_id: str) -> DirectAccess:
        """Where the caller reaches the worker of a running sandbox, for a short time. Unsupported, Unavailable."""
        record = await self.load(sandbox_id)
        if record.config.record:
            raise Unsupported("requests to a recorded sandbox pass the server", sandbox_id=sandbox_id,
                              hint="send them to the server")  # fmt: skip
        info = self._service.workers.joined(record.info.worker or "")
        if record.state is not State.RUNNING or info is None:
            raise Unavailable(f"sandbox {sandbox_id} has no worker that accepts direct requests now",
                              sandbox_id=sandbox_id, hint="send requests to the server")  # fmt: skip
        found = self._service.workers.direct(info)
        if found is None:
            raise Unsupported("this server offers no direct requests to its workers",
                              hint="ROCK_DIRECT=all permits them", details={"server": True})
        where, key = found
        token = signed(Grant(info.name, info.epoch, sandbox_id, self.caller, time.time() + LIFETIME), key)
        return DirectAccess(**where, token=token, proof=proof_of(token, key), seconds=LIFETIME)

    async def connections(self, sandbox_id: str) -> ConnectionList:
        await self._own(sandbox_id)
        return await self._service.connections(sandbox_id)

    async def list(self, query: Query, history: bool = False) -> SandboxList:
        return await self._service.list(self._mine(query), history)

    async def records(self, query: Query) -> Sequence[Record]:
        return await self._service.store.list(self._mine(query))

    async def count(self) -> dict[str, int]:
        return await self._service.store.count(self.caller.tenant)

    def _mine(self, query: Query) -> Query:
        return query if self.caller.tenant is None else replace(query, tenant=self.caller.tenant)

    # ---- volumes ----

    async def create_volume(self, spec: CreateVolume, key: str | None = None) -> VolumeInfo:
        return await self._service.volumes.create(spec, key, self.caller.owner)

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        return await self._service.volumes.list(self.caller.tenant)

    async def get_volume(self, name: str, tenant: str = "") -> VolumeInfo:
        return await self._service.volumes.get(self._of(tenant), name)

    async def delete_volume(self, name: str, tenant: str = "") -> VolumeInfo:
        return await self._service.volumes.delete(self._of(tenant), name)

    def _of(self, tenant: str) -> str:
        """The tenant whose volume is meant: only the server's owner may name another one."""
        return tenant if self.caller.tenant is None else self.caller.owner

    # ---- snapshots ----

    async def checkpoint(self, sandbox_id: str, spec: CheckpointRequest, key: str | None = None) -> SnapshotInfo:
        await self._own(sandbox_id)
        return await self._service.snapshots.checkpoint(sandbox_id, spec, key)

    async def forkable(self, sandbox_id: str) -> Forkable:
        await self._own(sandbox_id)
        return await self._service.snapshots.forkable(sandbox_id)

    async def rollback(self, sandbox_id: str, snapshot: str) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.snapshots.rollback(sandbox_id, snapshot)

    async def fork(self, sandbox_id: str, spec: ForkRequest, key: str | None = None) -> ForkResult:
        await self._own(sandbox_id)
        return await self._service.snapshots.fork(sandbox_id, spec, key, self.caller, self._allowed)

    async def list_snapshots(self, sandbox: str | None = None) -> Sequence[SnapshotInfo]:
        return await self._service.snapshots.list(self.caller.tenant, sandbox)

    async def get_snapshot(self, name: str, tenant: str = "") -> SnapshotInfo:
        return await self._service.snapshots.get(self._of(tenant), name)

    async def delete_snapshot(self, name: str, tenant: str = "") -> SnapshotInfo:
        return await self._service.snapshots.delete(self._of(tenant), name)

    async def export_snapshot(self, name: str, tenant: str = "") -> AsyncGenerator[bytes]:
        return await self._service.snapshots.export(self._of(tenant), name)

    async def import_snapshot(self, name: str | None, worker: str | None, ttl: float | None,
                              data: AsyncIterator[bytes]) -> SnapshotInfo:
        return await self._service.snapshots.take_in(self.caller.owner, name, worker, ttl, data)

    # ---- recordings ----

    async def recording(self, sandbox_id: str) -> RecordingInfo:
        return await self._service.snapshots.recordings.get(await self.load(sandbox_id))

    async def recorded(self, sandbox_id: str, after: int = 0) -> RecordedEntries:
        return await self._service.snapshots.recordings.entries(await self.load(sandbox_id), after)

    async def repeat_recording(self, sandbox_id: str, source: str) -> RecordingInfo:
        record = await self.load(sandbox_id)
        return await self._service.snapshots.recordings.repeat(record, await self.load(source))

    # ---- pools ----

    async def set_pool(self, name: str, spec: SetPool, tenant: str = "") -> PoolInfo:
        return await self._service.pools.set(self._of(tenant), name, spec, self._allowed)

    async def list_pools(self) -> Sequence[PoolInfo]:
        return await self._service.pools.list(self.caller.tenant)

    async def delete_pool(self, name: str, tenant: str = "") -> PoolInfo:
        return await self._service.pools.delete(self._of(tenant), name)

    # ---- change ----

    async def stop(self, sandbox_id: str) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.stop(sandbox_id)

    async def update(self, sandbox_id: str, change: UpdateSandbox) -> SandboxInfo:
        """Change the name, the labels or the deadline. NotFound, Conflict."""
        await self._own(sandbox_id)
        fields = change.model_dump(include=change.model_fields_set - {"timeout"})
        if "timeout" not in change.model_fields_set:
            return (await self._service.records.amend(sandbox_id, **fields)).info
        deadline = 0.0 if change.timeout is None else time.time() + change.timeout
        return await self._service.set_deadline(sandbox_id, deadline, fields)

    async def delete(self, sandbox_id: str, force: bool = False) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.kept.delete(sandbox_id, force)

    async def restart(self, sandbox_id: str, key: str | None = None, wait: float = 0.0) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.kept.restart(sandbox_id, key, wait, self.caller.quota)

    async def archive(self, sandbox_id: str, key: str | None = None, wait: float = 0.0) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.archive.archive(sandbox_id, key, wait)

    async def pause(self, sandbox_id: str) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.pause(sandbox_id)

    async def resume(self, sandbox_id: str) -> SandboxInfo:
        await self._own(sandbox_id)
        return await self._service.resume(sandbox_id)

    async def commit(self, sandbox_id: str, spec: CommitRequest, wait: float = 0.0) -> CommitStatus:
        await self._own(sandbox_id)
        if Access.ADMIN not in self.caller.scopes:
            spec = spec.model_copy(update={"public_registries": True})
        return await self._service.commits.commit(sandbox_id, spec, wait, self.caller.owner)

    async def commit_status(self, sandbox_id: str, wait: float = 0.0) -> CommitStatus:
        await self._own(sandbox_id)
        return await self._service.commits.status(sandbox_id, wait)


def _is_near(image: str) -> bool:
    """Whether the registry in an image's name is an address of the server's own networks."""
    domain, slash, _ = image.partition("/")
    host = domain.removeprefix("[").partition("]")[0] if domain.startswith("[") else domain.partition(":")[0]
    if not slash:
        return False
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, 0x7f000001, 0177.0.0.1
        except (OSError, ValueError):
            return False
    return bool(egress.never(address) or egress.closed(address))


# ---- API keys ----
#
# The server stores only their digests. A key is cached for `_FRESH` seconds: at most that long a key that another
# process revoked is still accepted here. A key that is revoked here is rejected at once.

_FRESH = 2.0  # seconds
_REMEMBERED = 10_000


class Keys:
    """The keys of a store. guarded: whether the server requires a key at all. quotas: those of the live configuration;
    call `reread` when they change."""

    def __init__(self, store: Store, guarded: bool, quotas: Callable[[], QuotaRules] = QuotaRules) -> None:
        self._store = store
        self._guarded = guarded
        self._quotas = quotas
        self._seen: OrderedDict[str, tuple[float, Caller, str]] = OrderedDict()  # (expiry, caller, id) by digest
        self._by_id: OrderedDict[str, tuple[float, Caller]] = OrderedDict()  # (expiry, caller)
        self.on_revoked: list[Callable[[str], None]] = []

    async def check_guarded(self) -> None:
        """Conflict when there are keys, including revoked ones, and this server would accept all clients."""
        if not self._guarded and any(info.revoked_at is None for info in await self._store.keys()):
            raise Conflict(
                "there are API keys, and this server has none of its own: it would take everybody for its owner",
                hint="set ROCK_API_KEY",
            )

    async def create(self, spec: CreateKey) -> NewKey:
        """Make a key. Conflict on a server without a key of its own."""
        if not self._guarded:
            raise Conflict("this server asks nobody for a key", hint="start it with ROCK_API_KEY: the owner's key")
        tenant = spec.tenant or f"t{secrets.token_hex(5)}"
        info = KeyInfo(id=secrets.token_hex(6), name=spec.name, tenant=tenant, scopes=spec.scopes, quota=spec.quota,
                       created_at=time.time())  # fmt: skip
        key = f"rock_{tenant}_{secrets.token_urlsafe(32)}"
        digest = digest_of(key.encode())
        assert digest is not None
        await self._store.add_key(digest, info)
        return NewKey(**info.model_dump(), key=key)

    async def list(self) -> list[KeyInfo]:
        return list(await self._store.keys())

    async def revoke(self, key_id: str) -> KeyInfo:
        """Revoke it: its requests are rejected from now on, and its open connections are closed. NotFound."""
        info = await self._store.revoke_key(key_id, time.time())
        for digest in [digest for digest, (_, _, known) in self._seen.items() if known == key_id]:
            del self._seen[digest]
        self._by_id.pop(key_id, None)
        for listener in self.on_revoked:
            listener(key_id)
        return info

    def _caller_with(self, info: KeyInfo) -> Caller:
        return Caller(info.tenant, frozenset(info.scopes), self._quota(info), info.id)

    def _quota(self, info: KeyInfo) -> Quota | None:
        """The quota of a key: that of the configuration for its tenant, else its own, else the default."""
        rules = self._quotas()
        quota = rules.tenants.get(info.tenant) or (info.quota if info.quota.is_limit else rules.default)
        return quota if quota is not None and quota.is_limit else None

    def reread(self) -> None:
        """The quotas have changed."""
        self._seen.clear()
        self._by_id.clear()

    async def is_tenant(self, name: str) -> bool:
        """Whether a key was ever made for it."""
        return any(info.tenant == name for info in await self._store.keys())

    async def caller(self, key: bytes) -> Caller | None:
        """The caller with this key; None for an unknown or revoked one."""
        digest = digest_of(key)
        return None if digest is None else await self.caller_of(digest)

    async def caller_with(self, key_id: str) -> Caller | None:
        """The caller with the key of this id; None for an unknown or revoked one."""
        now = time.monotonic()
        found = self._by_id.get(key_id)
        if found is not None and found[0] > now:
            return found[1]
        info = next((one for one in await self._store.keys() if one.id == key_id and one.revoked_at is None), None)
        if info is None:
            self._by_id.pop(key_id, None)
            return None
        caller = self._caller_with(info)
        self._by_id[key_id] = now + _FRESH, caller
        while len(self._by_id) > _REMEMBERED:
            self._by_id.popitem(last=False)
        return caller

    async def caller_of(self, digest: str) -> Caller | None:
        """The caller with the key of this digest; None for an unknown or revoked one."""
        found = self._seen.get(digest)
        if found is not None and found[0] > time.monotonic():
            return found[1]
        info = await self._store.key_of(digest)
        if info is None or info.revoked_at is not None:
            self._seen.pop(digest, None)
            return None
        caller = self._caller_with(info)
        self._seen[digest] = (time.monotonic() + _FRESH, caller, info.id)
        self._seen.move_to_end(digest)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return caller
