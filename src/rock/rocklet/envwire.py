"""The two ends of the pipes between the rocklet and guest/envhost.py, on the event loop and without a thread."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from rock.errors import InvalidConfig
from rock.guest import envhost
from rock.rocklet.streams import Reader

_READ = 1 << 18
_HELLO = b'{"hello": "'
_STDERR_KEPT = 8192

Message = dict[str, Any]


class Outlet:
    """Writes messages to a pipe, and keeps what does not fit until it does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._watching = False

    def send(self, stream: int, message: Message) -> None:
        """InvalidConfig for what JSON cannot hold. That the reader is gone is no error: it is told elsewhere."""
        try:
            payload = json.dumps(message).encode()
        except (TypeError, ValueError) as error:
            raise InvalidConfig(f"an environment can only be given what JSON holds: {error}") from None
        idle = not self._waiting
        self._waiting.extend(envhost.pieces(stream, payload))
        if idle:
            self._write()

    def _write(self) -> None:
        """A piece is small enough that the kernel takes it whole or not at all."""
        while self._waiting:
            try:
                os.write(self._fd, self._waiting[0])
            except BlockingIOError:
                if not self._watching:
                    self._watching = True
                    asyncio.get_running_loop().add_writer(self._fd, self._write)
                return
            except OSError:
                self._waiting.clear()
                break
            self._waiting.popleft()
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_writer(self._fd)

    def drop(self) -> None:
        """Forget what waits, and the descriptor."""
        self._waiting.clear()
        self._unwatch()


class Inlet:
    """Reads messages from a pipe, from the answer to our greeting on: a former rocklet may have read half of one.

    token: what to greet with. answered: called with (stream, message); an exception of it counts as nonsense too.
    ended: called once, with None at the end of the pipe, or with what was wrong with what came.
    """

    def __init__(self, fd: int, answered: Callable[[int, Message], None], ended: Callable[[str | None], None]) -> None:
        self.token = secrets.token_hex(16)
        self._fd = fd
        self._answered = answered
        self._ended = ended
        self._joiner = envhost.Joiner()
        self._seeking: bytes | None = _HELLO + self.token.encode()
        self._seen = bytearray()
        asyncio.get_running_loop().add_reader(fd, self._read)

    def forget(self, stream: int) -> None:
        """Leave out the half of a message of a stream that has ended."""
        self._joiner.forget(stream)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.stop()
            self._ended(None)
            return
        if self._seeking is not None:
            data = self._found(data, self._seeking)
        try:
            for stream, payload in self._joiner.feed(data):
                self._answered(stream, json.loads(payload))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.stop()
            self._ended(f"{type(error).__name__}: {error}")

    def _found(self, data: bytes, sought: bytes) -> bytes:
        self._seen += data
        place = self._seen.find(sought)
        if place < envhost.HEADER.size:
            del self._seen[: -(len(sought) + envhost.HEADER.size)]
            return b""
        found = bytes(self._seen[place - envhost.HEADER.size :])
        self._seeking = None
        self._seen.clear()
        return found


class Tail:
    """The last that a program printed."""

    def __init__(self, fd: int | None) -> None:
        self._kept = b""
        self._reader = None if fd is None else Reader(fd, self._add)

    @property
    def text(self) -> str:
        return self._kept.decode(errors="replace").strip()

    def _add(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-_STDERR_KEPT:]

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
