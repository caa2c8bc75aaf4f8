"""pid 1's side of the multiplexer: transfers the bytes of descriptors over one stream where descriptors cannot cross.

    server ◄── frames over the standard streams of pid 1 ──► Multiplexer ── socket, descriptors ──► Init

It runs in pid 1 itself, which no process inside can kill. Its memory is bounded: it reads no more from a descriptor
than the server's credit, and nothing while the stream to the server is full. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Callable

from rock.guest.init import channels, link
from rock.guest.init.link import Loop

_FULL = 512 << 10  # bytes queued for the server
_LONGEST = 64 << 20  # maximum bytes of one message
_LARGEST_FILE = 16 << 30


class _Channel:
    """One descriptor. `sends`, `takes`: whether bytes still go to the server, or come from it."""

    def __init__(self, number: int, fd: int, kind: bytes) -> None:
        self.number = number
        self.fd = fd
        self.kind = kind
        self.sends = kind in (channels.READ, channels.SOCKET, channels.TERMINAL, channels.CONTENT)
        self.takes = kind in (channels.WRITE, channels.SOCKET, channels.TERMINAL, channels.FILE)
        self.credit = channels.WINDOW
        self.waiting = bytearray()  # from the server, not yet written to the descriptor
        self.ending = False  # the server has closed its direction
        self.left = 0  # remaining bytes of a file's content
        self.failure = 0
        self.mask = 0


class Multiplexer:
    """adopt: gives Init the other end of a connection. Reads from `source`, writes to `sink`, and owns both."""

    def __init__(self, loop: Loop, source: int, sink: int, adopt: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._adopt = adopt
        self._parser = channels.Parser()
        self._out: list[bytes] = []
        self._out_size = 0
        self._sink_watched = False
        self._channels: dict[int, _Channel] = {}
        self._number = 0
        self._socket: socket.socket | None = None
        self._to_init: list[tuple[bytes, list[int]]] = []
        self._message = bytearray()
        os.set_blocking(source, False)
        os.set_blocking(sink, False)
        loop.watch(source, self._readable)

    # ---- the stream to the server ----

    def _readable(self) -> None:
        try:
            data = os.read(self._source, 256 << 10)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.unwatch(self._source)  # no server can connect again
            self._reset()
            return
        for kind, number, payload in self._parser.feed(data):
            self._take(kind, number, payload)

    def _send(self, data: bytes) -> None:
        self._out.append(data)
        self._out_size += len(data)
        if not self._sink_watched:
            self._flush()

    def _flush(self) -> None:
        while self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            try:
                size = os.write(self._sink, data)
            except BlockingIOError:
                size = 0
            except OSError:
                self._reset()
                return
            self._out = [data[size:]] if size < len(data) else []
            self._out_size = len(data) - size
            if size < len(data):
                break
        watched, self._sink_watched = self._sink_watched, bool(self._out)
        if self._out and not watched:
            self._loop.watch(self._sink, self._flush, select.EPOLLOUT)
        elif watched and not self._out:
            self._loop.unwatch(self._sink)
            for channel in list(self._channels.values()):
                self._arm(channel)

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == channels.BEGIN:
            self._begin(payload[len(channels.MAGIC):])
        elif self._socket is None:
            return
        elif kind == channels.PACKET:
            self._message += payload
            if number == 0 or len(self._message) > _LONGEST:
                message, self._message = bytes(self._message), bytearray()
                self._ask(message)
        elif (channel := self._channels.get(number)) is not None:
            if kind == channels.DATA:
                channel.waiting += payload
                self._write(channel)
            elif kind == channels.END:
                channel.ending = True
                self._write(channel)
            elif kind == channels.GONE:
                self._stop_sending(channel)
            elif kind == channels.CREDIT and len(payload) == 4:
                channel.credit += struct.unpack(">I", payload)[0]
                self._arm(channel)
            elif kind == channels.SIZE and len(payload) == 4 and channel.kind == channels.TERMINAL:
                try:
                    fcntl.ioctl(channel.fd, termios.TIOCSWINSZ, payload_size(payload))
                except OSError:
                    pass

    def _begin(self, nonce: bytes) -> None:
        """Reset the state for a new server."""
        self._reset()
        ours, inits = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        self._adopt(inits)
        self._loop.watch(ours.fileno(), self._answered)
        self._send(channels.frame(channels.READY, 0, nonce))

    def _reset(self) -> None:
        for channel in list(self._channels.values()):
            self._forget(channel)
        self._message.clear()
        for _, fds in self._to_init:
            for fd in fds:
                os.close(fd)
        self._to_init.clear()
        # The frames that follow end a partial write: the server only looks for READY.
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # ---- the connection to Init ----

    def _ask(self, message: bytes) -> None:
        fds = []
        if len(message) > link.PACKET:
            fds = [link.memory_file(message)]
            message = link.memory_note(message)
        self._to_init.append((message, fds))
        if len(self._to_init) == 1:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._to_init and self._socket is not None:
            message, fds = self._to_init[0]
            try:
                socket.send_fds(self._socket, [message], fds) if fds else self._socket.send(message)
            except BlockingIOError:
                self._loop.watch(self._socket.fileno(), self._answered, select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._reset()
                return
            self._to_init.pop(0)
            for fd in fds:
                os.close(fd)

    def _answered(self) -> None:
        if self._socket is None:
            return
        if self._to_init:
            self._loop.watch(self._socket.fileno(), self._answered)
            self._pass_on()
        while self._socket is not None:
            try:
                data, fds = link.receive_packet(self._socket, link.packet_buffer)
            except BlockingIOError:
                return
            except OSError:
                data, fds = memoryview(b""), []
            if not data:
                self._reset()
                return
            message = link.plain(data, fds)
            for fd in fds:
                self._open(fd)
            for part in channels.packet(message):
                self._send(part)

    # ---- channels ----

    def _open(self, fd: int) -> None:
        """Create a channel for a descriptor, and announce it."""
        while self._number in self._channels or self._number == 0:
            self._number = (self._number + 1) % (1 << 31)
        found = os.fstat(fd)
        channel = _Channel(self._number, fd, _kind(fd, found.st_mode))
        if len(self._channels) >= channels.MOST_CHANNELS:
            os.close(fd)
            self._send(channels.frame(channels.OPEN, channel.number, channels.READ))
            self._send(channels.frame(channels.END, channel.number))
            self._number += 1
            return
        self._channels[channel.number] = channel
        self._send(channels.frame(channels.OPEN, channel.number, channel.kind))
        if channel.kind == channels.CONTENT:
            channel.left = found.st_size if found.st_size <= _LARGEST_FILE else 0
            channel.failure = 0 if found.st_size <= _LARGEST_FILE else errno.EFBIG
        elif channel.kind != channels.FILE:
            os.set_blocking(fd, False)
        self._arm(channel)

    def _arm(self, channel: _Channel) -> None:
        """Register for the I/O that this channel can do now."""
        if channel.number not in self._channels or channel.kind == channels.FILE:
            return
        if channel.kind == channels.CONTENT:
            if channel.credit > 0 and self._out_size < _FULL:
                self._loop.later(0.0, lambda: self._read(channel))
            return
        reads = channel.sends and channel.credit > 0 and self._out_size < _FULL
        mask = (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if channel.waiting else 0)
        if mask == channel.mask:
            return
        if mask:
            self._loop.watch(channel.fd, lambda: self._ready(channel), mask)
        else:
            self._loop.unwatch(channel.fd)
        channel.mask = mask

    def _ready(self, channel: _Channel) -> None:
        if channel.waiting:
            self._write(channel)
        if channel.number in self._channels and channel.mask & select.EPOLLIN:
            self._read(channel)

    def _read(self, channel: _Channel) -> None:
        if channel.number not in self._channels or not channel.sends or channel.credit <= 0:
            return
        size = min(channel.credit, channels.MOST)
        if channel.kind == channels.CONTENT:
            size = min(size, channel.left)
        try:
            data = os.read(channel.fd, size) if size else b""
        except BlockingIOError:
            return
        except OSError as error:  # EIO is how a terminal ends
            data = b""
            channel.failure = (error.errno or errno.EIO) if channel.kind == channels.CONTENT else 0
        if data:
            channel.credit -= len(data)
            channel.left -= len(data)
            self._send(channels.frame(channels.DATA, channel.number, data))
            self._arm(channel)
            return
        self._send(channels.frame(channels.END, channel.number, struct.pack(">I", channel.failure)))
        self._stop_sending(channel)

    def _stop_sending(self, channel: _Channel) -> None:
        channel.sends = False
        self._close_if_done(channel)

    def _write(self, channel: _Channel) -> None:
        if channel.kind == channels.FILE:
            self._write_file(channel)
            return
        taken = 0
        while channel.waiting:
            try:
                size = os.write(channel.fd, memoryview(channel.waiting)[: 64 << 10])
            except BlockingIOError:
                break
            except OSError:  # the reader closed it
                size = len(channel.waiting)
                if channel.takes:
                    channel.takes = False
                    self._send(channels.frame(channels.GONE, channel.number))
            del channel.waiting[:size]
            taken += size
        if taken and channel.takes:
            self._send(channels.frame(channels.CREDIT, channel.number, struct.pack(">I", taken)))
        if channel.ending and not channel.waiting:
            self._end(channel)
        self._close_if_done(channel)

    def _write_file(self, channel: _Channel) -> None:
        """Write to a regular file, which never blocks; at its end, report the errno, 0 for success."""
        size = len(channel.waiting)
        try:
            while channel.waiting and not channel.failure:
                del channel.waiting[: os.write(channel.fd, channel.waiting)]
        except OSError as error:
            channel.failure = error.errno or errno.EIO
        channel.waiting.clear()
        if size:
            self._send(channels.frame(channels.CREDIT, channel.number, struct.pack(">I", size)))
        if channel.ending:
            self._forget(channel)
            self._send(channels.frame(channels.END, channel.number, struct.pack(">I", channel.failure)))

    def _end(self, channel: _Channel) -> None:
        """Apply the server's end of stream to the descriptor."""
        channel.takes = False
        if channel.kind == channels.SOCKET:
            try:
                with socket.socket(fileno=os.dup(channel.fd)) as sock:
                    sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        elif channel.kind == channels.TERMINAL:
            channel.sends = False

    def _close_if_done(self, channel: _Channel) -> None:
        if channel.number not in self._channels:
            return
        if not channel.sends and not channel.takes and not channel.waiting:
            self._forget(channel)
        else:
            self._arm(channel)

    def _forget(self, channel: _Channel) -> None:
        if self._channels.pop(channel.number, None) is not None:
            if channel.mask:
                self._loop.unwatch(channel.fd)
            os.close(channel.fd)


def payload_size(payload: bytes) -> bytes:
    """A terminal's size in the kernel's format."""
    rows, columns = struct.unpack(">HH", payload)
    return struct.pack("HHHH", rows, columns, 0, 0)


def _kind(fd: int, mode: int) -> bytes:
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if stat.S_ISREG(mode):
        return channels.CONTENT if access == os.O_RDONLY else channels.FILE
    if stat.S_ISSOCK(mode):
        return channels.SOCKET
    if stat.S_ISFIFO(mode):
        return channels.READ if access == os.O_RDONLY else channels.WRITE
    return channels.TERMINAL
