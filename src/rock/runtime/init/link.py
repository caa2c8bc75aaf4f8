"""The rocklet's connection to a pid 1: one per sandbox, requests with futures, and programs as `Process`.

    InitLink ── connect(path) ─► request(op) ─► (reply, descriptors)
        └── spawn, attach ─► InitProcess: streams as descriptors, wait, signal, kill_tree, close
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init.link import PACKET, pack, receive_packet, unpack
from rock.guest.init.process_tree import TICK
from rock.guest.init.programs import FIRST_STREAMS
from rock.protocol.routes import SENT
from rock.runtime.base import CLOCK, ExitStatus, Program
from rock.runtime.refusals import no_program, not_a_terminal_size

SOCKET_NAME = "s"
_WATCHED = 10.0  # timeout in seconds of a request that only saves descriptors
PATIENCE = 60.0  # timeout in seconds of a request that has no time limit of its own
log = logging.getLogger(__name__)
Answer = tuple[dict[str, Any], list[int]]
_PROGRAM_HINT = "install it in the image, or give its path; a shell's syntax needs `sh -c`"
_buffer = bytearray(PACKET + 4096)


def bind_listener(folder: Path) -> socket.socket:
    """The socket in `folder` on which a pid 1 listens; supports paths of any length."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
            listener.listen(16)
        except BaseException:
            listener.close()
            raise
        return listener
    finally:
        os.close(fd)


