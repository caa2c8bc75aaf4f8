"""One and several rocklet processes of one server, alternating: `python bench/processes.py 1 2`.

For each number of processes: commands per second in 32 sessions, cycles per second (create, command, stop; 8 at once),
the CPU milliseconds of all processes of the server for each, the busiest of these processes as a share of one CPU, and
the memory of the server without sandboxes. The load comes from two client processes. All of them share the CPUs of this
machine: the ratio shows the overhead on two CPUs. The rate divided by the CPU share of the busiest process is the rate
at which that process is busy all the time, which limits a machine with more CPUs; its ratio is the second one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from hosted import IMAGE, memory, raise_file_limit, server, tree

from rock.sdk import Sandbox, SandboxConfig
from rock.sync import Client

_TICK = os.sysconf("SC_CLK_TCK")
_CLIENTS = 2


async def load(url: str, kind: str, seconds: float, at_once: int, runtime: str) -> None:
    """A client process: prepares, prints a line, waits for a line, and prints how many operations it has completed."""
    config = SandboxConfig(base_url=url, image=IMAGE, memory="64m", auto_clear_seconds=0, runtime=runtime or None)
    boxes = [Sandbox(config) for _ in range(at_once if kind == "commands" else 0)]
    await asyncio.gather(*(box.start() for box in boxes))
    await asyncio.gather(*(box.run("true") for box in boxes))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end, count = time.monotonic() + seconds, 0

    async def commands(box: Sandbox) -> None:
        nonlocal count
        while time.monotonic() < end:
            await box.run("true")
            count += 1

    async def cycles() -> None:
        nonlocal count
        while time.monotonic() < end:
            box = Sandbox(config)
            await box.start()
            await box.run("true")
            await box.stop()
            count += 1

    began = time.monotonic()
    await asyncio.gather(*(map(commands, boxes) if kind == "commands" else (cycles() for _ in range(at_once))))
    print(json.dumps({"count": count, "seconds": time.monotonic() - began}), flush=True)
    await asyncio.gather(*(box.stop() for box in boxes))


def used(pids: list[int]) -> dict[int, float]:
    """CPU seconds of processes that exist, with those of children that have ended."""
    found = {}
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = sum(map(int, fields[11:15])) / _TICK
    return found


def measure(url: str, servers: list[int], kind: str, seconds: float, at_once: int, runtime: str) -> tuple[float, ...]:
    """Operations per second, CPU milliseconds of the server for each, and the share of its busiest process."""
    command = [sys.executable, __file__, "--load", kind, "--url", url, "--seconds", str(seconds), "--at-once",
               str(at_once // _CLIENTS), "--runtime", runtime]
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for _ in range(_CLIENTS)]
    for client in clients:
        assert client.stdout is not None and client.stdout.readline() == "ready\n"
    before, began = used(servers), time.monotonic()
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
    results = [json.loads(client.stdout.readline()) for client in clients if client.stdout is not None]
    after, passed = used(servers), time.monotonic() - began
    for client in clients:
        client.communicate()
    count = sum(result["count"] for result in results)
    spent = [after[pid] - before.get(pid, 0.0) for pid in after]
    return count / max(result["seconds"] for result in results), 1e3 * sum(spent) / count, max(spent) / passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--runtime", default="", help='"fake" for sandboxes in memory, without the cost of the kernel')
    parser.add_argument("--load", choices=("commands", "cycles"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    raise_file_limit()
    if given.load:
        asyncio.run(load(given.url, given.load, given.seconds, given.at_once, given.runtime))
        return
    rows: defaultdict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
    sizes: dict[int, float] = {}
    for _ in range(given.repeat):
        for number in given.processes:
            with server(ROCK_PROCESSES=str(number), ROCK_POOL_SIZE="0") as (url, pid, _), Client(url):
                pids = tree(pid)
                sizes[number] = sum(map(memory, pids)) / 1e6
                for kind, at_once in (("commands", 32), ("cycles", 8)):
                    rows[number, kind].append(measure(url, pids, kind, given.seconds, at_once, given.runtime))
    for kind in ("commands", "cycles"):
        first = median(row[0] for row in rows[given.processes[0], kind])
        limit = median(row[0] / row[2] for row in rows[given.processes[0], kind])
        for number in given.processes:
            rate, each, busiest = (median(column) for column in zip(*rows[number, kind], strict=True))
            own = median(row[0] / row[2] for row in rows[number, kind])
            print(f"{kind}, {number} processes: {rate:.0f} per second, ratio {rate / first:.2f}, server {each:.2f} ms "
                  f"of CPU each, busiest process {busiest:.2f} CPUs, {own:.0f} per second for a CPU of it, ratio "
                  f"{own / limit:.2f}, server without sandboxes {sizes[number]:.0f} MB")


if __name__ == "__main__":
    main()
