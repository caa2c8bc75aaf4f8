"""What a server process is like from outside: memory, descriptors, CPU, and how late its event loop is."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress

from rock.telemetry.metrics import REGISTRY, Family, Number, gauge_of

with suppress(ImportError):  # Windows, where only the fake runtime runs
    import resource

_EVERY = 0.5  # seconds between two looks at the loop
LAG = REGISTRY.histogram("rock_event_loop_lag_seconds", "How late the event loop ran what was due")
_STARTED = time.time()


class LoopLag:
    """Measures it for as long as it is open. `worst`: seconds, since it was last asked for."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._measure(), name="loop lag")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def worst(self) -> float:
        worst, self._worst = self._worst, 0.0
        return worst

    async def _measure(self) -> None:
        loop, series = asyncio.get_running_loop(), LAG.of()
        while True:
            due = loop.time() + _EVERY
            await asyncio.sleep(_EVERY)
            late = max(0.0, loop.time() - due)
            series.observe(late)
            self._worst = max(self._worst, late)


def gauges() -> list[Family[Number]]:
    """What the kernel says of this process now, under the names that Prometheus' own clients use."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    values = {
        "process_start_time_seconds": ("When it started, seconds since the epoch", _STARTED),
        "process_max_fds": ("Most descriptors it may have", float(resource.getrlimit(resource.RLIMIT_NOFILE)[0])),
    }
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = file.read().split()
        size = os.sysconf("SC_PAGE_SIZE")
        values["process_virtual_memory_bytes"] = ("Address space", float(pages[0]) * size)
        values["process_resident_memory_bytes"] = ("Memory in use", float(pages[1]) * size)
        values["process_open_fds"] = ("Open descriptors", float(len(os.listdir("/proc/self/fd"))))
    told = [gauge_of(name, text, (), {(): value}) for name, (text, value) in values.items()]
    seconds: Family[Number] = Family("process_cpu_seconds_total", "counter", "CPU time used, user and system", ())
    seconds.of().set(used.ru_utime + used.ru_stime)
    return [*told, seconds]
