"""Processes that run the rocklets of a fake cluster: thousands of pods do not share the event loop of its API server.

    FakeCluster ── a line of JSON for each request ──► a process in `main`
                ◄── a line for each response, and for each machine that ended by itself ──┘

A host ends with its standard input, and so with the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rock.settings import child_environment
from rock.testing.kubernetes.nodes import EmbeddedRocklet

_LONGEST = 1 << 20  # bytes of a line
_ENDING = 30.0  # seconds


class Hosts:
    """Some host processes, started with the first machine."""

    def __init__(self, count: int) -> None:
        self._hosts = [Host() for _ in range(count)]
        self._next = itertools.cycle(self._hosts)

    def machine(self, home: Path) -> HostedRocklet:
        return HostedRocklet(next(self._next), home)

    async def close(self) -> None:
        await asyncio.gather(*(host.close() for host in self._hosts))


class Host:
    """A process that runs rocklets."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}

    async def start(self, home: Path, address: str, environment: Mapping[str, str]) -> int:
        """Start a rocklet; its number. RuntimeError with the reason."""
        async with self._starting:
            if self._process is None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", "from rock.testing.kubernetes.hosts import main; main()",
                    env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=_LONGEST)  # fmt: skip
                self._reader = asyncio.create_task(self._read(self._process), name="host of rocklets")
        number = next(self._numbers)
        self._ended[number] = asyncio.get_running_loop().create_future()
        await self._request(number, op="start", home=str(home), address=address, environment=dict(environment))
        return number

    async def ended(self, number: int) -> int:
        return await asyncio.shield(self._ended[number])

    async def stop(self, number: int, grace: float) -> None:
        await self._request(next(self._numbers), op="stop", machine=number, grace=grace)

    async def _request(self, number: int, **fields: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            if self._reader is None or self._reader.done():
                raise RuntimeError("the process that runs the rocklets has ended")
            self._process.stdin.write(json.dumps({"id": number, **fields}).encode() + b"\n")
            await waiting
        finally:
            self._waiting.pop(number, None)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                said = json.loads(line)
                if "ended" in said:
                    if not (ended := self._ended[said["ended"]]).done():
                        ended.set_result(said["status"])
                elif (waiting := self._waiting.get(said["id"])) is not None and not waiting.done():
                    if said.get("error"):
                        waiting.set_exception(RuntimeError(said["error"]))
                    else:
                        waiting.set_result(None)
        finally:
            for one in self._waiting.values():
                if not one.done():
                    one.set_exception(RuntimeError("the process that runs the rocklets has ended"))
            for over in self._ended.values():
                if not over.done():
                    over.set_result(137)

    async def close(self) -> None:
        """End the process with all of its rocklets. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_ENDING):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)


class HostedRocklet:
    """A rocklet with the fake runtime in a host process. See `nodes.Machine`."""

    def __init__(self, host: Host, home: Path) -> None:
        self._host = host
        self._home = home
        self._number = 0

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        self._number = await self._host.start(self._home, address, environment)

    async def ended(self) -> int:
        return await self._host.ended(self._number)

    async def stop(self, grace: float) -> None:
        if self._number:
            with contextlib.suppress(RuntimeError):  # it has ended with its process
                await self._host.stop(self._number, grace)


# ---- in the host process ----


class _Served:
    """Serves the requests of standard input."""

    def __init__(self) -> None:
        self._machines: dict[int, EmbeddedRocklet] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_LONGEST)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            task = asyncio.create_task(self._answer(json.loads(line)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*(machine.stop(0.0) for machine in self._machines.values()), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, request: dict[str, Any]) -> None:
        number, error = int(request["id"]), ""
        try:
            if request["op"] == "start":
                machine = self._machines[number] = EmbeddedRocklet(Path(request["home"]))
                await machine.start(request["address"], request["environment"])
            elif (known := self._machines.pop(int(request["machine"]), None)) is not None:
                await known.stop(float(request["grace"]))
        except Exception as problem:
            self._machines.pop(number, None)
            error = repr(problem)
        _say({"id": number, "error": error})
        if request["op"] == "start" and not error:
            _say({"ended": number, "status": await machine.ended()})


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the cluster ends it
    gc.freeze()
    asyncio.run(_Served().run())
