"""Many idle sandboxes on one machine: `python bench/idle.py 1000`, and as many as are named.

At each step: bytes of memory that a sandbox costs all in (what the machine has less of, by sandboxes), seconds that a
create takes, and a command in one of them next to the same command when it was alone. At the end 32 clients at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from hosted import IMAGE, at, available, connect, cpu_of, memory, percentiles, raise_file_limit, request, server, tree

from rock.errors import RockError
from rock.sync import Client, Sandbox, SandboxConfig

RUN = json.dumps({"command": ":"}).encode()
CLIENTS = 32


def held(pids: list[int]) -> int:
    """Bytes of processes, pages that they share split among those who share them."""
    size = 0
    for pid in pids:
        try:
            size += memory(pid)
        except OSError:
            continue
    return size


async def commands(url: str, sandbox_id: str, count: int) -> list[float]:
    raw = await connect(url)
    asked = request("POST", f"/v1/sandboxes/{sandbox_id}/sessions/default/run", body=RUN)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        assert await raw.ask(asked) == 200
        times.append(time.perf_counter() - began)
    assert raw.transport is not None
    raw.transport.close()
    return times


def made(url: str, _: int) -> tuple[float, str]:
    sandbox = Sandbox(SandboxConfig(base_url=url, image=IMAGE, memory="64m", auto_clear_seconds=0))
    began = time.perf_counter()
    sandbox.start()
    return time.perf_counter() - began, str(sandbox.sandbox_id)


def at_once(url: str, ids: list[str], seconds: float) -> None:
    """Clients that each use a sandbox of their own, as fast as they can."""
    times: list[list[float]] = [[] for _ in ids]
    end = time.monotonic() + seconds

    def use(number: int) -> None:
        sandbox = Sandbox(base_url=url).attach(ids[number])
        while time.monotonic() < end:
            began = time.perf_counter()
            sandbox.arun("echo 1")
            times[number].append(time.perf_counter() - began)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [value for own in times for value in own]
    least, most = min(map(len, times)), max(map(len, times))
    print(f"{len(ids)} clients at once: {len(every) / seconds:,.0f} commands a second, ms {percentiles(every)}; "
          f"each client between {least} and {most}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sandboxes", type=int, nargs="?", default=1000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=4)
    given = parser.parse_args()
    raise_file_limit()
    with server(ROCK_SANDBOX_LIMIT="20000") as (url, pid, _):
        _, first = made(url, 0)
        asyncio.run(commands(url, first, 50))
        alone = asyncio.run(commands(url, first, given.count))
        print(f"alone: a command, ms {percentiles(alone)}", flush=True)
        free, own, ids = available(), held(tree(pid)), [first]
        step = max(1, (given.sandboxes - 1) // given.steps)
        try:
            with ThreadPoolExecutor(given.at_once) as pool:
                while len(ids) < given.sandboxes:
                    wanted = min(step, given.sandboxes - len(ids))
                    began = time.monotonic()
                    new = list(pool.map(lambda n: made(url, n), range(wanted)))
                    took = time.monotonic() - began
                    ids += [sandbox_id for _, sandbox_id in new]
                    tell(url, pid, ids, [seconds for seconds, _ in new], took, alone, free, own, given.count)
        except RockError as error:
            print(f"at {len(ids)}: {error}")
            return
        busy, began = cpu_of(pid), time.monotonic()
        time.sleep(10)
        print(f"idle: the server takes {(cpu_of(pid) - busy) / (time.monotonic() - began):.1%} of a CPU", flush=True)
        at_once(url, ids[:CLIENTS], 5.0)
        began = time.monotonic()
        with Client(url) as client, ThreadPoolExecutor(given.at_once) as pool:
            list(pool.map(client.stop_sandbox, ids))
        print(f"all stopped in {time.monotonic() - began:.1f} s")


def tell(
    url: str, pid: int, ids: list[str], creates: list[float], took: float, alone: list[float], free: int, own: int,
    count: int,
) -> None:  # fmt: skip
    seen = asyncio.run(commands(url, ids[0], count))
    pids = tree(pid)
    others = len(ids) - 1
    files = len(os.listdir(f"/proc/{pid}/fd"))
    print(
        f"{len(ids)} sandboxes: {(free - available()) / others / 1e6:.2f} MB each of the machine's memory, "
        f"{(held(pids) - own) / others / 1e6:.2f} MB of processes; server {memory(pid) >> 20} MB, {files} descriptors; "
        f"{len(creates) / took:.1f} creates a second, ms {percentiles(creates)}; a command, ms {percentiles(seen)}, "
        f"times the median {at(sorted(seen), 0.5) / at(sorted(alone), 0.5):.2f}, "
        f"the least {min(seen) / min(alone):.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
