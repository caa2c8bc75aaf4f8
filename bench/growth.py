"""Cost of a create as sandboxes accumulate: `python bench/growth.py 10 500 1000 2000`.

At each number of idle sandboxes: creates and stops per second, 8 at once, their share of the rates at the first number,
and the CPU milliseconds per create of the launcher (user, kernel) and of the server. The same sandboxes remain between
the steps; those of the measurement are stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from hosted import IMAGE, available, raise_file_limit, server, tree

from rock.sync import Client, Sandbox, SandboxConfig

_TICK = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> tuple[float, float]:
    """User and kernel seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICK, int(fields[12]) / _TICK


def launcher_of(server_pid: int) -> int:
    """The pid of the server's launcher: its child with the title of every pid 1, and the smallest pid."""
    return min(pid for pid in tree(server_pid)[1:] if Path(f"/proc/{pid}/comm").read_text() == "rock-init\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sandboxes", type=int, nargs="*", default=[10, 500, 1000, 2000])
    parser.add_argument("--count", type=int, default=100, help="creates of a measurement")
    parser.add_argument("--repeat", type=int, default=3, help="measurements at each number")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object per number")
    given = parser.parse_args()
    raise_file_limit()
    with server(ROCK_SANDBOX_LIMIT="20000") as (url, pid, _), Client(url) as client, \
            ThreadPoolExecutor(given.at_once) as pool:  # fmt: skip
        config = SandboxConfig(base_url=url, image=IMAGE, memory="64m", auto_clear_seconds=0)

        def create(_: int) -> str:
            sandbox = Sandbox(config)
            sandbox.start()
            return str(sandbox.sandbox_id)

        def stop(sandbox_id: str) -> None:
            client.stop_sandbox(sandbox_id)

        resident = list(pool.map(create, range(1)))
        launcher, free, first = launcher_of(pid), available(), 0.0
        for number in given.sandboxes:
            resident += pool.map(create, range(max(0, number - len(resident))))
            creates, stops, users, systems, servers = [], [], [], [], []
            for _ in range(given.repeat):
                before, own, began = cpu(launcher), cpu(pid), time.perf_counter()
                new = list(pool.map(create, range(given.count)))
                creates.append(given.count / (time.perf_counter() - began))
                after, later = cpu(launcher), cpu(pid)
                users.append((after[0] - before[0]) / given.count * 1e3)
                systems.append((after[1] - before[1]) / given.count * 1e3)
                servers.append((sum(later) - sum(own)) / given.count * 1e3)
                began = time.perf_counter()
                list(pool.map(stop, new))
                stops.append(given.count / (time.perf_counter() - began))
            first = first or median(creates)
            row = {"sandboxes": len(resident), "creates per second": round(median(creates), 1),
                   "share": round(median(creates) / first, 2), "stops per second": round(median(stops), 1),
                   "launcher, user ms": round(median(users), 1), "launcher, kernel ms": round(median(systems), 1),
                   "server, ms": round(median(servers), 1),
                   "MB each": round((free - available()) / max(1, len(resident) - 1) / 1e6, 2)}  # fmt: skip
            print(json.dumps(row) if given.json else ", ".join(f"{name} {value}" for name, value in row.items()),
                  flush=True)  # fmt: skip
        list(pool.map(stop, resident))


if __name__ == "__main__":
    main()
