"""Direct pipes to an environment, for a client on the server's machine (protocol:
rocklet/environments/local_socket.py).

Requests go from this process directly to the environment's process. A separate connection to the server reports
timeouts and protocol errors to it, and the end of the environment to the client. When the server is gone, the pipes are
dropped, and requests go through the server again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import stat
import sys
import threading
import time
import weakref

import orjson

from rock import errors
from rock.guest.environments import frames
from rock.guest.environments.frames import FIRST, HEAD, HEADER, IN_MEMORY, LAST, LIMIT, PIECE
from rock.protocol.env import DOOR, EnvInfo, error_of

_READ = 1 << 15
_LARGE = 32 << 10  # frame size above which the pipe is enlarged
_PIPE = 1 << 20
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ
_PACKET = 64 << 10
_PLAYING = 5.0  # seconds between two keep-alive messages
_WAIT = 20.0  # seconds of one wait, after which a keep-alive message is due
_MOMENT = 1e-3  # seconds
_SLEEPS = 2e-3  # seconds after a response for which an environment spins: `_MOMENT` of guest/environments/worker.py
_SKIPPED, _MOST_SKIPPED = 31, 1023
_KNOCK = 5.0  # timeout in seconds for the connection, and for the reason of a kill
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_process = os.getpid()
_held: weakref.WeakSet[LocalTransport] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: close its copies of the parent's pipes, or the server would not see the parent's end."""
    global _process
    _process = os.getpid()
    for pipes in list(_held):
        with contextlib.suppress(OSError, BufferError):  # a thread of the parent may have been reading
            pipes.close()


os.register_at_fork(after_in_child=_forked)


class TransportUnavailable(Exception):
    """The pipes gave no response: use the server."""


def reach(info: EnvInfo, host: str, *, shared: bool = True) -> LocalTransport | None:
    """The pipes of an environment on a server at `host`; None where they are unavailable: then use the server.

    shared: also map the shared memory for large responses, if available.
    """
    door = info.door
    if door is None or not hasattr(socket, "SOCK_SEQPACKET"):
        return None
    if host not in _LOOPBACK or os.path.basename(door.path) != DOOR:
        return None
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(_KNOCK)
            _connect(connection, door.path)
            spec = {"sandbox": info.sandbox_id, "env": info.env, "token": door.token, "memory": shared}
            connection.send(orjson.dumps(spec))
            data, fds, _, _ = socket.recv_fds(connection, _PACKET, 3)
            for fd in fds:
                stack.callback(os.close, fd)
            if len(fds) < 2 or not all(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in fds[:2]):
                return None
            greeting = orjson.loads(data)
            timeout = float(greeting["timeout"])
            memory = _part(fds[2], int(greeting["offset"])) if shared and len(fds) > 2 else None
            connection.setblocking(False)
            stack.pop_all()
            for fd in fds[2:]:
                os.close(fd)
            return LocalTransport(connection, fds[0], fds[1], memory, info.env, info.sandbox_id, timeout)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _part(fd: int, offset: int) -> mmap.mmap | None:
    """The environment's part of the shared memory, for large responses; the server has checked that its size is
    sealed."""
    if offset < 0 or os.fstat(fd).st_size < offset + frames.PART:
        return None
    return mmap.mmap(fd, frames.PART, prot=mmap.PROT_READ, offset=offset)


