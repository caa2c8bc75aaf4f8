"""Input and output of programs on the event loop: bounded buffers, non-blocking descriptors, streaming to clients."""

from __future__ import annotations

import array
import asyncio
import base64
import os
import select
import stat
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import orjson

from rock.errors import RockError, unexpected
from rock.http.asgi import Answer, Request, dumps
from rock.protocol.routes import STREAM_TYPE, Frame, pack_frame

with suppress(ImportError):  # Windows, where only the fake runtime runs
    import fcntl
    import termios

_MANY, _WITHIN = 16, 0.02  # so many reads within so many seconds count as a flood
_REST = 0.005
_CHUNK = 64 << 10  # the capacity of a pipe; a larger buffer costs more than further reads
_PORTION = 4 << 10


class Capped:
    """A buffer that retains at most `limit` bytes: half from the head, half from the tail; `dropped` counts the
    rest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._head_room = limit - limit // 2
        self._tail_room = limit // 2
        self._head = bytearray()
        self._tail: deque[bytearray] = deque()
        self._tail_size = 0
        self.dropped = 0
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_room - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        if self._tail and len(self._tail[-1]) < _PORTION:
            self._tail[-1] += data  # join short pieces: a thousand short lines must not become a thousand objects
        else:
            self._tail.append(bytearray(data))
        self._tail_size += len(data)
        while self._tail_size - len(self._tail[0]) >= self._tail_room:
            gone = len(self._tail.popleft())
            self._tail_size -= gone
            self.dropped += gone
            if not self._tail:
                return

    def parts(self) -> tuple[bytes, bytes]:
        """The retained head and the retained tail; the tail may slightly exceed its limit."""
        return bytes(self._head), b"".join(self._tail)

    def resume(self, head: bytes, dropped: int, tail: bytes) -> None:
        """Continue from `parts` of a Capped with the same limit, and the count that it had dropped."""
        self._head += head
        self._tail.append(bytearray(tail))
        self._tail_size = len(tail)
        self.dropped = dropped
        self.total = len(head) + dropped + len(tail)

    def take(self) -> tuple[bytes, int]:
        """The retained bytes and the number that was dropped between head and tail; a line marks the gap."""
        tail = b"".join(self._tail)
        over = len(tail) - self._tail_room
        if over > 0:
            tail = tail[over:]
            self.dropped += over
        if not self.dropped:
            return bytes(self._head) + tail, 0
        return bytes(self._head) + b"\n[... %d bytes dropped ...]\n" % self.dropped + tail, self.dropped


def as_text(data: bytes) -> tuple[str, str | None]:
    """(text, base64): base64 of the exact bytes only when they are not UTF-8."""
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), base64.b64encode(data).decode()


class Reader:
    """Reads a non-blocking descriptor whenever it has bytes, and passes them to `sink`.

    The descriptor belongs to the Process; the reader only watches it. `done` is set at end of file. `take` reads:
    os.read, or the method of a spool.
    """

    def __init__(self, fd: int, sink: Callable[[bytes], None]) -> None:
        self.fd = fd
        self.sink = sink
        self.take: Callable[[int, int], bytes] = os.read
        self.done = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._rest: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._reads = 0
        self._terminal = os.isatty(fd)
        self.resume()

    def resume(self) -> None:
        if not self._watching and self._rest is None and not self.done.is_set():
            self._loop.add_reader(self.fd, self._ready)
            self._watching = True

    def begin(self) -> None:
        """Output from now on belongs to another command: several short commands in a row are not a flood."""
        self._reads = 0

    def pause(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._watching:
            self._loop.remove_reader(self.fd)
            self._watching = False

    def _ready(self) -> None:
        self._read(_CHUNK)
        self._reads += 1
        if self._reads >= _MANY and self._watching:
            self._breathe()

    def _breathe(self) -> None:
        """Pause reading for a moment. A program that prints single lines without end would wake the event loop for each
        line; after the pause, one read returns them all."""
        now = self._loop.time()
        often, self._since, self._reads = now - self._since < _WITHIN, now, 0
        if often:
            self.pause()
            self._rest = self._loop.call_later(_REST, self._rested)

    def _rested(self) -> None:
        self._rest = None
        self.resume()

    def _read(self, limit: int) -> int:
        try:
            data = self.take(self.fd, limit)
        except BlockingIOError:
            return 0
        except OSError:  # EIO: the last program on the pty closed it
            data = b""
        if not data:
            self.pause()
            self.done.set()
            return 0
        self.sink(data)
        return len(data)

    def drain(self) -> None:
        """Read what is available now and no more, so that a program that writes without end cannot block the caller."""
        self._take(self._held())
        left = _CHUNK if self._terminal else 0
        while left > 0 and not self.done.is_set():
            # The kernel delivers terminal output to our side with a delay; this call flushes it.
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            poll.poll(0)
            held = self._held()
            if not held:
                return
            self._take(held)
            left -= held

    def _held(self) -> int:
        return 0 if self.done.is_set() else unread(self.fd)

    def _take(self, left: int) -> None:
        while left > 0:
            count = self._read(min(left, _CHUNK))
            if not count:
                return
            left -= count

    def close(self) -> None:
        self.pause()
        self.done.set()


def is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def unread(fd: int) -> int:
    """The number of unread bytes in a pipe, seen from either end, or of bytes to read from a terminal or a socket."""
    size = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, size)
    except OSError:
        return 0
    return size[0]


def write_now(fd: int, data: bytes) -> bytes:
    """Write as much as a non-blocking descriptor accepts at once; returns the rest, empty when the reader is gone."""
    try:
        count = os.write(fd, data)
    except BlockingIOError:
        return data
    except OSError:
        return b""
    return data[count:]


async def write_all(fd: int, data: bytes) -> bool:
    """Write everything to a non-blocking descriptor; False when its reader is gone."""
    view = memoryview(data)
    loop = asyncio.get_running_loop()
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, _set, ready)
            try:
                await ready
            finally:
                loop.remove_writer(fd)
        except OSError:
            return False
    return True


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# ---- streaming ----
#
# Output is sent as frames while the command runs. The client may be slow or disconnect.

_HIGH = 4 << 20  # bytes waiting for the client above which the program is paused
_LOW = 1 << 20


def _nothing() -> None:
    pass


class Streaming:
    """Frames of one running command. `put` takes output; `answer` sends it until the command's result.

    A client that disconnects ends the command, because no one is left to read or stop it.
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
        error = unexpected(error)
    return pack_frame(Frame.ERROR, orjson.dumps(error.to_wire(), default=repr))
