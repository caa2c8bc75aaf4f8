"""A server that counts its tasks and timers on request, by SIGUSR2. The server of `idle.py`."""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any


def _path(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"rock-counts-{pid}.json"


def counts(pid: int) -> dict[str, Any]:
    """Tasks and timers of that server, and the numbers of tasks by coroutine."""
    path = _path(pid)
    os.kill(pid, signal.SIGUSR2)
    for _ in range(6000):
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            path.unlink()
            return found
        time.sleep(0.01)
    raise SystemExit(f"server {pid} does not count")


def _count(*_: object) -> None:
    tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
    timers = [one for one in gc.get_objects() if type(one).__name__ == "TimerHandle" and not one.cancelled()]
    names = collections.Counter(getattr(one.get_coro(), "__qualname__", "") for one in tasks)
    path = _path(os.getpid())
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"tasks": len(tasks), "timers": len(timers), "names": names}))
    beside.rename(path)


if __name__ == "__main__":
    from rock.cli.server import main

    signal.signal(signal.SIGUSR2, _count)
    main()
