"""Environments that users registered by name, with the image they run in: one small SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, Field

from rock.errors import NotFound, StorageFull, Unavailable

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS environment (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL,
    owner TEXT NOT NULL,
    description TEXT NOT NULL,
    tags TEXT NOT NULL,
    extra_spec TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) WITHOUT ROWID
"""
_COLUMNS = "name, image, owner, description, tags, extra_spec, created_at, updated_at"


class Registered(BaseModel):
    """A registered environment. Times are ISO 8601 in UTC; the catalogue sets them, never the caller."""

    env_name: str
    image: str
    owner: str = ""
    description: str = ""
    tags: list[str] = Field(default_factory=list)
    extra_spec: dict[str, Any] | None = None
    create_at: str = ""
    update_at: str = ""


DEFAULT = Registered(env_name="EnvhubDefaultDockerImage", image="python:3.11")
"""What every catalogue has from its start, under the name that clients of ROCK know."""


class Catalogue:
    """Registered environments in a file. A registration is durable when `register` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rock-envhub")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        await self._aside(self._open)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # SQLite reports the error
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(_SCHEMA)
        if not self._db.execute("SELECT 1 FROM environment WHERE name = ?", (DEFAULT.env_name,)).fetchone():
            self._register(DEFAULT)

    async def close(self) -> None:
        if self._db is not None:
            await self._aside(self._db.close)
            self._db = None
        self._thread.shutdown()

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Run on the one thread that owns the connection: a commit waits for the disk."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except (sqlite3.Error, OSError) as error:
            kind = StorageFull if "full" in str(error) or "disk I/O" in str(error) else Unavailable
            raise kind(f"the catalogue {self.path} does not answer: {error}") from error

    @property
    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("the catalogue of environments is closed",
                              hint="open it first; a server does so when it starts")
        return self._db

    async def register(self, spec: Registered) -> Registered:
        """Add an environment or replace the one with its name; the time of the first registration is preserved."""
        return await self._aside(self._register, spec)

    def _register(self, spec: Registered) -> Registered:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = self._open_db.execute(
            f"INSERT INTO environment ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET image = excluded.image, owner = excluded.owner, "
            "description = excluded.description, tags = excluded.tags, extra_spec = excluded.extra_spec, "
            f"updated_at = excluded.updated_at RETURNING {_COLUMNS}",
            (spec.env_name, spec.image, spec.owner, spec.description, orjson.dumps(spec.tags).decode(),
             orjson.dumps(spec.extra_spec).decode(), now, now),
        ).fetchall()  # fmt: skip
        return _load(row[0])

    async def get(self, name: str) -> Registered:
        """The environment of that name; NotFound when there is none."""
        rows = await self._aside(
            lambda: self._open_db.execute(f"SELECT {_COLUMNS} FROM environment WHERE name = ?", (name,)).fetchall()
        )
        if not rows:
            raise _missing(name)
        return _load(rows[0])

    async def list(self, owner: str | None = None, tags: Collection[str] | None = None) -> list[Registered]:
        """All environments by name, or those of an owner, or those with at least one of the tags."""
        rows = await self._aside(
            lambda: self._open_db.execute(f"SELECT {_COLUMNS} FROM environment ORDER BY name").fetchall()
        )
        found = [_load(row) for row in rows]
        return [env for env in found if (not owner or env.owner == owner) and (not tags or {*tags} & {*env.tags})]

    async def delete(self, name: str) -> None:
        """Delete it; NotFound when there is none of that name."""
        done = await self._aside(
            lambda: self._open_db.execute("DELETE FROM environment WHERE name = ?", (name,)).rowcount
        )
        if not done:
            raise _missing(name)


def _missing(name: str) -> NotFound:
    return NotFound(f"environment {name!r} is not registered", hint="`rock env list` shows the registered environments")


def _load(row: tuple[Any, ...]) -> Registered:
    name, image, owner, description, tags, extra_spec, created_at, updated_at = row
    return Registered(
        env_name=name,
        image=image,
        owner=owner,
        description=description,
        tags=orjson.loads(tags),
        extra_spec=orjson.loads(extra_spec),
        create_at=created_at,
        update_at=updated_at,
    )
