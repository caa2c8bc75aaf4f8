"""This server next to ROCK's own, with the same client and in the same run: start, commands, a group.

    RL_ROCK/bin/python bench/against_rock.py --ours http://127.0.0.1:8080 [--image python:3.11] [--runs 10] [--group 20]

RL_ROCK is a virtual environment with `rl-rock` in it; ROCK_THEIRS is the address of a running ROCK server, which needs
Docker with privileged containers. Without it ours is measured alone. Both take turns, so that what else the machine
does hits both; seconds, median and 95th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Awaitable
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

import rock  # noqa: E402
from rock.actions import Command, CreateBashSessionRequest  # noqa: E402
from rock.sdk.sandbox.client import Sandbox, SandboxGroup  # noqa: E402
from rock.sdk.sandbox.config import SandboxConfig, SandboxGroupConfig  # noqa: E402

Times = dict[str, list[float]]


async def timed(times: Times, name: str, work: Awaitable[Any]) -> None:
    began = time.perf_counter()
    await work
    times.setdefault(name, []).append(time.perf_counter() - began)


async def one(url: str, image: str, times: Times) -> None:
    """A sandbox from start to stop, with ten commands of each kind."""
    box = Sandbox(SandboxConfig(base_url=url, image=image, memory="512m", cpus=1))
    try:
        await timed(times, "start", box.start())
        await timed(times, "create_session", box.create_session(CreateBashSessionRequest(session="s")))
        for _ in range(10):
            await timed(times, "arun in a session", box.arun("echo hi", session="s"))
            await timed(times, "execute", box.execute(Command(command=["echo", "hi"])))
    finally:
        await timed(times, "stop", box.stop())


async def group(url: str, image: str, size: int, times: Times) -> None:
    """Many at once: all running, a command in each, all stopped."""
    spec = SandboxGroupConfig(base_url=url, image=image, memory="128m", cpus=1, size=size, start_concurrency=size)
    boxes = SandboxGroup(spec)

    async def work() -> None:
        await boxes.start()
        await asyncio.gather(*(box.execute(Command(command=["echo", "hi"])) for box in boxes.sandbox_list))

    try:
        await timed(times, f"group of {size}: start, a command in each", work())
    finally:
        await boxes.stop()


async def measure(servers: dict[str, str], image: str, runs: int, size: int) -> dict[str, Times]:
    seen: dict[str, Times] = {name: {} for name in servers}
    for url in servers.values():
        await one(url, image, {})  # what is made by the first use is not what a start costs
    for _ in range(runs):
        for name, url in servers.items():
            await one(url, image, seen[name])
    for name, url in servers.items():
        try:
            await group(url, image, size, seen[name])
        except Exception as error:
            print(f"{name}: the group of {size} failed: {type(error).__name__}: {str(error)[:300]}")
    return seen


def show(values: list[float] | None) -> str:
    if not values:
        return f"{'-':>20}"
    ordered = sorted(values)
    high = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"{statistics.median(ordered):>9.4f} {high:>9.4f} "


def main() -> None:
    parser = argparse.ArgumentParser(description="this server next to ROCK's own")
    parser.add_argument("--ours", required=True)
    parser.add_argument("--image", default="python:3.11")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--group", type=int, default=20)
    given = parser.parse_args()
    servers = {"ours": given.ours}
    theirs = os.environ.get("ROCK_THEIRS")
    if theirs:
        servers["ROCK's"] = theirs
    else:
        print("ROCK's own server is not measured: ROCK_THEIRS names none (it needs Docker with privileged containers)")
    print(f"client: {os.path.dirname(rock.__file__)}; image {given.image}; seconds, median and 95th percentile")
    seen = asyncio.run(measure(servers, given.image, given.runs, given.group))
    print(f"{'':<42}" + "".join(f"{name:>20}" for name in servers))
    names = list(dict.fromkeys(name for times in seen.values() for name in times))
    for name in names:
        print(f"{name:<42}" + "".join(show(times.get(name)) for times in seen.values()))


if __name__ == "__main__":
    main()
