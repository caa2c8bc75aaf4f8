"""What differs between the two faces of the SDK, asynchronous here; `rock.sync.primitives` is its blocking twin.

These two modules are written by hand and have the same names; all else in `rock.sync` is generated from `rock.sdk`.
Sockets are plain non-blocking ones, never transports: a socket then belongs to no event loop, and the same connection
serves calls that each run in an `asyncio.run` of their own.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

from rock.errors import InvalidConfig

P = ParamSpec("P")
T = TypeVar("T")

sleep = asyncio.sleep

_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int] = weakref.WeakKeyDictionary()
_count = 0


def scope() -> int:
    """What connections may be shared within: all of the process, or on Windows one event loop (its completion port)."""
    global _count
    if os.name != "nt":
        return 0
    loop = asyncio.get_running_loop()
    if loop not in _loops:
        _count += 1
        _loops[loop] = _count
    return _loops[loop]


async def resolve(host: str, port: int) -> list[Any]:
    """Addresses of a host, as `socket.getaddrinfo` gives them."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def connect(sock: socket.socket, address: Any, timeout: float | None) -> None:
    """Connect within `timeout` seconds. OSError, TimeoutError."""
    sock.setblocking(False)
    async with asyncio.timeout(timeout):
        await asyncio.get_running_loop().sock_connect(sock, address)


async def send(sock: socket.socket, data: bytes | memoryview, timeout: float | None) -> None:
    """Send all of it; `timeout` seconds for the whole. OSError, TimeoutError."""
    try:
        sent = sock.send(data)
    except BlockingIOError:
        sent = 0
    if sent < len(data):
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_sendall(sock, memoryview(data)[sent:])


async def receive(sock: socket.socket, size: int, timeout: float | None) -> bytes:
    """What has come, at most `size` bytes; b"" at the end. OSError, TimeoutError."""
    if timeout is None:
        return await asyncio.get_running_loop().sock_recv(sock, size)
    async with asyncio.timeout(timeout):
        return await asyncio.get_running_loop().sock_recv(sock, size)


class Waiting(Protocol):
    """A call that waits for what a shared socket receives."""

    done: bool
    waiter: object


