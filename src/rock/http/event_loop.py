"""Long work on the event loop, in portions: each pass of the loop runs one portion of all waiting work.

When many connections have much to parse, other tasks wait for one portion in total, not for one portion per connection.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

BUDGET = 0.001  # seconds per portion


class Rounds:
    """The waiting work of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def soon(self, work: Callable[[], None]) -> None:
        """Call the function in a pass of its own."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self.loop.call_soon(self._next)

    async def wait(self) -> None:
        """Return in a pass of its own."""
        turn = self.loop.create_future()
        self.soon(lambda: None if turn.done() else turn.set_result(None))
        await turn

    def _next(self) -> None:
        work = self._waiting[0]
        try:
            work()
        finally:
            self._waiting.popleft()
            if self._waiting:
                self.loop.call_soon(self._next)


_last: Rounds | None = None


def rounds() -> Rounds:
    """The queue of the running loop."""
    global _last
    loop = asyncio.get_running_loop()
    if _last is None or _last.loop is not loop:
        _last = Rounds(loop)
    return _last


# ---- waiting for shared work ----

async def settled(future: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Wait until the future is done, or `seconds` are over; a cancellation of the caller does not cancel it.

    Equivalent to asyncio.wait and asyncio.shield, at a third of their cost: every command waits here twice.
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


# ---- tasks that begin at once ----

class _Begun:
    """The current task of a coroutine that has begun and has no task yet. `asyncio.timeout` keeps it, and calls its
    methods later: they are those of the task that follows."""

    __slots__ = ("_canceled", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self._canceled = False

    def cancel(self, msg: Any = None) -> bool:
        if self.task is not None:
            return self.task.cancel(msg)
        self._canceled = True  # by itself, before its first suspension
        return True

    def cancelling(self) -> int:
        return int(self._canceled) if self.task is None else self.task.cancelling()

    def uncancel(self) -> int:
        if self.task is not None:
            return self.task.uncancel()
        self._canceled = False
        return 0

    def follow(self, task: asyncio.Task[None]) -> None:
        """The coroutine goes on in a task."""
        self.task = task
        if self._canceled:
            task.cancel()


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], yielded: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine, which has yielded something already."""
    while True:
        try:
            value = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            step = partial(coroutine.throw, error)
        else:
            step = partial(coroutine.send, value)
        try:
            yielded = step()
        except StopIteration:
            return


async def _go_on(coroutine: Coroutine[Any, Any, None], yielded: Any) -> None:
    await _rest(coroutine, yielded)


def begin(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine up to its first suspension at once, and the rest in a task. None when it has ended. It must not
    be called from a task."""
    context = contextvars.copy_context()
    begun = _Begun()
    asyncio.tasks._enter_task(loop, begun)  # type: ignore[arg-type]  # as eager tasks of Python 3.12 do
    try:
        yielded = context.run(coroutine.send, None)
    except StopIteration:
        return None
    finally:
        asyncio.tasks._leave_task(loop, begun)  # type: ignore[arg-type]
    task = loop.create_task(_go_on(coroutine, yielded), context=context)
    begun.follow(task)
    return task
