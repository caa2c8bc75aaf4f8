"""`rock bench --profile ROW`: which part of the system an operation spends its CPU time in.

Two servers, one after the other. The first is measured by the kernel: user and kernel time of the client, the server,
the launcher with its zygote, and the processes of sandboxes. The second runs under cProfile, as does the client; its
shares divide the user time of the first, since a profiler slows small functions more than large ones.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import pstats
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from rock.cli.bench.floors import serving
from rock.cli.bench.measuring import config_for
from rock.sdk.client import Client
from rock.sdk.sandbox.client import Sandbox
from rock.settings import child_environment

Times = dict[tuple[str, str], float]  # seconds of CPU by (process, "user" or "kernel")
Work = Callable[[], Awaitable[None]]

_WARM = 5  # operations before the measured ones
_AFTER = 0.3  # seconds for what follows the last response

# The first SIGUSR2 starts the profiler, the second one writes its result.
_SERVER = """
import cProfile, signal, sys, time
from rock.cli.server import main
profile, file = cProfile.Profile(time.process_time), sys.argv.pop(1)

def begin(*_):
    signal.signal(signal.SIGUSR2, end)
    profile.enable()

def end(*_):
    profile.disable()
    profile.dump_stats(file)

signal.signal(signal.SIGUSR2, begin)
main()
"""
# The part of a file is the first of these that its path contains.
_PARTS = (
    ("/rock/sdk/", "SDK"), ("/rock/sync/", "SDK"),
    ("/rock/http/", "HTTP and queueing"), ("/uvicorn/", "HTTP and queueing"),
    ("/rock/telemetry/", "telemetry"), ("/rock/admin/", "admin"), ("/rock/scheduler/", "admin"),
    ("/rock/store/", "store"), ("/sqlite3/", "store"), ("/rock/proxy/", "proxy"), ("/rock/rocklet/", "rocklet"),
    ("/rock/runtime/", "runtime"), ("/rock/guest/", "runtime"), ("/rock/host/", "runtime"), ("/rock/images/", "images"),
    ("/rock/protocol/", "messages"), ("/pydantic", "messages"), ("/json/", "messages"),
    ("/asyncio/", "event loop"), ("/selectors.py", "event loop"),
)  # fmt: skip
_OTHER = "Python"
_TICKS = os.sysconf("SC_CLK_TCK")


async def _cycle(url: str) -> None:
    async with Sandbox(config_for(url)) as sandbox:
        await sandbox.arun("true")


class _Prepared:
    """Operations in one sandbox that exists before the measurement."""

    def __init__(self, url: str) -> None:
        self.sandbox = Sandbox(config_for(url))
        self.client = Client(url)

    async def command(self) -> None:
        await self.sandbox.arun("echo hi")

    async def checkpoint(self) -> None:
        snapshot = await self.sandbox.checkpoint(memory="session")
        await self.client.delete_snapshot(snapshot.snapshot_id)

    async def fork(self) -> None:
        [child] = await self.sandbox.fork(1, memory="session")
        await child.arun("true")
        await child.stop()


# Name: (size of the warm pool, times of the operation, milliseconds between two of them, operation).
ROWS: dict[str, tuple[int, int, int, str]] = {
    "create": (0, 60, 20, "create, first command and stop, without pool"),
    "pool": (4, 60, 150, "the same from the warm pool; its refill is included"),
    "command": (0, 3000, 0, "a command in a session"),
    "checkpoint": (0, 60, 0, "a checkpoint of files and shell, and its removal"),
    "fork": (0, 40, 20, "a child of such a checkpoint, its first command and its stop"),
}


async def _repeat(url: str, row: str, count: int, around: Callable[[Work], Awaitable[None]]) -> None:
    """Run the operation of a row `count` times inside `around`, after a few that warm up."""
    _, _, pause, _ = ROWS[row]

    async def again(work: Work, times: int) -> None:
        for _ in range(times):
            await work()
            if pause:
                await asyncio.sleep(pause / 1000)

    if row in ("create", "pool"):
        await again(lambda: _cycle(url), _WARM)
        await around(lambda: again(lambda: _cycle(url), count))
        return
    prepared = _Prepared(url)
    async with prepared.sandbox:
        await prepared.sandbox.arun("true")
        work = getattr(prepared, row)
        await again(work, _WARM)
        await around(lambda: again(work, count))


# ---- by process ----


def _times_of(server: int) -> Times:
    """CPU seconds of this process, a server and what it started, by process. Processes that ended count with the one
    that waited for them."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    found: Times = defaultdict(float)
    found["client", "user"], found["client", "kernel"] = own.ru_utime, own.ru_stime
    pending = [(server, "server")]
    while pending:
        pid, name = pending.pop()
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = [int(field) / _TICKS for field in stat.rpartition(")")[2].split()[11:15]]
        found[name, "user"] += fields[0]
        found[name, "kernel"] += fields[1]
        ended = "sandboxes" if name != "server" else "launcher"
        found[ended, "user"] += fields[2]
        found[ended, "kernel"] += fields[3]
        for child in children:
            pending.append((int(child), {"server": "launcher"}.get(name, _kind_of(child))))
    return found


