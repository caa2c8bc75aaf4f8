"""What the admin remembers: one record a sandbox, with a version, so that two writers cannot both win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State


@dataclass(frozen=True)
class Record:
    """A sandbox as remembered. `key`: the idempotency key of its creation, unique where there is one."""

    info: SandboxInfo
    config: SandboxConfig
    key: str | None = None
    version: int = 0

    @property
    def id(self) -> str:
        return self.info.sandbox_id

    @property
    def state(self) -> State:
        return self.info.state

    def changed(self, **fields: object) -> Record:
        """The same record with other fields of `info`."""
        return replace(self, info=self.info.model_copy(update=fields))


class VersionConflict(Exception):
    """Somebody else changed the record since it was read."""


@dataclass(frozen=True)
class Query:
    """Which records to list: equality on fields of `info`, labels that must match; newest first.

    after: the `created_at` and id of the last record of the page before.
    left: only those whose files are kept on a worker or in the archive.
    """

    states: Sequence[State] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    limit: int = 500
    after: tuple[float, str] | None = None
    left: bool = False


class Store(Protocol):
    """Where records live. Every method raises StorageFull or Unavailable when the medium fails."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def insert(self, record: Record) -> Record:
        """Add a record. Conflict when the id is taken; when the key is, the record that has it comes back."""
        ...

    async def get(self, sandbox_id: str) -> Record | None: ...

    async def by_key(self, key: str) -> Record | None:
        """The record that was created with this idempotency key."""
        ...

    async def put(self, record: Record) -> Record:
        """Save over the version that was read. VersionConflict when that is no longer the newest."""
        ...

    async def delete(self, sandbox_id: str) -> None: ...

    async def list(self, query: Query) -> Sequence[Record]: ...

    async def count(self) -> dict[str, int]:
        """Number of records by state."""
        ...

    async def prune(self, before: float) -> int:
        """Forget stopped and deleted sandboxes that ended before that time, but for those whose files are kept.

        Answers how many."""
        ...