class SharedSocket:
    """A socket that the calls of one event loop share. read: reads it for all of them, with `receive`."""

    shared = True

    def __init__(self, sock: socket.socket, read: Callable[[], None]) -> None:
        self._sock = sock
        self._read = read
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent = b""
        self._flush: asyncio.Handle | None = None
        self._writing = False
        sock.setblocking(False)

    def claim(self) -> bool:
        """Use it on the running event loop; False while it belongs to another one."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return True
        with _claims:
            if self._loop is not None and not self._loop.is_closed():
                return False
            self._loop = loop
        self._flush, self._writing, self._unsent = None, False, b""
        loop.add_reader(self._sock, self._read)
        return True

    def receive(self, size: int) -> bytes | None:
        """What has come; b"" at the end, None where nothing has. OSError."""
        try:
            return self._sock.recv(size)
        except (BlockingIOError, InterruptedError):
            return None

    def receive_into(self, room: memoryview) -> int | None:
        """As `receive`, into memory; returns the number of bytes."""
        try:
            return self._sock.recv_into(room)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes, later: bool) -> None:
        """Send all of it. later: with what other calls send in this pass of the loop. OSError."""
        assert self._loop is not None
        if later or self._unsent:
            self._unsent += data
            if self._flush is None and not self._writing:
                self._flush = self._loop.call_soon(self._send_rest)
            return
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(data):
            self._unsent = data[sent:]
            self._watch(True)

    def _send_rest(self) -> None:
        self._flush = None
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._unsent = b""
            self._read()  # reports the end
        self._watch(bool(self._unsent))

    def _watch(self, on: bool) -> None:
        assert self._loop is not None
        if on and not self._writing:
            self._loop.add_writer(self._sock, self._send_rest)
        elif self._writing and not on:
            self._loop.remove_writer(self._sock)
        self._writing = on

    async def wait(self, call: Waiting, timeout: float | None) -> None:
        """Return when the call is done. TimeoutError."""
        assert self._loop is not None
        waiter = call.waiter = self._loop.create_future()
        timer = None if timeout is None else self._loop.call_later(timeout, self.wake, call)
        try:
            await waiter
        finally:
            call.waiter = None
            if timer is not None:
                timer.cancel()
        if not call.done:
            raise TimeoutError

    def wake(self, call: Waiting) -> None:
        """Let `wait` return."""
        waiter = call.waiter
        if isinstance(waiter, asyncio.Future) and not waiter.done():
            waiter.set_result(None)

    def close(self) -> None:
        """Stop reading, and close the socket."""
        if self._loop is not None and not self._loop.is_closed() and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._watch(False)
        self._unsent = b""
        self._sock.close()


_claims = threading.Lock()


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call something that may block for a while, such as a disk."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], limit: int | None = None) -> list[T | BaseException]:
    """Results of all the calls, at most `limit` at once; what a call raised stands in its place."""
    gate = asyncio.Semaphore(limit or max(1, len(calls)))

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)


class Misused(InvalidConfig, TypeError):
    """The asynchronous SDK was used as the blocking one."""


class Face:
    """Base of the asynchronous classes: `with` is an error with a hint."""


def _no_with(self: Face, *error: object) -> NoReturn:
    name = type(self).__name__
    raise Misused(
        f"{name} of the asynchronous SDK was used in `with`",
        hint=f"use `async with`, or the blocking class: from rock.sync import {name}",
    )


for _name in ("__enter__", "__exit__"):
    setattr(Face, _name, _no_with)  # not in the class: type checkers reject `with` then


class Pending(Coroutine[Any, Any, T]):
    """The coroutine of a call. An attribute of its result before `await` is an error with a hint."""

    __slots__ = ("__name__", "__qualname__", "_inner")

    def __init__(self, inner: Coroutine[Any, Any, T]) -> None:
        self._inner = inner
        self.__name__ = self.__qualname__ = str(getattr(inner, "__qualname__", "the call"))

    def __await__(self) -> Generator[Any, Any, T]:
        return self._inner.__await__()

    def send(self, value: Any) -> Any:
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "cr_")):
            return getattr(self._inner, name)
        raise NotAwaited(
            f"the result of {self.__qualname__}() was read before the call was awaited",
            hint="write `await` before the call, or use the blocking class: from rock.sync import Sandbox",
        )


class NotAwaited(InvalidConfig, AttributeError):
    """An attribute of a result was read without `await`."""


def hinted(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A call whose result, read without `await`, is NotAwaited."""

    @functools.wraps(call)
    def begin(*args: P.args, **options: P.kwargs) -> Coroutine[Any, Any, T]:
        return Pending(call(*args, **options))

    return begin


class Tasks:
    """Calls that run beside their owner, and the queue of what they deliver. `close` ends them."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(64)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a call; an error that it raises is delivered by `get`."""
        self._tasks.append(asyncio.create_task(self._run(call)))

    async def _run(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await call()
        except Exception as error:
            await self._queue.put(error)

    async def put(self, item: object) -> None:
        """Deliver an item; waits while 64 are undelivered."""
        await self._queue.put(item)

    async def get(self, timeout: float | None = None) -> Any:
        """The next item; raises the error of a call. TimeoutError."""
        async with asyncio.timeout(timeout):
            item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def close(self) -> None:
        """Cancel the calls and wait for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def settle(call: Callable[[], Awaitable[Any]], timeout: float) -> None:
    """Clean up: run to its end even when the caller is being cancelled; what it raises is dropped."""

    async def quietly() -> None:
        try:
            async with asyncio.timeout(timeout):
                await call()
        except Exception:
            return

    task = asyncio.ensure_future(quietly())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
