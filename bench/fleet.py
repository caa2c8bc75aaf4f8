"""A simulated fleet: the real admin with its store, over workers whose sandboxes are in memory. `make fleet`.

    clients ──► admin (one process, SQLite) ──► hosts: a few processes, each many rocklets of the fake runtime,
                                                each rocklet on a port of its own, joined over the real wire

Measured: bursts of single creates at once, the same by group requests, status while it is full, and the admin's memory.
What a sandbox itself costs is no part of it. Latencies are from the begin of the burst to the answer that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from hosted import Raw, connect, cpu_of, request

from rock.cli.serve.serve import Rocklet, http_over, listen, run, spare_collections
from rock.errors import NotFound
from rock.http.asgi import Receive, Scope, Send
from rock.runtime.base import FileStat, Handle
from rock.runtime.fake import FakeRuntime
from rock.settings import Settings

KEY = "the-key-of-the-simulated-fleet"
BURSTS = {1000: (4.9, 8.7), 2000: (4.9, 10.5), 4000: (7.1, 13.3), 8000: (17.9, 32.0), 16000: (40.0, 60.1)}  # ROCK's
CONFIG = {"image": "python:3.11", "memory": "64m", "cpus": 1.0, "auto_clear_seconds": 0}
CONNECTIONS = 1000  # of the client
GROUP = 1000
_PROFILED = """
import cProfile, sys, time
from rock.cli.server import main
profile, where = cProfile.Profile(time.process_time), sys.argv.pop(1)
try:
    profile.runcall(main)
finally:
    profile.dump_stats(where)
"""


# ---- hosts of simulated workers -------------------------------------------------------------------------------------


class Bare(FakeRuntime):
    """Sandboxes without a shell, so that none is opened ahead: what a sandbox itself costs is no part of this."""

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat:
        raise NotFound(f"{path}: there are no programs here")


async def host(folder: Path, first: int, count: int, join: str) -> None:
    """Serve `count` rocklets until standard input ends."""
    rocklets: dict[int, Rocklet] = {}
    sockets = []
    for number in range(first, first + count):
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        settings = Settings(folder / f"w{number}", port=port, api_key=KEY, runtime="fake", pool_size=0, join=join,
                            worker_name=f"sim-{number:04}", sandbox_limit=1_000_000)  # fmt: skip
        rocklets[port] = Rocklet(settings, {"fake": Bare()})
        sockets.append(listener)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await rocklets[scope["server"][1]].app(scope, receive, send)

    http = http_over(app)
    serving = asyncio.create_task(http.serve(sockets=sockets))
    gate = asyncio.Semaphore(8)

    async def opened(rocklet: Rocklet) -> None:
        async with gate:
            await rocklet.open()

    await asyncio.gather(*(opened(rocklet) for rocklet in rocklets.values()))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for rocklet in rocklets.values():
        rocklet.let_go()
    http.should_exit = True
    await serving
    await asyncio.gather(*(rocklet.close() for rocklet in rocklets.values()))


# ---- the fleet ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """An admin's address, its pid, and those of the hosts of its workers."""

    url: str
    admin: int
    hosts: list[int]


