"""The server's side of the multiplexer: the connection to a pid 1 that is reachable over one byte stream only.

    InitLink ── socket, descriptors ──► Multiplexer ── frames over a stream ──► guest/init/multiplexer.py ── Init

Callers see a regular pid 1 connection. Each descriptor of a response is a local pipe or socket, whose bytes a `Channel`
or a `Pump` transfers. A file that is read arrives complete in an unnamed file; a file that is written is sent at its
commit. Data from inside is untrusted: all of it is bounded, and a protocol violation closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

from rock import errors
from rock.guest.init import channels, link
from rock.guest.init.channels import Parser, frame
from rock.guest.init.link import of_os_error

_LONGEST = 64 << 20  # maximum bytes of one message
_MOST_FDS = 64  # maximum descriptors of one message
_MOST_CHANNELS = 1024  # maximum concurrent channels of a sandbox
_MOST_QUEUED = 256 << 20  # maximum queued bytes to the sandbox; a sandbox that sends without reading is disconnected
_AGAIN = 1.0  # seconds between two handshake attempts
_FULL = 1 << 20  # high-water mark of the stream's queue, in bytes
TOKEN = "carried:"
log = logging.getLogger(__name__)


class ByteStream(Protocol):
    """A stream to pid 1's standard input, and from its standard output."""

    async def read(self) -> bytes:
        """Read available bytes; empty at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Write; returns when more can be written. OSError when the stream is broken."""
        ...

    def close(self) -> None: ...


