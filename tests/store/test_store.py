"""One suite for every store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rock.errors import Conflict, Unavailable
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.base import Query, Record, Store, VersionConflict
from rock.store.sqlite import SqliteStore


def record(name: str, created_at: float = 1.0, key: str | None = None, **fields: Any) -> Record:
    info = SandboxInfo(
        sandbox_id=name, state=fields.pop("state", State.PENDING), image="host", created_at=created_at, **fields
    )
    return Record(info, SandboxConfig(image="host"), key)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = SqliteStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def with_store(tmp_path: Path) -> Callable[[Callable[[Store], Coroutine[Any, Any, None]]], None]:
    def run(work: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            async with opened(tmp_path / "db.sqlite") as store:
                await work(store)

        asyncio.run(main())

    return run


def test_insert_get_put(with_store: Any) -> None:
    async def work(store: Store) -> None:
        first = await store.insert(record("a"))
        assert first.version == 1
        second = await store.put(first.changed(state=State.RUNNING))
        assert (second.version, second.state) == (2, State.RUNNING)
        assert await store.get("a") == second
        with pytest.raises(VersionConflict):
            await store.put(first.changed(state=State.STOPPED))
        assert (await store.get("a")) == second
        assert await store.get("b") is None

    with_store(work)


def test_ids_and_keys_are_unique(with_store: Any) -> None:
    async def work(store: Store) -> None:
        one = await store.insert(record("a", key="k"))
        with pytest.raises(Conflict, match="already exists"):
            await store.insert(record("a"))
        assert await store.insert(record("b", key="k")) == one
        assert await store.by_key("k") == one
        assert await store.get("b") is None

    with_store(work)


def test_two_writers_race_and_one_wins(with_store: Any) -> None:
    async def work(store: Store) -> None:
        first = await store.insert(record("a"))
        results = await asyncio.gather(
            *(store.put(first.changed(reason=f"writer {n}")) for n in range(20)), return_exceptions=True
        )
        won = [r for r in results if isinstance(r, Record)]
        assert len(won) == 1
        assert all(isinstance(r, (Record, VersionConflict)) for r in results)
        assert await store.get("a") == won[0]

    with_store(work)


def test_listing(with_store: Any) -> None:
    async def work(store: Store) -> None:
        for n in range(10):
            await store.insert(
                record(
                    f"s{n}",
                    float(n // 2),
                    user_id=f"u{n % 2}",
                    labels={"k.x": f"v{n % 3}"},
                    state=State.RUNNING if n < 5 else State.STOPPED,
                )
            )
        assert [r.id for r in await store.list(Query(limit=3))] == ["s9", "s8", "s7"]
        pages, after = [], None
        while page := await store.list(Query(limit=3, after=after)):
            pages += [r.id for r in page]
            after = (page[-1].info.created_at, page[-1].id)
        assert pages == [f"s{n}" for n in reversed(range(10))]
        assert [r.id for r in await store.list(Query(states=[State.RUNNING], fields={"user_id": "u1"}))] == ["s3", "s1"]
        assert [r.id for r in await store.list(Query(labels={"k.x": "v0"}))] == ["s9", "s6", "s3", "s0"]
        assert await store.count() == {"running": 5, "stopped": 5}
        await store.delete("s0")
        assert await store.get("s0") is None

    with_store(work)


def test_pruning_takes_only_old_stopped_ones(with_store: Any) -> None:
    async def work(store: Store) -> None:
        await store.insert(record("old", state=State.STOPPED, stopped_at=10.0))
        await store.insert(record("new", state=State.STOPPED, stopped_at=30.0))
        await store.insert(record("alive", state=State.RUNNING))
        assert await store.prune(20.0) == 1
        assert {r.id for r in await store.list(Query())} == {"new", "alive"}

    with_store(work)


def test_it_is_there_after_a_restart_and_passwords_are_not(tmp_path: Path) -> None:
    async def write() -> None:
        async with opened(tmp_path / "db") as store:
            config = SandboxConfig(image="host", registry_password="hunter2-secret")
            await store.insert(Record(record("a").info, config))

    async def read() -> None:
        async with opened(tmp_path / "db") as store:
            found = await store.get("a")
            assert found is not None and found.config.registry_password is None

    asyncio.run(write())
    asyncio.run(read())
    assert not [path for path in tmp_path.iterdir() if b"hunter2-secret" in path.read_bytes()]


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()

    async def main() -> None:
        store = SqliteStore(tmp_path / "db")
        try:
            with pytest.raises(Unavailable, match="newer version"):
                await store.open()
        finally:
            await store.close()

    asyncio.run(main())