class InitLink:
    """A connection to the pid 1 of one sandbox. `connect` creates it; `close` ends it without ending the sandbox."""

    def __init__(self, sock: socket.socket, sandbox_id: str, *, direct: bool = False) -> None:
        """direct: the descriptors in replies are pid 1's own, so that they can be closed and received again."""
        self.sandbox_id = sandbox_id
        self.direct = direct
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._unwanted: set[int] = set()
        self._processes: dict[int, list[InitProcess]] = {}
        self._early: dict[int, ExitStatus] = {}
        self.kept_pids: dict[str, int] = {}  # by key, as of the last call of `kept`
        self._outgoing: list[tuple[bytes, list[int]]] = []
        self.closed = False
        self.on_lost: Callable[[], None] | None = None  # called once when pid 1 closed the connection
        self.resize: Callable[[int, int, int], None] = _set_size  # of a terminal, by its descriptor
        self._loop.add_reader(sock, self._readable)

    @classmethod
    def connect(cls, folder: Path, sandbox_id: str) -> InitLink:
        """Connect to the socket in a sandbox's run folder. Lost when no process listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
            finally:
                os.close(fd)
        except OSError as error:
            sock.close()
            raise errors.Lost(f"the sandbox's pid 1 does not answer: {error.strerror}", sandbox_id=sandbox_id) from None
        return cls(sock, sandbox_id, direct=True)

    def close(self) -> None:
        """Close the connection; pending requests raise Unavailable. The sandbox continues to run. Idempotent."""
        self.release().close()

    def release(self) -> socket.socket:
        """As `close`, but the caller closes the socket, which wakes pid 1."""
        self.on_lost = None
        self._end(errors.Unavailable("the server closes its connection to the sandbox", sandbox_id=self.sandbox_id,
                                     details=SENT, hint="send the request again once the server has restarted"))
        return self._sock

    def _close(self, reason: errors.RockError) -> None:
        self._end(reason)
        self._sock.close()

    def _end(self, reason: errors.RockError) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        if self._outgoing:
            self._loop.remove_writer(self._sock)
        for _, fds in self._outgoing:
            _close_all(fds)
        self._outgoing.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(reason)
        self._waiting.clear()
        for group in self._processes.values():
            for process in group:
                process.lost(reason)
        self._processes.clear()
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost()

    def _lost(self) -> errors.Lost:
        return errors.Lost("the sandbox's pid 1 is gone", sandbox_id=self.sandbox_id)

    # ---- requests ----

    async def request(self, op: str, fields: Mapping[str, Any] | None = None, *,
                      patience: float | None = PATIENCE) -> Answer:
        """Send a request to pid 1; returns its reply and the descriptors in it, which the caller owns.

        Raises the error of pid 1's reply, Lost when the connection ends, Unavailable after `patience` seconds.
        """
        if self.closed:
            raise self._lost()
        self._number += 1
        number = self._number
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[number] = future
        self._send({"id": number, "op": op, **(fields or {})})
        try:
            async with asyncio.timeout(patience):
                reply, fds = await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.done() and future.exception() is None:
                self._discard(op == "spawn", *future.result())
            elif not future.done() and op == "spawn":
                self._unwanted.add(number)
            if isinstance(error, TimeoutError):
                raise errors.Unavailable(
                    f"the sandbox did not answer {op!r} in {patience:g} s", sandbox_id=self.sandbox_id,
                    hint="it may be short of memory or processes; try again") from None
            raise
        finally:
            self._waiting.pop(number, None)
        if "error" in reply:
            _close_all(fds)
            raise self._error(reply["error"])
        return reply, fds

    def post(self, op: str, fields: Mapping[str, Any]) -> None:
        """Send a request without waiting for its reply."""
        if not self.closed:
            self._send({"id": 0, "op": op, **fields})

    def _discard(self, spawned: bool, reply: Mapping[str, Any], fds: list[int]) -> None:
        """Drop a reply whose caller is gone; a program that was started for it is killed."""
        _close_all(fds)
        if spawned and "pid" in reply:
            self.post("kill_tree", {"pid": reply["pid"]})
            self.post("forget", {"pid": reply["pid"]})

    def _error(self, error: Any) -> errors.RockError:
        code, message = (error[0], error[1]) if isinstance(error, list) and len(error) == 2 else ("", str(error))
        hint = _PROGRAM_HINT if str(message).startswith("no such program") else None
        return errors.from_wire(
            {"error": {"code": code, "message": message, "sandbox_id": self.sandbox_id, "hint": hint}})

    def _send(self, message: dict[str, Any]) -> None:
        self._outgoing.append(pack(message))
        if len(self._outgoing) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._writable)
                return
            except OSError:
                self._loop.call_soon(self._close, self._lost())
                return
            self._outgoing.pop(0)
            _close_all(fds)

    def _writable(self) -> None:
        self._loop.remove_writer(self._sock)
        self._flush()

    def _readable(self) -> None:
        for _ in range(32):
            try:
                data, fds = receive_packet(self._sock, _buffer)
            except BlockingIOError:
                return
            except OSError:
                data, fds = memoryview(b""), []
            if not data:
                self._close(self._lost())
                return
            try:
                message = unpack(data, fds)
                self._take(message, fds)
            except (ValueError, KeyError, TypeError, RecursionError):
                _close_all(fds)
                self._close(self._lost())
                return

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        if message.get("event") == "complaint":
            _close_all(fds)
            log.warning("pid 1 of sandbox %s: %s", self.sandbox_id, str(message.get("text"))[:1000])
            return
        if message.get("event") == "readable":
            _close_all(fds)
            for process in self._processes.get(int(message["pid"]), ()):
                process.readable()
            return
        if message.get("event") == "exit":
            _close_all(fds)
            pid, status = int(message["pid"]), _status(message)
            group = self._processes.pop(pid, None)
            if group is None:
                self._early[pid] = status
                if len(self._early) > 4096:
                    self._early.pop(next(iter(self._early)))
            for process in group or ():
                process.ended(status)
            return
        number = int(message["id"])
        future = self._waiting.get(number)
        if "pid" in message:
            self._early.pop(int(message["pid"]), None)  # of an earlier program with this pid
        if future is None or future.done():
            self._discard(number in self._unwanted, message, fds)
            self._unwanted.discard(number)
        else:
            future.set_result((message, fds))

    # ---- programs ----

    async def spawn(self, program: Program) -> InitProcess:
        """Start a program; `env`, `cwd` and `user` must be complete."""
        if not program.argv or any("\0" in word for word in program.argv):
            raise no_program(self.sandbox_id)
        fields = {
            "argv": list(program.argv), "env": dict(program.env), "cwd": program.cwd, "user": program.user,
            "stdin": program.stdin, "stdout": program.stdout, "stderr": program.stderr, "pty": program.pty,
            "channels": {str(number): way for number, way in program.channels.items()},
            "key": program.key, "keep": program.keep, "nofile": program.nofile,
        }
        reply, fds = await self.request("spawn", fields)
        return self._adopt(reply, fds, program.key, program.keep)

    async def attach(self, key: str) -> InitProcess:
        """The kept program with that key, with its streams."""
        reply, fds = await self.request("attach", {"key": key})
        return self._adopt(reply, fds, key, True)

    async def kept(self, patience: float = PATIENCE) -> list[str]:
        """Keys of the kept programs that are not yet dropped. A pid 1 that waits in compiled code stays there."""
        reply, fds = await self.request("hello", {"brief": True}, patience=patience)
        _close_all(fds)
        self.kept_pids = {str(one["key"]): int(one["pid"]) for one in reply["programs"] if one["keep"]}
        return list(self.kept_pids)

    def _adopt(self, reply: Mapping[str, Any], fds: list[int], key: str, keep: bool) -> InitProcess:
        pid = int(reply["pid"])
        process = InitProcess(self, pid, key, keep, bool(reply["pty"]), self.streams(reply, fds))
        early = self._early.pop(pid, None)
        if reply.get("ended") or early is not None:
            process.ended(early or _status(reply["ended"]))
        elif self.closed:
            process.lost(self._lost())
        else:
            self._processes.setdefault(pid, []).append(process)
        return process

    def started(self, pid: int, fds: list[int], key: str) -> InitProcess:
        """The kept program that was started together with pid 1, with its streams."""
        return self._adopt({"pid": pid, "pty": False, "streams": FIRST_STREAMS}, fds, key, True)

    def streams(self, reply: Mapping[str, Any], fds: list[int]) -> dict[str, int]:
        """The descriptors of a reply, by stream. Unavailable when the kernel dropped some of them."""
        if len(fds) != len(reply["streams"]):
            _close_all(fds)
            raise errors.Unavailable("the server has no free file descriptor for the streams of a program",
                                     sandbox_id=self.sandbox_id,
                                     hint="raise the limit of open files (ulimit -n) of the server, or stop sandboxes")
        return dict(zip(reply["streams"], fds, strict=True))


class FirstStreams:
    """The pipes of a program that is started together with pid 1, its data, and the connection to pid 1. OSError."""

    def __init__(self, data: bytes | None = None) -> None:
        self.ours: list[int] = []
        self.theirs: list[int] = []
        self._data: list[int] = []
        ours, self._peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._sock: socket.socket | None = ours
        try:
            for name in FIRST_STREAMS:
                reading, writing = os.pipe2(os.O_CLOEXEC)
                self.ours.append(writing if name == "stdin" else reading)
                self.theirs.append(reading if name == "stdin" else writing)
                os.set_blocking(self.ours[-1], False)
            if data is not None:
                self._data.append(_sealed(data))
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> list[int]:
        """Those that pid 1 receives: the program's ends, the server's, of which it retains copies, the connection, and
        the program's data."""
        return [*self.theirs, *self.ours, self._peer.fileno(), *self._data]

    def adopt(self, sandbox_id: str, pid: int, key: str) -> tuple[InitLink, InitProcess]:
        """The connection, and the kept program that was started with this pid. They own the server's ends."""
        assert self._sock is not None
        link = InitLink(self._sock, sandbox_id, direct=True)
        self._sock, fds, self.ours = None, self.ours, []
        return link, link.started(pid, fds, key)

    def close(self) -> None:
        """Idempotent."""
        if self._sock is not None:
            self._sock.close()
        self._peer.close()
        _close_all([*self.ours, *self.theirs, *self._data])
        self.ours, self.theirs, self._data = [], [], []


