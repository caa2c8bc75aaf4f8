"""Output of the commands: tables or JSON on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rock.errors import RockError


@dataclass
class Options:
    """The global options, before the command."""

    base_url: str | None = None
    api_key: str | None = None
    verbose: bool = False


OPTIONS = Options()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "") -> None:
    """Print a table; `empty` instead, to the standard error, when there are no rows."""
    from rich.console import Console
    from rich.table import Table

    if not rows and empty:
        print(empty, file=sys.stderr)
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        drawn.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    terminal = sys.stdout.isatty()
    console = Console(markup=False, emoji=False, highlight=False, width=None if terminal else 10_000)
    if terminal:
        console.print(drawn)
        return
    with console.capture() as text:  # a pipe gets complete lines without trailing blanks
        console.print(drawn)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


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


@contextlib.contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; the returned function changes its text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda text: status.update(text)


@contextlib.contextmanager
def transfer(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes on a terminal; the returned function advances it."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def fail(error: RockError) -> int:
    """Print an error in one line, with the hint; returns the exit status."""
    return complain(error.message or type(error).__name__, error.hint)


def status_of(work: Callable[[], object]) -> int:
    """Run a function; returns the exit status, after printing an error."""
    from rock.errors import InvalidConfig, RockError

    try:
        work()
    except RockError as error:
        return fail(error)
    except ValueError as error:
        return fail(InvalidConfig(str(error)))
    return 0


def complain(message: str, hint: str | None = None) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return 1