def _connect(connection: socket.socket, path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{DOOR}")  # a path of any length
    finally:
        os.close(folder)


class LocalTransport:
    """The two pipes, and the connection that holds them. One request at a time; other threads wait."""

    def __init__(
        self,
        door: socket.socket,
        requests: int,
        answers: int,
        memory: mmap.mmap | None,
        number: int,
        sandbox_id: str,
        timeout: float,
    ) -> None:
        self._door = door
        self._requests = requests
        self._answers = answers
        self._memory = memory
        self._flags = 0 if memory is None else IN_MEMORY
        self._number = number
        self._sandbox_id = sandbox_id
        self._timeout = timeout
        self._owner = _process
        _held.add(self)
        self._lock = threading.Lock()
        self._open = True
        self._large = False
        self._begun = bytearray()
        self._id = 0
        self._op = 0
        self._deadline = 0.0
        self._sign = 0.0
        self._skip = 0 if len(os.sched_getaffinity(0)) > 1 else sys.maxsize  # requests until the next spin
        self._in_vain = 0  # consecutive unsuccessful spins
        self._over = 0.0  # when the last response had come
        self._rested = False  # the environment does not spin any more
        self._server_poll = self._poll(None, 0)
        self._readable = self._poll(answers, select.POLLIN)
        self._writable = self._poll(requests, select.POLLOUT)

    def _poll(self, fd: int | None, events: int) -> select.poll:
        """A poll object for the server's connection and a pipe."""
        poll = select.poll()
        poll.register(self._door, select.POLLIN)
        if fd is not None:
            poll.register(fd, events)
        return poll

    def close(self) -> None:
        """Return the pipes to the server. Idempotent."""
        if self._owner != _process:  # a forked child, where the lock may be held without an owner
            self._close()
            return
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._door.close()
            os.close(self._requests)
            os.close(self._answers)
            if self._memory is not None:
                self._memory.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._close()

    # ---- requests ----

    def begin(self, op: int, index: int, parts: list[bytes]) -> None:
        """Send a request; call `finish` afterwards. `TransportUnavailable` means that no request was sent."""
        if self._owner != _process:  # a forked child: the pipes belong to its parent
            raise TransportUnavailable
        self._lock.acquire()
        try:
            if not self._open:
                raise TransportUnavailable
            if self._server_poll.poll(0):  # the server is gone: the next one takes the pipes over
                self._door_says(0)
            now = time.monotonic()
            self._deadline = now + self._timeout
            if now - self._sign > _PLAYING:
                self._say({"playing": True}, now)
            self._rested = now - self._over > _SLEEPS
            self._id += 1
            self._op = op
            length = sum(len(part) for part in parts)
            frame = b"".join((HEAD.pack(length, op, self._flags, self._number, self._id, index), *parts))
            if len(frame) <= PIECE:
                self._write(HEADER.pack(len(frame), FIRST | LAST, self._number) + frame)
            else:
                for piece in frames.pieces(self._number, frame):
                    self._write(piece)
        except BaseException:
            self._close()
            self._lock.release()
            raise

    def finish(self) -> tuple[int, memoryview]:
        """(op, payload) of the response. TransportUnavailable; the error of an environment that has ended."""
        try:
            while True:
                found = self._answer(self._frame())
                if found is not None:
                    self._over = time.monotonic()
                    return found
                self._in_time()
        except BaseException:
            self._close()
            raise
        finally:
            self._lock.release()

    def _answer(self, frame: bytearray | bytes) -> tuple[int, memoryview] | None:
        """(op, payload) of a frame; None for the response to another request."""
        _, op, flags, _, id, _ = HEAD.unpack_from(frame)
        if id != self._id:
            return None
        payload = memoryview(frame)[HEAD.size :]
        return op, self._taken(payload) if flags & IN_MEMORY else payload

    # ---- for an event loop, which waits for `answers` and `door` itself ----

    @property
    def answers(self) -> int:
        """The descriptor of responses."""
        return self._answers

    @property
    def door(self) -> socket.socket:
        """The connection on which the server reports the environment's end."""
        return self._door

    def fits(self, parts: list[bytes]) -> bool:
        """Whether `begin` sends these without blocking: the capacity of an empty pipe."""
        return sum(len(part) for part in parts) < _READ

    def left(self) -> float:
        """Seconds until the next keep-alive message, or the timeout of the response."""
        return min(self._deadline - time.monotonic(), _WAIT)

    def sign(self) -> None:
        """Send a keep-alive message. TransportUnavailable when the server is gone."""
        self._say({"playing": True}, time.monotonic())

    def poll(self) -> tuple[int, memoryview] | None:
        """Nonblocking `finish`: None while the response is incomplete; call again when more data arrives. After an
        exception, call `abandon`."""
        while True:
            try:
                data = os.read(self._answers, _READ)
            except BlockingIOError:
                return None
            if not data:
                raise TransportUnavailable  # the server has the reason
            self._begun += data
            if len(self._begun) < HEAD.size:
                continue
            length = HEAD.size + int.from_bytes(self._begun[:4], "big")
            if length > HEAD.size + LIMIT or len(self._begun) > length:
                self._say({"nonsense": f"a frame of {length} bytes, and {len(self._begun)} came"}, time.monotonic())
                raise TransportUnavailable
            if len(self._begun) == length:
                frame, self._begun = self._begun, bytearray()
                found = self._answer(frame)
                if found is not None:
                    self._lock.release()
                    return found

    def abandon(self) -> None:
        """Return the pipes during an exchange."""
        self._close()
        self._lock.release()

    def _taken(self, payload: memoryview) -> memoryview:
        """A copy of data in the shared memory, which the environment may change at any time."""
        length = int.from_bytes(payload, "big")
        if self._memory is None or len(payload) != 8 or length > len(self._memory):
            self._refuse(f"{length} bytes in a memory of {frames.PART}")
            raise TransportUnavailable  # the server has sent no reason
        with memoryview(self._memory) as whole, whole[:length] as part:
            return memoryview(bytearray(part))

    def error(self, payload: memoryview) -> errors.RockError:
        """The error of a response with op ERROR."""
        return error_of(orjson.loads(payload), self._sandbox_id)[0]

    def _write(self, piece: bytes) -> None:
        """Write a piece that the kernel accepts atomically."""
        while True:
            try:
                os.write(self._requests, piece)
                return
            except BlockingIOError:
                self._in_time()
                self._wait(self._writable, self._requests)
            except OSError:
                self._door_says(_KNOCK)

    def _frame(self) -> bytearray | bytes:
        frame: bytearray | bytes = b""
        data: bytes | bytearray | None
        if self._begun:  # bytes that `poll` has read
            data, self._begun = self._begun, bytearray()
        else:
            data = self._at_once()
        while True:
            if data is None:
                self._more() if frame else self._wait(self._readable, self._answers)
                try:
                    data = os.read(self._answers, _READ)
                except BlockingIOError:
                    continue
            if not data:
                self._door_says(_KNOCK)
            frame = frame + data if frame else data
            data = None
            if len(frame) < HEAD.size:
                continue
            length = HEAD.size + int.from_bytes(frame[:4], "big")
            if len(frame) == length:
                return frame
            if length > HEAD.size + LIMIT or len(frame) > length:
                self._refuse(f"a frame of {length} bytes, and {len(frame)} came")
            if length > _LARGE:
                return self._large_frame(frame, length)

    def _at_once(self) -> bytes | None:
        """Spin briefly for data: waking a sleeping process takes longer than most environments' steps. For a slow
        environment, wait asleep, and spin again periodically. An environment that sleeps is not spun for: it would be
        woken on this processor, and wait until the spin ends."""
        if self._rested:
            return None
        if self._skip:
            self._skip -= 1
            return None
        end = time.perf_counter() + _MOMENT
        while True:
            try:
                data = os.read(self._answers, _READ)
                self._in_vain = 0
                return data
            except BlockingIOError:
                if time.perf_counter() > end:
                    self._skip = min(_SKIPPED << self._in_vain, _MOST_SKIPPED)
                    self._in_vain = min(self._in_vain + 1, 5)
                    return None

    def _large_frame(self, begun: bytes | bytearray, length: int) -> bytearray:
        if not self._large:
            self._large = True
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.fcntl(self._answers, _SET_PIPE_SIZE, _PIPE)
        frame = bytearray(length)
        filled = len(begun)
        frame[:filled] = begun
        with memoryview(frame) as room:
            while filled < length:
                with room[filled:] as rest:
                    try:
                        got = os.readv(self._answers, [rest])
                    except BlockingIOError:
                        self._more()
                        continue
                if not got:
                    self._door_says(_KNOCK)
                filled += got
        return frame

    def _more(self) -> None:
        """Wait for the rest of a frame."""
        os.sched_yield()  # its writer is active or waits for a CPU
        self._in_time()
        self._wait(self._readable, self._answers)

    # ---- waits, and the server's connection ----

    def _wait(self, poll: select.poll, fd: int) -> None:
        """Wait until the pipe is ready; raises errors that the server reports meanwhile."""
        while True:
            left = self._deadline - time.monotonic()
            ready = poll.poll(max(0.0, min(left, _WAIT)) * 1000)
            if any(found == fd for found, _ in ready):
                return
            if ready:
                self._door_says(0)
            elif left <= 0:
                self._late()
            else:
                self._say({"playing": True}, time.monotonic())

    def _in_time(self) -> None:
        """Apply the timeout to the whole transfer, also when it proceeds in parts."""
        if time.monotonic() > self._deadline:
            self._late()

    def _late(self) -> None:
        self._say({"overdue": frames.NAMES.get(self._op, "call")}, time.monotonic())
        self._door_says(_KNOCK)

    def _refuse(self, why: str) -> None:
        self._say({"nonsense": why}, time.monotonic())
        self._door_says(_KNOCK)

    def _say(self, what: dict[str, object], now: float) -> None:
        self._sign = now
        try:
            self._door.send(orjson.dumps(what))
        except BlockingIOError:
            pass
        except OSError:
            raise TransportUnavailable from None

    def _door_says(self, patience: float) -> None:
        """Raise the error that the server reports, or TransportUnavailable without one."""
        reply: object = None
        if self._server_poll.poll(patience * 1000):
            with contextlib.suppress(OSError, ValueError):
                reply = orjson.loads(self._door.recv(_PACKET))
        if isinstance(reply, dict):
            raise errors.from_wire(reply)
        raise TransportUnavailable
