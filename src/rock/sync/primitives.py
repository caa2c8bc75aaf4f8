"""The blocking twin of `rock.sdk.primitives`; written by hand, with the same names."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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


def settle(call: Callable[[], Any], timeout: float) -> None:
    """Clean up: what it raises is dropped."""
    try:
        call()
    except Exception:
        return
