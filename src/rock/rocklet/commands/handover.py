"""What the rocklet after this one has to know of the command that runs in a session, and how it goes on with it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rock.errors import Conflict
from rock.http.event_loop import settled
from rock.protocol.action import BashAction
from rock.rocklet.commands.output import Capped, unread
from rock.rocklet.commands.shell_process import Run, ShellProcess
from rock.rocklet.durability.journal import Journal
from rock.rocklet.durability.spool import SpoolFile

_UNHEARD = 0.3  # seconds in which a shell that has begun a command, of a former rocklet, shows it
_ANSWERED = 10.0  # seconds in which one that has not begun it answers to the next
_REPORTS = 1 << 20  # bytes of a command's reports that are kept for after a crash


@dataclass(frozen=True)
class JournalEntry:
    """Where a command is written down for the rocklet after this one, and what it is known by."""

    journal: Journal
    place: str


class Handover:
    """The spool files of a session: its shell's output, errors and reports go to them on their way."""

    def __init__(self, process: ShellProcess) -> None:
        self._process = process
        self._spools: dict[str, SpoolFile] = {}  # by stream: out, err, status
        self._journal: Journal | None = None  # whose they are

    def _spool(self, journal: Journal, name: str) -> SpoolFile:
        found = self._spools.get(name)
        if found is None:
            session = self._process.spec.session.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2s(session, digest_size=8).hexdigest()
            found = self._spools[name] = journal.file(f"{digest}.{name}")
            self._journal = journal
        return found

    # ---- while a command runs ----

    def write_down(self, keep: JournalEntry, run: Run, action: BashAction, held: bytes) -> None:
        """The intent, before the shell has a byte of it. held: what is to be shown ahead of its output."""
        if any(spool.full for spool in self._spools.values()):
            keep.journal.flush()  # it begins anew
        try:
            spooled = {name: self._spool(keep.journal, name).begin(held if name == "out" else b"")
                       for name in ("out", "status", *(["err"] if action.separate else []))}  # fmt: skip
        except OSError:
            return  # no room on the server's disk: the command runs, and a crash would lose it
        keep.journal.begin(
            keep.place, kind="run", session=self._process.spec.session, token=run.token, began=run.began,
            timeout=action.timeout, limit=action.max_output_bytes, **spooled,
        )  # fmt: skip
        self._divert(action.separate)

    def _divert(self, separate: bool) -> None:
        readers = self._process.readers
        readers[0].take = self._spools["out"].take
        if separate and len(readers) > 2:
            readers[1].take = self._spools["err"].take
        readers[-1].take = self._spools["status"].take

    def ended(self) -> None:
        """No command runs: what comes is nobody's."""
        for reader in self._process.readers:
            reader.take = os.read

    def flush(self) -> None:
        """To be called ahead of a command that is not written down: what spool files have is that command's no
        longer."""
        if self._journal is not None:
            self._journal.flush()

    def bound_output(self, is_errors: bool, token: int, kept: Capped) -> None:
        spool = self._spools.get("err" if is_errors else "out")
        if spool is not None:
            spool.keep_short(token, kept)

    def bound_reports(self) -> None:
        """A program writes there: it may not fill the server's disk."""
        spool = self._spools.get("status")
        if spool is not None and spool.size > _REPORTS:
            spool.broken = True

    def give_back(self) -> None:
        """Of a shell that is gone."""
        if self._journal is not None:
            self._journal.flush()
            for spool in self._spools.values():
                self._journal.give_back(spool)
            self._spools.clear()

    def close(self) -> None:
        """Leave them as they are, for the rocklet after this one."""
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()

    # ---- in the rocklet after it ----

    def take_up(self, journal: Journal, entry: Mapping[str, Any], run: Run) -> bytes:
        """Give a command of a former rocklet what it had written, and go on from there. Its reports until now.

        What is damaged or missing of its output is counted in `run.missing`, of its reports in `run.reports_damaged`.
        OSError."""
        for name, kept in (("out", run.output), ("err", run.errors)):
            if name in entry:
                missing = self._spool(journal, name).load(run.token, int(entry[name]), kept)
                if missing is not None:
                    run.missing = (run.missing or 0) + missing
        reports = Capped(_REPORTS * 4)
        run.reports_damaged = self._spool(journal, "status").load(run.token, int(entry["status"]), reports) is not None
        self._divert(separate="err" in entry)
        return reports.parts()[0]

    async def was_begun(self, run: Run, written: bool, ask: Callable[[], Awaitable[None]]) -> bool:
        """Whether the shell was given the command before the crash. While it runs, its pipe has what comes after.

        written: whether a former rocklet says so. ask: has the shell report, as a command after it.
        """
        fd = self._process.script
        if fd is None:
            return written
        if not written and not self._process.piped:
            return False
        end = time.monotonic() + _UNHEARD
        while not run.done.done() and time.monotonic() < end:
            if unread(fd):
                return True
            await asyncio.sleep(0.01)
        if not run.done.done():  # it waits for commands: it tells so before anything else, unless it runs this one
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWERED):  # few enough bytes to be written in whole or not at all
                    await ask()
                    if not written:
                        await settled(run.done)
        # Where a carrier is between, its report may have gone to nobody: then that of the probe tells of its end.
        return written or not run.unbegun


def ended_with_client() -> Conflict:
    """For a key whose command was ended: it is never begun again."""
    return Conflict(
        "the command with this key was ended because its client left",
        hint="look what it did; send it with a new key to run it again",
    )


def unseen(sandbox_id: str, damaged: bool = False) -> Conflict:
    """Of a command that was begun, and whose report nobody has. damaged: because the file of its reports is."""
    if damaged:
        return Conflict(
            "the command was begun, and how it ended is not known: the server's file of its end is damaged or missing",
            sandbox_id=sandbox_id,
            hint="look what it did; send it with a new key to run it again",
            details={"damaged": "output"},
        )
    return Conflict(
        "the command ended while no server was there, and how is not known",
        sandbox_id=sandbox_id,
        hint="look what it did",
    )
