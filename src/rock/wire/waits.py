"""Waiting for what others wait for too."""

from __future__ import annotations

import asyncio
from typing import Any


async def settled(future: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Until it is done, or `seconds` are over; it is not cancelled when who waits is.

    What asyncio.wait and asyncio.shield do, at a third of their cost: every command waits here twice.
    """
    if future.done():
        return
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def end(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    future.add_done_callback(end)
    timer = None if seconds is None else loop.call_later(seconds, end)
    try:
        await over
    finally:
        future.remove_done_callback(end)
        if timer is not None:
            timer.cancel()
