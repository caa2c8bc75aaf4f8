"""Retries of coroutines, under ROCK's path."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

__all__ = ["retry_async"]


def retry_async(
    max_attempts: int = 3,
    delay_seconds: float = 1.0,
    backoff: float = 1.0,
    jitter: bool = False,
    exceptions: tuple[type[BaseException], ...] = (Exception,),
) -> Callable[[Callable[P, Awaitable[Result]]], Callable[P, Awaitable[Result]]]:
    """A decorator that calls a coroutine function again after one of `exceptions`, at most `max_attempts` times in all.

    Between two calls it waits `delay_seconds`, times `backoff` more each time, by half to one and a half of that with
    `jitter`. The last exception is raised.
    """

    def decorate(function: Callable[P, Awaitable[Result]]) -> Callable[P, Awaitable[Result]]:
        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            delay = delay_seconds
            for attempt in range(1, max_attempts + 1):
                try:
                    return await function(*args, **kwargs)
                except exceptions:
                    if attempt == max_attempts:
                        raise
                await asyncio.sleep(delay * random.uniform(0.5, 1.5) if jitter else delay)
                delay *= backoff
            raise ValueError(f"max_attempts={max_attempts}: at least one attempt is needed")

        return call

    return decorate
