"""Fleets of sandboxes in memory: what one costs, and that nothing of it is the machine's until a program runs."""

from __future__ import annotations

import asyncio
import os
import threading
import tracemalloc

from rock.protocol.sandbox import SandboxConfig
from rock.runtime.fake import FakeRuntime
from tests.runtime.boxes import run

MANY = 5_000
MOST_BYTES = 4096  # of one whose files nobody has looked at


def test_a_fleet_is_cheap() -> None:
    async def main() -> None:
        runtime = FakeRuntime()
        config = SandboxConfig(image="any:1", env={"A": "1"})
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        tracemalloc.start()
        try:
            handles = [await runtime.create(f"s{number}", config) for number in range(MANY)]
            assert tracemalloc.get_traced_memory()[0] / MANY < MOST_BYTES
        finally:
            tracemalloc.stop()
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
        assert len(asyncio.all_tasks()) == 1
        fd, _ = await runtime.open_write(handles[7], "/work/mine")  # and never committed
        assert await runtime.list(handles[8], "/work") == []
        gone = await runtime.sweep([handle.id for handle in handles[: MANY // 2]])
        assert len(gone) == MANY // 2
        os.close(fd)
        await runtime.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors

    run(main())