def _kind_of(pid: str) -> str:
    """Whether a descendant of the launcher is a part of it, or of a sandbox, which has a pid namespace of its own."""
    try:
        return "launcher" if os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid") else "sandboxes"
    except OSError:
        return "sandboxes"


# ---- by part ----


def _shares(profile: pstats.Stats) -> dict[str, float]:
    """Shares of the parts in a profile. The time of built-in functions counts for the functions that call them."""
    found: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, callers) in vars(profile)["stats"].items():
        if file != "~" or not callers:
            found[_part_of(file)] += own
            continue
        for (caller, _, _), (_, _, part, _) in callers.items():
            found[_part_of(caller)] += part
    total = sum(found.values()) or 1.0
    return {part: seconds / total for part, seconds in found.items()}


def _part_of(file: str) -> str:
    return next((part for text, part in _PARTS if text in file), _OTHER)


# ---- together ----


def measure(row: str, short: bool) -> tuple[list[tuple[str, str, float]], float]:
    """(where, what, milliseconds of CPU for each operation) in descending order for each process, and milliseconds of
    time for each operation."""
    pool, usual, _, _ = ROWS[row]
    count = usual // 4 if short else usual
    times: Times = {}
    took = 0.0

    async def counted(pid: int, work: Work) -> None:
        nonlocal times, took
        before, began = _times_of(pid), time.perf_counter()
        await work()
        took = time.perf_counter() - began
        await asyncio.sleep(_AFTER)
        times = defaultdict(float, {key: value - before[key] for key, value in _times_of(pid).items()})

    client = cProfile.Profile(time.process_time)

    async def profiled(pid: int, work: Work) -> None:
        os.kill(pid, signal.SIGUSR2)
        client.enable()
        await work()
        client.disable()
        await asyncio.sleep(_AFTER)
        os.kill(pid, signal.SIGUSR2)

    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        environment = child_environment(ROCK_HOME=home, ROCK_POOL_SIZE=str(pool))
        place = ("--host", "127.0.0.1", "--port", "0")
        with serving(home, "-m", "rock.cli.server", *place, env=environment) as (url, pid):
            asyncio.run(_repeat(url, row, count, lambda work: counted(pid, work)))
        file = f"{home}/profile"
        with serving(home, "-c", _SERVER, file, *place, env=environment) as (url, pid):
            asyncio.run(_repeat(url, row, count, lambda work: profiled(pid, work)))
        shares = {"client": _shares(pstats.Stats(client)), "server": _shares(pstats.Stats(file))}
    rows = []
    for where in ("client", "server", "launcher", "sandboxes"):
        user, kernel = (1000 * times[where, kind] / count for kind in ("user", "kernel"))
        parts = shares.get(where, {"user": 1.0})
        rows += sorted(((where, part, user * share) for part, share in parts.items()), key=lambda one: -one[2])
        rows.append((where, "kernel", kernel))
    return rows, 1000 * took / count


def show(row: str, short: bool) -> None:
    """Print the table of a row."""
    if sys.platform != "linux":
        raise SystemExit("error: --profile reads /proc, which Linux has")
    rows, took = measure(row, short)
    total = sum(value for _, _, value in rows) or 1.0
    print(f"{ROWS[row][3]}: {took:.2f} ms, {total:.2f} ms of CPU, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'process':<12}{'part':<20}{'CPU ms':>9}{'share':>8}")
    for where, part, value in rows:
        if value / total >= 0.005:
            print(f"{where:<12}{part:<20}{value:>9.3f}{value / total:>8.0%}")
