"""The blocking twin of `rock.sdk.primitives`; written by hand, with the same names."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")

TURN = 1.0  # seconds

sleep = time.sleep


def scope() -> int:
    """What connections may be shared within: all of the process."""
    return 0


def resolve(host: str, port: int) -> list[Any]:
    """Addresses of a host, as `socket.getaddrinfo` gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def connect(sock: socket.socket, address: Any, timeout: float | None) -> None:
    """Connect within `timeout` seconds. OSError, TimeoutError."""
    sock.settimeout(timeout)
    sock.connect(address)


def send(sock: socket.socket, data: bytes | memoryview, timeout: float | None) -> None:
    """Send all of it; `timeout` seconds for the whole. OSError, TimeoutError."""
    sock.settimeout(timeout)
    sock.sendall(data)


def receive(sock: socket.socket, size: int, timeout: float | None) -> bytes:
    """What has come, at most `size` bytes; b"" at the end. OSError, TimeoutError.

    It waits in turns: a signal that arrives just before a system call blocks is only seen after it.
    """
    end = None if timeout is None else time.monotonic() + timeout
    turn = TURN if timeout is None else min(TURN, timeout)
    while True:
        sock.settimeout(turn)
        try:
            return sock.recv(size)
        except TimeoutError as error:
            if error.errno is not None:  # the network's word, not ours
                raise
        if end is not None:
            turn = min(TURN, end - time.monotonic())
            if turn <= 0:
                raise TimeoutError("timed out")


class Waiting(Protocol):
    """A call that waits for what a shared socket receives."""

    done: bool
    waiter: object


class SharedSocket:
    """A socket that one call at a time uses. read: reads it, with `receive`."""

    shared = False

    def __init__(self, sock: socket.socket, read: Callable[[], None]) -> None:
        self._sock = sock
        self._read = read
        sock.settimeout(None)
        # The kernel ends a wait in turns, so that each of them is one system call.
        self._turn = TURN
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _interval(TURN))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _interval(_SEND))

    def claim(self) -> bool:
        """Whether the caller may use it."""
        return True

    def receive(self, size: int) -> bytes | None:
        """What has come; b"" at the end, None where nothing has within a turn. OSError."""
        try:
            return self._sock.recv(size)
        except (BlockingIOError, InterruptedError):
            return None

    def receive_into(self, room: memoryview) -> int | None:
        """As `receive`, into memory; returns the number of bytes, as many as fit where they come within a turn."""
        try:
            return self._sock.recv_into(room, len(room), socket.MSG_WAITALL)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes, later: bool) -> None:
        """Send all of it. OSError."""
        try:
            self._sock.sendall(data)
        except BlockingIOError:
            raise ConnectionAbortedError(f"nothing could be sent for {_SEND:g} s") from None

    def wait(self, call: Waiting, timeout: float | None) -> None:
        """Return when the call is done. TimeoutError."""
        end = None if timeout is None else time.monotonic() + timeout
        turn = TURN
        while not call.done:
            if end is not None:
                turn = min(TURN, end - time.monotonic())
                if turn <= 0:
                    raise TimeoutError
            if turn != self._turn and (turn < TURN or self._turn < TURN):
                self._turn = turn
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _interval(turn))
            self._read()

    def wake(self, call: Waiting) -> None:
        """Nobody waits elsewhere."""

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


_SEND = 60.0  # seconds


def _interval(seconds: float) -> bytes:
    """A `struct timeval`; 0 would be no limit."""
    return struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))


def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call something that may block for a while: this face simply blocks."""
    return function(*args)


def gather(calls: Sequence[Callable[[], T]], limit: int | None = None) -> list[T | BaseException]:
    """Results of all the calls, at most `limit` threads at once; what a call raised stands in its place."""
    if not calls:
        return []
    pool = ThreadPoolExecutor(max_workers=min(limit or 64, len(calls)), thread_name_prefix="rock")
    try:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


class Face:
    """Base of the blocking classes."""


def hinted(call: C) -> C:
    """The call itself: a blocking one has no `await` to forget."""
    return call


class Tasks:
    """Calls that run in daemon threads beside their owner, and the queue of what they deliver. `close` ends them."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def start(self, call: Callable[[], None]) -> None:
        """Begin a call; an error that it raises is delivered by `get`."""
        threading.Thread(target=self._run, args=(call,), name="rock-stream", daemon=True).start()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            with suppress(Closed):
                self.put(error)

    def put(self, item: object) -> None:
        """Deliver an item; waits while 64 are undelivered. Closed after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < 64 or self._closed)
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Any:
        """The next item; raises the error of a call. TimeoutError. It waits in turns, as `receive` does."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._items:
                turn = TURN if end is None else min(TURN, end - time.monotonic())
                if turn <= 0:
                    raise TimeoutError("timed out")
                self._changed.wait(turn)
            item = self._items.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Deliver nothing more; a call ends at its next delivery or request."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Closed(Exception):
    """The owner of a call has gone."""


def settle(call: Callable[[], Any], timeout: float) -> None:
    """Clean up: what it raises is dropped."""
    try:
        call()
    except Exception:
        return
