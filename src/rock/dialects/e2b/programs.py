"""Programs that E2B clients started, and pauses of the sandboxes in which they run.

A program is a native background process, so it outlives the connection of its client and the server. This module adds
the time limit of a program, and removes its logs some time after its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rock.dialects.e2b.errors import NotRunning
from rock.dialects.e2b.native import Sandbox
from rock.errors import NotFound, RockError
from rock.protocol.routes import LOG_RUNNING

log = logging.getLogger("rock.e2b")
T = TypeVar("T")

Output = asyncio.Queue[tuple[str, bytes] | Exception | None]

KEPT = 30.0  # seconds for which the end of a program can be read
_WAIT = 60.0  # seconds of a request that waits
_PIECE = 128 << 10  # bytes of output in one event
_MOST_ENDED = 256  # ended programs of all sandboxes that are kept
_MOST_GATES = 4096  # above which those without requests are removed


class Gate:
    """Requests that wait in one sandbox. A pause is refused while requests are in progress, so these are withdrawn for
    a pause and repeated after it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._waiting: set[asyncio.Future[Any]] = set()

    async def run(self, request: Callable[[], Awaitable[T]]) -> T:
        """The result of a request without effects."""
        while True:
            await self._open.wait()
            task = asyncio.ensure_future(request())
            self._waiting.add(task)
            try:
                await asyncio.wait({task})
            finally:
                self._waiting.discard(task)
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            if task.cancelled() and not self._open.is_set():
                continue
            return task.result()

    @property
    def is_idle(self) -> bool:
        return self._open.is_set() and not self._waiting

    async def close(self) -> None:
        """Withdraw the requests until `reopen`."""
        self._open.clear()
        waiting = list(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def reopen(self) -> None:
        self._open.set()


@dataclass
class Program:
    """A program. cmd, args, envs, cwd, tag: as its client gave them. expires_at: of the monotonic clock; None is no
    limit. expired: its time limit killed it."""

    sandbox_id: str
    id: str
    pid: int
    cmd: str
    args: list[str]
    envs: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    tag: str = ""
    expires_at: float | None = None
    expired: bool = False
    task: asyncio.Task[None] | None = None


class Programs:
    """The programs of all sandboxes, by sandbox id and process id."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Program]] = {}
        self._gates: OrderedDict[str, Gate] = OrderedDict()
        self._ended: list[asyncio.Event] = []  # of ended programs that are kept, the oldest first

    async def close(self) -> None:
        """The programs continue without this server."""
        tasks = [program.task for known in self._known.values() for program in known.values() if program.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._known.clear()

    def gate(self, sandbox_id: str) -> Gate:
        gate = self._gates.setdefault(sandbox_id, Gate())
        self._gates.move_to_end(sandbox_id)
        while len(self._gates) > _MOST_GATES and next(iter(self._gates.values())).is_idle:
            self._gates.popitem(last=False)
        return gate

    def forget(self, sandbox_id: str) -> None:
        """A sandbox has ended."""
        for program in self._known.pop(sandbox_id, {}).values():
            if program.task is not None and program.task is not asyncio.current_task():
                program.task.cancel()
        gate = self._gates.pop(sandbox_id, None)
        if gate is not None:
            gate.reopen()

    async def withdraw(self, sandbox_id: str) -> None:
        """Withdraw the requests that wait in a sandbox, before a pause."""
        if sandbox_id in self._gates or sandbox_id in self._known:
            await self.gate(sandbox_id).close()

    def repeat(self, sandbox_id: str) -> None:
        """Repeat the withdrawn requests, after a resume."""
        if sandbox_id in self._gates:
            self._gates[sandbox_id].reopen()

    def of(self, sandbox_id: str) -> dict[str, Program]:
        return self._known.get(sandbox_id, {})

    async def start(
        self, sandbox: Sandbox, program: Program, command: dict[str, Any], seconds: float | None
    ) -> Program:
        """Start a program with a time limit in seconds; None is no limit."""
        made = await sandbox.json("start_process", command)
        program.id, program.pid = made["process_id"], made["pid"]
        program.expires_at = None if seconds is None else time.monotonic() + seconds
        self._known.setdefault(sandbox.id, {})[program.id] = program
        own = sandbox.copy()
        program.task = asyncio.create_task(self._watch(own, program), name=f"e2b-program-{program.id}")
        return program

    async def _watch(self, sandbox: Sandbox, program: Program) -> None:
        """Enforce the time limit of a program, wait for its end, and remove it afterwards."""
        try:
            while await self._runs(sandbox, program):
                pass
            await self._keep()
            with contextlib.suppress(NotFound):
                await sandbox.json("forget_process", process_id=program.id)
        except NotRunning:
            self.forget(program.sandbox_id)
        except RockError as error:
            log.warning("program %s of sandbox %s: %s", program.id, program.sandbox_id, error)
        finally:
            await sandbox.close()
            known = self._known.get(program.sandbox_id, {})
            known.pop(program.id, None)
            if not known:
                self._known.pop(program.sandbox_id, None)

    async def _keep(self) -> None:
        """Wait until an ended program may be removed: it has open descriptors and a log in the server."""
        over = asyncio.Event()
        self._ended.append(over)
        if len(self._ended) > _MOST_ENDED:
            self._ended[0].set()
        try:
            async with asyncio.timeout(KEPT):
                await over.wait()
        except TimeoutError:
            pass
        finally:
            self._ended.remove(over)

    async def _runs(self, sandbox: Sandbox, program: Program) -> bool:
        """Wait for the end or the time limit; whether it may still run."""
        left = _WAIT if program.expires_at is None else program.expires_at - time.monotonic()
        if left <= 0 and not program.expired:
            program.expired = True
            await self.signal(sandbox, program.id, 9)
        wait = max(0.001, min(left, _WAIT)) if not program.expired else _WAIT
        found = await self.info(sandbox, program.id, wait)
        return bool(found["running"])

    # ---- requests ----

    async def info(self, sandbox: Sandbox, process_id: str, wait: float = 0.0) -> dict[str, Any]:
        """A ProcessInfo as plain data. wait: seconds to wait for the end."""

        async def ask() -> dict[str, Any]:
            found = await sandbox.json("get_process", query={"wait": wait} if wait else None, process_id=process_id)
            assert isinstance(found, dict)
            return found

        return await (self.gate(sandbox.id).run(ask) if wait else ask())

    async def signal(self, sandbox: Sandbox, process_id: str, number: int) -> None:
        """Send a signal; SIGKILL is sent to the whole process tree."""
        body = {"signal": number, "tree": number == 9}
        await sandbox.json("signal_process", body, process_id=process_id)

    async def output(
        self, sandbox: Sandbox, process_id: str, starts: tuple[int, int]
    ) -> AsyncGenerator[tuple[str, bytes]]:
        """(stream, bytes) from these offsets of stdout and stderr until both have ended."""
        queue: Output = asyncio.Queue(2)
        readers = [
            asyncio.create_task(self._read(sandbox, process_id, name, start, queue))
            for name, start in zip(("stdout", "stderr"), starts, strict=True)
        ]
        try:
            left = len(readers)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _read(
        self, sandbox: Sandbox, process_id: str, name: str, offset: int, queue: Output
    ) -> None:
        gate = self.gate(sandbox.id)
        try:
            more = True
            while more:
                try:
                    data, more = await logs_of(sandbox, gate, process_id, name, offset)
                except NotFound as error:
                    if not isinstance(error.details.get("offset"), int):
                        raise
                    offset = error.details["offset"]  # that part of the log was lost with the server's file
                    continue
                if data:
                    offset += len(data)
                    await queue.put((name, data))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)


async def logs_of(
    sandbox: Sandbox, gate: Gate, process_id: str, name: str, offset: int
) -> tuple[bytes, bool]:
    """(bytes of a log from `offset`, whether more may follow); waits some time while there are none."""
    query = {"stream": name, "offset": offset, "limit": _PIECE, "wait": _WAIT}

    async def ask() -> tuple[bytes, bool]:
        reply = await sandbox.open("process_logs", query=query, process_id=process_id)
        try:
            return await reply.read(), reply.header(LOG_RUNNING) == "1"
        finally:
            sandbox.done(reply)

    return await gate.run(ask)