class Multiplexer:
    """Owner of the stream. `begin` once, `close` once; `spool` is a folder for files in transfer."""

    def __init__(self, stream: ByteStream, spool: Path, sandbox_id: str) -> None:
        self._stream = stream
        self._spool = spool
        self._id = sandbox_id
        self._loop = asyncio.get_running_loop()
        self._parser = Parser(strict=True)
        self._out: list[bytes] = []
        self._out_size = 0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: dict[int, Channel] = {}
        self._opened: list[Channel] = []  # of the message that is being received
        self._message = bytearray()
        self._held: list[tuple[bytes, list[Channel]]] = []  # responses that wait for file contents
        self._files: dict[str, Channel] = {}  # open for writing, by token
        self._socket: socket.socket | None = None
        self._to_link: list[tuple[bytes, list[int]]] = []
        self.closed = False

    # ---- lifecycle ----

    async def begin(self, patience: float) -> socket.socket:
        """The connection for an InitLink. Unavailable on a timeout, Lost when the stream ends."""
        nonce = secrets.token_bytes(channels.NONCE)
        ready = frame(channels.READY, 0, nonce)
        try:
            async with asyncio.timeout(patience):
                rest = await self._answer_to(channels.begin(nonce), ready)
        except TimeoutError:
            raise errors.Unavailable(f"the sandbox's pid 1 did not respond within {patience:g} s", sandbox_id=self._id,
                                     hint="raise startup_timeout, or check the load of the machine") from None
        except OSError as error:
            raise errors.Lost(f"the stream to the sandbox's pid 1 broke: {error}", sandbox_id=self._id) from None
        ours, links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        links.setblocking(False)
        self._socket = ours
        self._loop.add_reader(ours, self._asked)
        self._start(self._receive(rest), "receive")
        self._start(self._transmit(), "send")
        return links

    async def _answer_to(self, opening: bytes, ready: bytes) -> bytes:
        """Repeat the handshake until pid 1 responds; earlier data on the stream is discarded."""
        async def say() -> None:
            while True:
                await self._stream.write(opening)
                await asyncio.sleep(_AGAIN)

        saying = asyncio.create_task(say())
        seen = b""
        try:
            while ready not in seen:
                data = await self._stream.read()
                if not data:
                    raise errors.Lost("the sandbox's pid 1 is gone", sandbox_id=self._id)
                seen = seen[-len(ready):] + data
            return seen.partition(ready)[2]
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"carrier {what} {self._id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Disconnect; all descriptors given to callers reach end of file. Idempotent; ends no sandbox."""
        if self.closed:
            return
        self.closed = True
        for task in self._tasks:
            task.cancel()
        for channel in (*self._channels.values(), *self._files.values()):
            channel.drop()
        for channel in (*self._opened, *(channel for _, waiting in self._held for channel in waiting)):
            channel.drop()
        self._channels.clear()
        for _, fds in self._to_link:
            _close_all(fds)
        self._to_link.clear()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._stream.close()

    async def gone(self) -> None:
        """After `close`: return when all its tasks have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _break(self, why: str) -> None:
        if not self.closed:
            log.warning("sandbox %s: %s", self._id, why)
            self.close()

    # ---- the stream ----

    async def _receive(self, rest: bytes) -> None:
        try:
            data = rest
            while True:
                for kind, number, payload in self._parser.feed(data):
                    self._take(kind, number, payload)
                data = await self._stream.read()
                if not data or self.closed:
                    break
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            self._break(f"its pid 1 talks nonsense: {error!r}")
        self.close()

    async def _transmit(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                data, self._out, self._out_size = b"".join(self._out), [], 0
                await self._stream.write(data)
                for channel in list(self._channels.values()):
                    channel.arm()
        except OSError as error:
            self._break(f"the stream to its pid 1 broke: {error}")

    def send(self, data: bytes) -> None:
        """Queue frames."""
        self._out.append(data)
        self._out_size += len(data)
        self._wake.set()
        if self._out_size > _MOST_QUEUED:
            self._loop.call_soon(self._break, "its pid 1 talks and does not listen")

    @property
    def full(self) -> bool:
        """Whether to wait before more bytes are queued."""
        return self._out_size >= _FULL

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == channels.OPEN:
            if len(self._opened) >= _MOST_FDS or number in self._channels:
                raise ValueError("more channels than a message can have")
            if len(self._channels) + sum(len(waiting) for _, waiting in self._held) >= _MOST_CHANNELS:
                raise ValueError("more channels than a sandbox can have")  # each costs this server two descriptors
            channel = self._make(number, payload)
            self._channels[number] = channel
            self._opened.append(channel)
        elif kind == channels.PACKET:
            self._message += payload
            if len(self._message) > _LONGEST:
                raise ValueError("a message that is too long")
            if number == 0:
                message, self._message = bytes(self._message), bytearray()
                opened, self._opened = self._opened, []
                self._answer(message, opened)
        elif (found := self._channels.get(number)) is not None:
            if kind == channels.DATA:
                found.take(payload)
            elif kind == channels.END:
                self._ended(found, payload)
            elif kind == channels.GONE:
                found.gone()
            elif kind == channels.CREDIT:
                found.allow(struct.unpack(">I", payload)[0])

    # ---- channels ----

    def _make(self, number: int, kind: bytes) -> Channel:
        if kind in (channels.CONTENT, channels.FILE):
            with tempfile.TemporaryFile(dir=self._spool) as spooled:
                return Channel(self, number, kind, os.dup(spooled.fileno()), os.dup(spooled.fileno()))
        if kind in (channels.SOCKET, channels.TERMINAL):
            ours, theirs = socket.socketpair()
            return Pump(self, number, kind, ours.detach(), theirs.detach())
        reading, writing = os.pipe2(os.O_CLOEXEC)
        if kind == channels.READ:
            return Pump(self, number, kind, writing, reading)
        if kind == channels.WRITE:
            return Pump(self, number, kind, reading, writing)
        os.close(reading)
        os.close(writing)
        raise ValueError(f"a channel of kind {kind!r}")

    def _ended(self, channel: Channel, payload: bytes) -> None:
        failure = struct.unpack(">I", payload)[0] if len(payload) == 4 else 0
        channel.ended(failure)
        if channel.kind == channels.CONTENT:
            self._release()

    def forget(self, channel: Channel) -> None:
        """Remove a finished channel."""
        self._channels.pop(channel.number, None)

    def resize(self, fd: int, rows: int, columns: int) -> None:
        """Resize a terminal, by the caller's descriptor."""
        inode = os.fstat(fd).st_ino
        for channel in self._channels.values():
            if channel.kind == channels.TERMINAL and channel.given == inode:
                self.send(frame(channels.SIZE, channel.number, struct.pack(">HH", rows, columns)))

    # ---- responses of pid 1 ----

    def _answer(self, message: bytes, opened: list[Channel]) -> None:
        if any(channel.kind == channels.CONTENT for channel in opened):
            self._held.append((message, opened))
            self._release()
            return
        if opened and opened[0].kind == channels.FILE:
            reply = json.loads(message)
            token = str(reply.get("token") or "") or f"{TOKEN}{opened[0].number}"
            self._files[token] = opened[0]
            message = json.dumps({**reply, "token": token}).encode()
        self._deliver(message, [channel.give() for channel in opened])

    def _release(self) -> None:
        """Deliver the responses whose files are complete."""
        for held in list(self._held):
            message, opened = held
            if all(channel.complete for channel in opened if channel.kind == channels.CONTENT):
                self._held.remove(held)
                failure = next((channel.failure for channel in opened if channel.failure), 0)
                fds = [channel.give() for channel in opened]
                if failure:
                    _close_all(fds)
                    self._refuse(int(json.loads(message)["id"]), _os_error(failure), "the file")
                else:
                    self._deliver(message, fds)

    def _refuse(self, number: int, error: OSError, what: str) -> None:
        fault = of_os_error(error, what)
        self._deliver(json.dumps({"id": number, "error": [fault.code, fault.message]}).encode(), [])

    def _deliver(self, message: bytes, fds: list[int]) -> None:
        if len(message) > link.PACKET:
            fds.append(link.memory_file(message))
            message = link.memory_note(message)
        self._to_link.append((message, fds))
        if len(self._to_link) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._to_link and self._socket is not None:
            message, fds = self._to_link[0]
            try:
                socket.send_fds(self._socket, [message], fds) if fds else self._socket.send(message)
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                self._loop.call_soon(self.close)
                return
            self._to_link.pop(0)
            _close_all(fds)
        if self._socket is not None:
            self._loop.remove_writer(self._socket)

    # ---- requests of callers ----

    def _asked(self) -> None:
        for _ in range(32):
            if self._socket is None:
                return
            try:
                data, fds = link.receive_packet(self._socket, link.packet_buffer)
            except BlockingIOError:
                return
            except OSError:
                data, fds = memoryview(b""), []
            if not data:
                self.close()
                return
            message = link.plain(data, fds)
            _close_all(fds)
            if b"_write" in message and self._files and self._about_file(message):
                continue
            self._pass_on(message)

    def _pass_on(self, message: bytes) -> None:
        for part in channels.packet(message):
            self.send(part)

    def _about_file(self, message: bytes) -> bool:
        """Handle the commit or abort of a file that is being written; returns whether the message was one."""
        request = json.loads(message)
        if request.get("op") not in ("commit_write", "abort_write"):
            return False
        token = str(request.get("token"))
        channel = self._files.pop(token, None)
        if channel is None:
            return False
        if request["op"] == "commit_write":
            self._start(self._commit(channel, token, request, message), "commit")
            return True
        channel.drop()
        self.send(frame(channels.END, channel.number))
        if token.startswith(TOKEN):
            self._deliver(json.dumps({"id": request["id"], "ok": True}).encode(), [])
            return True
        return False

    async def _commit(self, channel: Channel, token: str, request: dict[str, Any], message: bytes) -> None:
        """Send the content, then have pid 1 commit the file."""
        try:
            failure = await channel.carry()
        finally:
            channel.drop()
        if failure:
            if not token.startswith(TOKEN):
                self._pass_on(json.dumps({**request, "id": 0, "op": "abort_write"}).encode())
            self._refuse(int(request["id"]), _os_error(failure), "the file")
        elif token.startswith(TOKEN):
            self._deliver(json.dumps({"id": request["id"], "ok": True}).encode(), [])
        else:
            self._pass_on(message)


