"""Handover of the running command of a session: what the rocklet stores for its successor, and how that resumes it."""

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

_UNHEARD = 0.3  # seconds within which a shell that has begun a command of an earlier rocklet process shows it
_ANSWERED = 10.0  # seconds within which a shell that has not begun it executes the next command
_REPORTS = 1 << 20  # bytes of a command's reports that are stored for recovery after a crash


@dataclass(frozen=True)
class JournalEntry:
    """The journal, and the key of the request, under which a command is recorded for the next rocklet process."""

    journal: Journal
    place: str


class Handover:
    """The spool files of a session. The output, errors and reports of its shell are written to them as they are
    read."""

    def __init__(self, process: ShellProcess) -> None:
        self._process = process
        self._spools: dict[str, SpoolFile] = {}  # by stream: out, err, status
        self._journal: Journal | None = None  # the journal that owns the spool files

    def _spool(self, journal: Journal, name: str) -> SpoolFile:
        found = self._spools.get(name)
        if found is None:
            session = self._process.spec.session.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2s(session, digest_size=8).hexdigest()
            found = self._spools[name] = journal.file(f"{digest}.{name}")
            self._journal = journal
        return found

    # ---- while a command runs ----

    def write_down(self, keep: JournalEntry, run: Run, action: BashAction, held: bytes, *, by_file: bool) -> None:
        """Record the intent before the shell receives the command. held: bytes to be returned ahead of its output.
        by_file: the shell may read it from a file, which is removed after it."""
        if any(spool.full for spool in self._spools.values()):
            keep.journal.flush()  # the spool file restarts at its beginning
        try:
            spooled = {name: self._spool(keep.journal, name).begin(held if name == "out" else b"")
                       for name in ("out", "status", *(["err"] if action.separate else []))}  # fmt: skip
        except OSError:
            return  # the server's disk is full: the command runs, and a crash loses its output
        keep.journal.begin(
            keep.place, kind="run", session=self._process.spec.session, token=run.token, began=run.began,
            timeout=action.timeout, limit=action.max_output_bytes, **({"file": True} if by_file else {}), **spooled,
        )  # fmt: skip
        self._divert(action.separate)

    def _divert(self, separate: bool) -> None:
        readers = self._process.readers
        readers[0].take = self._spools["out"].take
        if separate and len(readers) > 2:
            readers[1].take = self._spools["err"].take
        readers[-1].take = self._spools["status"].take

    def ended(self) -> None:
        """No command runs; output that arrives now belongs to no command."""
        for reader in self._process.readers:
            reader.take = os.read

    def flush(self) -> None:
        """Flush the journal. Call this before a command that is not recorded: from then on, the spool files no longer
        contain only the recorded command."""
        if self._journal is not None:
            self._journal.flush()

    def bound_output(self, is_errors: bool, token: int, kept: Capped) -> None:
        spool = self._spools.get("err" if is_errors else "out")
        if spool is not None:
            spool.keep_short(token, kept)

    def bound_reports(self) -> None:
        """Limit the size of the reports file: a program in the sandbox can write to it and must not fill the server's
        disk."""
        spool = self._spools.get("status")
        if spool is not None and spool.size > _REPORTS:
            spool.broken = True

    def give_back(self) -> None:
        """Return the spool files of a shell that has ended."""
        if self._journal is not None:
            self._journal.flush()
            for spool in self._spools.values():
                self._journal.give_back(spool)
            self._spools.clear()

    def close(self) -> None:
        """Close the spool files without change, for the next rocklet process."""
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()

    # ---- recovery by the next rocklet ----

    def is_superseded(self, journal: Journal, entry: Mapping[str, Any]) -> bool:
        """Whether a later command of the session has begun, although the journal does not contain it: the mark of a
        spool file is that of output after this command's. OSError."""
        return any(self._spool(journal, name).has_later(int(entry[name])) for name in ("out", "err", "status")
                   if name in entry)

    def take_up(self, journal: Journal, entry: Mapping[str, Any], run: Run) -> bytes:
        """Give a resumed command its stored output, and continue from there. Returns its reports until now.

        Damaged or missing output is counted in `run.missing`; damaged reports set `run.reports_damaged`. OSError.
        """
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
        """Whether the shell received the command before the crash. While the command runs, later commands stay in the
        pipe.

        written: whether the earlier rocklet process recorded that it wrote the command. ask: makes the shell report, as
        a later command would.
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
        if not run.done.done():  # the shell reads commands and reports at once, unless it runs this one
            with contextlib.suppress(TimeoutError):
                # the bytes are few enough to be written completely or not at all
                async with asyncio.timeout(_ANSWERED):
                    await ask()
                    if not written:
                        await settled(run.done)
        # Behind a carrier, the report of the command can be lost; the report of the probe then proves its end.
        return written or not run.unbegun


def ended_with_client() -> Conflict:
    """For the key of a command that was ended: it is never started again."""
    return Conflict(
        "the command with this key was ended because its client left",
        hint="look what it did; send it with a new key to run it again",
    )


def unseen(sandbox_id: str, damaged: bool = False) -> Conflict:
    """For a command that was begun and whose report was lost. damaged: the file of the reports is damaged."""
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
