"""Recordings of sandboxes: reading, the entries of snapshots and rollbacks, and repetition (decision 58).

The proxy writes the entries of requests (proxy/recording.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rock.errors import Conflict, NotFound
from rock.protocol.recordings import (
    CHECKPOINT,
    PAGE,
    ROLLBACK,
    RecordedEntries,
    RecordedEntry,
    RecordingInfo,
)
from rock.protocol.snapshots import SnapshotInfo
from rock.store.base import Record, Store
from rock.store.recordings import Head, opened

_LOST = ("background process ", "open environments")  # what a replay needs, and level "session" has not
_IN_PROGRESS = 3600.0  # seconds after which an entry without a response is taken as left by a crash


class Recordings:
    """The recordings of all sandboxes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, record: Record) -> RecordingInfo:
        """The recording of a sandbox. NotFound."""
        head = await self._head(record)
        return RecordingInfo(
            sandbox_id=record.id, config=record.config.model_copy(update={"registry_password": None}),
            state=record.state.value, entries=head.entries, bytes=head.bytes, full=head.full, source=head.source,
            repeats=head.repeats, repeated=head.repeated, diverged_at=head.diverged_at)  # fmt: skip

    async def _head(self, record: Record) -> Head:
        if not record.config.record:
            raise NotFound(f"sandbox {record.id} is not recorded", sandbox_id=record.id,
                           hint="create it with record=True")  # fmt: skip
        return await opened(self._store, record)

    async def entries(self, record: Record, after: int = 0) -> RecordedEntries:
        """A page of entries. NotFound."""
        await self._head(record)
        found: Sequence[RecordedEntry] = await self._store.recordings.list(record.id, after, PAGE)
        return RecordedEntries(items=list(found), next=found[-1].number if len(found) == PAGE else None)

    async def repeat(self, record: Record, source: Record) -> RecordingInfo:
        """Answer the clients of a sandbox with the entries of a recording, from the first one. NotFound, Conflict."""
        head = await self._head(record)
        await self._head(source)
        if head.repeats is not None or record.id == source.id:
            raise Conflict(f"sandbox {record.id} repeats a recording already, or its own", sandbox_id=record.id,
                           hint="start another one: Sandbox.replay")  # fmt: skip
        await self._store.recordings.open(record.id, head._replace(repeats=source.id, repeated=0, diverged_at=None))
        return await self.get(record)

    # ---- snapshots ----

    async def mark(self, record: Record) -> int | None:
        """The place in the recording before a checkpoint; None if requests are in progress, or nothing is recorded."""
        if not record.config.record:
            return None
        head = await self._head(record)
        busy = await self._store.recordings.unfinished(record.id, time.time() - _IN_PROGRESS)
        return None if busy else head.entries

    async def taken(self, record: Record, row: SnapshotInfo, before: int | None) -> None:
        """Record a checkpoint. before: the result of `mark` before it."""
        if record.config.record:
            lost = row.memory != "processes" and any(line.startswith(_LOST) for line in row.left_out)
            exact = not lost and before is not None and before == (await self._head(record)).entries
            await self._add(record, CHECKPOINT, row.snapshot_id, exact, row.memory)

    async def rolled_back(self, record: Record, snapshot_id: str) -> None:
        """Record a rollback."""
        if record.config.record:
            await self._head(record)
            await self._add(record, ROLLBACK, snapshot_id, True, "")

    async def _add(self, record: Record, route: str, snapshot: str, exact: bool, memory: str) -> None:
        now = time.time()
        entry = RecordedEntry(number=0, at=now, finished_at=now, route=route, request="", status=200, response="",
                              snapshot=snapshot, exact=exact, memory=memory)  # fmt: skip
        await self._store.recordings.begin(record.id, entry, None)
