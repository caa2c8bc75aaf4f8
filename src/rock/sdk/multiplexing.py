"""Requests over upgraded connections (protocol/formats/multiplexing.py), where the server offers them.

After some requests, the transport upgrades a connection and sends further requests over it. The calls of one event loop
share a connection; of the blocking SDK each call has one for itself, so no thread reads for others. Whatever fails, a
request is sent by HTTP with the same idempotency key.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Hashable

from rock.errors import ServerError
from rock.protocol.formats import multiplexing as wire
from rock.protocol.formats.multiplexing import NAME
from rock.protocol.routes import CONNECTION
from rock.sdk import primitives
from rock.sdk.connection import READ_SIZE, Connection
from rock.sdk.http import HEAD_LIMIT, Answer, upgrade_headers

AFTER = 3  # requests to a server before the first upgrade
_WITHIN = 2.0  # seconds for an upgrade
_WINDOW = 1 << 31  # bytes of a response, which is read as a whole
_MOST = wire.MOST_REQUESTS - 24  # requests at once
_NUMBERS = (1 << 32) - 2
_QUIET = 1.0  # seconds after which an unused connection is looked at before it is used
_OFF, _PAUSE = 300.0, 1.0  # seconds without an upgrade after a refusal, and after a connection that broke
_KEPT = 64  # unused connections to one server


class ChannelBroken(OSError):
    """The connection ended before the response came."""


class Call:
    """A request that waits for its response."""

    __slots__ = ("answer", "done", "parts", "problem", "waiter")

    def __init__(self) -> None:
        self.answer = Answer()
        self.parts: list[bytes] = []
        self.done = False
        self.problem = ""
        self.waiter: object = None


class Channel:
    """An upgraded connection. authorization: the header of its upgrade request."""

    def __init__(self, connection: Connection, authorization: bytes) -> None:
        self.authorization = authorization
        self.served = False  # a response has come
        self._connection = connection
        self._socket = primitives.SharedSocket(connection.sock, self._read)
        self._reader = wire.FrameReader(wire.OF_SERVER, views=True)
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._problem = ""
        self._retired = False
        self._used = self._received = time.monotonic()

    def claim(self) -> bool:
        """Whether the caller may use it: it belongs to the event loop of the caller from now on."""
        return self._socket.claim()

    @property
    def usable(self) -> bool:
        """Whether it takes another request."""
        if self._problem or self._retired or len(self._calls) >= _MOST or self._number >= _NUMBERS:
            return False
        if self._calls or time.monotonic() - self._used < _QUIET:
            return True
        try:  # the server sends nothing without a request but the end
            self._connection.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return False

    @property
    def is_over(self) -> bool:
        """Whether it takes no more requests, and none is under way."""
        return bool(self._problem) or (not self._calls and not self.usable)

    async def ask(
        self, method: str, target: bytes, body: bytes, key: bytes, headers: wire.Headers, timeout: float | None
    ) -> Answer:
        """The complete response. ChannelBroken, TimeoutError."""
        self._number += 1
        number, call = self._number, Call()
        packed = wire.pack_headers(headers) if headers else b""
        frame = wire.request(method, target, key, body, number, headers=packed, window=_WINDOW)
        self._calls[number] = call
        try:
            self._socket.send(self._connection.encoded(frame), len(self._calls) > 1)
            while not call.done:
                try:
                    await self._socket.wait(call, timeout)
                except TimeoutError:
                    if timeout is None or not self._is_coming(call, timeout):
                        raise
        except OSError as error:
            if not isinstance(error, TimeoutError):
                self._break(str(error))
            self._leave(number)
            raise
        except BaseException:
            self._leave(number)
            raise
        finally:
            self._calls.pop(number, None)
            self._used = time.monotonic()
        if call.problem:
            raise ChannelBroken(call.problem)
        self.served = True
        return call.answer

    def _is_coming(self, call: Call, timeout: float) -> bool:
        """Whether a part of the response has come, the last one within `timeout` seconds."""
        begun = bool(call.parts) or self._reader.incomplete
        return begun and time.monotonic() - self._received < timeout

    def _leave(self, number: int) -> None:
        """The caller does not wait any more."""
        if not self._socket.shared:
            self._break("its call was interrupted")  # a part of a frame may be lost
            self.close()
        elif not self._problem and not self._calls[number].done:
            with contextlib.suppress(OSError):
                self._socket.send(self._connection.encoded(wire.pack(wire.CANCEL, number)), True)

    def _read(self) -> None:
        """Read what has come, and deliver it."""
        try:
            if self._connection.is_plain and (room := self._reader.room) is not None:
                count = self._socket.receive_into(room)
                if count is None:
                    return
                found, ended = self._reader.filled(count), not count
            else:
                data = self._socket.receive(max(READ_SIZE, self._reader.missing))
                if data is None:
                    return
                data, ended = self._connection.decoded(data)
                found = self._reader.feed(data)
            self._received = time.monotonic()
            for frame in found:
                self._take(*frame)
            if ended:
                raise ConnectionResetError("the server closed it")
        except (OSError, ValueError) as error:
            self._break(str(error))

    def _take(self, kind: int, flags: int, value: int, number: int, payload: bytes) -> None:
        if kind == wire.CLOSE:
            self._retired = True
            if payload:
                raise wire.Malformed(f"the server closed it: {payload.decode('utf-8', 'replace')}")
            return
        call = self._calls.get(number)
        if call is None or kind == wire.CREDIT:
            return  # its caller does not wait any more
        if kind == wire.ABORT:
            call.problem = "the response broke off"
        elif kind == wire.RESPONSE:
            headers, body = wire.response_of(payload)
            call.answer.headers = {name.decode("latin-1"): text.decode("latin-1") for name, text in headers}
            call.answer.status = value
            call.parts.append(body)
        else:
            call.parts.append(payload)
        if flags & wire.END:
            call.answer.complete(call.parts)
        if flags & wire.END or call.problem:
            call.done = True
            self._socket.wake(call)

    def _break(self, problem: str) -> None:
        """No more responses come."""
        if not self._problem:
            self._problem = problem or "the connection broke"
            self._socket.close()
        for call in self._calls.values():
            if not call.done:
                call.problem, call.done = self._problem, True
                self._socket.wake(call)

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._break("it was closed")
        self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()


class Channels:
    """The upgraded connections of this process to one server.

    offered: whether the server offers upgrades. There is no lock, which a fork could leave held. A forked child drops
    its parent's connections.
    """

    def __init__(self) -> None:
        self.offered = False
        self._uses = 0
        self._not_before = 0.0
        self._all: deque[Channel] = deque()
        self._pid = os.getpid()

    def take(self) -> Channel | None:
        """A connection for a request. `give` it back afterwards."""
        if not self._all:
            return None
        if self._pid != os.getpid():
            self.clear()
        if primitives.SharedSocket.shared:
            for channel in list(self._all):
                if channel.claim():
                    if channel.usable:
                        return channel
                    if channel.is_over:
                        self.drop(channel)
            return None
        while self._all:
            try:
                channel = self._all.pop()
            except IndexError:
                break
            if channel.usable:
                return channel
            channel.close()
        return None

    def give(self, channel: Channel) -> None:
        """A request is over."""
        if channel.is_over:
            self._not_before = time.monotonic() + (_PAUSE if channel.served else _OFF)
            self.drop(channel)
        elif not primitives.SharedSocket.shared:
            self._all.append(channel)
            if len(self._all) > _KEPT:
                with contextlib.suppress(IndexError):
                    self._all.popleft().close()

    def drop(self, channel: Channel) -> None:
        """Close a connection."""
        with contextlib.suppress(ValueError):
            self._all.remove(channel)
        channel.close()

    def is_due(self) -> bool:
        """Whether another connection is to be opened now. Then `refused` or `opened` follows."""
        if not self.offered:
            return False
        self._uses += 1
        if self._uses <= AFTER:
            return False
        now = time.monotonic()
        if now < self._not_before:
            return False
        if primitives.SharedSocket.shared:
            self._not_before = now + _WITHIN  # other calls do not open one too
        return True

    def refused(self) -> None:
        """The server, or something before it, does not upgrade."""
        self._not_before = time.monotonic() + _OFF

    def opened(self, channel: Channel) -> None:
        self._not_before = 0.0
        if primitives.SharedSocket.shared:
            self._all.append(channel)

    def clear(self) -> None:
        """Close all; after a fork this closes the child's copies only."""
        self._pid = os.getpid()
        while self._all:
            self._all.pop().close()