def _os_error(number: int) -> OSError:
    number = number if number in errno.errorcode else errno.EIO
    return OSError(number, os.strerror(number))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


# ---- channels ----

_LARGEST_FILE = 16 << 30


class Channel:
    """One file: its content is complete before the caller gets the descriptor, or is sent whole at the commit.

    ours, theirs: two descriptors; the caller gets the second.
    """

    def __init__(self, mux: Multiplexer, number: int, kind: bytes, ours: int, theirs: int) -> None:
        self.number = number
        self.kind = kind
        self.given = os.fstat(theirs).st_ino
        self.complete = False
        self.failure = 0
        self._mux = mux
        self._ours = ours
        self._theirs = theirs
        self._size = 0
        self._credit = channels.WINDOW
        self._changed = asyncio.Event()

    def give(self) -> int:
        """The descriptor for the caller, which owns it from now on."""
        if self.kind == channels.CONTENT:
            fd = os.open(f"/proc/self/fd/{self._theirs}", os.O_RDONLY | os.O_CLOEXEC)  # with an independent file offset
            self.drop()
            return fd
        fd, self._theirs = self._theirs, -1
        return fd

    def take(self, data: bytes) -> None:
        self._size += len(data)
        if self.kind != channels.CONTENT or self._size > _LARGEST_FILE:
            raise ValueError("content without a request")
        view = memoryview(data)
        while view:
            view = view[os.write(self._ours, view):]
        self._mux.send(frame(channels.CREDIT, self.number, struct.pack(">I", len(data))))

    def ended(self, failure: int) -> None:
        self.complete, self.failure = True, failure
        self._changed.set()
        self._mux.forget(self)

    def gone(self) -> None:
        """The other side accepts no more data."""

    def allow(self, size: int) -> None:
        self._credit = min(self._credit + size, channels.WINDOW)
        self._changed.set()

    def arm(self) -> None:
        """Register for the next possible I/O."""

    async def carry(self) -> int:
        """Send the written content; returns the errno of the remote write, 0 for success."""
        at = 0
        while not self.complete:
            if self._credit <= 0 or self._mux.full:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._changed.wait()
                continue
            data = os.pread(self._ours, min(self._credit, channels.MOST), at)
            if not data:
                break
            self._credit -= len(data)
            at += len(data)
            self._mux.send(frame(channels.DATA, self.number, data))
            await asyncio.sleep(0)
        self._mux.send(frame(channels.END, self.number))
        while not self.complete:
            self._changed.clear()
            await self._changed.wait()
        return self.failure

    def _close_ours(self) -> None:
        fd, self._ours = self._ours, -1
        if fd >= 0:
            os.close(fd)
        self._mux.forget(self)

    def drop(self) -> None:
        """Close the descriptor that was not given out. Idempotent."""
        self._close_ours()
        fd, self._theirs = self._theirs, -1
        if fd >= 0:
            os.close(fd)


