"""Output of the commands: tables or JSON on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rock.errors import InvalidConfig, RockError

_FRAMES = "|/-\\"
_DELAY = 0.3  # seconds before a spinner appears
_CLEAR = "\r\x1b[K"
_SHORT = 12  # digits of a shortened id


# ---- tables


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "", *, whole: bool = False) -> None:
    """Print a table; `empty` instead, to the standard error, when there are no rows.

    On a terminal each row is one line: the widest columns, but the first, are cut. whole: nothing is cut.
    """
    if not rows and empty:
        print(empty, file=sys.stderr)
        return
    terminal = sys.stdout.isatty()
    width = None if whole or not terminal else shutil.get_terminal_size().columns
    for number, line in enumerate(lines_of(columns, rows, width)):
        print(f"\x1b[1m{line}\x1b[0m" if terminal and not number and line else line)


def lines_of(columns: Sequence[str], rows: Sequence[Sequence[object]], width: int | None) -> list[str]:
    """The lines of a table, the header first (none without column names), of at most `width` characters."""
    cells = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len_of(row[number]) for row in cells) for number in range(len(columns))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(range(1, len(widths)), key=lambda number: widths[number], default=0)
        if widths[widest] <= 6:
            break
        widths[widest] -= 1
    lines = []
    for row in cells if any(columns) else cells[1:]:
        parts = [_cut(cell, room) for cell, room in zip(row, widths, strict=True)]
        lines.append("  ".join(part + " " * (room - len_of(part))
                               for part, room in zip(parts, widths, strict=True)).rstrip())  # fmt: skip
    return lines


def printable(value: object) -> str:
    """A value as text without control characters, which could come from a sandbox and command the terminal."""
    text = "" if value is None else str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else " " if c == "\n" else "?" for c in text)


def len_of(text: str) -> int:
    """Columns of a text on a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str, room: int) -> str:
    if len_of(text) <= room:
        return text
    while len_of(text) > room - 1:
        text = text[:-1]
    return text + "…"


# ---- values


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def size(count: float | None) -> str:
    """Format bytes: 1.5G."""
    if count is None:
        return ""
    for unit in ("B", "K", "M", "G"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def age(since: float | None, until: float | None = None) -> str:
    """Format a duration: 42s, 7m, 3h, 12d."""
    if not since:
        return ""
    seconds = max(0.0, (until or time.time()) - since)
    for limit, unit, length in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def short(sandbox_id: str) -> str:
    """An id as tables show it: 12 digits of a generated one, and an id of the user's choice as it is."""
    return sandbox_id[:_SHORT] if re.fullmatch(r"[0-9a-f]{16,}", sandbox_id) else sandbox_id


def rendered(template: str, fields: dict[str, Any]) -> str:
    r"""A template with Docker's placeholders, like "{{.ID}}\t{{.Image}}" or "{{json .}}". InvalidConfig."""
    known = {re.sub(r"[^a-z0-9]", "", name.lower()): value for name, value in fields.items()}

    def value_of(match: re.Match[str]) -> str:
        as_is, name = match[1], match[2]
        if not name:
            return json.dumps(fields, default=str)
        key = re.sub(r"[^a-z0-9]", "", name.lower())
        if key not in known:
            raise InvalidConfig(f"the template has an unknown field .{name}", hint=f"fields: {', '.join(fields)}")
        value = known[key]
        if as_is or isinstance(value, dict | list):
            return json.dumps(value, default=str)
        return printable(value)

    text = template.replace("\\t", "\t").replace("\\n", "\n")
    return re.sub(r"\{\{\s*(json\s+)?\.(\w*)\s*\}\}", value_of, text)


# ---- progress, on a terminal only


class _Status:
    """One line on the standard error that a thread redraws until `close`. text: a function for the current text."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._end = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._draw, name="rock-progress", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        if self._end.wait(_DELAY):
            return
        number = 0
        while True:
            seconds = time.monotonic() - self._began
            line = f"{_FRAMES[number % len(_FRAMES)]} {printable(self._text())}  {seconds:.0f}s"
            sys.stderr.write(_CLEAR + _cut(line, shutil.get_terminal_size().columns - 1))
            sys.stderr.flush()
            number += 1
            if self._end.wait(0.1):
                sys.stderr.write(_CLEAR)
                sys.stderr.flush()
                return

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@contextlib.contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; the returned function changes its text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    current = [what]
    status = _Status(lambda: current[0])
    try:
        yield lambda text: current.__setitem__(0, text)
    finally:
        status.close()


@contextlib.contextmanager
def transfer(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """The progress of a transfer on a terminal; the returned function advances it by bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    done = [0]
    began = time.monotonic()

    def text() -> str:
        rate = size(done[0] / max(0.001, time.monotonic() - began))
        part = f"{size(done[0])}/{size(total)} {min(100, 100 * done[0] // total)}%" if total else size(done[0])
        return f"{what}  {part}  {rate}/s"

    status = _Status(text)
    try:
        yield lambda count: done.__setitem__(0, done[0] + count)
    finally:
        status.close()


# ---- errors


def fail(error: RockError) -> int:
    """Print an error in one line, with the hint; returns the exit code."""
    return complain(error.message or type(error).__name__, error.hint)


def for_each(names: Sequence[str], work: Callable[[str], object], progress: str = "") -> int:
    """Call a function for each name, and print the name or the error; returns the exit code. progress: the text of a
    spinner before the name, as "deleting the volume"."""
    failed = 0
    for name in names:
        try:
            with busy(f"{progress} {name}") if progress else contextlib.nullcontext():
                work(name)
            print(name)
        except RockError as error:
            failed = fail(error)
    return failed


def status_of(work: Callable[[], object]) -> int:
    """Run a function; returns the exit code, after printing an error."""
    try:
        work()
    except RockError as error:
        return fail(error)
    except ValueError as error:
        return fail(InvalidConfig(str(error), hint="correct the setting; docs/reference lists all of them"))
    return 0


def complain(message: str, hint: str | None = None) -> int:
    for label, text in (("error", message), ("hint", hint)):
        if text:
            shown = "\n".join(printable(line) for line in text.split("\n"))
            print(f"{label}: {shown}", file=sys.stderr)
    return 1
