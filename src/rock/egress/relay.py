"""Transfers bytes between two sockets in both directions, until both have ended. Standard library only."""

from __future__ import annotations

import asyncio
import socket
import struct

from rock.egress.log import OpenEntry

_PIECE = 1 << 18
_buffer = memoryview(bytearray(_PIECE))  # shared: there is one thread


class _Way:
    """One direction. Data that the target does not accept is queued, and reading stops until it does."""

    def __init__(self, relay: Relay, source: socket.socket, target: socket.socket, outgoing: bool) -> None:
        self._relay = relay
        self._source, self._target = source, target
        self._outgoing = outgoing
        self._waiting = memoryview(b"")
        self._loop = asyncio.get_running_loop()
        self.ended = False
        self.read()

    def read(self) -> None:
        self._loop.add_reader(self._source, self._readable)

    def _readable(self) -> None:
        try:
            size = self._source.recv_into(_buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._relay.finish(f"broken: {error.strerror}")
            return
        if size == 0:
            self._loop.remove_reader(self._source)
            self._end()
            return
        self._relay.count(size, self._outgoing)
        try:
            sent = self._target.send(_buffer[:size])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._relay.finish(f"broken: {error.strerror}")
            return
        if sent < size:
            self._waiting = memoryview(bytes(_buffer[sent:size]))
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._target, self._writable)

    def _writable(self) -> None:
        try:
            sent = self._target.send(self._waiting)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._relay.finish(f"broken: {error.strerror}")
            return
        self._waiting = self._waiting[sent:]
        if not self._waiting:
            self._loop.remove_writer(self._target)
            self.read()

    def _end(self) -> None:
        self.ended = True
        try:
            self._target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other direction reports it
        self._relay.ended()


class Relay:
    """Transfers bytes between a program in a sandbox (inner) and its destination (outer); owns both sockets.

    `wait` returns when both have ended, or one is broken. `entry` counts the bytes.
    """

    def __init__(self, inner: socket.socket, outer: socket.socket, entry: OpenEntry) -> None:
        self._inner, self._outer = inner, outer
        self._entry = entry
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ways: list[_Way] = []

    async def wait(self) -> None:
        self._ways = [_Way(self, self._inner, self._outer, True), _Way(self, self._outer, self._inner, False)]
        try:
            await self._done
        finally:
            loop = asyncio.get_running_loop()
            for sock in (self._inner, self._outer):
                loop.remove_reader(sock)
                loop.remove_writer(sock)

    def count(self, size: int, outgoing: bool) -> None:
        if outgoing:
            self._entry.sent += size
        else:
            self._entry.received += size

    def ended(self) -> None:
        if all(way.ended for way in self._ways):
            self._finish()

    def finish(self, reason: str) -> None:
        """Close both sockets after an error of one."""
        self._entry.reason = self._entry.reason or reason
        for sock in (self._inner, self._outer):
            reset(sock)
        self._finish()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


def reset(sock: socket.socket) -> None:
    """Close a socket with a reset instead of an orderly end."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
