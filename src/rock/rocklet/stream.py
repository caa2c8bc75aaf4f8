"""Output while it is made, as frames, to a client that may be slow or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import orjson

from rock.errors import InternalServerRockError, RockError
from rock.protocol.routes import STREAM_TYPE, Frame, pack_frame
from rock.wire.asgi import Answer, Request, dumps

_HIGH = 4 << 20  # bytes waiting for the client above which the program has to wait
_LOW = 1 << 20


def _nothing() -> None:
    pass


class Streaming:
    """Frames of one running command. `put` takes output; `answer` sends it until the command's result.

    A client that leaves ends the command: nobody is there to read it or to stop it.
    """

    def __init__(self, pause: Callable[[], None] = _nothing, resume: Callable[[], None] = _nothing) -> None:
        self.pause = pause
        self.resume = resume
        self._parts: list[bytes] = []
        self._size = 0
        self._ready = asyncio.Event()
        self._paused = False

    def put(self, is_errors: bool, data: bytes) -> None:
        self._parts.append(pack_frame(Frame.STDERR if is_errors else Frame.STDOUT, data))
        self._size += len(data)
        self._ready.set()
        if self._size > _HIGH:
            self._paused = True
            self.pause()  # each time: another stream of the same session may have resumed it

    def answer(self, work: Coroutine[Any, Any, Any], request: Request) -> Answer:
        return Answer(stream=self._frames(work, request), content_type=STREAM_TYPE.encode())

    async def _frames(self, work: Coroutine[Any, Any, Any], request: Request) -> AsyncGenerator[bytes]:
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(request.disconnected())
        task.add_done_callback(lambda _: self._ready.set())
        gone.add_done_callback(lambda _: self._ready.set())
        try:
            while not gone.done():
                await self._ready.wait()
                self._ready.clear()
                parts, self._parts, self._size = self._parts, [], 0
                if parts:
                    yield b"".join(parts)
                if self._paused and self._size < _LOW:
                    self._paused = False
                    self.resume()
                if task.done() and not self._parts:
                    yield _last(task)
                    return
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


def _last(task: asyncio.Future[Any]) -> bytes:
    error = task.exception()
    if error is None:
        return pack_frame(Frame.RESULT, dumps(task.result()))
    if not isinstance(error, RockError):
        error = InternalServerRockError(f"{type(error).__name__}: {error}")
    return pack_frame(Frame.ERROR, orjson.dumps(error.to_wire(), default=repr))
