"""The command that runs in a session, and what came of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from rock.protocol.action import BashObservation
from rock.rocklet import shell
from rock.rocklet.spool import told_missing
from rock.rocklet.streams import Capped, as_text
from rock.runtime.base import CLOCK, ExitStatus

Sink = Callable[[bool, bytes], None]  # (is stderr, bytes)


@dataclass
class Run:
    """The command that runs now."""

    token: int
    output: Capped
    errors: Capped
    done: asyncio.Future[shell.Report | ExitStatus]
    began: float  # seconds of CLOCK_BOOTTIME: what is younger was started by this command
    sink: Sink | None = None
    interrupted: bool = False
    written: bool = False  # the shell has the whole of it
    dropped: int = 0  # bytes that were dropped before it began
    probe: int = -1  # the token of a command after it, by which is seen that it was never begun
    unbegun: bool = False
    by_file: bool = False  # the shell has it by a file
    missing: int | None = None  # bytes of its output that a former rocklet kept and that are damaged
    reports_damaged: bool = False  # what its shell reported to a former rocklet is lost

    def observe(
        self, report: shell.Report | ExitStatus, timeout: float | None, closed: str | None, restarted: bool
    ) -> BashObservation:
        """What came of it. timeout: the seconds after which it was ended; closed: why its session is, if it is."""
        code = report.shell_code if isinstance(report, ExitStatus) else report.code
        if self.interrupted and isinstance(report, shell.Restarted):
            code = 128 + signal.SIGINT  # what ended it; its own `$?` is that of the command before
        reason = ""
        if timeout is not None:
            code, reason = None, f"timed out after {timeout:g} s; what it had started was killed"
        elif self.interrupted:
            reason = "interrupted"
        elif closed is not None:
            reason = f"the session is closed: {closed}"
        if self.missing is not None:
            reason += ("; " if reason else "") + told_missing(self.missing)
        if restarted:
            reason += "; the shell was started anew, its variables are lost"
        output, dropped = self.output.take()
        errors, dropped_errors = self.errors.take()
        text, exact = as_text(output)
        errors_text, errors_exact = as_text(errors)
        return BashObservation.made(
            output=text,
            output_b64=exact,
            stderr=errors_text,
            stderr_b64=errors_exact,
            exit_code=code,
            failure_reason=reason,
            timed_out=timeout is not None,
            interrupted=self.interrupted,
            session_closed=closed is not None,
            session_restarted=restarted,
            dropped_bytes=dropped + dropped_errors + self.dropped + (self.missing or 0),
            duration=time.clock_gettime(CLOCK) - self.began,
        )