def _sealed(data: bytes) -> int:
    """A memory file of this content, which cannot be changed. OSError."""
    fd = os.memfd_create("rock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS,
                    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        return fd
    except BaseException:
        os.close(fd)
        raise


class InitProcess:
    """A program under pid 1: implements `Process`."""

    def __init__(self, link: InitLink, pid: int, key: str, keep: bool, has_pty: bool, streams: dict[str, int]) -> None:
        self.pid = pid
        self.key = key
        self._link = link
        self._keep = keep
        self._has_pty = has_pty
        self._closed = False
        self._end: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self._changed: Callable[[], None] | None = None  # set while the streams are closed
        self._open(streams)

    def _open(self, streams: dict[str, int]) -> None:
        terminal = streams.pop("pty", None)
        self.stdin: int | None = streams.pop("stdin", None)
        self.stdout: int | None = streams.pop("stdout", None)
        self.stderr: int | None = streams.pop("stderr", None)
        if terminal is not None:
            self.stdin, self.stdout = terminal, os.dup(terminal)
        self.channels: Mapping[int, int] = {int(name): fd for name, fd in streams.items()}
        self._opened = True

    def __repr__(self) -> str:
        return f"InitProcess(pid={self.pid}, key={self.key!r}, sandbox={self._link.sandbox_id!r})"

    def ended(self, status: ExitStatus) -> None:
        """Record the exit; called once by the link."""
        if not self._end.done():
            self._end.set_result(status)
        self.readable()

    def lost(self, error: errors.RockError) -> None:
        """Record the loss of pid 1; called by the link."""
        if not self._end.done():
            self._end.set_exception(error)
            self._end.exception()  # mark as retrieved: a process without waiters is not an error
        self.readable()

    def readable(self) -> None:
        """Report to the owner of closed streams that there is something to read."""
        changed, self._changed = self._changed, None
        if changed is not None:
            changed()

    @property
    def reopens(self) -> bool:
        return self._keep and self._link.direct and not self._closed and not self._end.done()

    def _can_open(self) -> bool:
        return not (self._closed or self._opened)

    async def close_streams(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        try:
            await self._link.request("watch_streams", {"key": self.key}, patience=_WATCHED)
        except BaseException:
            self._changed = None
            raise
        self._close_streams()

    async def reopen_streams(self) -> None:
        self._changed = None
        if not self._can_open():
            return
        reply, fds = await self._link.request("attach", {"key": self.key})
        streams = self._link.streams(reply, fds)
        if not self._can_open():  # closed, or opened by another caller meanwhile
            _close_all(fds)
            return
        self._open(streams)

    @property
    def status(self) -> ExitStatus | None:
        """The exit status; None while it runs or when the status is lost."""
        return self._end.result() if self._end.done() and self._end.exception() is None else None

    async def wait(self) -> ExitStatus:
        return await asyncio.shield(self._end)

    async def signal(self, number: int, *, tree: bool = False, since: float | None = None, root: bool = True) -> int:
        if self._end.done():
            return 0
        if not tree and not root:
            return 0
        spec = {"pid": self.pid, "signal": int(number), "tree": tree, "since": _ticks(since), "root": root}
        reply, _ = await self._link.request("signal", spec)
        return int(reply["count"])

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        if self._end.done():
            return 0
        spec = {"pid": self.pid, "since": _ticks(since), "root": root, "tell": tell}
        reply, _ = await self._link.request("kill_tree", spec)
        return int(reply["count"])

    async def resize(self, rows: int, columns: int) -> None:
        if not self._has_pty:
            raise errors.InvalidConfig("this program has no terminal", sandbox_id=self._link.sandbox_id,
                                       hint="start it with pty=(rows, columns)")
        if not (0 < rows < 65536 and 0 < columns < 65536):
            raise not_a_terminal_size(rows, columns, self._link.sandbox_id)
        fd = self.stdin if self.stdin is not None else self.stdout
        if fd is not None:
            with contextlib.suppress(OSError):
                self._link.resize(fd, rows, columns)

    async def close_stdin(self) -> None:
        if self.stdin is None or self._has_pty:
            return
        fd, self.stdin = self.stdin, None
        os.close(fd)
        if self._keep and not self._end.done():
            await self._link.request("close_stream", {"pid": self.pid, "stream": "stdin"})

    def close(self, *, forget: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        self._changed = None
        self._close_streams()
        if forget and self._keep and self._end.done():
            self._link.post("forget", {"pid": self.pid})

    def _close_streams(self) -> None:
        _close_all([fd for fd in (self.stdin, self.stdout, self.stderr, *self.channels.values()) if fd is not None])
        self.stdin = self.stdout = self.stderr = None
        self.channels = {}
        self._opened = False


def _set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _ticks(since: float | None) -> int | None:
    """Convert a time of CLOCK to clock ticks as in /proc."""
    return None if since is None else int(since * TICK)


def boottime() -> float:
    """The current time in the clock of `since`."""
    return time.clock_gettime(CLOCK)


def _status(message: Mapping[str, Any]) -> ExitStatus:
    if "signal" in message:
        return ExitStatus(signal=int(message["signal"]))
    return ExitStatus(code=int(message["code"]) if "code" in message else None)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def token_user(token: str) -> str | None:
    """The user of a token of `open_write`."""
    try:
        return str(json.loads(token)["user"]) or None
    except (ValueError, KeyError, TypeError):
        return None
