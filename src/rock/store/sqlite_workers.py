"""Workers in a SQLite file: see workers.py."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rock.protocol.workers import Beat, JoinWorker, WorkerInfo
from rock.store.workers import COLUMNS, loaded, next_epoch, not_lost, over, unknown

T = TypeVar("T")


class SqliteWorkers:
    """do: runs work on the open database in a transaction of its own, and tells of what goes wrong."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], T]], T]) -> None:
        self._do: Callable[[Callable[[sqlite3.Connection], Any]], Any] = do

    async def join(self, wish: JoinWorker) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            epoch = next_epoch(_get(db, wish.name), wish)
            db.execute(
                "INSERT INTO worker (name, holder, url, epoch, beat, lost, draining, version, status, seen_at) "
                "VALUES (?, ?, ?, ?, 1, 0, 0, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, "
                "url = excluded.url, epoch = excluded.epoch, beat = worker.beat + 1, lost = 0, "
                "version = excluded.version, status = excluded.status, seen_at = excluded.seen_at",
                (wish.name, wish.holder, wish.url, epoch, wish.version, wish.status.model_dump_json(), time.time()),
            )
            return _known(db, wish.name)

        return self._in(work)

    async def beat(self, name: str, beat: Beat) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            done = db.execute(
                "UPDATE worker SET beat = beat + 1, status = ?, seen_at = ? "
                "WHERE name = ? AND holder = ? AND epoch = ? AND NOT lost",
                (beat.status.model_dump_json(), time.time(), name, beat.holder, beat.epoch),
            )
            if done.rowcount != 1:
                raise over(name, _get(db, name))
            return _known(db, name)

        return self._in(work)

    async def lose(self, name: str, epoch: int, beat: int | None = None) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            done = db.execute("UPDATE worker SET lost = 1 WHERE name = ?1 AND epoch = ?2 AND (?3 IS NULL OR beat = ?3)",
                              (name, epoch, beat))  # fmt: skip
            return done.rowcount == 1

        done: bool = self._do(work)
        return done

    async def drain(self, name: str, draining: bool) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            db.execute("UPDATE worker SET draining = ? WHERE name = ?", (draining, name))
            return _known(db, name)

        return self._in(work)

    async def remove(self, name: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            if not _known(db, name).is_lost:
                raise not_lost(name)
            db.execute("DELETE FROM worker WHERE name = ?", (name,))

        self._do(work)

    async def list(self) -> Sequence[WorkerInfo]:
        def work(db: sqlite3.Connection) -> Sequence[WorkerInfo]:
            rows = db.execute(f"SELECT {COLUMNS}, ? - seen_at FROM worker ORDER BY name", (time.time(),)).fetchall()
            return [loaded(row) for row in rows]

        found: Sequence[WorkerInfo] = self._do(work)
        return found

    def _in(self, work: Callable[[sqlite3.Connection], WorkerInfo]) -> WorkerInfo:
        made: WorkerInfo = self._do(work)
        return made


def _get(db: sqlite3.Connection, name: str) -> WorkerInfo | None:
    row = db.execute(f"SELECT {COLUMNS}, ? - seen_at FROM worker WHERE name = ?", (time.time(), name)).fetchone()
    return None if row is None else loaded(row)


def _known(db: sqlite3.Connection, name: str) -> WorkerInfo:
    found = _get(db, name)
    if found is None:
        raise unknown(name)
    return found
