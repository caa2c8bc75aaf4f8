"""One suite for every store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rock.errors import Conflict, NotFound, QuotaExceeded, Unavailable
from rock.protocol.keys import Access, KeyInfo, Quota
from rock.protocol.node import Beat, JoinWorker, NodeStatus, VolumeInfo, WorkerState
from rock.protocol.sandbox import Isolation, SandboxConfig, SandboxInfo, State
from rock.store.base import Lease, Query, Record, Store, VersionConflict
from rock.store.sqlite import SqliteStore


def record(sandbox_id: str, created_at: float = 1.0, key: str | None = None, **fields: Any) -> Record:
    info = SandboxInfo(
        sandbox_id=sandbox_id, state=fields.pop("state", State.PENDING), image="host", created_at=created_at, **fields
    )
    return Record(info, SandboxConfig(image="host"), key)


Opens = Callable[[], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def opened(make: Callable[[], Store]) -> AsyncIterator[Any]:
    store = make()
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(params=["sqlite", "postgres"])
def opens(request: pytest.FixtureRequest, tmp_path: Path) -> Opens:
    """Opens a store on one place, as often as it is called: each time as another process would."""
    if request.param == "sqlite":
        return lambda: opened(lambda: SqliteStore(tmp_path / "db.sqlite"))
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    from rock.store.postgres import PostgresStore

    url = request.getfixturevalue("database")()
    return lambda: opened(lambda: PostgresStore(url))


@pytest.fixture
def with_store(opens: Opens) -> Callable[[Callable[[Store], Coroutine[Any, Any, None]]], None]:
    def run(work: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            async with opens() as store:
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
        assert await store.insert(record("a", key="k")) == one
        assert await store.by_key("k") == one
        assert await store.get("b") is None

    with_store(work)


def test_a_name_is_unique_until_its_sandbox_ends(with_store: Any) -> None:
    async def work(store: Store) -> None:
        one = await store.insert(record("a", name="web"))
        with pytest.raises(Conflict, match="has the name web"):
            await store.insert(record("b", name="web"))
        with pytest.raises(Conflict, match="already exists"):
            await store.insert(record("a", name="other"))
        await store.insert(record("c", name="web", tenant="acme"))
        two = await store.insert(record("d"))
        with pytest.raises(Conflict, match="has the name web"):
            await store.put(two.changed(name="web"))
        assert await store.get("d") == two
        ended = await store.put(one.changed(state=State.STOPPED))
        two = await store.put(two.changed(name="web"))
        assert [r.id for r in await store.list(Query(fields={"name": "web"}, tenant=""))] == ["d", "a"]
        with pytest.raises(Conflict, match="has the name web"):
            await store.put(ended.changed(state=State.PENDING))  # a restart
        await store.put(two.changed(name=None))
        assert (await store.put(ended.changed(state=State.PENDING))).info.name == "web"

    with_store(work)


def test_of_concurrent_sandboxes_one_gets_the_name(with_store: Any) -> None:
    async def work(store: Store) -> None:
        made = await asyncio.gather(
            *(store.insert(record(f"s{n}", name="web" if n % 2 else None)) for n in range(40)), return_exceptions=True
        )
        named = [one for one in made if isinstance(one, Record) and one.info.name == "web"]
        refused = [one for one in made if not isinstance(one, Record)]
        assert len(named) == 1 and len(refused) == 19
        assert all(isinstance(one, Conflict) for one in refused)
        assert len(await store.list(Query())) == 21

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
        assert await store.tally() == {("", "running"): 5, ("", "stopped"): 5}
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


def test_it_is_there_after_a_restart_and_passwords_are_not(opens: Opens, tmp_path: Path) -> None:
    async def main() -> None:
        async with opens() as store:
            config = SandboxConfig(image="host", registry_password="hunter2-secret")
            await store.insert(Record(record("a").info, config))
        async with opens() as store:
            found = await store.get("a")
            assert found is not None and found.config.registry_password is None

    asyncio.run(main())
    assert not [path for path in tmp_path.iterdir() if b"hunter2-secret" in path.read_bytes()]


# ---- several at once ----


def test_two_processes_race_and_one_wins(opens: Opens) -> None:
    async def main() -> None:
        async with opens() as one, opens() as two:
            first = await one.insert(record("a"))
            results = await asyncio.gather(
                *(store.put(first.changed(reason=f"{n}")) for n in range(20) for store in (one, two)),
                return_exceptions=True,
            )
            won = [r for r in results if isinstance(r, Record)]
            assert len(won) == 1 and await one.get("a") == await two.get("a") == won[0]
            results = await asyncio.gather(*(store.insert(record(f"k{n}{i}", key="k")) for n in range(10)
                                             for i, store in enumerate((one, two))))  # fmt: skip
            assert len({r.id for r in results}) == 1
            assert len(await two.list(Query())) == 2

    asyncio.run(main())


def test_whoever_watches_sees_changes(opens: Opens) -> None:
    async def main() -> None:
        async with opens() as one, opens() as two:
            watching = one.watch()
            seen: list[str] = []

            async def look() -> None:
                while seen.count("a") < 3:
                    seen.append(await anext(watching))

            task = asyncio.create_task(look())
            await asyncio.sleep(0.5)
            writer = one if isinstance(one, SqliteStore) else two  # SQLite has one process
            made = await writer.insert(record("a"))
            await writer.put(made.changed(reason="x"))
            await writer.delete("a")
            async with asyncio.timeout(30):
                await task
            await watching.aclose()

    asyncio.run(main())


def test_leases(opens: Opens) -> None:
    async def main() -> None:
        async with opens() as one, opens() as two:
            first = await one.take_lease("x", "me", 60)
            assert first == Lease("x", "me", 1)
            assert await two.take_lease("x", "you", 60) is None
            assert await two.take_lease("y", "you", 60) == Lease("y", "you", 1)
            assert await one.take_lease("x", "me", 0.0) == first  # and lets it run out
            taken = await two.take_lease("x", "you", 60)
            assert taken == Lease("x", "you", 2)
            assert await one.take_lease("x", "me", 60) is None
            await one.drop_lease("x", "me")  # not his
            assert await one.take_lease("x", "me", 60) is None
            await two.drop_lease("x", "you")
            asked = await asyncio.gather(*(s.take_lease("x", f"{n}", 60) for n in range(10) for s in (one, two)))
            holders = {lease.holder for lease in asked if lease}
            assert len(holders) == 1 and {lease.token for lease in asked if lease} == {3}

    asyncio.run(main())


# ---- tenants ----


def of(tenant: str, name: str, **more: Any) -> Record:
    made = record(name, tenant=tenant)
    return Record(made.info, SandboxConfig(image="host", **more), None)


def test_a_quota_is_exact_however_many_ask(opens: Opens) -> None:
    quota = Quota(sandboxes=10, cpus=100.0, memory="100g")

    async def main() -> None:
        async with opens() as one, opens() as two:
            specs = [s.insert(of("t", f"s{n}{i}"), quota) for n in range(25) for i, s in enumerate((one, two))]
            done = await asyncio.gather(*specs, return_exceptions=True)
            assert sum(isinstance(r, Record) for r in done) == 10
            assert all(isinstance(r, Record | QuotaExceeded) for r in done)
            assert isinstance(await one.insert(of("u", "other"), quota), Record)  # another tenant's is another's
            mine = next(r for r in done if isinstance(r, Record))
            stopped = await one.put(mine.changed(state=State.STOPPED))
            await one.insert(of("t", "more"), quota)
            with pytest.raises(QuotaExceeded):
                await two.put(stopped.changed(state=State.PENDING), quota)
            assert (await two.get(mine.id)) == stopped
            assert await one.count("t") == {"pending": 10, "stopped": 1}

    asyncio.run(main())


def test_cpus_memory_and_starts(with_store: Any) -> None:
    async def work(store: Store) -> None:
        await store.insert(of("c", "c0", cpus=0.5, limit_cpus=1.5), Quota(cpus=2))
        with pytest.raises(QuotaExceeded, match="cpus"):
            await store.insert(of("c", "c1", cpus=0.6), Quota(cpus=2))
        await store.insert(of("c", "c2", cpus=0.5), Quota(cpus=2))
        await store.insert(of("m", "m0", memory="1g"), Quota(memory="1536m"))
        with pytest.raises(QuotaExceeded, match="memory"):
            await store.insert(of("m", "m1", memory="1g"), Quota(memory="1536m"))
        for number in range(3):
            await store.insert(of("s", f"s{number}"), Quota(creates_per_minute=3))
            await store.delete(f"s{number}")
        with pytest.raises(QuotaExceeded, match="3 starts a minute") as told:
            await store.insert(of("s", "s3"), Quota(creates_per_minute=3))
        assert 0 < told.value.details["retry_after"] <= 60

    with_store(work)


def test_tenants_have_idempotency_keys_and_lists_of_their_own(with_store: Any) -> None:
    async def work(store: Store) -> None:
        for tenant in ("", "t", "u"):
            made = record(f"{tenant}-a", tenant=tenant, key="k")
            assert (await store.insert(made)).id == f"{tenant}-a"
            assert await store.by_key("k", tenant) is not None
        assert [r.id for r in await store.list(Query(tenant="t"))] == ["t-a"]
        assert [r.id for r in await store.list(Query(tenant=""))] == ["-a"]
        assert len(await store.list(Query())) == 3
        assert await store.by_key("k", "nobody") is None

    with_store(work)


def test_text_of_any_kind(with_store: Any) -> None:
    odd = "a\\0 \\ ' \" . $1 %s \u2028 \U0001f600 \x7f"
    nul = odd + "\0" + odd

    async def work(store: Store) -> None:
        for name, text in (("a", odd), ("b", nul)):
            made = await store.insert(record(name, user_id=text, labels={text: text}, reason=text, key=text))
            assert await store.get(name) == made == await store.by_key(text)
            assert await store.get(text) is None
            await store.delete(text)
        await store.list(Query(fields={"user_id": nul}, labels={nul: nul}))
        for query in (Query(fields={"user_id": odd}), Query(labels={odd: odd})):
            assert [r.id for r in await store.list(query)][-1:] == ["a"]
        for query in (Query(fields={"user_id": odd + "x"}), Query(labels={odd: odd.replace("0", "\0")})):
            assert await store.list(query) == []

    with_store(work)


def test_keys(with_store: Any) -> None:
    async def work(store: Store) -> None:
        info = KeyInfo(id="1", name="x", tenant="t", scopes=[Access.READ], quota=Quota(cpus=1), created_at=1.0)
        await store.add_key("digest", info)
        assert await store.key_of("digest") == info and await store.key_of("other") is None
        revoked = await store.revoke_key("1", 5.0)
        assert revoked.revoked_at == 5.0 and await store.revoke_key("1", 9.0) == revoked
        assert await store.key_of("digest") == revoked and list(await store.keys()) == [revoked]
        with pytest.raises(NotFound):
            await store.revoke_key("2", 1.0)

    with_store(work)


# ---- migrations ----


def test_an_old_file_is_brought_up_to_date(tmp_path: Path) -> None:
    import sqlite3

    old = sqlite3.connect(tmp_path / "db")
    old.executescript((Path(__file__).parent / "schema_1.sql").read_text())
    old.close()

    async def main() -> None:
        for _ in range(2):  # the second time there is nothing to do
            async with opened(lambda: SqliteStore(tmp_path / "db")) as store:
                found = {r.id: r for r in await store.list(Query())}
                assert {name: (r.state.value, r.version, r.tenant) for name, r in found.items()} == {
                    "runs": ("running", 2, ""), "kept": ("stopped", 4, "")}  # fmt: skip
                assert found["kept"].info.kept and found["kept"].config.auto_delete_seconds == 3600
                assert await store.by_key("first key") == found["runs"]
                assert [r.id for r in await store.list(Query(labels={"team": "a"}))] == ["runs"]
        async with opened(lambda: SqliteStore(tmp_path / "db")) as store:
            assert (await store.put(found["runs"].changed(reason="x"))).version == 3
            with pytest.raises(Conflict):
                await store.insert(record("kept"))
            again = await store.insert(Record(record("another").info, record("another").config, "first key"))
            assert again.id == "runs" and again.version == 3

    asyncio.run(main())


def test_what_a_burst_writes(tmp_path: Path) -> None:
    """Ids are random: records and what indexes have of them must not be ordered by them, or each has pages of its own
    in the log: 14 KB for each of so few, and 30 in a large file."""
    count, together = 1200, 40

    async def main() -> None:
        async with opened(lambda: SqliteStore(tmp_path / "db")) as store:
            before = (tmp_path / "db-wal").stat().st_size
            for _ in range(count // together):
                made = await asyncio.gather(*(store.insert(record(uuid.uuid4().hex)) for _ in range(together)))
                await asyncio.gather(*(store.put(one.changed(state=State.RUNNING)) for one in made))
            assert (tmp_path / "db-wal").stat().st_size - before < count * 8000

    asyncio.run(main())


def test_a_migration_is_whole_or_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    old = sqlite3.connect(tmp_path / "db")
    old.executescript((Path(__file__).parent / "schema_1.sql").read_text())
    before = list(old.iterdump())
    old.close()
    from rock.store import sqlite as module

    steps = module.SQLITE
    monkeypatch.setattr(module, "SQLITE", (*steps, ("CREATE TABLE third (x)", "this is no SQL")))

    async def main() -> None:
        with pytest.raises(Unavailable, match="syntax"):
            async with opened(lambda: SqliteStore(tmp_path / "db")):
                pass

    asyncio.run(main())
    db = sqlite3.connect(tmp_path / "db")
    assert list(db.iterdump()) == before and db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()


def test_servers_that_start_at_once_migrate_once(opens: Opens) -> None:
    async def main() -> None:
        async def start(number: int) -> None:
            async with opens() as store:
                await store.insert(record(f"s{number}"))

        await asyncio.gather(*(start(number) for number in range(5)))
        async with opens() as store:
            assert len(await store.list(Query())) == 5

    asyncio.run(main())


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


# ---- workers ----


def joining(name: str = "w", holder: str = "h" * 16, epoch: int = 0, **fields: Any) -> JoinWorker:
    return JoinWorker(name=name, url="http://10.0.0.1:8080", holder=holder, epoch=epoch, status=node_status(), **fields)


def node_status(sandboxes: int = 0) -> NodeStatus:
    return NodeStatus(host_name="n", host_ip="10.0.0.1", runtime="fake", isolation=Isolation.NONE, cpus=4,
                      memory_total=1 << 30, memory_free=1 << 29, sandboxes=sandboxes, sandbox_limit=9)  # fmt: skip


def test_workers_join_beat_and_are_lost(with_store: Any) -> None:
    async def work(store: Store) -> None:
        workers = store.workers
        assert await workers.list() == []
        with pytest.raises(NotFound):
            await workers.beat("w", Beat(holder="h" * 16, epoch=1, status=node_status()))
        first = await workers.join(joining(version="1.2"))
        assert (first.epoch, first.state, first.version) == (1, WorkerState.READY, "1.2")
        again = await workers.beat("w", Beat(holder="h" * 16, epoch=1, status=node_status(3)))
        assert again.beat == first.beat + 1 and again.status is not None and again.status.sandboxes == 3
        assert 0 <= again.age < 60
        with pytest.raises(Conflict):  # another machine of that name
            await workers.join(joining(holder="o" * 16))
        with pytest.raises(Conflict):
            await workers.beat("w", Beat(holder="o" * 16, epoch=1, status=node_status()))
        # A restart of the same goes on; one that gave up by itself begins anew.
        assert (await workers.join(joining(epoch=1))).epoch == 1
        assert (await workers.join(joining(epoch=1, fresh=True))).epoch == 2
        seen = (await workers.list())[0]
        await workers.beat("w", Beat(holder="h" * 16, epoch=2, status=node_status()))
        assert not await workers.lose("w", 2, seen.beat)  # it was heard of since
        assert not await workers.lose("w", 1)
        assert await workers.lose("w", 2, seen.beat + 1)
        assert [worker.state for worker in await workers.list()] == [WorkerState.LOST]
        with pytest.raises(Conflict):
            await workers.beat("w", Beat(holder="h" * 16, epoch=2, status=node_status()))
        assert (await workers.join(joining(epoch=2))).epoch == 3  # what was lost does not go on
        with pytest.raises(Conflict):
            await workers.remove("w")
        assert await workers.lose("w", 3)
        assert (await workers.join(joining(holder="o" * 16))).epoch == 4  # the name is free now
        assert await workers.lose("w", 4)
        await workers.remove("w")
        with pytest.raises(NotFound):
            await workers.remove("w")
        assert await workers.list() == []
        assert (await workers.join(joining(epoch=4))).epoch == 5

    with_store(work)


def test_workers_are_drained(with_store: Any) -> None:
    async def work(store: Store) -> None:
        workers = store.workers
        with pytest.raises(NotFound):
            await workers.drain("w", True)
        await workers.join(joining())
        assert (await workers.drain("w", True)).state is WorkerState.DRAINING
        beaten = await workers.beat("w", Beat(holder="h" * 16, epoch=1, status=node_status()))
        assert beaten.draining
        assert (await workers.join(joining())).draining  # until somebody says otherwise
        assert (await workers.drain("w", False)).state is WorkerState.READY

    with_store(work)


def test_one_of_many_machines_gets_a_name(opens: Opens) -> None:
    async def one(number: int) -> bool:
        async with opens() as store:
            try:
                await store.workers.join(joining(holder=f"holder-{number:010}"))
            except Conflict:
                return False
            return True

    async def main() -> list[bool]:
        async with opens():  # its tables are there
            return await asyncio.gather(*(one(number) for number in range(6)))

    assert sum(asyncio.run(main())) == 1


def test_of_writes_at_once_each_has_its_own_outcome(with_store: Any) -> None:
    async def work(store: Store) -> None:
        first = await store.insert(record("a"))
        outcomes = await asyncio.gather(
            store.insert(record("b")), store.insert(record("a")), store.put(first.changed(reason="x")),
            store.put(first.changed(reason="y")), store.insert(record("c", key="k")),
            store.insert(record("d", key="k")),
            return_exceptions=True,
        )  # fmt: skip
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds[:2] == [Record, Conflict] and sorted(map(str, kinds[2:4])) == sorted(
            map(str, [Record, VersionConflict])
        )
        assert outcomes[4] == outcomes[5]
        assert {r.id for r in await store.list(Query())} in ({"a", "b", "c"}, {"a", "b", "d"})

    with_store(work)


# ---- groups ----


def members(group_id: str, count: int, key: str | None = None, tenant: str = "", **more: Any) -> list[Record]:
    made = [record(f"{group_id}-{n}", group=group_id, tenant=tenant, key=key if n == 0 else None) for n in range(count)]
    return [Record(one.info, SandboxConfig(image="host", **more), one.key) for one in made]


def test_a_group_is_added_whole_or_not(with_store: Any) -> None:
    async def work(store: Store) -> None:
        assert len(await store.insert_group(members("g", 12))) == 12
        assert [r.id for r in await store.group("g", "")] == [f"g-{n}" for n in range(12)]
        await store.insert(record("h-2"))
        with pytest.raises(Conflict):
            await store.insert_group(members("h", 4))
        assert {r.id for r in await store.list(Query())} == {f"g-{n}" for n in range(12)} | {"h-2"}
        assert list(await store.group("h", "")) == []
        assert list(await store.group("g", "other")) == []

    with_store(work)


def test_groups_race_for_a_key_and_a_quota(opens: Opens) -> None:
    async def main() -> None:
        async with opens() as one, opens() as two:
            asked = [s.insert_group(members(f"k{n}{i}", 5, key="k"))
                     for n in range(6) for i, s in enumerate((one, two))]  # fmt: skip
            found = await asyncio.gather(*asked)
            assert len({group[0].info.group for group in found}) == 1 and {len(group) for group in found} == {5}
            quota = Quota(sandboxes=10, creates_per_minute=100)
            asked = [s.insert_group(members(f"q{n}{i}", 4, tenant="t"), quota)
                     for n in range(6) for i, s in enumerate((one, two))]  # fmt: skip
            done = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(isinstance(group, QuotaExceeded) for group in done) == 10
            assert len(await one.insert_group(members("r", 4, tenant="t"), quota, False)) == 2
            with pytest.raises(QuotaExceeded):
                await two.insert_group(members("s", 4, tenant="t"), quota, False)
            assert await one.count("t") == {"pending": 10}

    asyncio.run(main())


@pytest.mark.parametrize("model", [SandboxConfig, SandboxInfo])
def test_what_is_not_set_is_not_written(model: type[BaseModel]) -> None:
    """Nor need it be, as long as nothing that may be None is something else when nobody says."""
    seen: list[type[BaseModel]] = [model]
    for one in seen:
        for name, field in one.model_fields.items():
            words = get_args(field.annotation)
            if NoneType in words and not field.is_required():
                assert field.get_default(call_default_factory=True) is None, (one, name)
            inner = (field.annotation, *words, *(deeper for word in words for deeper in get_args(word)))
            models = (kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
            seen += [kind for kind in models if kind not in seen]
    assert len(seen) > 1 or model is SandboxConfig


# ---- volumes ----


def volume(name: str, tenant: str = "", worker: str = "local", volume_id: str = "") -> VolumeInfo:
    return VolumeInfo(name=name, volume_id=volume_id or uuid.uuid4().hex, worker=worker, size=1 << 20,
                      state="creating", created_at=1.0, tenant=tenant)  # fmt: skip


def test_volumes_are_found_by_tenant_and_name(with_store: Any) -> None:
    async def work(store: Store) -> None:
        mine = await store.volumes.add(volume("data", "a"))
        others = await store.volumes.add(volume("data", "b", "far"))
        assert await store.volumes.find("a", "data") == mine
        assert await store.volumes.find("b", "data") == others
        assert await store.volumes.find("", "data") is None and await store.volumes.find("a", "\0") is None
        with pytest.raises(Conflict, match="a volume data already"):
            await store.volumes.add(volume("data", "a"))
        assert {one.tenant for one in await store.volumes.list()} == {"a", "b"}
        assert await store.volumes.list(tenant="a") == [mine]
        assert await store.volumes.list(worker="far") == [others]
        await store.volumes.mark(mine.volume_id, "ready")
        found = await store.volumes.find("a", "data")
        assert found is not None and found.state == "ready"
        await store.volumes.remove(mine.volume_id)
        await store.volumes.mark(mine.volume_id, "deleting")
        assert await store.volumes.list(tenant="a") == []
        assert (await store.volumes.add(volume("data", "a"))).volume_id != mine.volume_id

    with_store(work)


def test_a_volume_is_created_once_for_a_key(with_store: Any) -> None:
    async def work(store: Store) -> None:
        first = await store.volumes.add(volume("data", "a"), "key")
        assert await store.volumes.add(volume("data", "a"), "key") == first
        assert await store.volumes.add(volume("more", "a"), "key") == first
        assert (await store.volumes.add(volume("data", "b"), "key")) != first
        both = await asyncio.gather(*(store.volumes.add(volume("both", "c"), f"k{n}") for n in range(4)),
                                    return_exceptions=True)  # fmt: skip
        assert sum(isinstance(one, VolumeInfo) for one in both) == 1
        assert sum(isinstance(one, Conflict) for one in both) == 3

    with_store(work)


def test_a_tenant_has_a_limited_number_of_volumes(with_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rock.store.volumes.MOST_OF_TENANT", 2)

    async def work(store: Store) -> None:
        for name in ("one", "two"):
            await store.volumes.add(volume(name, "a"))
        with pytest.raises(QuotaExceeded):
            await store.volumes.add(volume("three", "a"))
        await store.volumes.add(volume("three", "b"))

    with_store(work)
