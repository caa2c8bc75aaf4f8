"""An interactive program on a pty, over a WebSocket; `rock shell` uses it."""

from __future__ import annotations

import asyncio
import contextlib

import orjson

from rock.errors import InvalidConfig
from rock.http.asgi import Receive, Request, Send, SocketHandler
from rock.rocklet.commands.output import Reader, write_all
from rock.rocklet.node import Node
from rock.rocklet.sandbox import Supervisor
from rock.runtime.base import Process, Program

_HIGH = 1 << 20


def handler(node: Node) -> SocketHandler:
    async def terminal(request: Request, receive: Receive, send: Send) -> None:
        sandbox = node.get(request.path["sandbox_id"])
        size = (
            request.integer("rows", 24, low=1, high=10_000),
            request.integer("columns", 80, low=1, high=10_000),
        )
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        with sandbox.active():
            process = await _start(sandbox, request, size)
            try:
                if request.flag("pid"):
                    await send({"type": "websocket.send", "text": orjson.dumps({"pid": process.pid}).decode()})
                await _Bridge(process, receive, send).run()
            finally:
                await process.kill_tree()
                process.close()

    return terminal


async def _start(sandbox: Supervisor, request: Request, size: tuple[int, int]) -> Process:
    command = request.query.get("command")
    sh = await sandbox.sessions.find_shell()
    interactive = [sh.path, "-i"] if not sh.dialect.is_bash else [sh.path, "--norc", "-i"]
    argv = [sh.path, "-c", command] if command else interactive
    env = {"TERM": request.query.get("term") or "xterm-256color", "PS1": "\\u@\\h:\\w\\$ "}
    return await sandbox.runtime.spawn(
        sandbox.handle,
        Program(argv, env=env, cwd=request.query.get("cwd"), user=request.query.get("user"), stdin="pipe", pty=size),
    )


class _Bridge:
    """Bytes between a pty and a WebSocket, until the program ends or the client disconnects."""

    def __init__(self, process: Process, receive: Receive, send: Send) -> None:
        self._process = process
        self._receive = receive
        self._send = send
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting = 0
        assert process.stdout is not None
        self._reader = Reader(process.stdout, self._on_output)

    def _on_output(self, data: bytes) -> None:
        self._out.put_nowait(data)
        self._waiting += len(data)
        if self._waiting > _HIGH:
            self._reader.pause()

    async def run(self) -> None:
        tasks = [asyncio.ensure_future(work) for work in (self._to_client(), self._from_client(), self._process.wait())]
        to_client, from_client, ended = tasks
        try:
            await asyncio.wait({from_client, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                self._reader.drain()
                self._out.put_nowait(b"")  # end marker: all output before it is sent
                await asyncio.wait({to_client})
                code = ended.result().shell_code  # type: ignore[union-attr]
                with contextlib.suppress(RuntimeError):
                    await self._send({"type": "websocket.send", "text": orjson.dumps({"exit": code}).decode()})
                    await self._send({"type": "websocket.close", "code": 1000})
        finally:
            self._reader.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _to_client(self) -> None:
        while True:
            data = await self._out.get()
            if not data:
                return
            await self._send({"type": "websocket.send", "bytes": data})
            self._waiting -= len(data)
            if self._waiting < _HIGH // 2:
                self._reader.resume()

    async def _from_client(self) -> None:
        assert self._process.stdin is not None
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            if data is None:
                await self._control(message.get("text") or "")
            elif not await write_all(self._process.stdin, data):
                return

    async def _control(self, text: str) -> None:
        try:
            rows, columns = orjson.loads(text)["resize"]
            valid = all(isinstance(n, int) and 1 <= n <= 10_000 for n in (rows, columns))
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise InvalidConfig(f"invalid message of a terminal: {text[:80]!r}",
                                hint='send text frames of the form {"resize": [24, 80]}, and input as binary frames')
        await self._process.resize(rows, columns)
