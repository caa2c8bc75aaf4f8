"""Connects the local terminal to a program in a sandbox, over a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from rock.cli.parsing import TIMED_OUT
from rock.errors import Unavailable, Unsupported, from_wire
from rock.protocol.routes import ROUTES
from rock.sdk.forward import web_socket
from rock.sdk.http import query_string
from rock.sdk.sandbox.link import headers_of
from rock.settings import terminal_environment
from rock.sync import Sandbox

DETACH_HINT = "the sandbox was not changed; connect again, or see `rock ps -a`"
END_OF_INPUT = b"\x04"


async def attend(sandbox: Sandbox, query: dict[str, object], timeout: float | None = None) -> int:
    """Connect this terminal until the program inside ends; returns its exit code. timeout: seconds after which the
    program is killed and the exit code is 124."""
    try:
        async with await web_socket(sandbox.url, _target(sandbox, query), headers_of(sandbox.config)) as socket:
            with _raw_terminal():
                limit = asyncio.timeout(timeout)
                try:
                    async with limit:
                        return await _Terminal(socket).run()
                except TimeoutError:
                    if not limit.expired():
                        raise
        print(f"error: timed out after {timeout:g} s; the program was killed", file=sys.stderr)
        return TIMED_OUT
    except ConnectionClosed as error:
        raise Unavailable(f"the server closed the terminal: {error}", hint=DETACH_HINT) from None


def _target(sandbox: Sandbox, query: dict[str, object]) -> str:
    size = _size(sys.stdin.fileno()) or shutil.get_terminal_size()
    term = terminal_environment().get("TERM")
    values = {"rows": size.lines, "columns": size.columns, "term": term, **query}
    return ROUTES["terminal"].url(sandbox_id=sandbox.sandbox_id or "") + query_string(values)


def _size(fd: int) -> os.terminal_size | None:
    """The size of the terminal itself, which COLUMNS and LINES do not change; None when it has none."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return size if size.lines and size.columns else None


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Raw mode for the block: every key goes to the program. The terminal is always restored."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import termios
        import tty
    except ImportError:
        raise Unsupported("an interactive shell needs a Unix terminal", hint="use rock exec") from None
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setraw(handle, termios.TCSADRAIN)  # preserves typed-ahead input
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


class _Terminal:
    """Transfers bytes between this terminal and a WebSocket."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._input: asyncio.Queue[bytes | str] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._keyboard = sys.stdin.fileno()

    async def run(self) -> int:
        resize = getattr(signal, "SIGWINCH", None)
        if resize is not None and sys.stdin.isatty():
            self._loop.add_signal_handler(resize, self._resized)
        for number in (signal.SIGTERM, signal.SIGHUP):
            task = asyncio.current_task()
            assert task is not None
            self._loop.add_signal_handler(number, task.cancel)
        sender = asyncio.create_task(self._send())
        reading = self._start_reading()
        try:
            return await self._receive()
        finally:
            sender.cancel()
            if reading:
                self._loop.remove_reader(self._keyboard)

    def _start_reading(self) -> bool:
        try:
            self._loop.add_reader(self._keyboard, self._typed)
        except PermissionError:  # a regular file: epoll does not support it
            self._input.put_nowait(sys.stdin.buffer.read())
            self._input.put_nowait(END_OF_INPUT)
            return False
        return True

    def _typed(self) -> None:
        data = os.read(self._keyboard, 65536)
        if not data:
            self._loop.remove_reader(self._keyboard)
            data = END_OF_INPUT
        self._input.put_nowait(data)

    def _resized(self) -> None:
        size = _size(self._keyboard)
        if size is not None:
            self._input.put_nowait(json.dumps({"resize": [size.lines, size.columns]}))

    async def _send(self) -> None:
        while True:
            await self._socket.send(await self._input.get())

    async def _receive(self) -> int:
        async for message in self._socket:
            if isinstance(message, str):
                said: dict[str, Any] = json.loads(message)
                if "error" in said:
                    raise from_wire(said)
                if "exit" in said:
                    return 125 if said["exit"] is None else int(said["exit"])
            else:
                await asyncio.to_thread(_write, message)
        raise Unavailable("the server closed the terminal", hint=DETACH_HINT)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
