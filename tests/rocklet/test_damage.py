"""Journals and spool files that are damaged on disk: a bit in any place, a cut in any place, emptied, removed."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from rock.host import atomic_file
from rock.http.asgi import Answer, answer
from rock.rocklet.commands.output import Capped
from rock.rocklet.durability.journal import Journal
from rock.rocklet.durability.spool import SpoolFile, SpoolFolder

SEED = 20_261
ANSWERS = {f"/run\nkey-{number}": Answer(b'{"output":"answer %d"}' % number, 200) for number in range(4)}
BEGUN = ("/run\nbegun-1", "/run\nbegun-2")
FORGOTTEN = "/run\nforgotten"


def written(folder: Path) -> Path:
    """A folder as a server leaves it that was killed: four answers, two requests that run, one that was not begun."""
    spools = SpoolFolder(folder)
    spools.make()
    journal = Journal(spools)
    for number, (place, reply) in enumerate(ANSWERS.items()):
        journal.begin(place, kind="run", token=number)
        journal.written(place)
        journal.finish(place, reply)
    journal.begin(FORGOTTEN, kind="run")
    journal.forget(FORGOTTEN)
    for place in BEGUN:
        journal.begin(place, kind="execute", id=place[-1])
    spools.close()
    return folder


def check(folder: Path, *, may_refuse_new: bool = False) -> str | None:
    """No request that was begun is begun again, and no answer is another one. Returns the damage."""

    async def main() -> str | None:
        journal = Journal(SpoolFolder(folder))
        journal.load(expected=True)
        for place, expected in ANSWERS.items():
            if place in journal.begun:  # its end is damaged, and its program is not found
                reply = journal.not_begun(place)
            else:
                reply = await journal.known(place)
            assert reply is not None, place
            assert (reply.status, reply.body) == (200, expected.body) or reply.status == 409, reply
        for place in BEGUN:
            if place not in journal.begun:
                reply = await journal.known(place)
                assert reply is not None and reply.status == 409, place
        fresh = await journal.known("/run\nnew")
        assert fresh is None or may_refuse_new
        damage = journal.damage
        await journal.close()
        return damage

    return asyncio.run(main())


def flips(size: int, count: int) -> Iterator[tuple[int, int]]:
    random_ = random.Random(SEED)
    for at in sorted(random_.sample(range(size), min(count, size))):
        yield at, 1 << random_.randrange(8)


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def test_what_is_whole_is_not_damaged(tmp_path: Path) -> None:
    assert check(written(tmp_path / "a")) is None


def test_one_bit_of_a_journal(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    for at, bit in flips((whole / "journal").stat().st_size, 250):
        folder = Path(shutil.copytree(whole, tmp_path / f"{at}"))
        flip(folder / "journal", at, bit)
        assert check(folder), at


def test_a_journal_that_was_cut(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    size = (whole / "journal").stat().st_size
    for at in [0, *random.Random(SEED).sample(range(1, size), 100), size - 1]:
        folder = Path(shutil.copytree(whole, tmp_path / f"{at}"))
        os.truncate(folder / "journal", at)
        assert check(folder), at


def test_one_bit_of_the_marks(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    for at, bit in flips((whole / "marks").stat().st_size, 250):
        folder = Path(shutil.copytree(whole, tmp_path / f"{at}"))
        flip(folder / "marks", at, bit)
        assert check(folder), at


@pytest.mark.parametrize("names", [("journal",), ("marks",), ("journal", "marks")])
@pytest.mark.parametrize("how", ["removed", "emptied", "garbage"])
def test_whole_files(tmp_path: Path, names: tuple[str, ...], how: str) -> None:
    folder = written(tmp_path / "a")
    for name in names:
        if how == "removed":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(b"" if how == "emptied" else random.Random(SEED).randbytes(3000))
    assert check(folder, may_refuse_new=len(names) > 1)
    if names == ("journal", "marks"):
        assert asyncio.run(_known(folder, "/run\nnew")) == 409  # nothing tells it from one that began


async def _known(folder: Path, place: str) -> int | None:
    journal = Journal(SpoolFolder(folder))
    journal.load(expected=True)
    reply = await journal.known(place)
    await journal.close()
    return None if reply is None else reply.status


@pytest.mark.parametrize("first", ["marks", "journal"])
@pytest.mark.parametrize("how", ["removed", "emptied", "garbage"])
def test_damage_after_damage(tmp_path: Path, first: str, how: str) -> None:
    """The marks first, then the journal: what the new marks do not tell was begun again. And the other way round."""
    folder = written(tmp_path / "a")
    for name in (first, {"marks": "journal", "journal": "marks"}[first]):
        if how == "removed":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(b"" if how == "emptied" else random.Random(SEED).randbytes(3000))
        check(folder, may_refuse_new=True)


def test_keys_are_refused_after_a_second_restart(tmp_path: Path) -> None:
    """Nothing tells which keys began: a restart within the time in which they are retried does not change that."""
    folder = written(tmp_path / "a")
    (folder / "journal").write_bytes(random.Random(SEED).randbytes(3000))
    (folder / "marks").write_bytes(b"")
    for _ in range(3):
        assert asyncio.run(_known(folder, "/run\nbegun-1")) == 409


def test_a_command_begun_before_another_one_whose_end_is_damaged(tmp_path: Path) -> None:
    """Two commands of one session are begun. One of them was not continued and was begun again."""
    folder = tmp_path / "a"
    spools = SpoolFolder(folder)
    spools.make()
    journal = Journal(spools)
    journal.begin("/run\nended", kind="run", session="default", token=1)
    journal.begin("/run\nruns", kind="run", session="default", token=2)
    spools.close()

    async def main() -> None:
        after = Journal(SpoolFolder(folder))
        after.load(expected=True)
        after.settled()
        for place in ("/run\nended", "/run\nruns"):
            reply = await after.known(place)
            assert reply is not None and reply.status == 409, place
        await after.close()

    asyncio.run(main())


def test_a_command_whose_end_is_damaged_and_a_later_one_that_ended(tmp_path: Path) -> None:
    """The later one shows that the earlier one has ended; its output is not the earlier one's."""
    folder = tmp_path / "a"
    spools = SpoolFolder(folder)
    spools.make()
    journal = Journal(spools)
    journal.begin("/run\nfirst", kind="run", session="default", token=1)
    journal.finish("/run\nfirst", Answer(b'{"output":"first"}', 200))
    journal.begin("/run\nother", kind="run", session="other", token=1)
    journal.begin("/run\nsecond", kind="run", session="default", token=2)
    journal.finish("/run\nsecond", Answer(b'{"output":"second"}', 200))
    spools.close()
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    at = sum(map(len, lines[:1])) + 12  # within the end of the first one
    flip(folder / "journal", at, 4)
    after = Journal(SpoolFolder(folder))
    after.load(expected=True)
    assert after.begun["/run\nfirst"]["superseded"] is True
    assert "superseded" not in after.begun["/run\nother"]
    assert "/run\nsecond" not in after.begun


