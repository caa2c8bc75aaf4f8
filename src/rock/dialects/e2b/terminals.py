"""Programs with a terminal: one WebSocket of the data plane each, which this server holds.

A terminal outlives the connection of its client, and ends with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import time
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any
from urllib.parse import urlencode

import orjson

from rock.dialects.e2b.errors import RpcError
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.programs import Program
from rock.errors import from_wire
from rock.http.asgi import App
from rock.protocol.keys import CALLER
from rock.protocol.routes import ROUTES

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_AHEAD = 16  # portions of output that are held for one client
_START_WITHIN = 60.0
_LONGEST_COMMAND = 16 << 10  # bytes: it is a part of a URL


class Terminal:
    """A program with a terminal. exit_code: None while it runs, or when its end is not known."""

    def __init__(self, sandbox: Sandbox, program: Program, data: App) -> None:
        self.program = program
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.ended = asyncio.Event()
        self.started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._sandbox = sandbox
        self._data = data
        self._input: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(_AHEAD)
        self._clients: set[asyncio.Queue[bytes]] = set()

    # ---- the WebSocket ----

    async def run(self, query: str) -> None:
        """Serve the terminal until its program ends."""
        path = ROUTES["terminal"].path.format(sandbox_id=self._sandbox.id)
        scope: dict[str, Any] = {
            "type": "websocket", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "ws", "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "headers": [], "subprotocols": [],
            "client": None, "server": None, "extensions": {"websocket.http.response": {}},
            CALLER: self._sandbox.caller,
        }  # fmt: skip
        self._input.put_nowait({"type": "websocket.connect"})
        try:
            left = None if self.program.expires_at is None else self.program.expires_at - time.monotonic()
            async with asyncio.timeout(left):
                await self._data(scope, self._input.get, self._take)
        except TimeoutError:
            self.program.expired = True
        finally:
            self.ended.set()
            if not self.started.done():
                self.started.set_exception(RpcError("unavailable", "the terminal did not start"))
                self.started.exception()

    async def _take(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.send" and message.get("bytes") is not None:
            for client in list(self._clients):
                await client.put(message["bytes"])
        elif kind == "websocket.send":
            said = orjson.loads(message["text"])
            if "pid" in said and not self.started.done():
                self.started.set_result(said["pid"])
            elif "exit" in said:
                self.exit_code = said["exit"]
            elif "error" in said and not self.started.done():
                self.started.set_exception(from_wire(said))
        elif kind == "websocket.http.response.body" and not self.started.done():
            with contextlib.suppress(orjson.JSONDecodeError):
                self.started.set_exception(from_wire(orjson.loads(message.get("body", b""))))

    # ---- clients ----

    def subscribe(self) -> asyncio.Queue[bytes]:
        """A queue of the output from now on, for `output`; `leave` ends it."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        self._clients.add(queue)
        return queue

    def leave(self, queue: asyncio.Queue[bytes]) -> None:
        self._clients.discard(queue)
        while not queue.empty():  # the terminal may wait until there is room
            queue.get_nowait()

    async def output(self, queue: asyncio.Queue[bytes]) -> AsyncGenerator[bytes]:
        """The output in a queue until the end of the program."""
        over = asyncio.ensure_future(self.ended.wait())
        waiting: asyncio.Future[bytes] | None = None
        try:
            while True:
                waiting = asyncio.ensure_future(queue.get())
                await asyncio.wait({waiting, over}, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield waiting.result()
                    continue
                waiting.cancel()
                while not queue.empty():
                    yield queue.get_nowait()
                return
        finally:
            left = [task for task in (over, waiting) if task is not None and not task.done()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def write(self, data: bytes) -> None:
        """Send input. RpcError where the program has ended."""
        await self._send({"type": "websocket.receive", "bytes": data})

    async def resize(self, rows: int, columns: int) -> None:
        text = orjson.dumps({"resize": [rows, columns]}).decode()
        await self._send({"type": "websocket.receive", "text": text})

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self.ended.is_set():
            raise RpcError("not_found", f"process with pid {self.program.pid} not found: it has ended")
        put = asyncio.ensure_future(self._input.put(message))
        over = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait({put, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (put, over):
                task.cancel()
            await asyncio.gather(put, over, return_exceptions=True)

    async def end(self, number: int) -> None:
        """Send SIGTERM to the program, or end it with its process tree by SIGKILL."""
        if number != 9:
            command = ["/bin/sh", "-c", f"kill -{number} {int(self.program.pid)}"]
            await self._sandbox.json("execute", {"command": command, "timeout": 30.0})
            return
        self.signal = 9
        await self._send({"type": "websocket.disconnect", "code": 1000})


class Terminals:
    """The terminals of all sandboxes."""

    def __init__(self, data: App) -> None:
        self._data = data
        self._known: dict[str, dict[int, Terminal]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of(self, sandbox_id: str) -> list[Terminal]:
        return list(self._known.get(sandbox_id, {}).values())

    async def start(
        self, sandbox: Sandbox, program: Program, env: dict[str, str], cwd: str, user: str | None,
        size: tuple[int, int], seconds: float | None,
    ) -> tuple[Terminal, asyncio.Queue[bytes]]:  # fmt: skip
        """Start a program on a terminal of (rows, columns); the queue has all of its output. RpcError, RockError."""
        for name in env:
            if not _NAME.fullmatch(name):
                raise RpcError("invalid_argument", f"field 'process.envs': {name[:80]!r} is no name of a variable")
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
        command = exports + "exec " + shlex.join([program.cmd, *program.args])
        if len(command.encode("utf-8", "surrogatepass")) > _LONGEST_COMMAND:
            raise RpcError("invalid_argument", f"the command and the variables of a terminal have over "
                                               f"{_LONGEST_COMMAND} bytes: set fewer variables")  # fmt: skip
        query = {"rows": size[0], "columns": size[1], "command": command, "cwd": cwd, "pid": 1}
        if user is not None:
            query["user"] = user
        program.expires_at = None if seconds is None else time.monotonic() + seconds
        terminal = Terminal(sandbox.copy(), program, self._data)
        queue = terminal.subscribe()
        task = asyncio.create_task(self._run(terminal, urlencode(query)), name="e2b-terminal")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(_START_WITHIN):
                program.pid = await asyncio.shield(terminal.started)
        except BaseException:
            task.cancel()
            raise
        if not terminal.ended.is_set():
            self._known.setdefault(sandbox.id, {})[program.pid] = terminal
        return terminal, queue

    async def _run(self, terminal: Terminal, query: str) -> None:
        try:
            await terminal.run(query)
        finally:
            known = self._known.get(terminal.program.sandbox_id, {})
            known.pop(terminal.program.pid, None)
            if not known:
                self._known.pop(terminal.program.sandbox_id, None)
