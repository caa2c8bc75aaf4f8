"""What the admin remembers: one record a sandbox, with a version, so that two writers cannot both win.
Beside them API keys and leases."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rock.errors import Conflict
from rock.protocol.keys import KeyInfo, Quota
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.workers import Workers


@dataclass(slots=True)
class Record:
    """A sandbox as remembered; nobody changes one. `key`: the idempotency key of its creation, unique in its tenant
    where there is one. id, tenant, state: of its info."""

    info: SandboxInfo
    config: SandboxConfig
    key: str | None = None
    version: int = 0
    id: str = field(init=False, repr=False, compare=False)
    tenant: str = field(init=False, repr=False, compare=False)
    state: State = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.id, self.tenant, self.state = self.info.sandbox_id, self.info.tenant, self.info.state

    def at(self, version: int) -> Record:
        """The same record as it is saved with that version."""
        return Record(self.info, self.config, self.key, version)

    def changed(self, **fields: object) -> Record:
        """The same record with other fields of `info`."""
        return Record(self.info.model_copy(update=fields), self.config, self.key, self.version)


def member(group_id: str, number: int) -> str:
    """The id of a sandbox of a group."""
    return f"{group_id}-{number}"


def ordered(records: Sequence[Record], group_id: str) -> Sequence[Record]:
    """Those of a group alone, in its order; ids that begin alike may be others'."""
    mine = (record for record in records if record.info.group == group_id)
    return sorted(mine, key=lambda record: int(record.id[len(group_id) + 1 :]))


def id_taken(sandbox_id: str) -> Conflict:
    return Conflict(
        f"Sandbox {sandbox_id} already exists",
        sandbox_id=sandbox_id,
        hint="choose another sandbox_id, or delete the stopped one",
    )


class VersionConflict(Exception):
    """Somebody else changed the record since it was read."""


@dataclass(frozen=True)
class Query:
    """Which records to list: equality on fields of `info`, labels that must match; newest first.

    after: the `created_at` and id of the last record of the page before.
    left: only those whose files are kept on a worker or in the archive.
    tenant: whose; "" is the server's owner, None is everybody.
    """

    states: Sequence[State] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    limit: int = 500
    after: tuple[float, str] | None = None
    left: bool = False
    tenant: str | None = None


@dataclass(frozen=True)
class Lease:
    """Something that one process at a time may do. token: grows with each change of hands, never otherwise; whoever
    is commanded by a holder refuses a token below one that it has seen."""

    name: str
    holder: str
    token: int


class Store(Protocol):
    """Where records live. Every method raises StorageFull or Unavailable when the medium fails.

    shared: other servers may use it at the same time. workers: those that joined."""

    shared: bool

    @property
    def workers(self) -> Workers: ...

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def identity(self) -> str:
        """A word that this store got when it was made, and no other has. A copy has that of its original."""
        ...

    def missing(self) -> str | None:
        """What is missing of a store that was not opened yet; None when nothing is, or it cannot be known."""
        ...

    async def insert(self, record: Record, quota: Quota | None = None) -> Record:
        """Add a record. Conflict when the id is taken; when the key is, the record that has it comes back.

        quota: of its tenant; QuotaExceeded. However many ask at once, here or elsewhere, it is exact."""
        ...

    async def insert_group(
        self, records: Sequence[Record], quota: Quota | None = None, whole: bool = True
    ) -> Sequence[Record]:
        """Add equal records of one group and tenant in one transaction: all, or without `whole` the first that the
        quota takes. Only the first has an idempotency key; when it is taken, the group that has it comes back.
        Conflict, QuotaExceeded."""
        ...

    async def group(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        """The records of a group, in its order; None is anybody's."""
        ...

    async def get(self, sandbox_id: str) -> Record | None: ...

    async def by_key(self, key: str, tenant: str = "") -> Record | None:
        """The record that a tenant created with this idempotency key."""
        ...

    async def put(self, record: Record, quota: Quota | None = None) -> Record:
        """Save over the version that was read; its config stays. VersionConflict when that is no longer the newest.
        quota: for a step that starts it again."""
        ...

    async def delete(self, sandbox_id: str) -> None: ...

    async def list(self, query: Query) -> Sequence[Record]: ...

    async def count(self, tenant: str | None = None) -> dict[str, int]:
        """Number of records by state; of all, or of one tenant."""
        ...

    async def tally(self) -> dict[tuple[str, str], int]:
        """Number of records by tenant and state."""
        ...

    async def prune(self, before: float) -> int:
        """Forget stopped and deleted sandboxes that ended before that time, but for those whose files are kept.

        Answers how many."""
        ...

    def watch(self) -> AsyncGenerator[str]:
        """Ids of records as they are added, changed and removed, by whomever, from the first step on; "" says that
        some may have been missed."""
        ...

    # ---- API keys ----

    async def add_key(self, digest: str, info: KeyInfo) -> None:
        """Remember a key by its digest."""
        ...

    async def key_of(self, digest: str) -> KeyInfo | None:
        """A key by its digest, a revoked one too."""
        ...

    async def keys(self) -> Sequence[KeyInfo]:
        """All, oldest first."""
        ...

    async def revoke_key(self, key_id: str, at: float) -> KeyInfo:
        """End it; one that is ended stays as it is. NotFound."""
        ...

    # ---- leases ----

    async def take_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """Have it, or have it longer: `seconds` from now. None while somebody else has it."""
        ...

    async def drop_lease(self, name: str, holder: str) -> None:
        """Give it back, if it is ours."""
        ...