_KNOWN: dict[Hashable, Channels] = {}


def channels_of(server: Hashable) -> Channels:
    """Those of one server, by what identifies it."""
    found = _KNOWN.get(server)
    if found is None:
        found = _KNOWN.setdefault(server, Channels())
    return found


def clear() -> None:
    """Close all connections of this process."""
    for channels in list(_KNOWN.values()):
        channels.clear()


atexit.register(clear)


async def upgrade(connection: Connection, headers: bytes, authorization: bytes) -> Channel:
    """Upgrade a new connection. headers: lines of the request. OSError, TimeoutError; ServerError when the server does
    not do it. The connection is closed then."""
    try:
        head = f"GET {CONNECTION} HTTP/1.1\r\nconnection: upgrade\r\nupgrade: {NAME}\r\n".encode()
        await connection.send(b"%b%b\r\n" % (head, headers), _WITHIN)
        data = b""
        end = time.monotonic() + _WITHIN
        while b"\r\n\r\n" not in data:
            part = await connection.receive(max(0.01, end - time.monotonic()))
            data += part
            if not part or len(data) > HEAD_LIMIT or not b"HTTP/1.1 101".startswith(data[:12]):
                raise ServerError("the connection was not upgraded")
        if upgrade_headers(data).get("upgrade", "").lower() != NAME:
            raise ServerError("the connection was upgraded to another protocol")
        return Channel(connection, authorization)
    except BaseException:
        connection.close()
        raise
