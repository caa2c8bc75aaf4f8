"""Progress of a start: `SandboxInfo.phases` reports its phases, which install packages at the first use of a package
set. A terminal shows a line per phase, with the elapsed time; without a terminal nothing is shown."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rock.protocol.sandbox import SandboxInfo

INTERVAL = 1.0  # seconds between two requests while progress is reported
_LONGEST = 50  # characters of a message, so that a line with the id of an environment fits a terminal

# How to report: a function that is called with each new message; True: on the standard error; False: not at all;
# None: on the standard error if it is a terminal.
Report = Callable[[str], None] | bool | None

_terminal = threading.Lock()  # environments that start at the same time in other threads report nothing


class StartProgress:
    """Reports the phases of one start. `wanted` is False when nothing is reported."""

    def __init__(self, what: str, report: Report = None) -> None:
        self._what = what
        self._report = report if callable(report) else None
        self.wanted = report is True or callable(report) or (report is None and _is_terminal(sys.stderr))
        self._holds = False
        self._began = 0.0
        self._phase = ""
        self._message = ""

    def __enter__(self) -> Self:
        if self.wanted and self._report is None:
            self._holds = self.wanted = _terminal.acquire(blocking=False)
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phase and self._report is None:
            if _is_terminal(sys.stderr):
                sys.stderr.write("\n")
            outcome = "failed" if error is not None else "ready"
            sys.stderr.write(f"{self._what}: {outcome} after {time.monotonic() - self._began:.0f} s\n")
            sys.stderr.flush()
        if self._holds:
            self._holds = False
            _terminal.release()

    def show(self, info: SandboxInfo) -> None:
        """Report the current phase of a pending sandbox."""
        if not self.wanted:
            return
        running = [phase.message for phase in info.phases.values() if phase.status == "running" and phase.message]
        message = _plain(running[-1]) if running else self._message or "starting a sandbox"
        phase = message.partition(" ")[0]
        if self._report is not None:
            if message != self._message:
                self._report(message)
        elif _is_terminal(sys.stderr):
            if self._phase and phase != self._phase:
                sys.stderr.write("\n")
            seconds = time.monotonic() - self._began
            sys.stderr.write(f"\r\033[K{self._what}: {message} ({seconds:.0f} s)")
            sys.stderr.flush()
        elif phase != self._phase:
            sys.stderr.write(f"{self._what}: {message}\n")
            sys.stderr.flush()
        self._phase, self._message = phase, message


def _plain(text: str) -> str:
    """The server's text on one line, without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)[:_LONGEST]


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is an open terminal; a program may have replaced or closed sys.stderr."""
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):
        return False
