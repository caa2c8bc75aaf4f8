"""Reference measurements for `rock bench`: the lower bounds of this machine, printed next to the measured figures.

    floor        a bash responds to `echo ready` in new namespaces, forked by a launcher: no files, no limits, no HTTP
    whole        the same in a complete sandbox of the launcher: all namespaces, limits and mounts; no server, no HTTP
    whole_rates  complete sandboxes per second, several at once, created and destroyed
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rock.images.store import ImageStore
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Program
from rock.runtime.namespace.launcher.link import LaunchLink
from rock.runtime.namespace.runtime import NamespaceRuntime


async def floor(n: int) -> list[float]:
    """Seconds of each of `n` bare namespace forks, from the fork to bash's response. Unsupported without namespaces."""
    with tempfile.TemporaryDirectory(prefix="rock-floor-") as folder:
        options = {"privileged": os.geteuid() == 0, "staging": f"{folder}/staging"}
        launcher = LaunchLink(options, Path(folder) / "log")
        try:
            return [float((await launcher.request("floor", {}))["seconds"]) for _ in range(n)]
        finally:
            launcher.close()


_CONFIG = SandboxConfig(image="host", memory="256m", cpus=1.0)


@contextlib.asynccontextmanager
async def _launcher() -> AsyncIterator[NamespaceRuntime]:
    """A private runtime that has already created one sandbox."""
    with tempfile.TemporaryDirectory(prefix="rock-floor-") as folder:
        runtime = NamespaceRuntime(Path(folder) / "run", 0, ImageStore(Path(folder) / "images"))
        await runtime.open()
        try:
            await _whole_one(runtime, "floor")
            yield runtime
        finally:
            await runtime.close()


async def whole(n: int) -> list[float]:
    """Seconds from the create to the response of a bash in the sandbox, for `n` sandboxes in sequence."""
    async with _launcher() as runtime:
        return [await _whole_one(runtime, "floor") for _ in range(n)]


async def whole_rates(slices: int, width: int) -> list[float]:
    """Sandboxes created, used and destroyed per second, `width` at once, in slices of half a second."""
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        while going_on:
            await _whole_one(runtime, f"floor-{number}")
            done += 1

    async with _launcher() as runtime:
        going_on = True
        async with asyncio.TaskGroup() as group:
            for number in range(width):
                group.create_task(client(number))
            await asyncio.sleep(0.3)
            rates = []
            for _ in range(slices):
                before, began = done, time.perf_counter()
                await asyncio.sleep(0.5)
                rates.append((done - before) / (time.perf_counter() - began))
            going_on = False
        return rates


async def _whole_one(runtime: NamespaceRuntime, name: str) -> float:
    started = time.perf_counter()
    handle = await runtime.create(name, _CONFIG)
    try:
        bash = await runtime.spawn(handle, Program(argv=["/bin/bash", "-c", "echo ready"]))
        assert bash.stdout is not None
        readable = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(bash.stdout, readable.set_result, None)
        await readable
        asyncio.get_running_loop().remove_reader(bash.stdout)
        seconds = time.perf_counter() - started
        await bash.wait()
        bash.close()
    finally:
        await runtime.destroy(handle)
    return seconds
