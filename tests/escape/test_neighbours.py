"""A bad neighbour: what it does to another sandbox of the same server. Times are compared within the run only, and in
the tests loosely; `bench/neighbours.py` measures them."""

from __future__ import annotations

import contextlib
import statistics
import time

import pytest

from rock.errors import QuotaExceeded
from rock.sync import Sandbox, SandboxConfig
from tests.conftest import IMAGE, RunningServer

_HARM = {
    "cpu hog": "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait",
    "fork bomb": "bomb() { bomb | bomb & }; bomb; sleep 1000",
    "memory bomb": "while :; do python3 -c 'x = bytearray(2 << 30)'; sleep 0.1; done",
    "disk fill": "while :; do head -c 900m /dev/zero > /tmp/big; rm -f /tmp/big; done",
    "inode fill": "mkdir /tmp/many; cd /tmp/many; for i in $(seq 100000); do : > $i || break; done; sleep 1000",
    "log flood": "while :; do echo yes yes yes yes yes yes yes yes yes yes yes yes yes yes; done",
    "endless line": "exec cat /dev/zero",
}


def _times(sandbox: Sandbox, count: int = 25) -> list[float]:
    found = []
    for _ in range(count):
        started = time.perf_counter()
        assert sandbox.arun("echo hi").output.strip() == "hi"
        found.append(time.perf_counter() - started)
    return found


@pytest.mark.parametrize("name", _HARM)
def test_a_neighbour_keeps_its_pace(server: RunningServer, name: str) -> None:
    config = {"base_url": server.url, "image": IMAGE, "memory": "128m", "cpus": 0.5, "pids": 150}
    with Sandbox(SandboxConfig(**config)) as victim:
        alone = statistics.median(_times(victim))
        limit = {"disk": "48m"} if "fill" in name else {}
        with Sandbox(SandboxConfig(**config, **limit)) as bad:
            bad.processes.start(_HARM[name])
            time.sleep(0.5)
            beside = statistics.median(_times(victim))
            with contextlib.suppress(QuotaExceeded):  # the bad one itself may be out of processes, and is told so
                bad.execute(["true"], timeout=30)
            now = bad.info(usage=True).usage
            assert now is not None
            if bad.info().enforced["memory"].startswith("cgroup"):
                assert now.memory_bytes is not None and now.memory_bytes <= 129 << 20
        # Times of milliseconds on a machine that does other things too: a neighbour that starves would take seconds.
        assert beside < max(alone * 10, 1.0)
