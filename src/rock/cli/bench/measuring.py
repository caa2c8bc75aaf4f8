"""The measurements of `rock bench`: a server in a separate process, accessed by the SDK over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rock.cli.bench.floors import bare_commands, serving
from rock.cli.serve.serve import Server
from rock.errors import from_wire
from rock.guest.init import process_tree
from rock.http.asgi import call
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.keys import OPERATOR
from rock.protocol.routes import OTHER_KEY, ROUTES
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.sandbox.client import Sandbox
from rock.sdk.transport import Transport
from rock.settings import Settings, child_environment

_TURNS = 5


@contextlib.contextmanager
def running_server(pool: int) -> Iterator[tuple[str, int]]:
    """A separate server: (URL, pid). It is stopped, with every sandbox, at the end."""
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        environment = child_environment(ROCK_HOME=home, ROCK_POOL_SIZE=str(pool))
        words = ("-m", "rock.cli.server", "--host", "127.0.0.1", "--port", "0")
        with serving(home, *words, env=environment) as found:
            yield found


def config_for(url: str, **fields: Any) -> SandboxConfig:
    given = {"base_url": url, "image": "host", "memory": "256m", "cpus": 1.0, "auto_clear_seconds": 600, **fields}
    return SandboxConfig.model_validate(given)


async def _repeat(count: int, work: Callable[[], Awaitable[Any]]) -> list[float]:
    """Milliseconds of each of `count` calls, after one warm-up call."""
    await work()
    values = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        values.append((time.perf_counter() - began) * 1000)
    return values


async def first_commands(url: str, count: int, pause: float) -> list[float]:
    """Milliseconds from create to the output of the first command."""
    values = []
    for _ in range(count + 1):
        sandbox = Sandbox(config_for(url))
        began = time.perf_counter()
        await sandbox.start()
        seen = await sandbox.arun("echo ready")
        values.append((time.perf_counter() - began) * 1000)
        assert seen.output == "ready\n"
        await sandbox.stop()
        await asyncio.sleep(pause)
    return values[1:]


async def cycles(url: str, seconds: float, width: int) -> list[float]:
    """Create, run and destroy cycles per second, `width` concurrently, in slices of half a second."""
    done = 0

    async def client() -> None:
        nonlocal done
        async with _sandbox(url) as sandbox:
            await sandbox.arun("true")
        done += 1

    return await _rates([client] * width, lambda: done, seconds)


async def _rates(clients: list[Callable[[], Awaitable[Any]]], done: Callable[[], int], seconds: float) -> list[float]:
    """Rate of `done` over all concurrent `clients`, each repeated, per second, in slices of half a second."""
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
    sandbox = Sandbox(config_for(url, **fields))
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


async def commands(url: str, bare_url: str, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a command, alternating with one by a minimal server."""
    bare = Transport(bare_url)
    values: list[float] = []
    floor: list[float] = []
    async with _sandbox(url) as sandbox:
        for _ in range(_TURNS):
            values += await _repeat(count // _TURNS, lambda: sandbox.arun("echo hi"))
            floor += await _repeat(count // _TURNS, lambda: bare.call("POST", "/", b'{"command": "echo hi"}'))
    return values, floor


async def server_side(count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a command from the request's arrival in the server to its response, without the socket;
    alternating with one on a plain bash's pipes on the same loop."""
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        server = Server(dataclasses.replace(Settings.read(), home=Path(home), pool_size=0))
        await server.open()
        try:
            body = config_for("http://here").model_dump_json(exclude={"base_url"}).encode()
            made = await _asked(server, ROUTES["create_sandbox"].url(), body, "wait=60")
            path = {"sandbox_id": made["sandbox_id"]}
            url = ROUTES["run"].url(session="default", **path)
            values: list[float] = []
            floor: list[float] = []
            for _ in range(_TURNS):
                values += await _repeat(count // _TURNS, lambda: _asked(server, url, b'{"command": "echo hi"}'))
                floor += await bare_commands(count // _TURNS)
            await _asked(server, ROUTES["stop_sandbox"].url(**path), b"")
            return values, floor
        finally:
            await server.close()


async def _asked(server: Server, url: str, body: bytes, query: str = "") -> dict[str, Any]:
    key = {OTHER_KEY: server.settings.api_key or server.home.owner_key}
    status, answer = await call(server.app, "POST", url, body=body, query=query, headers=key, caller=OPERATOR)
    if status >= 400:
        raise from_wire(json.loads(answer), status)
    reply: dict[str, Any] = json.loads(answer)
    return reply


async def many_sessions(url: str, seconds: float, width: int) -> list[float]:
    """Commands per second over `width` sessions of four sandboxes, in slices of half a second."""
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


async def many_bare(bare_url: str, seconds: float, width: int) -> list[float]:
    """The same by a minimal server."""
    bare = Transport(bare_url)
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        await bare.call("POST", f"/{number}", b'{"command": "echo hi"}')
        done += 1

    return await _rates([functools.partial(client, n) for n in range(width)], lambda: done, seconds)


async def transfers(url: str, count: int) -> tuple[list[float], list[float], list[float]]:
    """Megabytes per second: (up, down, a plain copy on this disk)."""
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


async def memory(url: str, pid: int, count: int) -> list[float]:
    """Megabytes of memory that one idle sandbox with its default session adds to the process tree of server and
    launcher. The free memory of the whole machine would include noise of other programs."""
    values = []
    for _ in range(3):
        before = used_memory(pid)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                sandbox = await stack.enter_async_context(_sandbox(url))
                await sandbox.arun("true")
            await asyncio.sleep(1.0)
            values.append((used_memory(pid) - before) / count / 1e6)
        await asyncio.sleep(1.0)
    return values


def used_memory(pid: int) -> int:
    """Memory of a process tree in bytes, shared pages divided among their users (PSS). Where an ordinary user cannot
    read it: bytes in use on this machine, without reclaimable caches."""
    with contextlib.suppress(PermissionError):
        return sum(map(_shares, [pid, *(entry.pid for entry in process_tree.descendants(process_tree.scan(), pid))]))
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


def install() -> tuple[int, float]:
    """(distributions, megabytes) of the base install: the package's dependencies, without extras."""
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
