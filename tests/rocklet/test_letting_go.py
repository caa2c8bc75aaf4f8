"""Sessions and their journal at the end of a server, graceful or not: real shells on the process runtime."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from rock.errors import StorageFull, Unavailable
from rock.http.asgi import Answer
from rock.protocol.action import BashAction
from rock.protocol.routes import RESUMES
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.commands.handover import JournalEntry
from rock.rocklet.commands.output import _HIGH, Streaming
from rock.rocklet.commands.session import DEFAULT, Session
from rock.rocklet.commands.shell_process import find_shell
from rock.rocklet.durability.journal import Journal
from rock.rocklet.durability.spool import SpoolFolder
from rock.runtime.base import Handle, Process
from rock.runtime.process.runtime import ProcessRuntime

SECONDS = 20.0


@dataclass
class Place:
    """A sandbox with one session, and the journals and sessions of several rocklets after each other."""

    runtime: ProcessRuntime
    handle: Handle
    folder: Path

    async def first(self) -> tuple[Session, Journal]:
        session = Session(self.runtime, self.handle, DEFAULT, await find_shell(self.runtime, self.handle))
        await session.open()
        return session, Journal(SpoolFolder(self.folder / "spool"))

    async def next(self, before: Session) -> tuple[Session, Journal]:
        journal = Journal(SpoolFolder(self.folder / "spool"))
        journal.load()
        session = Session(self.runtime, self.handle, DEFAULT, before.shell)
        await session.attach(journal)
        return session, journal


@asynccontextmanager
async def place_in(folder: Path) -> AsyncIterator[Place]:
    runtime = ProcessRuntime(folder / "run")
    await runtime.open()
    handle = await runtime.create("x", SandboxConfig(image="host"))
    try:
        yield Place(runtime, handle, folder)
    finally:
        await runtime.destroy(handle)
        await runtime.close()


async def until_there(path: Path) -> None:
    async with asyncio.timeout(SECONDS):
        while not path.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_what_is_written_after_the_server_let_go_is_the_next_ones(tmp_path: Path) -> None:
    """Readers went on until the last moment: the command was run twice, and what it wrote meanwhile was lost."""
    action = BashAction(command=f"echo one; touch {tmp_path}/begun; sleep 0.5; echo two; "
                                f"echo x >> {tmp_path}/count; touch {tmp_path}/ended", session="default")  # fmt: skip

    async def main() -> None:
        async with place_in(tmp_path) as place:
            session, journal = await place.first()
            waiting = asyncio.create_task(session.run_kept(action, JournalEntry(journal, "p")))
            await until_there(tmp_path / "begun")
            session.let_go()
            with pytest.raises(Unavailable) as told:
                await waiting
            assert told.value.details == RESUMES
            session.resume()  # a slow client of a stream that was paused
            await until_there(tmp_path / "ended")
            await asyncio.sleep(0.2)  # for the report
            await session.detach()
            await journal.close()

            session, journal = await place.next(session)
            async with asyncio.timeout(SECONDS):
                reply = await journal.known("p")
            assert reply is not None and orjson.loads(reply.body)["output"] == "one\ntwo\n"
            assert (tmp_path / "count").read_text() == "x\n"
            await session.close()
            await journal.close()

    asyncio.run(main())


def test_an_end_that_nobody_saw_is_told_so(tmp_path: Path) -> None:
    """Where a carrier is between, the report of a command goes nowhere while no server is there: it was run again."""
    action = BashAction(command=f"echo x >> {tmp_path}/count; touch {tmp_path}/begun; sleep 0.5", session="default")

    async def main() -> None:
        async with place_in(tmp_path) as place:
            session, journal = await place.first()
            waiting = asyncio.create_task(session.run_kept(action, JournalEntry(journal, "p")))
            await until_there(tmp_path / "begun")
            session.let_go()
            with pytest.raises(Unavailable):
                await waiting
            process: Process = await place.runtime.attach(place.handle, "session:default")
            report = process.channels[session.shell.dialect.status]
            async with asyncio.timeout(SECONDS):
                data = b""
                while b"\0D " not in data:
                    try:
                        data += os.read(report, 4096)
                    except BlockingIOError:
                        await asyncio.sleep(0.02)
            process.close()
            await session.detach()
            await journal.close()

            session, journal = await place.next(session)
            async with asyncio.timeout(SECONDS):
                reply = await journal.known("p")
            assert reply is not None and reply.status == 409 and b"how is not known" in reply.body
            seen = await session.run(BashAction(command=f"cat {tmp_path}/count", session="default"))
            assert (seen.output, seen.exit_code) == ("x\n", 0)
            await session.close()
            await journal.close()

    asyncio.run(main())


def test_what_a_command_writes_as_reports_is_bounded(tmp_path: Path) -> None:
    action = BashAction(command="head -c 4000000 /dev/zero >&199; echo done", session="default")

    async def main() -> None:
        async with place_in(tmp_path) as place:
            session, journal = await place.first()
            reply = await session.run_kept(action, JournalEntry(journal, "p"))
            assert orjson.loads(reply.body)["output"] == "done\n"
            assert all(path.stat().st_size < 2 << 20 for path in (tmp_path / "spool").iterdir())
            await session.close()
            await journal.close()

    asyncio.run(main())


def test_a_command_that_could_not_be_given_is_not_looked_for(tmp_path: Path) -> None:
    """It stayed begun; after a crash it was taken for the one that ran."""

    async def main() -> None:
        async with place_in(tmp_path) as place:
            session, journal = await place.first()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
            try:
                with pytest.raises(StorageFull, match="no room for a command"):
                    await session.run_kept(BashAction(command="echo " + "y" * 40_000), JournalEntry(journal, "big"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert not journal.begun
            again = Journal(SpoolFolder(tmp_path / "spool"))
            again.load()
            assert not again.begun
            assert (await session.run(BashAction(command="echo fine"))).output == "fine\n"
            await session.close()
            await journal.close()

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    asyncio.run(main())


def test_a_journal_with_a_large_beginning_is_not_written_anew_each_time(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal(SpoolFolder(tmp_path / "spool"))
        journal.begin("big", kind="start", id="1", command={"stdin": "x" * (4 << 20)})
        path = tmp_path / "spool" / "journal"
        files = []
        for number in range(4):
            journal.begin(f"small-{number}", kind="run")
            journal.finish(f"small-{number}", Answer(b"{}"))
            files.append(path.stat().st_ino)
        assert len(set(files)) == 1  # made shorter once, at the first end
        assert path.stat().st_mode & 0o777 == 0o600
        await journal.close()
        again = Journal(SpoolFolder(tmp_path / "spool"))
        again.load()
        assert set(again.begun) == {"big"}
        for number in range(4):
            assert await again.known(f"small-{number}") is not None
        await again.close()

    asyncio.run(main())


def test_a_journal_stays_closed(tmp_path: Path) -> None:
    """A request whose body came after its sandbox was gone opened it again."""

    async def main() -> None:
        journal = Journal(SpoolFolder(tmp_path / "spool"))
        spool = journal.borrow()
        await journal.close()
        before = sorted(os.listdir(tmp_path / "spool"))
        with pytest.raises(OSError):
            journal.borrow()
        journal.begin("late", kind="execute")
        journal.finish("late", Answer(b"{}"))
        journal.give_back(spool)
        assert sorted(os.listdir(tmp_path / "spool")) == before

    asyncio.run(main())


def test_spool_files_of_which_nothing_is_begun_are_removed(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal(SpoolFolder(tmp_path / "spool"))
        used, left, free = journal.borrow(), journal.borrow(), journal.borrow()
        session = journal.file("dab318ad5085cfa9.out")
        journal.begin("p", kind="execute", spools=[[used.path.name, 32]])
        journal.give_back(free)
        journal.sweep()
        assert not left.path.exists()
        assert used.path.exists() and free.path.exists() and session.path.exists()
        for spool in (used, left, session):
            spool.close()
        await journal.close()

    asyncio.run(main())


def test_a_stream_that_another_resumed_is_paused_again() -> None:
    async def main() -> None:
        said: list[str] = []
        streaming = Streaming(lambda: said.append("pause"), lambda: said.append("resume"))
        streaming.put(False, b"x" * (_HIGH + 1))
        streaming.put(False, b"x")  # of a reader that somebody else resumed
        assert said == ["pause", "pause"]

    asyncio.run(main())


def test_a_folder_is_empty_for_the_next_sandbox(tmp_path: Path) -> None:
    """A journal that had been made shorter stayed as it was; so did all that a former rocklet had written."""

    async def main() -> None:
        folder = SpoolFolder(tmp_path / "spool")
        journal = Journal(folder)
        for number in range(3):
            journal.begin(f"p{number}", kind="run")
            journal.finish(f"p{number}", Answer(b"x" * 500_000))
        journal.give_back(journal.borrow())
        (tmp_path / "spool" / "of-a-former-rocklet.out").write_bytes(b"secret")
        await journal.close()
        assert folder.clear()
        assert all(path.stat().st_size == 0 for path in (tmp_path / "spool").iterdir())
        again = Journal(folder)
        again.load()
        assert await again.known("p0") is None
        await again.close()
        folder.remove()
        assert not (tmp_path / "spool").exists()

    asyncio.run(main())
