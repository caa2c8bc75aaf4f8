"""Work that may take as long as somebody elsewhere likes, in a thread of its own: those of the event loop are few, and
for what this machine does by itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LET_GO = 2.0  # seconds


async def in_own_thread(work: Callable[[threading.Event], T], name: str) -> T:
    """What the work gives. On a cancellation it is told to end, and waited for a moment: a registry that is silent
    must not keep a server from stopping, and what is half-made then is removed by whoever opens the store next."""
    gone, loop = threading.Event(), asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not future.cancelled():
            future.set_exception(error)

    def succeed(made: T) -> None:
        if not future.cancelled():
            future.set_result(made)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                made = work(gone)
            except BaseException as raised:
                loop.call_soon_threadsafe(fail, raised)
            else:
                loop.call_soon_threadsafe(succeed, made)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait({future}, timeout=_LET_GO)
        future.cancel()
        raise
