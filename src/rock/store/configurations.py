"""The versions of the live configuration, in SQLite and in PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from rock import faults
from rock.errors import Conflict
from rock.protocol.configuration import ConfigurationVersion

MOST_KEPT = 1000  # versions; older ones are deleted


class Configurations(Protocol):
    """Each method raises Unavailable or StorageFull when the database fails."""

    async def add(self, version: ConfigurationVersion) -> None:
        """Add a version, the number of which is one above the last. Conflict when another server was faster."""
        ...

    async def number(self) -> int:
        """The number of the last version; 0 when there is none."""
        ...

    async def list(self, limit: int, before: int | None = None) -> Sequence[ConfigurationVersion]:
        """Versions, newest first; those below `before`."""
        ...


def _taken(version: ConfigurationVersion) -> Conflict:
    return Conflict(f"the configuration has a version {version.version} already: another change came first",
                    hint="read the current one, and repeat the change")


def _loaded(text: str) -> ConfigurationVersion:
    return ConfigurationVersion.model_validate_json(text)


_BELOW = 1 << 62


class SqliteConfigurations:
    """do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do

    async def add(self, version: ConfigurationVersion) -> None:
        def work(db: sqlite3.Connection) -> None:
            if _number(db) != version.version - 1:
                raise _taken(version)
            db.execute("INSERT INTO configuration (version, info) VALUES (?, ?)",
                       (version.version, version.model_dump_json()))  # fmt: skip
            db.execute("DELETE FROM configuration WHERE version <= ?", (version.version - MOST_KEPT,))

        await faults.point("store.configuration.add")
        self._do(work)

    async def number(self) -> int:
        found: int = self._do(_number)
        return found

    async def list(self, limit: int, before: int | None = None) -> Sequence[ConfigurationVersion]:
        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute("SELECT info FROM configuration WHERE version < ? ORDER BY version DESC LIMIT ?",
                              (_BELOW if before is None else before, limit))  # fmt: skip
            return [row[0] for row in rows]

        return [_loaded(text) for text in self._do(work)]


def _number(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(max(version), 0) FROM configuration").fetchone()[0])


class PostgresConfigurations:
    """transaction: a connection in a transaction."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._transaction = transaction

    async def add(self, version: ConfigurationVersion) -> None:
        async with self._transaction() as db:
            await db.execute("LOCK TABLE configuration IN EXCLUSIVE MODE")
            last = await db.fetchval("SELECT coalesce(max(version), 0) FROM configuration")
            if last != version.version - 1:
                raise _taken(version)
            await db.execute("INSERT INTO configuration (version, info) VALUES ($1, $2)", version.version,
                             version.model_dump_json())  # fmt: skip
            await db.execute("DELETE FROM configuration WHERE version <= $1", version.version - MOST_KEPT)

    async def number(self) -> int:
        async with self._transaction() as db:
            return int(await db.fetchval("SELECT coalesce(max(version), 0) FROM configuration"))

    async def list(self, limit: int, before: int | None = None) -> Sequence[ConfigurationVersion]:
        async with self._transaction() as db:
            rows = await db.fetch("SELECT info FROM configuration WHERE version < $1 ORDER BY version DESC LIMIT $2",
                                  _BELOW if before is None else before, limit)  # fmt: skip
        return [_loaded(row["info"]) for row in rows]