@contextlib.contextmanager
def worker_registry(workers: int, hosts: int, profile: str | None = None) -> Iterator[Fleet]:
    """An admin over so many workers."""
    # What hosts write of their sandboxes is in memory, as those sandboxes are; what the admin writes is on the disk.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (tempfile.TemporaryDirectory(prefix="rock-fleet-") as text,
          tempfile.TemporaryDirectory(prefix="rock-fleet-", dir=memory) as hosted):  # fmt: skip
        folder, processes = Path(text), list[subprocess.Popen[str]]()
        environment = {**os.environ, "ROCK_HOME": str(folder / "admin"), "ROCK_API_KEY": KEY, "ROCK_WORKERS": "none",
                       "ROCK_WORKER_LEASE": "120", "ROCK_LOG_LEVEL": "warning"}  # fmt: skip
        (folder / "admin").mkdir()
        log = open(folder / "admin.log", "w")  # noqa: SIM115
        program = ["-m", "rock.cli.server"]
        if profile:
            program = ["-c", _PROFILED, profile]
        admin = subprocess.Popen([sys.executable, *program, "--host", "127.0.0.1", "--port", "0"], env=environment,
                                 stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not (folder / "admin" / "server.json").exists():
                assert admin.poll() is None and time.monotonic() < end, (folder / "admin.log").read_text()
                time.sleep(0.05)
            url = f"http://127.0.0.1:{json.loads((folder / 'admin' / 'server.json').read_text())['port']}"
            each = math.ceil(workers / hosts)
            for first in range(0, workers, each):
                count = min(each, workers - first)
                command = [sys.executable, __file__, "--host-of", f"{hosted},{first},{count},{url}"]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                processes.append(process)
            for process in processes:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield Fleet(url, admin.pid, [process.pid for process in processes])
        except BaseException:
            log.flush()
            print((folder / "admin.log").read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            for process in (admin, *processes):  # what they had is thrown away; a profile is written at an end in order
                process.send_signal(signal.SIGTERM if profile and process is admin else signal.SIGKILL)
            for process in (admin, *processes):
                process.communicate()
            log.close()


# ---- clients --------------------------------------------------------------------------------------------------------


class Clients:
    """Requests of any number at once, over a bounded number of connections."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[Raw] = []
        self._gate = asyncio.Semaphore(CONNECTIONS)

    async def ask(self, sent: bytes) -> Any:
        """The body of the answer to a request as it travels."""
        async with self._gate:
            connection = self._idle.pop() if self._idle else await connect(self._url)
            status = await connection.ask(sent)
            body = connection.body
            self._idle.append(connection)
        assert status < 300, body[:500]
        return orjson.loads(body)

    async def close(self) -> None:
        for connection in self._idle:
            assert connection.transport is not None
            connection.transport.close()
        await asyncio.sleep(0)


def _of(method: str, path: str, body: Any = None) -> bytes:
    """A request as it travels."""
    return request(method, path, KEY, b"" if body is None else orjson.dumps(body))


@contextlib.asynccontextmanager
async def clients(url: str) -> AsyncIterator[Clients]:
    made = Clients(url)
    try:
        yield made
    finally:
        await made.close()


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def memory_of(pid: int) -> float:
    """MB that a process has in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Spent:
    """CPU of the three sides since it was made."""

    def __init__(self, worker_registry: Fleet) -> None:
        self._worker_registry = worker_registry
        self._before = self._now()

    def _now(self) -> list[float]:
        return [cpu_of(self._worker_registry.admin), sum(map(cpu_of, self._worker_registry.hosts)), time.process_time()]

    def row(self, kind: str, took: list[float], whole: float, **more: Any) -> dict[str, Any]:
        pairs = zip(self._now(), self._before, strict=True)
        admin, hosts, client = ((now - then) * 1000 / len(took) for now, then in pairs)
        return {"kind": kind, **more, "p50": round(quantile(took, 0.5), 3), "p99": round(quantile(took, 0.99), 3),
                "per_second": round(len(took) / whole), "admin_ms": round(admin, 3), "hosts_ms": round(hosts, 3),
                "client_ms": round(client, 3), "admin_mb": round(memory_of(self._worker_registry.admin)),
                "load": round(os.getloadavg()[0], 1)}  # fmt: skip


async def singles(on: Fleet, size: int, **more: Any) -> dict[str, Any]:
    """So many creates at once."""
    async with clients(on.url) as asking:
        began, took, spent = time.monotonic(), list[float](), Spent(on)

        create = _of("POST", "/v1/sandboxes?wait=300", CONFIG)

        async def one() -> None:
            info = await asking.ask(create)
            assert info["state"] == "running", info
            took.append(time.monotonic() - began)

        await asyncio.gather(*(one() for _ in range(size)))
        whole = time.monotonic() - began
    return spent.row("single creates", took, whole, size=size, **more)


async def groups(on: Fleet, size: int, **more: Any) -> dict[str, Any]:
    """The same by requests for groups."""
    async with clients(on.url) as asking:
        began, took, spent = time.monotonic(), list[float](), Spent(on)

        async def one(count: int) -> None:
            made = await asking.ask(_of("POST", "/v1/groups?wait=300", {"config": CONFIG, "size": count}))
            assert {info["state"] for info in made["sandboxes"]} == {"running"}
            took.extend([time.monotonic() - began] * count)

        await asyncio.gather(*(one(min(GROUP, size - at)) for at in range(0, size, GROUP)))
        whole = time.monotonic() - began
    return spent.row("group creates", took, whole, size=size, **more)


async def looks(on: Fleet, **more: Any) -> dict[str, Any]:
    """Status of single sandboxes, one after the other; and one page and the counts."""
    async with clients(on.url) as asking:
        page = await asking.ask(_of("GET", "/v1/sandboxes?limit=500"))
        ids = [info["sandbox_id"] for info in page["items"]]
        took, spent = list[float](), Spent(on)
        for sandbox_id in ids:
            began = time.monotonic()
            await asking.ask(_of("GET", f"/v1/sandboxes/{sandbox_id}"))
            took.append(time.monotonic() - began)
        found = spent.row("status", took, sum(took), **more)
        began = time.monotonic()
        await asking.ask(_of("GET", "/v1/sandboxes?limit=500&state=running"))
        listed = time.monotonic() - began
        began = time.monotonic()
        await asking.ask(_of("GET", "/v1/server"))
        told = time.monotonic() - began
    return {**found, "list_500": round(listed, 3), "server": round(told, 3)}


def tell(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def bursts(workers: int, hosts: int, most: int, profile: str | None) -> None:
    for size, (rock_p50, rock_p99) in BURSTS.items():
        if size > most:
            continue
        for burst in (singles, groups):
            with worker_registry(workers, hosts, profile) as on:
                run(singles(on, workers))  # every worker has been asked once
                tell({**run(burst(on, size, workers=workers)), "rock_p50": rock_p50, "rock_p99": rock_p99})


def growth(hosts: int, most_workers: int, most_sandboxes: int) -> None:
    for workers in (10, 100, 1000):
        if workers > most_workers:
            continue
        with worker_registry(workers, hosts) as on:
            have, until = 0, min(most_sandboxes, workers * 100)
            while have < until:
                step = min(10_000, until - have)
                tell(run(groups(on, step, workers=workers, sandboxes=have + step)))
                have += step
            tell(run(singles(on, 1000, workers=workers, sandboxes=have)))
            tell(run(looks(on, workers=workers, sandboxes=have)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["bursts", "growth"])
    parser.add_argument("--workers", type=int, default=100, help="of the bursts")
    parser.add_argument("--hosts", type=int, default=2, help="processes that simulate them")
    parser.add_argument("--most", type=int, default=16000, help="largest burst")
    parser.add_argument("--most-workers", type=int, default=1000)
    parser.add_argument("--most-sandboxes", type=int, default=100_000)
    parser.add_argument("--profile", default=None, help="a file for cProfile of the admin")
    parser.add_argument("--host-of", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.host_of:
        folder, first, count, join = given.host_of.split(",")
        spare_collections()
        run(host(Path(folder), int(first), int(count), join))
        return
    if "bursts" in given.what:
        bursts(given.workers, given.hosts, given.most, given.profile)
    if "growth" in given.what:
        growth(given.hosts, given.most_workers, given.most_sandboxes)


if __name__ == "__main__":
    main()
