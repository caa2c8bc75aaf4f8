"""`rock bench`: the figures of the embedded runtime, each next to its floor from the same run.

The server under test is a process of its own with a home of its own; the client is the SDK over HTTP, as users have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from rock.cli import serve
from rock.cli.serve import Server
from rock.errors import Unavailable, from_wire
from rock.guest import proctree
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.keys import OPERATOR
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.sandbox.client import Sandbox
from rock.settings import Settings, child_environment
from rock.wire.asgi import call

app = typer.Typer(help="Measure this machine: figures next to their floors.", invoke_without_command=True)


_TURNS = 5


@dataclass
class Figure:
    """One row: `values` in `unit`; `floor` is the same thing without ROCK, from the same run."""

    name: str
    unit: str
    values: list[float]
    target: str
    floor_name: str = ""
    floor: list[float] = field(default_factory=list)

    def spread(self, values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {
            "n": len(ordered),
            "min": ordered[0],
            "p50": statistics.median(ordered),
            "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        }

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "unit": self.unit, **self.spread(self.values), "target": self.target}
        if self.floor:
            row["floor"] = {"name": self.floor_name, **self.spread(self.floor)}
            base = row["floor"]["p50"]
            row["ratio"] = row["p50"] / base if base else None
        return row


@contextlib.contextmanager
def running_server(pool: int) -> Iterator[tuple[str, int]]:
    """A server of its own: (URL, pid). It is stopped, with every sandbox, at the end."""
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        log = Path(home) / "output.log"
        with log.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port", "0"],
                env=child_environment(ROCK_HOME=home, ROCK_POOL_SIZE=str(pool)), stdout=out, stderr=out,
            )  # fmt: skip
        try:
            yield _wait_for(child, Path(home), log), child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(60)


def _wait_for(child: subprocess.Popen[bytes], home: Path, log: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and child.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            note = json.loads((home / "server.json").read_text())
            return f"http://127.0.0.1:{note['port']}"
        time.sleep(0.02)
    raise Unavailable(f"the server did not start: {log.read_text(errors='replace')[-500:]}")


def _config(url: str, **fields: Any) -> SandboxConfig:
    given = {"base_url": url, "image": "host", "memory": "256m", "cpus": 1.0, "auto_clear_seconds": 600, **fields}
    return SandboxConfig.model_validate(given)


async def _repeat(count: int, work: Callable[[], Awaitable[Any]]) -> list[float]:
    """Milliseconds of each of `count` calls, after one that does not count."""
    await work()
    values = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        values.append((time.perf_counter() - began) * 1000)
    return values


async def _first_commands(url: str, count: int, pause: float) -> list[float]:
    """Milliseconds from create to the output of the first command."""
    values = []
    for _ in range(count + 1):
        sandbox = Sandbox(_config(url))
        began = time.perf_counter()
        await sandbox.start()
        seen = await sandbox.arun("echo ready")
        values.append((time.perf_counter() - began) * 1000)
        assert seen.output == "ready\n"
        await sandbox.stop()
        await asyncio.sleep(pause)
    return values[1:]


async def _cycles(url: str, seconds: float, width: int) -> list[float]:
    """Create, run and destroy a second, `width` at once, in slices of half a second."""
    done = 0

    async def client() -> None:
        nonlocal done
        async with _sandbox(url) as sandbox:
            await sandbox.arun("true")
        done += 1

    return await _rates([client] * width, lambda: done, seconds)


async def _rates(clients: list[Callable[[], Awaitable[Any]]], done: Callable[[], int], seconds: float) -> list[float]:
    """What `clients`, all at once, each again and again, have `done` a second, in slices of half a second."""
    going_on = True

    async def again(client: Callable[[], Awaitable[Any]]) -> None:
        while going_on:
            await client()

    tasks = [asyncio.create_task(again(client)) for client in clients]
    await asyncio.sleep(0.7)
    rates = []
    for _ in range(int(seconds * 2)):
        before, began = done(), time.perf_counter()
        await asyncio.sleep(0.5)
        rates.append((done() - before) / (time.perf_counter() - began))
    going_on = False
    await asyncio.gather(*tasks)
    return rates


@contextlib.asynccontextmanager
async def _sandbox(url: str, **fields: Any) -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(_config(url, **fields))
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


async def _commands(url: str, count: int) -> list[float]:
    async with _sandbox(url) as sandbox:
        return await _repeat(count, lambda: sandbox.arun("echo hi"))


async def _server_side(count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a command from the request's arrival in the server to its answer, without the socket; and of one
    on a bare bash's pipes on the same loop, in turns with it."""
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        server = Server(dataclasses.replace(Settings.read(), home=Path(home), pool_size=0))
        await server.open()
        try:
            body = _config("http://here").model_dump_json(exclude={"base_url"}).encode()
            made = await _asked(server, ROUTES["create_sandbox"].url(), body, "wait=60")
            path = {"sandbox_id": made["sandbox_id"]}
            url = ROUTES["run"].url(session="default", **path)
            values: list[float] = []
            floor: list[float] = []
            for _ in range(_TURNS):
                values += await _repeat(count // _TURNS, lambda: _asked(server, url, b'{"command": "echo hi"}'))
                floor += await _bare_commands(count // _TURNS)
            await _asked(server, ROUTES["stop_sandbox"].url(**path), b"")
            return values, floor
        finally:
            await server.close()


async def _asked(server: Server, url: str, body: bytes, query: str = "") -> dict[str, Any]:
    status, answer = await call(server.app, "POST", url, body=body, query=query, caller=OPERATOR)
    if status >= 400:
        raise from_wire(json.loads(answer), status)
    reply: dict[str, Any] = json.loads(answer)
    return reply


async def _many_sessions(url: str, seconds: float, width: int) -> list[float]:
    """Commands a second over `width` sessions of four sandboxes, in slices of half a second."""
    async with contextlib.AsyncExitStack() as stack:
        sandboxes = [await stack.enter_async_context(_sandbox(url)) for _ in range(4)]
        done = 0

        async def client(number: int) -> None:
            nonlocal done
            await sandboxes[number % 4].arun("echo hi", session=f"s{number}")
            done += 1

        for n in range(width):
            await sandboxes[n % 4].create_session(CreateBashSessionRequest(session=f"s{n}"))
        return await _rates([functools.partial(client, n) for n in range(width)], lambda: done, seconds)


async def _transfers(url: str, count: int) -> tuple[list[float], list[float], list[float]]:
    """Megabytes a second: (up, down, a plain copy on this disk)."""
    size = 100 << 20
    with tempfile.TemporaryDirectory() as folder:
        source, back, copy = (Path(folder) / name for name in ("source", "back", "copy"))
        source.write_bytes(os.urandom(1 << 20) * 100)
        up: list[float] = []
        down: list[float] = []
        plain: list[float] = []
        async with _sandbox(url, memory="1g") as sandbox:
            for _ in range(count):
                for values, work in (
                    (up, sandbox.fs.upload_file(str(source), "/tmp/big")),
                    (down, sandbox.fs.download_file("/tmp/big", str(back))),
                ):
                    began = time.perf_counter()
                    await work
                    values.append(size / 1e6 / (time.perf_counter() - began))
                began = time.perf_counter()
                with source.open("rb") as reader, copy.open("wb") as writer:
                    while data := reader.read(1 << 20):
                        writer.write(data)
                plain.append(size / 1e6 / (time.perf_counter() - began))
    return up, down, plain


async def _memory(url: str, pid: int, count: int) -> list[float]:
    """Megabytes of memory that one idle sandbox with its default session adds to the server, the launcher and all that
    is below them. What the whole machine has less is noise on one that does anything else."""
    values = []
    for _ in range(3):
        before = _used(pid)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                sandbox = await stack.enter_async_context(_sandbox(url))
                await sandbox.arun("true")
            await asyncio.sleep(1.0)
            values.append((_used(pid) - before) / count / 1e6)
        await asyncio.sleep(1.0)
    return values


def _used(pid: int) -> int:
    """Bytes of a process and all below it, shared pages split among those who share them. Where those may not be looked
    into, by an ordinary user: bytes in use on this machine, without caches that can be given back."""
    with contextlib.suppress(PermissionError):
        return sum(map(_shares, [pid, *(entry.pid for entry in proctree.descendants(proctree.scan(), pid))]))
    lines = Path("/proc/meminfo").read_text().splitlines()
    value = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    given_back = value["MemFree"] + value["Cached"] + value["Buffers"] + value["SReclaimable"] - value["Shmem"]
    return value["MemTotal"] - given_back


def _shares(pid: int) -> int:
    """Bytes of one process; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _install() -> tuple[int, float]:
    """(distributions, megabytes) of the base install: what the package needs, without extras."""
    seen: set[str] = set()
    size = 0
    pending = ["rock-sandbox"]
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in seen:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        seen.add(name)
        for file in found.files or []:
            with contextlib.suppress(OSError):
                size += os.stat(str(found.locate_file(file))).st_size
        pending += [
            match[0] for text in found.requires or []
            if "extra ==" not in text and (match := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text))
        ]  # fmt: skip
    return len(seen), size / 1e6


async def measure(short: bool, inside: tuple[list[float], list[float]]) -> list[Figure]:
    """All rows. `short`: few repetitions, to see that it works. inside: what `_server_side` gave, on its own loop."""
    from rock.runtime.namespace.bench import floor as bare_namespaces
    from rock.runtime.namespace.bench import plain_bash, whole, whole_rates

    n = 5 if short else 40
    rounds = 1 if short else 4
    figures = []
    cold: list[float] = []
    floor: list[float] = []
    with running_server(0) as (url, pid):
        for _ in range(rounds):  # in turns with its floor: a machine's speed changes within a minute
            floor += [1000 * s for s in await whole(n // rounds)]
            cold += await _first_commands(url, n // rounds, 0.05)
        fork = [1000 * s for s in await bare_namespaces(n)]
        made = "a whole sandbox and bash in the launcher"
        figures.append(Figure("create to first command, no pool", "ms", cold, "<= 2.5x floor", made, floor))
        bare = "bare namespaces and bash, forked"
        figures.append(Figure("a whole sandbox in the launcher", "ms", floor, "", bare, fork))
        rates: list[float] = []
        most: list[float] = []
        for _ in range(rounds):
            most += await whole_rates(2 if short else 6, 8)
            rates += await _cycles(url, 1 if short else 4, 8)
        figures.append(
            Figure(
                "create + command + destroy, 8 at once",
                "1/s",
                rates,
                ">= 100, x0.53",
                "the same in the launcher, 8 at once",
                most,
            )
        )
        commands = await _commands(url, 50 if short else 1000)
        figures.append(
            Figure(
                "a command in a session",
                "ms",
                commands,
                "<= 1.0",
                "a command on a bare bash's pipes",
                await _bare_commands(50 if short else 1000),
            )
        )
        figures.append(
            Figure("the same, server side", "ms", inside[0], "<= 0.4", "a command on a bare bash's pipes", inside[1])
        )
        many = await _many_sessions(url, 1 if short else 15, 32)
        figures.append(Figure("commands a second, 32 sessions", "1/s", many, ">= 1500"))
        up, down, plain = await _transfers(url, 1 if short else 5)
        figures.append(Figure("upload of 100 MB", "MB/s", up, ">= 300", "a copy on this disk", plain))
        figures.append(Figure("download of 100 MB", "MB/s", down, ">= 300", "a copy on this disk", plain))
        figures.append(
            Figure("memory of an idle sandbox, all in", "MB", await _memory(url, pid, 5 if short else 50), "<= 2")
        )
    with running_server(4) as (url, _):
        warm = await _first_commands(url, n, 0.15)
        bash = [1000 * s for s in await plain_bash(n)]
        figures.append(
            Figure("create to first command, warm pool", "ms", warm, "<= 5", "bash on pipes, no isolation", bash)
        )
    count, size = _install()
    figures.append(Figure("base install, distributions", "", [float(count)], "<= 40"))
    figures.append(Figure("base install, size", "MB", [size], "<= 60"))
    return figures


async def _bare_commands(count: int) -> list[float]:
    """Milliseconds of `echo hi` in a bash on pipes, its status on a descriptor of its own: no server, no framing."""
    shell = await asyncio.create_subprocess_exec("bash", "--norc", "--noprofile", stdin=-1, stdout=-1)
    assert shell.stdin is not None and shell.stdout is not None
    values = []
    for _ in range(count):
        began = time.perf_counter()
        shell.stdin.write(b"echo hi\n")
        await shell.stdout.readline()
        values.append((time.perf_counter() - began) * 1000)
    shell.stdin.close()
    await shell.wait()
    return values


@app.callback()
def run(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    short: Annotated[bool, typer.Option(help="Few repetitions: does it work at all?")] = False,
) -> None:
    """Measure the embedded runtime on this machine; takes about a minute and a half."""
    inside = serve.run(_server_side(50 if short else 1000))
    rows = [figure.row() for figure in asyncio.run(measure(short, inside))]
    if as_json:
        typer.echo(json.dumps({"figures": rows}, indent=1))
        return
    typer.echo(f"{'':<40} {'unit':>5} {'n':>5} {'min':>9} {'p50':>9} {'p95':>9}  {'target':<14} floor p50, ratio")
    for row in rows:
        floor = row.get("floor")
        beside = f"{floor['p50']:9.2f} x{row['ratio']:.2f}  {floor['name']}" if floor else ""
        typer.echo(
            f"{row['name']:<40} {row['unit']:>5} {row['n']:>5} {row['min']:>9.2f} {row['p50']:>9.2f} "
            f"{row['p95']:>9.2f}  {row['target']:<14} {beside}"
        )
