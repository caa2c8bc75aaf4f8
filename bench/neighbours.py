"""What a sandbox notices of a bad neighbour: `python bench/neighbours.py [ROUNDS]`.

Against one server: the time of a command in a session of sandbox A, alone, and while sandbox B does each kind of harm.
Prints milliseconds, minimum / median / 95th percentile, and how many times the median alone that is. The CPU limit of
both is 1 of the machine's, so that B takes no more than its share; rounds are taken in turn, alone and beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cycles import IMAGE, serving

from rock.errors import RockError
from rock.sync import Sandbox, SandboxConfig

HARM = {
    "CPU hog, 8 threads": "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait",
    "fork bomb": "bomb() { bomb | bomb & }; bomb; sleep 1000",
    "memory bomb, again and again":
        "while :; do python3 -c 'x = bytearray(2 << 30)'; sleep 0.1; done",
    "disk filled, again and again": "while :; do head -c 900m /dev/zero > /tmp/big; rm -f /tmp/big; done",
    "inodes filled, again and again":
        "while :; do mkdir /tmp/many; (cd /tmp/many; for i in $(seq 20000); do : > $i; done); rm -rf /tmp/many; done",
    "flood of output": "while :; do echo yes yes yes yes yes yes yes yes yes yes yes yes; done",
    "a line without end": "exec cat /dev/zero",
}
CONFIG = {"image": IMAGE, "memory": "256m", "cpus": 1.0, "pids": 200}


def latencies(sandbox: Sandbox, count: int) -> list[float]:
    """Seconds of `count` commands in the default session."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        if sandbox.arun("echo hi").output.strip() != "hi":
            raise SystemExit("the victim answers wrongly")
        found.append(time.perf_counter() - started)
    return found


@contextmanager
def harm(url: str, script: str, *, disk: bool) -> Iterator[Sandbox]:
    """A sandbox in which this runs."""
    limit = {"disk": "512m"} if disk else {}
    with Sandbox(SandboxConfig(base_url=url, **CONFIG, **limit)) as bad:
        bad.processes.start(script)
        time.sleep(0.5)
        yield bad


def figures(seconds: list[float]) -> str:
    ordered = sorted(value * 1000 for value in seconds)
    return f"{ordered[0]:.2f} / {statistics.median(ordered):.2f} / {ordered[int(len(ordered) * 0.95)]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    spec = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rock-neighbours-") as folder, serving(Path(folder), 0) as (_, url):
        with Sandbox(SandboxConfig(base_url=url, **CONFIG)) as victim:
            latencies(victim, 20)
            print("| beside | ms alone: min / p50 / p95 | ms beside | times the median |\n|---|---|---|---|")
            for name, script in HARM.items():
                alone: list[float] = []
                beside: list[float] = []
                for _ in range(spec.rounds):
                    alone += latencies(victim, 40)
                    with suppress(RockError), harm(url, script, disk="filled" in name):
                        beside += latencies(victim, 40)
                ratio = statistics.median(beside) / statistics.median(alone)
                print(f"| {name} | {figures(alone)} | {figures(beside)} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