def test_marks_of_a_later_command_show_that_an_earlier_one_ended(tmp_path: Path) -> None:
    spools = SpoolFolder(tmp_path / "a")
    spools.make()
    file = spools.file("default.out")
    starts = []
    for text in (b"first\n", b"second\n"):
        starts.append(file.begin(text))
    spools.close()
    again = SpoolFolder(tmp_path / "a")
    again.read_marks()
    found = again.file("default.out")
    assert found.has_later(starts[0]) and not found.has_later(starts[1])
    found.close()
    again.close()


def test_half_a_line_that_nobody_relied_on_is_ignored(tmp_path: Path) -> None:
    """A server that was killed while it wrote a line had not begun the request: it is begun by the retry, and the line
    after the half one is whole."""
    folder = written(tmp_path / "a")
    whole = (folder / "journal").read_bytes()
    for half in (b"{", b'{"begin":"/run\\nhalf","ki', b'{"begin":"/run\\nhalf","kind":"run","crc":"00000000"}'):
        (folder / "journal").write_bytes(whole + half)
        assert check(folder) is None
        assert asyncio.run(_known(folder, "/run\nhalf")) is None
        (folder / "journal").write_bytes(whole)
        (folder / "marks").unlink()
        shutil.rmtree(folder)
        written(folder)
        whole = (folder / "journal").read_bytes()


