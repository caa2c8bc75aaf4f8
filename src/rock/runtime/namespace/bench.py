"""Floors for `rock bench`: what this machine can do at best, to print next to what we do.

    plain_bash   a bash on pipes answers `echo ready`, without any isolation
    floor        the same in new namespaces, forked by a launcher: no files, no limits, no HTTP
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from pathlib import Path

from rock.runtime.namespace.launchlink import LaunchLink


async def floor(n: int) -> list[float]:
    """Seconds of each of `n` bare namespace forks, from the fork to bash's answer. Unsupported where there are none."""
    with tempfile.TemporaryDirectory(prefix="rock-floor-") as folder:
        options = {"privileged": os.geteuid() == 0, "staging": f"{folder}/staging"}
        launcher = LaunchLink(options, Path(folder) / "log")
        try:
            return [float((await launcher.request("floor", {}))["seconds"]) for _ in range(n)]
        finally:
            launcher.close()


async def plain_bash(n: int) -> list[float]:
    """Seconds of each of `n` plain bashes, from the start to the answer."""
    return await asyncio.to_thread(lambda: [_bash() for _ in range(n)])


def _bash() -> float:
    started = time.perf_counter()
    with subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bash:
        assert bash.stdin is not None
        assert bash.stdout is not None
        bash.stdin.write(b"echo ready\n")
        bash.stdin.flush()
        bash.stdout.readline()
        seconds = time.perf_counter() - started
        bash.kill()
    return seconds
