"""ROCK's path of helpers that scripts of its users import. Ours are where they belong; nothing of ours imports this."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from rock.errors import Unavailable
from rock.utils.retry import retry_async
from rock.utils.system import extract_nohup_pid, find_free_port, get_host_ip

__all__ = ["Timer", "extract_nohup_pid", "find_free_port", "get_host_ip", "retry_async", "run_until_complete",
           "wait_until_alive"]  # fmt: skip

Result = TypeVar("Result")


class Timer:
    """`with Timer("step") as timer:`; `timer.elapsed` is seconds afterwards."""

    def __init__(self, description: str = "Execution") -> None:
        self.description = description
        self.elapsed = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.elapsed = time.perf_counter() - self._began


def run_until_complete(coro: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, run in an event loop of this call. RuntimeError inside a running loop."""
    return asyncio.run(coro)


async def wait_until_alive(
    function: Callable[..., Awaitable[Any]],
    timeout: float = 10.0,
    function_timeout: float | None = 0.1,
    sleep: float = 0.25,
) -> None:
    """Call `function` until its result is truthy. Unavailable after `timeout` seconds, with the last error."""
    end, last = time.monotonic() + timeout, "it never was alive"
    while time.monotonic() < end:
        try:
            if await asyncio.wait_for(function(), function_timeout):
                return
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
        await asyncio.sleep(sleep)
    raise Unavailable(f"no check succeeded within {timeout:g} seconds: {last}",
                      hint="raise timeout, or check the log of the service")

