"""Sessions of the web page and the audit log, in every store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tests.store.test_store import opens, with_store  # noqa: F401 - fixtures

from rock.protocol.keys import AuditEntry
from rock.store.access import AuditQuery, Session
from rock.store.base import Store

Runs = Callable[[Callable[[Store], Coroutine[Any, Any, None]]], None]


def _entry(at: float, **fields: Any) -> AuditEntry:
    return AuditEntry(at=at, **{"action": "stop_sandbox", "status": 200, "tenant": "blue", **fields})


def test_sessions_expire(with_store: Runs) -> None:  # noqa: F811
    async def work(store: Store) -> None:
        first, old = Session("a" * 64, "session", "k", 100.0), Session("b" * 64, "session", "k", 50.0)
        await store.access.add_session(old, 10.0)
        await store.access.add_session(first, 10.0)
        assert await store.access.session("a" * 64, "session", 99.0) == first
        assert await store.access.session("a" * 64, "link", 99.0) is None
        assert await store.access.session("b" * 64, "session", 60.0) is None
        await store.access.add_session(Session("c" * 64, "link", "k", 200.0), 60.0)
        assert await store.access.take_session("b" * 64, "session") is None  # it was removed
        assert await store.access.take_session("a" * 64, "session") == first
        assert await store.access.session("a" * 64, "session", 20.0) is None

    with_store(work)


def test_a_link_is_used_once(with_store: Runs) -> None:  # noqa: F811
    async def work(store: Store) -> None:
        await store.access.add_session(Session("d" * 64, "link", "k", 100.0), 10.0)
        taken = await asyncio.gather(*(store.access.take_session("d" * 64, "link") for _ in range(8)))
        assert sum(one is not None for one in taken) == 1

    with_store(work)


def test_the_audit_log_is_filtered_and_paged(with_store: Runs) -> None:  # noqa: F811
    async def work(store: Store) -> None:
        await store.access.add_entries([_entry(float(n), target=f"s{n % 2}", key_id=f"k{n % 3}") for n in range(10)])
        await store.access.add_entries([_entry(20.0, tenant="red", action="create_key", target="nul\0")])
        page = await store.access.entries(AuditQuery({"tenant": "blue"}, limit=4))
        assert [entry.at for entry in page] == [9.0, 8.0, 7.0, 6.0]
        rest = await store.access.entries(AuditQuery({"tenant": "blue"}, before=page[-1].number))
        assert [entry.at for entry in rest] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
        found = await store.access.entries(AuditQuery({"target": "s1", "key_id": "k0"}, since=3.0, until=9.0))
        assert [entry.at for entry in found] == [3.0]
        assert [e.tenant for e in await store.access.entries(AuditQuery({"action": "create_key"}))] == ["red"]
        assert await store.access.prune_entries(5.0) == 5
        assert len(await store.access.entries(AuditQuery())) == 6

    with_store(work)
