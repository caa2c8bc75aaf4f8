"""The tables of recordings and pools, in SQLite and in PostgreSQL."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.store.test_store import Opens, opened

from rock.protocol.pools import StoredPool
from rock.protocol.recordings import MOST_BYTES, RecordedEntry
from rock.protocol.sandbox import SandboxConfig
from rock.proxy.recording import Recorder
from rock.store.recordings import Head
from rock.store.sqlite import SqliteStore


@pytest.fixture(params=["sqlite", "postgres"])
def opens(request: pytest.FixtureRequest, tmp_path: Path) -> Opens:
    if request.param == "sqlite":
        return lambda: opened(lambda: SqliteStore(tmp_path / "db.sqlite"))
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    from rock.store.postgres import PostgresStore

    database: Callable[[], str] = request.getfixturevalue("database")
    url = database()
    return lambda: opened(lambda: PostgresStore(url))


def asked(data: bytes = b"\x00\xff") -> RecordedEntry:
    return RecordedEntry(number=0, at=1.0, route="run", method="POST", target="/v1/x?a=\x00", request_type="text/plain",
                         request=base64.b64encode(data).decode(), request_bytes=len(data))  # fmt: skip


def test_entries_are_numbered_completed_and_removed(opens: Opens) -> None:
    async def play() -> None:
        async with opens() as store:
            table = store.recordings
            assert await table.head("a") is None and await table.begin("a", asked(), "k") is None
            await table.open("a", Head(source="b"))
            assert [await table.begin("a", asked(), f"k{number}") for number in range(3)] == [1, 2, 3]
            known = await table.known("a", "k1")
            assert known is not None and (known.number, known.request, known.finished_at) == (2, "AP8=", None)
            assert await table.unfinished("a", 0.0) == 3 and await table.known("a", "other") is None
            done = known.model_copy(update={"status": 200, "finished_at": 2.0, "response": "AAE=", "response_bytes": 2,
                                            "response_type": "content-type: x"})  # fmt: skip
            await table.finish("a", done)
            assert await table.known("a", "k1") == done and await table.unfinished("a", 0.0) == 2
            head = await table.head("a")
            assert head is not None and (head.entries, head.bytes, head.source) == (3, 8, "b")
            await table.advance("a", 2, 3)
        async with opens() as store:
            table = store.recordings
            assert [entry.number for entry in await table.list("a", 1, 10)] == [2, 3]
            head = await table.head("a")
            assert head is not None and (head.repeated, head.diverged_at) == (2, 3)
            await table.open("a", head._replace(bytes=MOST_BYTES))
            assert await table.begin("a", asked(), None) is None  # it is full
            await table.prune()  # there is no such sandbox
            assert await table.head("a") is None and not await table.list("a", 0, 10)

    asyncio.run(play())


def test_entries_are_admitted_or_found(opens: Opens) -> None:
    async def play() -> None:
        async with opens() as store:
            table = store.recordings
            assert await table.admit("a", asked(), "k", True) is None
            await table.open("a", Head())
            assert await table.admit("a", asked(), "k", True) == 1
            known = await table.admit("a", asked(), "k", True)
            assert isinstance(known, RecordedEntry) and (known.number, known.request) == (1, "AP8=")
            assert await table.admit("a", asked(), "k", False) == 2 and await table.admit("a", asked(), None, True) == 3
            repeating = Head(repeats="a", repeated=4)
            await table.open("b", repeating)
            assert await table.admit("b", asked(), "new", True) == repeating
            await table.advance("b", 4, 5)
            assert await table.admit("b", asked(), "new", True) == 1
            await table.open("c", Head(bytes=MOST_BYTES))
            assert await table.admit("c", asked(), None, True) is None

    asyncio.run(play())


def test_a_recorded_request_costs_two_transactions(tmp_path: Path) -> None:
    """One before it is forwarded, and one before its response; a repetition costs one."""
    statements: list[str] = []
    sent: list[Any] = []

    async def worker(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"answer"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def play() -> None:
        store = SqliteStore(tmp_path / "db.sqlite")
        await store.open()
        try:
            await store.recordings.open("a", Head())
            recorder, path = Recorder(store), "/v1/sandboxes/a/execute"
            store._open_db.set_trace_callback(statements.append)
            for key, count in ((b"one", 2), (b"two", 4), (b"two", 5)):
                scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"idempotency-key", key)]}
                await recorder(scope, receive, send, "a", worker)
                assert len([text for text in statements if text.startswith("BEGIN")]) == count
            assert [one["body"] for one in sent if one["type"] == "http.response.body"] == [b"answer"] * 3
            assert [one.number for one in await store.recordings.list("a", 0, 10)] == [1, 2]
        finally:
            await store.close()

    asyncio.run(play())


def test_pools_are_replaced_by_name(opens: Opens) -> None:
    async def play() -> None:
        async with opens() as store:
            config = SandboxConfig(image="x", memory="64m")
            first = StoredPool(tenant="t", name="p", created_at=1.0, config=config, minimum=1, maximum=2)
            assert await store.pools.save(first) == first
            again = first.model_copy(update={"created_at": 9.0, "minimum": 2})
            assert (await store.pools.save(again)).created_at == 1.0
            assert [one.minimum for one in await store.pools.list("t")] == [2] and not await store.pools.list("u")
            found = await store.pools.find("t", "p")
            assert found is not None and found.config.memory == "64m" and found.id == "t/p"
            await store.pools.remove("t", "p")
            assert await store.pools.find("t", "p") is None

    asyncio.run(play())
