"""Run the test groups of `make test`: announce, run side by side, retry a few failures alone, clean up, sum up.

    python tools/run_tests.py [--groups FILE.json] [--record FILE] [--quiet SECONDS] [pytest options ...]

- Lines of a group are printed as they come, with its name; tests/conftest.py prints each failure when it happens.
- Up to MOST tests that failed beside others run once more, alone. A test that passes only alone has a race; the record
  (in ROCK_TEST_CACHE) counts how many runs in a row needed that, and the third in a row fails the run.
- A group without output for --quiet seconds hangs. Its processes and their stacks are printed, they are killed, and the
  whole group runs once more, alone; that counts as a retry too.
- Ctrl-C and SIGTERM end the groups; what servers of the tests left behind (sandboxes, mounts, cgroups) is removed by
  starting each of them once more and stopping it with everything that it has.
- The last line has the totals: "N passed, N failed, N skipped".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST = 8  # failures of a run that are tried again
IN_A_ROW = 3  # runs in which a test needed a retry, after which it fails
QUIET = 1000.0  # seconds: a test fails after 900
_FAILED = 1  # pytest's exit status where tests failed, and nothing else was wrong
_NO_TESTS = 5
_GRACE = 60.0  # seconds for pytest to run its teardowns after an interrupt
_MINUTES = 18  # of the whole suite on two idle cores
_SLOWEST = ("--durations=15", "--durations-min=10")
_TOTALS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)\b")

# Lanes run side by side, the groups of one after each other. The runtimes' own tests count the descriptors and children
# of their process, and a container engine is a child of its group, so each has a process of its own.
LANES: list[list[dict[str, object]]] = [
    [
        {"name": "runtimes", "words": ["tests/runtime", "tests/rocklet", "--ignore=tests/runtime/docker"],
         "environment": {"ROCK_TEST_CONFORM": "fake,namespace,process"}},
        {"name": "docker", "words": ["tests/runtime/docker", "tests/runtime/conformance"],
         "environment": {"ROCK_TEST_CONFORM": "docker"}},
    ],
    [
        {"name": "others",
         "words": ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder", "--ignore=tests/runtime",
                   "--ignore=tests/rocklet"]},
    ],
]  # fmt: skip


@dataclass
class Group:
    """Tests that one pytest runs. `words`: its arguments; `failed`: ids of tests that failed."""

    name: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    status: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    hung: bool = False


class Run:
    """quiet: seconds without output after which a group hangs. more: options for every group."""

    def __init__(self, lanes: list[list[Group]], record: Path, quiet: float, more: list[str]) -> None:
        self._lanes = lanes
        self._quiet = quiet
        self._groups = [group for lane in lanes for group in lane]
        self._record = record
        self._more = more
        self._base = Path(tempfile.mkdtemp(prefix="rock-tests-"))
        self._interrupted = threading.Event()

    def run(self) -> int:
        """Run everything; returns the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._interrupted.set())
        _announce()
        began = time.monotonic()
        try:
            lanes = [threading.Thread(target=self._lane, args=(lane,)) for lane in self._lanes]
            for lane in lanes:
                lane.start()
            self._wait(lanes)
            status = self._interrupt(lanes) if self._interrupted.is_set() else self._judge()
        finally:
            clean_up(self._base, ended=not self._interrupted.is_set() and not any(one.hung for one in self._groups))
        took = time.monotonic() - began
        print(f"took {int(took // 60)} min {int(took % 60)} s, load {os.getloadavg()[0]:.1f}")
        totals = {name: sum(group.totals.get(name, 0) for group in self._groups) for name in ("passed", "skipped")}
        failed = sum(len(group.failed) for group in self._groups)
        print(f"{totals['passed']} passed, {failed} failed, {totals['skipped']} skipped", flush=True)
        return status

    # ---- running

    def _lane(self, lane: list[Group]) -> None:
        for group in lane:
            if not self._interrupted.is_set():
                self._pytest(group, group.words)

    def _wait(self, threads: list[threading.Thread]) -> None:
        while not self._interrupted.is_set() and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2)

    def _pytest(self, group: Group, words: list[str]) -> None:
        cache = Path(".pytest_cache") / group.name
        noted = cache / "v/cache/lastfailed"
        noted.unlink(missing_ok=True)
        folder = self._base / group.name
        command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", f"--basetemp={folder}", *_SLOWEST,
                   *self._more, *words]  # fmt: skip
        environment = {**os.environ, **group.environment, "PYTHONUNBUFFERED": "1", "ROCK_TEST_INSTANT": "1"}
        # A session of its own: a Ctrl-C of the terminal reaches it through us alone, and once.
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, start_new_session=True) as group.process:  # fmt: skip
            last = ""
            for line in self._lines(group, group.process):
                print(f"{group.name}| {line}", flush=True)
                last = line if " in " in line and _TOTALS.search(line) else last
        group.status = group.process.returncode
        group.totals = {name.rstrip("s"): int(count) for count, name in _TOTALS.findall(last)}
        failures = noted.exists() and group.status == _FAILED
        group.failed = list(json.loads(noted.read_text())) if failures else []

    def _lines(self, group: Group, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """Its output, until it ended; processes that it leaves may hold the pipe for longer. A group that hangs is
        killed."""
        assert process.stdout is not None
        rest, heard = b"", time.monotonic()
        while True:
            ended = process.poll() is not None
            if select.select([process.stdout], [], [], 0.0 if ended else 1.0)[0]:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
                heard = time.monotonic()
            elif ended:
                break
            elif time.monotonic() - heard > self._quiet:
                yield f"HANGS: no output for {self._quiet:.0f} s; the processes and their stacks:"
                group.hung = True
                yield from _kill_all(process)
                heard = time.monotonic()
        if rest:
            yield rest.decode(errors="replace")

    def _interrupt(self, lanes: list[threading.Thread]) -> int:
        print("interrupted: ending the tests and removing what they started ...", flush=True)
        running = [group.process for group in self._groups if group.process and group.process.poll() is None]
        for process in running:
            _signal(process, signal.SIGINT)
        end = time.monotonic() + _GRACE
        for process in running:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            _signal(process, signal.SIGKILL)
        for lane in lanes:
            lane.join(10)
        return 130

    # ---- judging

    def _judge(self) -> int:
        hung = [group for group in self._groups if group.hung]
        for group in hung:
            print(f"once more, alone: the group {group.name}", flush=True)
            group.hung = False
            self._pytest(group, group.words)
        failed = [(group, test) for group in self._groups for test in group.failed]
        if 0 < len(failed) <= MOST:
            self._again(failed)
        needed = {test for _, test in failed} if len(failed) <= MOST else set()
        needed |= {f"the group {group.name}" for group in hung}
        repeated = _noted(self._record, needed - {test for group in self._groups for test in group.failed})
        for test, runs in repeated.items():
            print(f"NEEDED A RETRY IN {runs} RUNS IN A ROW, which counts as a failure: {test}")
        broken = [group for group in self._groups if group.status not in (0, _FAILED, _NO_TESTS)]
        for group in broken:
            print(f"the group {group.name} ended with pytest's status {group.status}")
        return int(bool(broken or repeated or any(group.failed for group in self._groups)))

    def _again(self, failed: list[tuple[Group, str]]) -> None:
        """Run them one after the other, with nothing of this run beside them."""
        for group, test in failed:
            first, ended = dict(group.totals), group.failed
            print(f"once more, alone: {test}", flush=True)
            self._pytest(group, [test])
            passed = group.status == 0
            print(f"{'PASSED ONLY ALONE' if passed else 'FAILED TWICE'} {test}", flush=True)
            first["passed"] = first.get("passed", 0) + int(passed)
            group.totals = first
            group.failed = [other for other in ended if other != test or not passed]
        for group, _ in failed:
            group.status = _FAILED if group.failed else 0


def _announce() -> None:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    minutes = _MINUTES * max(1.0, 2 / cores) * max(1.0, (load + 2) / max(cores, 2))
    print(f"the whole suite takes about {minutes:.0f} minutes here ({cores} cores, load {load:.1f}); "
          "failures are printed when they happen", flush=True)  # fmt: skip


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _kill_all(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Have a pytest and its workers print their stacks, and kill them and what they started; a line for each."""
    found = [process.pid, *_descendants(process.pid)]
    for pid in found:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield f"  {pid} {state} {Path(f'/proc/{pid}/wchan').read_text()} {words[:200]}"
            if pid == process.pid or "exec(eval(" in words:  # pytest, or a worker of xdist
                os.kill(pid, signal.SIGABRT)
    time.sleep(5)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in entry.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _noted(record: Path, needed: set[str]) -> dict[str, int]:
    """Count the tests that needed a retry in this run; returns those that did in IN_A_ROW runs in a row."""
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        before = {}
    counts = {test: int(before.get(test, 0)) + 1 for test in sorted(needed)}
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(counts, indent=1))
    return {test: runs for test, runs in counts.items() if runs >= IN_A_ROW}


# ---- cleaning up


def clean_up(base: Path, *, ended: bool) -> None:
    """Remove the folder of the tests. ended: they ran to their end, and removed what they had started; else servers
    below `base` and their sandboxes are stopped first."""
    if not ended:
        for home in sorted(set(_homes(base))):
            print(f"removing what a server left in {home.relative_to(base)}", flush=True)
            _end_server(home)
    if f" {base}/" in Path("/proc/self/mountinfo").read_text():
        print(f"{base} stays: something is mounted below it")
        return
    shutil.rmtree(base, ignore_errors=True)


def _homes(base: Path) -> Iterator[Path]:
    """Homes of servers that run, or that left sandboxes."""
    for note in base.glob("**/server.json"):
        yield note.parent
    for folder in base.glob("**/run/*"):
        if folder.name in ("records", "namespace", "process", "landlock") and any(folder.iterdir()):
            yield folder.parent.parent


def _end_server(home: Path) -> None:
    """Stop what runs there; a server that was killed is started once more, and finds and removes its sandboxes."""
    environment = {**os.environ, "ROCK_HOME": str(home), "ROCK_POOL_SIZE": "0"}
    environment.pop("ROCK_FAULTS", None)
    rock = [sys.executable, "-m", "rock.cli.main", "admin"]
    for words in (["stop"], ["start", "--port", "0"], ["stop"]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*rock, *words], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, timeout=120, check=False)  # fmt: skip


def main() -> int:
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=Path, help="lanes of groups as JSON, in place of the built-in ones")
    parser.add_argument("--quiet", type=float, default=QUIET, help="seconds without output of a group that hangs")
    parser.add_argument("--record", type=Path, default=cache / "retries.json", help="where retries are counted")
    asked, more = parser.parse_known_args()
    lanes = json.loads(asked.groups.read_text()) if asked.groups else LANES
    groups = [[Group(**group) for group in lane] for lane in lanes]
    return Run(groups, asked.record, asked.quiet, more).run()


if __name__ == "__main__":
    sys.exit(main())
