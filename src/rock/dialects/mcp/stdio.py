"""The transport over standard input and output: one message on each line. The process is the session."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import orjson

from rock.dialects.api import Api
from rock.dialects.mcp.context import Session, ToolContext
from rock.dialects.mcp.messages import (
    INVALID_REQUEST,
    LONGEST,
    Failure,
    Message,
    error_response,
    failure_of,
    id_of,
    message_of,
    parsed,
    response,
)
from rock.dialects.mcp.protocol import initialized, result_of
from rock.errors import RockError

_CHUNK = 64 << 10
_LAST = 1.0  # seconds for requests in progress at the end of the input
_MOST = 64  # requests in progress; further lines wait


class StdioServer:
    """Serves one client. base_url: the address of the server, for URLs in results. source: a file descriptor."""

    def __init__(self, api: Api, session: Session, base_url: str, source: int, target: BinaryIO) -> None:
        self._api = api
        self._session = session
        self._context = ToolContext(api, session, base_url)
        self._source = source
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Serve until the end of the input; then cancel what has not ended within a second, and stop the sandbox of the
        session."""
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        free = threading.Semaphore(_MOST)
        loop = asyncio.get_running_loop()

        def push(line: bytes | None) -> None:
            try:
                loop.call_soon_threadsafe(lines.put_nowait, line)
            except RuntimeError:  # the loop has ended
                pass

        threading.Thread(target=_read, args=(self._source, free, push), daemon=True, name="mcp input").start()
        try:
            while (line := await lines.get()) is not None:
                task = asyncio.create_task(self._line(line, free))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if self._tasks:  # the requests of a script that ends its input at once
                await asyncio.wait(set(self._tasks), timeout=_LAST)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._session.close(self._api)

    async def _line(self, line: bytes, free: threading.Semaphore) -> None:
        try:
            reply = await self._reply(line)
            if reply is not None:
                self._target.write(orjson.dumps(reply, default=repr) + b"\n")
                self._target.flush()
        except BrokenPipeError:
            pass  # the client has ended; its end of the input follows
        finally:
            free.release()

    async def _reply(self, line: bytes) -> dict[str, Any] | None:
        value: Any = None
        try:
            if len(line) > LONGEST:
                raise Failure(INVALID_REQUEST, f"the message has more than {LONGEST} bytes")
            value = parsed(line)
            message = message_of(value)
        except Failure as error:
            return error_response(id_of(value), error)
        if message.method is None or message.id is None:
            if message.method == "notifications/cancelled":
                self._session.cancel(message.params.get("requestId"))
            return None
        try:
            return response(message.id, await self._result(message))
        except Failure as error:
            return error_response(message.id, error)
        except RockError as error:
            return error_response(message.id, failure_of(error))

    async def _result(self, message: Message) -> dict[str, Any]:
        if message.method == "initialize":
            return initialized(message.params)
        return await result_of(message, self._context, None)


def _read(source: int, free: threading.Semaphore, push: Callable[[bytes | None], None]) -> None:
    """Read lines in a thread. Of a line that is too long, only the beginning is passed on.

    It reads the descriptor: a thread that waits in a buffered file would abort the interpreter at its end.
    """
    line = bytearray()
    while data := os.read(source, _CHUNK):
        *ended, rest = data.split(b"\n")
        for part in ended:
            line += part[: LONGEST + 1 - len(line)]
            if line.strip():
                free.acquire()
                push(bytes(line))
            line.clear()
        line += rest[: LONGEST + 1 - len(line)]
    push(None)
