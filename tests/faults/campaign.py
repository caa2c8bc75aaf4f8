"""`make faults`: many randomised runs of the fault suite, and what they found. `--seed` has the same ones again.

    python -m tests.faults.campaign --runs 1000 --kind process --seed 7
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.branches import BranchMachine
from tests.faults.machine import FaultMachine
from tests.faults.world import KINDS, World

COUNTED = ("histories", "concurrent operations", "unknown outcomes", "stops", "failovers", "damaged files")
_stopped: list[int] = []


def _stop(number: int, _: object) -> None:
    _stopped.append(number)
    raise KeyboardInterrupt


def campaign(
    kind: str, runs: int, steps: int, number: int, folder: Path, minutes: float = 1e9, longest: float = 30.0,
    first: int = 0,
) -> Counter[str]:
    """Counts of what was done; "problems" is how many runs broke an invariant, each of which is printed.

    longest: seconds that a server is away at most."""
    counts: Counter[str] = Counter(runs=first) if first else Counter()
    options = settings(
        stateful_step_count=steps, deadline=None, database=None, verbosity=Verbosity.quiet,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    end = time.monotonic() + minutes * 60
    base = BranchMachine if kind == "branches" else FaultMachine
    machine = type(base.__name__, (base,), {"counts": counts, "longest": longest})
    with_world = 0
    while counts["runs"] < runs and time.monotonic() < end:
        with_world += 1
        machine.world = World(kind, folder / f"{kind}{with_world}")
        try:
            while counts["runs"] < runs and time.monotonic() < end:
                batch = min(25, runs - counts["runs"])
                test = seed(number * 1_000_003 + counts["runs"])(machine)
                run_state_machine_as_test(test, settings=settings(options, max_examples=batch))
                print(f"{kind}: {counts['runs']} runs, {counts['kills']} kills", flush=True)
        except BaseException as error:
            if _stopped or isinstance(error, KeyboardInterrupt):
                break
            counts["problems"] += 1
            print(f"--- problem {counts['problems']}, run {counts['runs']} ---", flush=True)
            traceback.print_exc(limit=-4)
            print(*getattr(error, "__notes__", []), sep="\n")
            print(machine.world.server.log()[-3000:], flush=True)
        finally:
            print(f"{kind}: {counts['runs']} runs, {counts['kills']} kills, {counts['problems']} problems", flush=True)
            try:
                machine.world.close()
            except Exception as error:
                print(f"the world did not close: {error!r}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--first", type=int, default=0, help="begin at this run of the seed, a multiple of 25")
    parser.add_argument("--kind", choices=KINDS, default="process")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    signal.signal(signal.SIGTERM, _stop)  # so that no server is left behind
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rock-faults-") as folder:
        counts = campaign(given.kind, given.runs, given.steps, given.seed, Path(folder), given.minutes,
                          first=given.first)
    print(f"{given.kind}: {counts['runs']} runs, {counts['steps']} steps, {counts['requests']} requests, "
          f"{counts['kills']} kills, {counts['problems']} problems, {time.monotonic() - began:.0f} s")
    print({name: counts[name] for name in COUNTED if counts[name]})
    print({name: count for name, count in sorted(counts.items()) if name.startswith(("rule ", "branch "))})
    return 1 if counts["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
