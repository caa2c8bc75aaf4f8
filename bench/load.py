"""What a server bears: `python bench/load.py [flood] [idle]`, both unless one is named.

flood   one client's latency alone, and while another hammers with 64 connections: the ratio of their p99
idle    10,000 kept-alive connections that say nothing: bytes of each, and what they cost one that does

What readers that stop reading cost is measured by tests/e2e/test_slow_readers.py; `pytest -s` prints it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from multiprocessing.synchronize import Event
from typing import Any

from hosted import IMAGE, at, connect, memory, percentiles, raise_file_limit, request, server

from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox, SandboxConfig

OWNER = "bench-owner"
CONNECTIONS = 64
RUN = json.dumps({"command": ":"}).encode()


def hammer(url: str, target: bytes, connections: int, begin: Event, end: Event, answers: Any) -> None:
    """Ask as fast as answers come, on many connections, between two events. In a process of its own."""

    async def one(statuses: dict[int, int]) -> None:
        raw = await connect(url)
        while not end.is_set():
            status = await raw.ask(target)
            statuses[status] = statuses.get(status, 0) + 1
        assert raw.transport is not None
        raw.transport.close()

    async def all_of_them() -> dict[int, int]:
        statuses: dict[int, int] = {}
        await asyncio.gather(*(one(statuses) for _ in range(connections)))
        return statuses

    begin.wait()
    answers.put(asyncio.run(all_of_them()))


async def latencies(url: str, target: bytes, count: int) -> list[float]:
    raw = await connect(url)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        status = await raw.ask(target)
        times.append(time.perf_counter() - began)
        assert status == 200, status
        await asyncio.sleep(0.002)
    assert raw.transport is not None
    raw.transport.close()
    return times


def keys_of(url: str, *tenants: str) -> list[str]:
    with Client(url, OWNER) as owner:
        return [owner.create_key(CreateKey(name=tenant, tenant=tenant)).key for tenant in tenants]


def sandbox_of(url: str, key: str) -> Sandbox:
    made = Sandbox(SandboxConfig(base_url=url, api_key=key, image=IMAGE, memory="128m"))
    made.start()
    made.arun(":")
    return made


def flood(rounds: int, count: int, kind: str) -> float:
    """The ratio of one client's p99 beside another's flood to its p99 alone, in rounds of both in turn."""
    with server(ROCK_API_KEY=OWNER) as (url, _, _):
        good, bad = keys_of(url, "good", "bad")
        mine, theirs = sandbox_of(url, good), sandbox_of(url, bad)
        run = "/v1/sandboxes/{}/sessions/default/run"
        target = request("POST", run.format(mine.sandbox_id), good, RUN)
        aim = {"cheap": request("GET", f"/v1/sandboxes/{theirs.sandbox_id}/sessions", bad),
               "refused": request("GET", "/v1/sandboxes/nobody/sessions", "wrong"),
               "runs": request("POST", run.format(theirs.sandbox_id), bad, RUN)}[kind]  # fmt: skip
        alone: list[float] = []
        beside: list[float] = []
        statuses: dict[int, int] = {}
        spent = 0.0
        for _ in range(rounds):
            alone += asyncio.run(latencies(url, target, count))
            begin, end, answers = multiprocessing.Event(), multiprocessing.Event(), multiprocessing.Queue()  # type: ignore[var-annotated]
            process = multiprocessing.Process(target=hammer, args=(url, aim, CONNECTIONS, begin, end, answers))
            process.start()
            begin.set()
            began = time.monotonic()
            time.sleep(1.0)
            beside += asyncio.run(latencies(url, target, count))
            end.set()
            for status, number in answers.get(timeout=60).items():
                statuses[status] = statuses.get(status, 0) + number
            spent += time.monotonic() - began
            process.join()
        for sandbox in (mine, theirs):
            sandbox.stop()
    ratio = at(sorted(beside), 0.99) / at(sorted(alone), 0.99)
    rate = sum(statuses.values()) / spent
    print(f"flood of {CONNECTIONS} connections, {kind}: {rate:,.0f} requests a second, statuses {statuses}")
    print(f"  a command of another client, ms: alone {percentiles(alone)}; beside it {percentiles(beside)}")
    print(f"  times: median {at(sorted(beside), 0.5) / at(sorted(alone), 0.5):.2f}, p99 {ratio:.2f}", flush=True)
    return ratio


def hold(url: str, count: int, source: str, ready: Any, end: Event) -> None:
    """Kept-alive connections that have asked once. In a process of its own."""
    raise_file_limit()
    host, _, port = url.removeprefix("http://").partition(":")
    held = []
    for _ in range(count):
        made = socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))
        made.sendall(request("GET", "/healthz"))
        assert made.recv(1000).startswith(b"HTTP/1.1 200")
        held.append(made)
    ready.put(count)
    end.wait()
    for made in held:
        made.close()


def idle(total: int, count: int) -> None:
    with server(ROCK_API_KEY=OWNER) as (url, pid, _):
        (key,) = keys_of(url, "good")
        mine = sandbox_of(url, key)
        target = request("POST", f"/v1/sandboxes/{mine.sandbox_id}/sessions/default/run", key, RUN)
        alone = asyncio.run(latencies(url, target, count))
        before = memory(pid)
        end, ready = multiprocessing.Event(), multiprocessing.Queue()  # type: ignore[var-annotated]
        began = time.monotonic()
        holders = [multiprocessing.Process(target=hold, args=(url, total // 4, f"127.0.0.{2 + n}", ready, end))
                   for n in range(4)]  # fmt: skip
        for process in holders:
            process.start()
        there = sum(ready.get(timeout=300) for _ in holders)
        took = time.monotonic() - began
        beside = asyncio.run(latencies(url, target, count))
        grown = memory(pid) - before
        end.set()
        for process in holders:
            process.join()
        mine.stop()
    each = grown / there / 1024
    print(f"{there:,} idle connections, made in {took:.1f} s: {each:.1f} KB each, {grown >> 20} MB in all")
    print(f"  a command, ms: before {percentiles(alone)}; among them {percentiles(beside)}")
    print(f"  times: median {at(sorted(beside), 0.5) / at(sorted(alone), 0.5):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["flood", "idle"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--connections", type=int, default=10_000)
    given = parser.parse_args()
    raise_file_limit()
    if "flood" in given.parts:
        for kind in ("cheap", "refused", "runs"):
            flood(given.rounds, given.count, kind)
    if "idle" in given.parts:
        idle(given.connections, given.count)


if __name__ == "__main__":
    main()