def test_a_line_after_half_a_line_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    with (folder / "journal").open("ab") as file:
        file.write(b'{"begin":"/run\\nhalf","ki')

    async def main() -> None:
        journal = Journal(SpoolFolder(folder))
        journal.load(expected=True)
        journal.settled()
        journal.begin("/run\nafter", kind="run")
        journal.finish("/run\nafter", Answer(b"{}", 200))
        await journal.close()

    asyncio.run(main())
    assert asyncio.run(_known(folder, "/run\nafter")) == 200


def test_a_journal_without_checksums_is_read(tmp_path: Path) -> None:
    """One of the version before, and what comes after it has checksums."""
    folder = tmp_path / "a"
    folder.mkdir()
    lines = [{"begin": "/run\nold", "kind": "run"}, {"written": "/run\nold"},
             {"end": "/run\nold", "status": 200, "body": '{"output":"old"}'},
             {"begin": "/run\nruns", "kind": "run"}]  # fmt: skip
    (folder / "journal").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines) + b'{"half')

    async def main() -> None:
        journal = Journal(SpoolFolder(folder))
        journal.load()
        assert journal.damage is None and list(journal.begun) == ["/run\nruns"]
        reply = await journal.known("/run\nold")
        assert reply is not None and reply.body == b'{"output":"old"}'
        await journal.close()

    asyncio.run(main())
    data = (folder / "journal").read_bytes()
    assert data.count(b'"crc":"') == data.count(b"\n") == 2
    asyncio.run(main())


