"""The progress of a job: JSON lines, a live table on a terminal, or a line for each event."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from typing import Any

from rock.cli.output import lines_of

_ROWS = 12  # running trials in the table
_EVERY = 0.25  # seconds between two drawings


class Progress:
    """Shows events of a runner. jsonl: on standard output; the others use standard error."""

    def __init__(self, jsonl: bool) -> None:
        self._jsonl = jsonl
        self._live = not jsonl and sys.stderr.isatty()
        self._running: dict[str, float] = {}
        self._counts = {"completed": 0, "passed": 0, "failed": 0, "total": 0}
        self._lines = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._drawer: threading.Thread | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self._live and self._drawer is None:
            self._drawer = threading.Thread(target=self._redraw, name="job progress", daemon=True)
            self._drawer.start()
        with self._lock:
            self._show(event)

    def _redraw(self) -> None:
        while not self._ended.wait(_EVERY):
            with self._lock:
                self._draw()

    def _show(self, event: dict[str, Any]) -> None:
        if self._jsonl:
            print(json.dumps({**event, "time": time.time()}), flush=True)
            return
        kind, name = event["event"], str(event.get("job_name", ""))
        if kind == "run_started":
            self._counts["total"] = event["total"]
            self._counts["completed"] = event["total"] - event["pending"]
            self._print(f"job {event['run_id']}: {event['pending']} of {event['total']} trials to run")
        elif kind == "job_started":
            self._running[name] = time.monotonic()
        elif kind in ("job_done", "job_retried"):
            began = self._running.pop(name, time.monotonic())
            self._print(_line(event, time.monotonic() - began))
        elif kind == "progress":
            self._counts = {key: event[key] for key in self._counts}
        elif kind == "job_recovered":
            self._print(f"{name}: taken over from another runner")

    def end(self) -> None:
        """Remove the table."""
        self._ended.set()
        if self._drawer is not None:
            self._drawer.join()
        self._clear()

    def _print(self, text: str) -> None:
        self._clear()
        printable = lines_of([""], [[text]], None)[0]
        print(printable, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._lines:
            sys.stderr.write(f"\x1b[{self._lines}A\x1b[J")
            self._lines = 0

    def _draw(self) -> None:
        self._clear()
        now = time.monotonic()
        rows = [[name, f"{now - began:.0f}s"] for name, began in list(self._running.items())[:_ROWS]]
        width = shutil.get_terminal_size().columns
        counts = self._counts
        head = (f"{counts['completed']}/{counts['total']} trials, {counts['passed']} passed, "
                f"{counts['failed']} failed, {len(self._running)} running")
        lines = [head[:width], *lines_of(["TRIAL", "TIME"], rows, width)]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        self._lines = len(lines)


def _line(event: dict[str, Any], seconds: float) -> str:
    if event["event"] == "job_retried":
        return f"{event['job_name']}: try {event['tries']} failed, again in {event['delay']:.0f}s: {event['error']}"
    score = event.get("score")
    reward = "no reward" if score is None else f"reward {score:g}"
    error = f" ({event['error']})" if event.get("error") else ""
    return f"{event['job_name']}: {event['status']}, {reward}, {seconds:.1f}s{error}"