class Pump(Channel):
    """A pipe, connection or terminal: transfers bytes as they arrive, in one or both directions."""

    def __init__(self, mux: Multiplexer, number: int, kind: bytes, ours: int, theirs: int) -> None:
        super().__init__(mux, number, kind, ours, theirs)
        both = kind in (channels.SOCKET, channels.TERMINAL)
        self._comes = both or kind == channels.READ
        self._goes = both or kind == channels.WRITE
        self._waiting = bytearray()  # received, not yet delivered
        self._owed = channels.WINDOW  # bytes that the sandbox may still send without a window update
        self._ending = False
        self._reading = self._writing = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(ours, False)
        os.set_blocking(theirs, False)
        self.arm()

    def take(self, data: bytes) -> None:
        self._owed -= len(data)
        if not self._comes:
            return
        if self._owed < 0 or not data:
            raise ValueError("more bytes than there was room for")
        self._waiting += data
        self._write()

    def ended(self, failure: int) -> None:
        self._ending = True
        self._write()

    def gone(self) -> None:
        self._goes = False
        self._settle()

    def allow(self, size: int) -> None:
        super().allow(size)
        self.arm()

    def arm(self) -> None:
        if self._ours < 0:
            return
        reading = self._goes and self._credit > 0 and not self._mux.full
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._ours, self._read)
            else:
                self._loop.remove_reader(self._ours)
        writing = bool(self._waiting)
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._ours, self._write)
            else:
                self._loop.remove_writer(self._ours)

    def _read(self) -> None:
        try:
            data = os.read(self._ours, min(self._credit, channels.MOST))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._credit -= len(data)
            self._mux.send(frame(channels.DATA, self.number, data))
            self.arm()
            return
        self._goes = False
        self._mux.send(frame(channels.END, self.number))
        if self.kind == channels.TERMINAL:  # the caller closed it: discard the remaining output
            self._comes = False
            self._waiting.clear()
        self._settle()

    def _write(self) -> None:
        taken = 0
        while self._waiting and self._ours >= 0:
            try:
                size = os.write(self._ours, memoryview(self._waiting)[: 64 << 10])
            except BlockingIOError:
                break
            except OSError:  # the reader closed it
                self._waiting.clear()
                if self._comes and not self._ending:
                    self._mux.send(frame(channels.GONE, self.number))
                self._comes = False
                break
            del self._waiting[:size]
            taken += size
        if taken and not self._ending:
            self._owed += taken
            self._mux.send(frame(channels.CREDIT, self.number, struct.pack(">I", taken)))
        if self._ending and not self._waiting:
            self._comes = False
            if self.kind == channels.TERMINAL:
                self._goes = False
            elif self.kind == channels.SOCKET and self._ours >= 0:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._ours)) as sock:
                    sock.shutdown(socket.SHUT_WR)
        self._settle()

    def _settle(self) -> None:
        if self._comes or self._goes or self._waiting:
            self.arm()
        else:
            self._close_ours()  # the caller's end may not have been given out yet

    def _close_ours(self) -> None:
        if self._ours >= 0:
            self._loop.remove_reader(self._ours)
            self._loop.remove_writer(self._ours)
        super()._close_ours()
