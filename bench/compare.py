"""Two versions of the server on this machine, measured in turn: `python bench/compare.py main~5 .`

Each argument is a commit, or `.` for the working tree. Both servers run at the same time and are measured alternately
in short slices, so that a change of the machine's speed affects both. For each row it prints the medians, the ratio of
the second version to the first, and its 95 % confidence interval (bootstrap over the slices). Starts of a server and
memory are measured before that, with one server at a time. With `--check` it fails when a row is worse by more than
`--tolerance` with confidence. The client is that of the working tree.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hosted import cpu_of

from rock.cli.bench.floors import bare_server, serving
from rock.cli.bench.measuring import commands, cycles, first_commands, many_sessions, memory, used_memory
from rock.settings import child_environment

_ROOT = Path(__file__).resolve().parents[1]
_SAMPLES = 2000  # of the bootstrap
_IDLE = 12  # sandboxes whose memory is measured


@dataclass
class Row:
    """One measurement of both versions. more: higher values are better. slices: by version, the median of each."""

    name: str
    unit: str
    more: bool
    slices: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def ratio(self) -> tuple[float, float, float]:
        """The second version's median relative to the first one's, and the limits of its 95 % interval."""
        first, second = self.slices
        random_ = random.Random(len(first))
        drawn = sorted(median(random_.choices(second, k=len(second))) / median(random_.choices(first, k=len(first)))
                       for _ in range(_SAMPLES))  # fmt: skip
        return median(second) / median(first), drawn[int(_SAMPLES * 0.025)], drawn[int(_SAMPLES * 0.975)]

    def worse(self, tolerance: float) -> bool:
        """Whether the whole interval is on the wrong side of the tolerance."""
        _, low, high = self.ratio()
        return high < 1 - tolerance if self.more else low > 1 + tolerance


def installed(version: str, folder: Path) -> Path:
    """A folder with the installed package of a version: of the working tree, or of a commit."""
    tree = _ROOT
    if version != ".":
        tree = folder / "source"
        packed = subprocess.run(["git", "-C", str(_ROOT), "archive", version], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(tree, filter="data")
    target = folder / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(tree)],
                   check=True)  # fmt: skip
    return target


@contextlib.contextmanager
def running(path: Path, home: str) -> Iterator[tuple[str, int]]:
    """(URL, pid) of a server of that source."""
    environment = child_environment(ROCK_HOME=home, ROCK_POOL_SIZE="0") | {"PYTHONPATH": str(path)}
    found = subprocess.run([sys.executable, "-c", "import rock; print(rock.__path__[0])"], env=environment,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    if not found.startswith(str(path)):
        raise SystemExit(f"Python imports {found.strip()} instead of {path}; use an environment without another rock")
    words = ("-m", "rock.cli.server", "--host", "127.0.0.1", "--port", "0")
    with serving(home, *words, env=environment) as found_at:
        yield found_at


def starts(paths: tuple[Path, Path], homes: tuple[str, str], count: int) -> list[Row]:
    """A server's start on a home that it knows, its memory without sandboxes, and that of an idle sandbox."""
    rows = [Row("start until the server serves", "s", False), Row("its CPU", "s", False),
            Row("memory without sandboxes, PSS", "MB", False), Row("memory of an idle sandbox, PSS", "MB", False)]
    for number in range(count + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.monotonic()
            with running(paths[which], homes[which]) as (url, pid):
                values = [time.monotonic() - began, cpu_of(pid)]
                time.sleep(1.5)  # what it starts in the background
                values += [used_memory(pid) / 1e6, asyncio.run(memory(url, pid, _IDLE))[-1]]
            if number:  # the first is a warm-up
                for row, value in zip(rows, values, strict=True):
                    row.slices[which].append(value)
    return rows


async def measure(urls: tuple[str, str], slices: int, bare: str) -> list[Row]:
    rows = [Row("create to first command", "ms", False), Row("create + command + destroy, 8 at once", "1/s", True),
            Row("a command in a session", "ms", False), Row("commands per second, 32 sessions", "1/s", True)]
    for number in range(slices + 1):
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            url = urls[which]
            values = [median(await first_commands(url, 5, 0.02)), median(await cycles(url, 1, 8)),
                      median((await commands(url, bare, 100))[0]), median(await many_sessions(url, 1, 32))]  # fmt: skip
            if number:  # the first slice is a warm-up
                for row, value in zip(rows, values, strict=True):
                    row.slices[which].append(value)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default=".")
    parser.add_argument("--slices", type=int, default=12, help="slices of each version")
    parser.add_argument("--starts", type=int, default=6, help="starts of each version")
    parser.add_argument("--check", action="store_true", help="fail when a row is worse with confidence")
    parser.add_argument("--tolerance", type=float, default=0.1, help="part by which a row may be worse")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if min(given.slices, given.starts) < 3:
        parser.error("--slices, --starts: at least 3, for an interval")
    with contextlib.ExitStack() as stack:
        paths, homes = [], []
        for version in (given.base, given.head):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rock-compare-"))
            (home := Path(folder) / "home").mkdir()
            paths.append(installed(version, Path(folder)))
            homes.append(str(home))
        rows = starts((paths[0], paths[1]), (homes[0], homes[1]), given.starts)
        servers = [stack.enter_context(running(*each))[0] for each in zip(paths, homes, strict=True)]
        bare = stack.enter_context(bare_server())
        rows += asyncio.run(measure((servers[0], servers[1]), given.slices, bare))
    print(f"load {os.getloadavg()[0]:.1f}, {given.slices} slices, {given.starts} starts", file=sys.stderr)
    worse = []
    for row in rows:
        ratio, low, high = row.ratio()
        first, second = (median(values) for values in row.slices)
        if row.worse(given.tolerance):
            worse.append(row.name)
        if given.json:
            print(json.dumps({"name": row.name, "unit": row.unit, "base": first, "head": second, "ratio": ratio,
                              "low": low, "high": high}))  # fmt: skip
        else:
            print(f"{row.name:<40} {row.unit:>4} {first:9.2f} {second:9.2f}  "
                  f"ratio {ratio:.2f} ({low:.2f} to {high:.2f})")
    if worse:
        print(f"worse by more than {given.tolerance:.0%}: {', '.join(worse)}", file=sys.stderr)
    return int(given.check and bool(worse))


if __name__ == "__main__":
    sys.exit(main())
