"""The lines of a journal: what is written, and what a later line makes redundant."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from rock.http.asgi import Answer
from rock.rocklet.durability.journal import Journal
from rock.rocklet.durability.spool import SpoolFolder


def kinds(folder: Path) -> list[tuple[str, str]]:
    """The kind and the place of each line."""
    lines = [orjson.loads(line) for line in (folder / "journal").read_bytes().splitlines()]
    return [next((kind, line[kind]) for kind in ("begin", "written", "end", "forget") if kind in line)
            for line in lines]  # fmt: skip


def test_the_end_of_a_request_replaces_the_line_before_it(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(SpoolFolder(tmp_path / "one"))
        for place in ("a", "b"):
            journal.begin(place, kind="run", session="default")
            journal.written(place, found=True)
        journal.finish("b", Answer(b"of b"), found=True)
        journal.flush()
        await journal.close()
        later = Journal(SpoolFolder(tmp_path / "one"))
        later.load(expected=True)
        found = await later.known("b")
        assert later.damage is None and found is not None and found.body == b"of b"
        assert later.begun["a"]["written"] is True and "b" not in later.begun
        await later.close()

    asyncio.run(work())
    assert kinds(tmp_path / "one") == [("begin", "a"), ("written", "a"), ("begin", "b"), ("end", "b")]


def test_a_request_without_an_end_keeps_its_line(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(SpoolFolder(tmp_path / "one"))
        journal.begin("a", kind="run", session="default")
        journal.written("a", found=True)
        await journal.close()

    asyncio.run(work())
    assert kinds(tmp_path / "one") == [("begin", "a"), ("written", "a")]
