"""Rows of snapshots in both stores: the report has any text."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.store.postgres_server import postgres

from rock.protocol.snapshots import SnapshotInfo
from rock.store.base import Store
from rock.store.sqlite import SqliteStore

REPORT = ['background process p: sh -c "echo \\"hi\\"; printf \'a\\\\n\'"', "a\tb\x00c", "\\u0000", "ü\U0001f600"]


def test_a_report_is_returned_as_it_was_stored(tmp_path: Path) -> None:
    async def exercise(store: Store) -> None:
        await store.open()
        try:
            made = SnapshotInfo(snapshot_id="a" * 32, tenant="t", name="n", worker="w", sandbox_id="s", left_out=REPORT)
            await store.snapshots.add(made, "key\\")
            for found in (await store.snapshots.find("t", "n"), *await store.snapshots.list("t"),
                          await store.snapshots.add(made, "key\\")):  # fmt: skip
                assert found is not None and found.left_out == REPORT
            changed = made.model_copy(update={"left_out": [*REPORT, '"']})
            await store.snapshots.save(changed)
            assert (await store.snapshots.list())[0].left_out == [*REPORT, '"']
        finally:
            await store.close()

    asyncio.run(exercise(SqliteStore(tmp_path / "db")))
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    from rock.store.postgres import PostgresStore

    with postgres() as make:
        asyncio.run(exercise(PostgresStore(make())))