def _pipe(data: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def kept(folder: Path, parts: list[bytes]) -> int:
    """A spool file with what a command wrote, after another command. Returns where the command begins."""
    spools = SpoolFolder(folder)
    spools.make()
    spool = spools.file("out")
    for text in ([b"of another"], parts):
        start = spool.begin()
        for part in text:
            fd = _pipe(part)
            assert spool.take(fd, 1 << 16) == part
            os.close(fd)
    spools.close()
    spool.close()
    return start


def found(folder: Path, start: int) -> tuple[bytes, int | None]:
    """What the server after it gives: (output, bytes that are missing)."""
    spools = SpoolFolder(folder, folder.parent / "damaged")
    spools.read_marks()
    into = Capped(1 << 20)
    spool = spools.file("out")
    missing = spool.load(1, start, into)
    spool.close()
    spools.close()
    return into.take()[0], missing


PARTS = [b"first line\n", b"x" * 500 + b"\n", b"last line\n"]
SIZE = sum(map(len, PARTS))


def test_output_that_is_whole(tmp_path: Path) -> None:
    start = kept(tmp_path / "a", PARTS)
    assert found(tmp_path / "a", start) == (b"".join(PARTS), None)
    with (tmp_path / "a" / "out").open("ab") as file:
        file.write(b"in the file, and the server was killed before its mark")
    output, missing = found(tmp_path / "a", start)
    assert output.endswith(b"before its mark") and missing is None


def _each(whole: Path, folder: Path, damage: Callable[[Path, int], None], places: list[int]) -> Iterator[Path]:
    for at in places:
        copy = Path(shutil.copytree(whole, folder / str(at)))
        damage(copy / "out", at)
        yield copy


def test_one_bit_of_output(tmp_path: Path) -> None:
    start = kept(tmp_path / "whole", PARTS)
    random_ = random.Random(SEED)
    places = random_.sample(range(start, start + SIZE), 120)
    damage = lambda path, at: flip(path, at, 1 << random_.randrange(8))  # noqa: E731
    for folder in _each(tmp_path / "whole", tmp_path, damage, places):
        assert found(folder, start) == (b"", SIZE)
        assert found(folder, start) == (b"", SIZE)  # a second restart tells it too
    assert (tmp_path / "damaged").is_dir()  # a copy is kept


def test_output_that_was_cut_or_removed(tmp_path: Path) -> None:
    start = kept(tmp_path / "whole", PARTS)
    places = [0, start, *random.Random(SEED).sample(range(start, start + SIZE), 60)]
    for folder in _each(tmp_path / "whole", tmp_path, os.truncate, places):
        assert found(folder, start) == (b"", SIZE)
    (tmp_path / "whole" / "out").unlink()
    assert found(tmp_path / "whole", start) == (b"", SIZE)


def test_output_that_had_no_room(tmp_path: Path) -> None:
    """The disk was full from some byte on: what was kept is given, and the size of the rest is told."""
    spools = SpoolFolder(tmp_path / "a")
    spools.make()
    spool: SpoolFile = spools.file("out")
    start = spool.begin()
    for broken, part in ((False, b"kept\n"), (True, b"lost\n"), (True, b"lost too\n")):
        spool.broken = broken
        fd = _pipe(part)
        assert spool.take(fd, 1 << 16) == part
        os.close(fd)
    spool.close()
    spools.close()
    assert found(tmp_path / "a", start) == (b"kept\n", 14)


def test_output_that_was_shortened(tmp_path: Path) -> None:
    spools = SpoolFolder(tmp_path / "a")
    spools.make()
    spool, kept_ = spools.file("out"), Capped(1000)
    start = spool.begin()
    for number in range(100):
        data = b"%d\n" % number * 200
        fd = _pipe(data)
        kept_.add(spool.take(fd, 1 << 16))
        os.close(fd)
        if number == 50:
            spool.shorten(1, kept_)
    spool.close()
    spools.close()
    expected = kept_.take()

    def again(folder: Path) -> tuple[tuple[bytes, int], int | None]:
        after = SpoolFolder(folder)
        after.read_marks()
        into = Capped(1000)
        file = after.file("out")
        missing = file.load(1, start, into)
        file.close()
        after.close()
        return into.take(), missing

    whole = Path(shutil.copytree(tmp_path / "a", tmp_path / "whole"))
    assert again(tmp_path / "a") == (expected, None)
    for at, bit in flips((whole / "out").stat().st_size, 60):
        folder = Path(shutil.copytree(whole, tmp_path / f"{at}"))
        flip(folder / "out", at, bit)
        (output, _), missing = again(folder)
        assert output == b"" and missing, at


def test_a_record_with_one_bit_wrong(tmp_path: Path) -> None:
    record = {"config": {"image": "host"}, "handle": {"id": "x" * 40}}
    text = atomic_file.summed(orjson.dumps(record).decode())
    for at, bit in flips(len(text), len(text)):
        data = bytearray(text.encode())
        data[at] ^= bit
        try:
            seen = atomic_file.parsed(bytes(data))
        except ValueError:
            continue
        assert {**seen, **record} == seen and b'"crc"' not in data, at  # only the name of the checksum is another
    assert atomic_file.parsed(b'{"id": "old"}') == {"id": "old"}


def test_a_folder_of_an_earlier_process_is_empty_for_its_next_sandbox(tmp_path: Path) -> None:
    """The marks of the earlier sandbox, in whose folder this process wrote nothing, are not those of the next one."""
    first = SpoolFolder(tmp_path / "spools")
    first.make()
    journal = Journal(first)
    for number in range(3):
        journal.begin(f"key{number}", kind="call")
        journal.finish(f"key{number}", answer({"number": number}))
    journal.flush()
    first.close()

    recovered = SpoolFolder(tmp_path / "spools")
    Journal(recovered).load(expected=True)
    assert recovered.clear()
    recovered.make()
    again = Journal(recovered)
    again.begin("other", kind="call")
    again.finish("other", answer({}))
    again.flush()
    recovered.close()

    last = Journal(SpoolFolder(tmp_path / "spools"))
    last.load(expected=True)
    assert last.damage is None
