"""pid 1's connections (packets of JSON, with descriptors), its event loop, and its error type.

Everything in this folder runs inside sandboxes: standard library only, and no imports of ours from outside the folder.
"""

from __future__ import annotations

import array
import errno
import heapq
import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

PACKET = 60_000  # bytes; a longer message is sent in a memory file
CHANNEL_MEMORY = 512 << 20  # bytes of shared memory of a program; unused pages take no memory
_LARGEST = 64 << 20
_MOST_WAITING = 2_000
_MOST_FDS = 64
packet_buffer = bytearray(PACKET + 4096)


def pack(message: dict[str, Any]) -> tuple[bytes, list[int]]:
    """The packet of a message, and the memory file of a long one."""
    data = json.dumps(message).encode()
    if len(data) <= PACKET:
        return data, []
    return memory_note(data), [memory_file(data)]


def memory_file(data: bytes) -> int:
    """A memory file with a long message."""
    fd = os.memfd_create("message", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]
    return fd


def memory_note(data: bytes) -> bytes:
    """The packet that accompanies the memory file."""
    return json.dumps({"memfd": len(data)}).encode()


def unpack(data: bytes | bytearray | memoryview, fds: list[int]) -> dict[str, Any]:
    """The message of a packet; its memory file, the last of `fds`, is removed and closed. ValueError if invalid."""
    message = json.loads(plain(data, fds))
    if not isinstance(message, dict):
        raise ValueError("a message must be an object")
    return message


def plain(data: bytes | bytearray | memoryview, fds: list[int]) -> bytes:
    """The text of a packet's message; its memory file, the last of `fds`, is removed and closed. ValueError."""
    text = bytes(data)
    if not text.startswith(b'{"memfd"') or not fds:
        return text
    message = json.loads(text)
    if isinstance(message, dict) and "memfd" in message and fds:
        fd = fds.pop()
        try:
            length = int(message["memfd"])
            if not 0 <= length <= _LARGEST:
                raise ValueError(f"a message of {length} bytes is too long")
            pieces = []
            offset = 0
            while offset < length and (piece := os.pread(fd, length - offset, offset)):
                pieces.append(piece)
                offset += len(piece)
        finally:
            os.close(fd)
        return b"".join(pieces)
    return text


def receive_packet(sock: socket.socket, buffer: bytearray) -> tuple[memoryview, list[int]]:
    """One packet and its descriptors, close-on-exec. BlockingIOError when there is none; an empty one is end of
    file."""
    space = socket.CMSG_SPACE(_MOST_FDS * 4)
    size, ancillary, _flags, _ = sock.recvmsg_into([buffer], space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return memoryview(buffer)[:size], list(fds)


def send_patiently(sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    """Send from a child on a socket that it shares with pid 1, whose flags it must not change; waits up to 30 s."""
    data, extra = pack(message)
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    for _ in range(30):
        try:
            socket.send_fds(sock, [data], [*fds, *extra])
            return
        except BlockingIOError:
            poll.poll(1000)
    raise TimeoutError("the server does not read")


class Connection:
    """The connection of one server. Sends never block: unsent data is queued up to a limit."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.waiting: deque[tuple[bytes, list[int]]] = deque()
        self.mask = select.EPOLLIN

    def receive(self) -> dict[str, Any] | None:
        """The next request; None at end of file. BlockingIOError when there is none now."""
        data, fds = receive_packet(self.sock, packet_buffer)
        try:
            return unpack(data, fds) if data else None
        finally:
            for fd in fds:
                os.close(fd)

    def send(self, message: dict[str, Any], fds: list[int]) -> bool:
        """Send and close `fds`; False when the connection is broken."""
        data, extra = pack(message)
        self.waiting.append((data, [*fds, *extra]))
        return self.flush() and len(self.waiting) <= _MOST_WAITING

    def flush(self) -> bool:
        while self.waiting:
            data, fds = self.waiting[0]
            try:
                if fds:
                    socket.send_fds(self.sock, [data], fds)
                else:
                    self.sock.send(data)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.waiting.popleft()
            for fd in fds:
                os.close(fd)
        return True

    def close(self) -> None:
        for _, fds in self.waiting:
            for fd in fds:
                os.close(fd)
        self.waiting.clear()
        self.sock.close()


# ---- event loop ----

_LONGEST = 60.0  # maximum seconds of one wait
_QUIET = 0.5  # idle seconds before `rest` is called


class Loop:
    """Callbacks by descriptor and by time. `turn` waits once; exceptions of callbacks go to `complain`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.readers: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.rest: Callable[[], None] | None = None  # called once after each period of work
        self._rested = False

    def turn(self) -> None:
        """Wait for events, and run their callbacks."""
        timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else _LONGEST
        restless = self.rest is not None and not self._rested and timeout > _QUIET
        try:
            ready = self.epoll.poll(_QUIET if restless else timeout, 64)
        except InterruptedError:
            ready = []
        if restless and not ready and self.rest is not None:
            self._rested = True
            self.guard(self.rest)
            return
        for fd, _ in ready:
            self._rested = False
            callback = self.readers.get(fd)
            if callback is not None:
                self.guard(callback)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            self._rested = False
            self.guard(heapq.heappop(self.timers)[2])

    def guard(self, callback: Callable[[], None]) -> None:
        """Call, and report exceptions to `complain`."""
        try:
            callback()
        except Exception as error:
            self.complain(error)

    def complain(self, error: BaseException) -> None:
        """Receives exceptions of callbacks."""

    def watch(self, fd: int, callback: Callable[[], None], mask: int = select.EPOLLIN) -> None:
        """Call whenever a descriptor is ready."""
        if fd in self.readers:
            self.epoll.modify(fd, mask)
        else:
            self.epoll.register(fd, mask)
        self.readers[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Stop calling; required before the descriptor is closed."""
        if self.readers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call once, after so many seconds."""
        self._sequence += 1
        heapq.heappush(self.timers, (time.monotonic() + seconds, self._sequence, callback))


# ---- errors ----

_CODES = {
    "not_found": (errno.ENOENT, errno.ENXIO, errno.ESRCH, errno.ENODEV),
    "conflict": (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EBUSY, errno.ETXTBSY),
    "permission_denied": (errno.EACCES, errno.EPERM, errno.EROFS),
    "storage_full": (errno.ENOSPC, errno.EDQUOT),
    "quota_exceeded": (errno.EAGAIN, errno.ENOMEM),
    "invalid_config": (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EXDEV, errno.E2BIG, errno.EFBIG,
                       errno.EBADF),
    "unavailable": (errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT),
}
_BY_ERRNO = {number: code for code, numbers in _CODES.items() for number in numbers}
_SENTENCES = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "it exists already",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.EROFS: "it is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ELOOP: "too many symbolic links",
    errno.EFBIG: "larger than files may be here",
}


class Fault(Exception):
    """The error of a failed request. `code` is a code of `rock.errors`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def of_os_error(error: OSError, what: str) -> Fault:
    """The fault for an OSError; `what` is the path or the action."""
    number = error.errno or 0
    sentence = _SENTENCES.get(number) or (error.strerror or str(error)).lower()
    return Fault(_BY_ERRNO.get(number, "internal"), f"{what}: {sentence}")
