"""Running the attempts at every level that this machine has, and the table of what came of it.

`python -m tests.escape.levels` runs them and writes the table into docs/security.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rock.runtime.namespace.limits import cgroups, devices
from tests import unprivileged
from tests.escape import gvisor
from tests.escape.catalogue import ATTEMPTS

LEVELS = ("none", "landlock", "userns", "namespaces", "gvisor")
TITLES = {"none": "`none` (control)", "landlock": "`landlock`", "userns": "`userns`", "namespaces": "`namespaces`",
          "gvisor": "`gvisor`"}
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- attempts: made by `make escape-table` -->", "<!-- end of the attempts -->"
_SIGNS = {"blocked": "blocked", "inside": "inside", "open": "OPEN", "absent": "-", "skipped": ""}


Change = Callable[[Path], None]


class RunnerFailed(RuntimeError):
    """The runner ended without a result."""


@contextlib.contextmanager
def _place(as_user: bool, change: Change | None) -> Iterator[tuple[list[str], dict[str, Any], Path, Path]]:
    """The interpreter, the options of its process, a folder, and the package under test; as root or as an ordinary
    user. change: made in a copy of the package."""
    if not as_user:
        with tempfile.TemporaryDirectory(prefix="rock-escape-") as top:
            os.chmod(top, 0o755)
            folder = Path(top) / "home"
            folder.mkdir(mode=0o755)
            package, environment = unprivileged.ROOT / "src" / "rock", dict(os.environ)
            if change is not None:
                package = Path(top) / "src" / "rock"
                shutil.copytree(unprivileged.ROOT / "src" / "rock", package,
                                ignore=shutil.ignore_patterns("__pycache__"))
                change(package)
                environment["PYTHONPATH"] = str(package.parent)
            try:
                yield [sys.executable], {"cwd": unprivileged.ROOT, "env": environment}, folder, package
            finally:
                if change is not None:
                    _remove_groups(folder / "run")
        return
    python = unprivileged.interpreter()
    if python is None:
        raise RuntimeError("no interpreter of this version that an ordinary user can run")
    with unprivileged.checkout() as checkout:
        if change is not None:
            change(checkout.path / "src" / "rock")
        folder = checkout.home / "escape"
        folder.mkdir()
        os.chown(folder, checkout.user, checkout.user)
        yield [python], {"cwd": checkout.path, "env": checkout.environment, **checkout.identity}, folder, \
            checkout.path / "src" / "rock"


def _remove_groups(run_dir: Path) -> None:
    """What a runtime without one of its walls left."""
    found = cgroups.discover(str(run_dir))
    cgroups.remove([str(path) for place in found.places.values() for path in Path(place.parent).glob("[ng]-*")])
    cgroups.remove_parents(found)
    devices.remove_shared(str(run_dir))


# A host of its own, so that a runtime without a namespace changes nothing of this machine: names, settings, processes.
_APART = ("unshare", "--fork", "--kill-child", "--pid", "--mount", "--mount-proc", "--uts", "--ipc", "--net")


def run_level(level: str, patterns: Sequence[str] = (), *, change: Change | None = None) -> dict[str, Any]:
    """What the runner told; {"unsupported": why} where this machine has no such level.

    patterns: parts of names of the attempts to run; none is all. change: of the package under test, in a copy of it.
    RunnerFailed.
    """
    root = os.geteuid() == 0
    if not root and level != "userns":
        return {"level": level, "unsupported": "it takes root"}
    with _place(root and level == "userns", change) as (python, options, folder, package):
        if change is not None and root and level != "userns":
            python = [*_APART, *python]
        done = subprocess.run([*python, "-m", "tests.escape.runner", level, str(folder), *patterns],
                              capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL, check=False,
                              **options)
        if done.returncode:
            raise RunnerFailed(f"the runner at level {level} failed:\n{done.stderr[-3000:]}")
        told: dict[str, Any] = json.loads(done.stdout)
        if "source" in told and os.path.realpath(told["source"]) != os.path.realpath(package):
            raise RuntimeError(f"the runner used {told['source']} in place of {package}")
    return told


def run_levels(levels: Sequence[str] = LEVELS) -> dict[str, dict[str, Any]]:
    """These levels, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(levels, pool.map(run_level, levels), strict=True))


def reasons() -> list[str]:
    """What is known to be open, done inside, or not there, and why."""
    lines: dict[str, list[str]] = {}
    for attempt in ATTEMPTS:
        for known in (attempt.open_at, attempt.absent):
            for level, why in known.items():
                lines.setdefault(f"{level}: {why}", []).append(attempt.name)
    for known in (gvisor.INSIDE, gvisor.ABSENT):
        for key, why in known.items():
            lines.setdefault(f"gvisor: {why}", []).append(key.partition(": ")[2])
    return [f"- `{head.partition(':')[0]}`{head.partition(':')[1]}{head.partition(':')[2]} ({'; '.join(names)})"
            for head, names in sorted(lines.items())]


def table(told: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| attempt | " + " | ".join(TITLES[level] for level in LEVELS) + " |", "|---|" + "---|" * len(LEVELS)]
    for attempt in ATTEMPTS:
        words = []
        for level in LEVELS:
            word, _ = told[level].get("results", {}).get(attempt.key, ["skipped", ""])
            words.append(_SIGNS[word] if not (level == "none" and word == "open") else "open")
        lines.append(f"| {attempt.key} | {' | '.join(words)} |")
    return "\n".join(lines)


def rows(page: str) -> dict[str, list[str]]:
    """The table of a page: words by attempt."""
    part = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("|") for line in part.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in found[1:]}


def main() -> None:
    told = run_levels()
    for level, one in told.items():
        if "unsupported" in one:
            sys.exit(f"level {level} is not to be had here: {one['unsupported']}; the page stays as it is")
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    machine = f"Linux {os.uname().release.split('-')[0]}, {os.uname().machine}"
    known = "\n".join(reasons())
    PAGE.write_text(f"{head}{BEGIN}\n\nMade on {machine}; {len(ATTEMPTS)} attempts.\n\n{table(told)}\n\n"
                    f"Known to be open, done inside, or not there:\n\n{known}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
