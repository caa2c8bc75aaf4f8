"""Containers against their floors, in one run: a start against a bare `docker run`, a command against the embedded
runtime. The server is a process of its own, the client is the SDK over HTTP.

    PYTHONPATH=src:. python bench/docker.py [--engine unix:///var/run/docker.sock --image IMAGE] [-n 30]

Without --engine the tests' own engine and image are used. IMAGE needs `sh` and `true`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import RunningServer
from tests.runtime.docker import engines

from rock.images.store import ImageStore
from rock.sync import Sandbox, SandboxConfig

HOST_IMAGE = "python:3.11"


def spread(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values)
    return {"n": len(ordered), "min": round(ordered[0], 2), "p50": round(statistics.median(ordered), 2),
            "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 2)}  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def bare_run(host: str, image: str, runtime: str) -> float:
    """`docker run` until its program has said something; what it takes to remove it is not counted."""
    command = ["docker", "-H", host, "run", "--rm", "--network", "none", "--runtime", runtime, "--memory", "512m",
               "--cpus", "1", "--pids-limit", "512", image, "sh", "-c", "echo ready"]  # fmt: skip
    environment = engines._environment() if engines.HOST in os.environ else dict(os.environ)
    program = shutil.which("docker", path=environment["PATH"])
    began = time.perf_counter()
    with subprocess.Popen(command, executable=program, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        return (time.perf_counter() - began) * 1000


def started(config: SandboxConfig, times: list[float], stops: list[float]) -> None:
    """From nothing to the answer of a first command."""
    sandbox = Sandbox(config)

    def first() -> None:
        sandbox.start()
        assert sandbox.execute(["sh", "-c", "echo ready"]).stdout == "ready\n"

    times.append(timed(first))
    stops.append(timed(sandbox.stop))


def commands(config: SandboxConfig, count: int) -> dict[str, list[float]]:
    """Commands of a session, and programs."""
    with Sandbox(config) as sandbox:
        for _ in range(5):
            sandbox.arun("true")
            sandbox.execute(["true"])
        return {"session": [timed(lambda: sandbox.arun("true")) for _ in range(count)],
                "program": [timed(lambda: sandbox.execute(["true"])) for _ in range(count)]}  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--engine", default="")
    words.add_argument("--image", default="rock-test/hand:1")
    words.add_argument("--oci", default="runc", choices=["runc", "runsc", "kata"])
    words.add_argument("-n", type=int, default=30)
    given = words.parse_args()
    host = given.engine or engines.shared().host
    with tempfile.TemporaryDirectory() as folder:
        ImageStore(Path(folder) / "images").from_host(HOST_IMAGE)
        server = RunningServer(Path(folder), DOCKER_HOST=host)
        server.start()
        try:
            rows = measure(server, host, given.image, given.oci, given.n)
        finally:
            server.stop()
    print(json.dumps(rows, indent=2))
    for name, row in rows.items():
        if "floor" in row:
            print(f"{name}: {row['ratio_p50']:.2f}x at p50, {row['ratio_min']:.2f}x at min")


def measure(server: RunningServer, host: str, image: str, oci: str, count: int) -> dict[str, dict[str, object]]:
    limits = {"base_url": server.url, "memory": "512m", "cpus": 1.0, "pids": 512}
    docker = SandboxConfig(image=image, runtime="docker", oci_runtime=oci, pull="never", **limits)
    embedded = SandboxConfig(image=HOST_IMAGE, runtime="namespace", **limits)
    starts: list[float] = []
    stops: list[float] = []
    bare: list[float] = []
    started(docker, [], [])  # our Python is made once
    bare_run(host, image, oci)
    for _ in range(count):  # in turn, so that both see the same machine
        started(docker, starts, stops)
        bare.append(bare_run(host, image, oci))
    rows: dict[str, dict[str, object]] = {"start": row(starts, bare), "stop": {"ours": spread(stops)}}
    ours: dict[str, list[float]] = {}
    floor: dict[str, list[float]] = {}
    for _ in range(3):
        for into, config in ((ours, docker), (floor, embedded)):
            for name, values in commands(config, count).items():
                into.setdefault(name, []).extend(values)
    return rows | {name: row(ours[name], floor[name]) for name in ours}


def row(ours: list[float], floor: list[float]) -> dict[str, object]:
    return {"ours": spread(ours), "floor": spread(floor), "ratio_min": min(ours) / min(floor),
            "ratio_p50": statistics.median(ours) / statistics.median(floor)}  # fmt: skip


if __name__ == "__main__":
    main()
