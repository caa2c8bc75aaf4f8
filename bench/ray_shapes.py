"""Two shapes of sandboxes in one Ray cluster of three nodes on this machine, in the same run: an actor for each, as
ROCK has them, and a placement group for each with one actor a node. `make ray-shapes`; needs the venv of `make ray`.

Both make sandboxes in memory, so that what is compared is what Ray takes for each: creates a second and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from tests.scheduler.test_ray import SPEC, World

from rock.sync import SandboxGroup


class ActorSandbox:
    """What an actor a sandbox is at the least: a process of its own, that answers."""

    def __init__(self, number: int) -> None:
        self.number = number

    def memory(self) -> int:
        """Bytes that are its process's own."""
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) << 10
        return 0


def actors(world: World, count: int) -> dict[str, Any]:
    ray.init(address=f"127.0.0.1:{world.head_port}", namespace="shapes", log_to_driver=False)
    try:
        kind = ray.remote(num_cpus=1)(ActorSandbox)
        began = time.monotonic()
        made = [kind.remote(number) for number in range(count)]
        sizes = ray.get([actor.memory.remote() for actor in made])
        took = time.monotonic() - began
        for actor in made:
            ray.kill(actor)
    finally:
        ray.shutdown()
    return {"shape": "an actor a sandbox", "sandboxes": count, "seconds": round(took, 2),
            "creates_per_second": round(count / took, 2),
            "memory_mb_each": round(sum(sizes) / count / 1e6, 1)}  # fmt: skip


def groups(world: World, count: int) -> dict[str, Any]:
    boxes = SandboxGroup(base_url=world.url, size=count, **SPEC)
    began = time.monotonic()
    boxes.start()
    took = time.monotonic() - began
    boxes.stop()
    return {"shape": "a placement group a sandbox", "sandboxes": count, "seconds": round(took, 2),
            "creates_per_second": round(count / took, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--actors", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rock-ray-") as folder:
        world = World(Path(folder))
        try:
            world.start()
            groups(world, 10)  # warm
            for shape, count in ((groups, given.count), (actors, given.actors), (groups, given.count)):
                print(json.dumps({**shape(world, count), "load": round(os.getloadavg()[0], 1)}), flush=True)
        finally:
            if world.process is not None and world.process.poll() is None:
                world.end(signal.SIGTERM)
            world.cluster.shutdown()


if __name__ == "__main__":
    main()
