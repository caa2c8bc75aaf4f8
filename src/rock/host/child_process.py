"""The rocklet's client of a helper process: starts it, sends requests, and detects its death."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init.link import pack, receive_packet, unpack

PATIENCE = 30.0  # seconds


class Ended(errors.Unavailable):
    """The child died during a request; the next request starts another one."""


class ChildLink:
    """One child at a time, of a program of this package, started with the first request.

    what: its name in errors. again: the advice when it has ended. options: the program's, without the descriptor.
    """

    what = ""
    again = ""

    def __init__(self, program: Path, options: dict[str, Any], log: Path) -> None:
        self._program = str(program)
        self._options = options
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._number = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()
        self._outgoing: list[tuple[bytes, list[int]]] = []
        self._buffer = bytearray(1 << 17)

    # ---- for subclasses ----

    def _greeted(self, data: bytes) -> None:
        """Check its first message; raises its error. Empty data means that it ended at once."""

    def _not_started(self, error: OSError | TimeoutError) -> errors.RockError:
        raise NotImplementedError

    def _told(self, message: dict[str, Any]) -> None:
        """Handle each of its messages, replies included."""

    def _lost(self) -> None:
        """Handle its death."""
        self.close()

    # ---- common ----

    @property
    def pid(self) -> int | None:
        """Its pid while it runs."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> None:
        """Start it when it does not run. Raises the errors of `_greeted` and `_not_started`."""
        async with self._starting:
            if self._sock is not None:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            try:
                self._child = self._fork(theirs)
                async with asyncio.timeout(PATIENCE):
                    data = await asyncio.get_running_loop().sock_recv(ours, 65536)
                self._greeted(data)
            except BaseException as error:
                ours.close()
                self._bury()
                if isinstance(error, OSError | TimeoutError):
                    raise self._not_started(error) from None
                raise
            self._sock = ours
            asyncio.get_running_loop().add_reader(ours, self._readable)

    def _fork(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        options = json.dumps({**self._options, "fd": theirs.fileno()})
        with theirs, open(self._log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", self._program, options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[theirs.fileno()], cwd="/", start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"})

    async def ask(
        self, op: str, fields: dict[str, Any], fds: Sequence[int] = (), patience: float | None = None
    ) -> dict[str, Any]:
        """Send a request with copies of `fds`, starting the child when necessary. Ended when it dies meanwhile,
        Unavailable after `patience` seconds."""
        copies = [os.dup(fd) for fd in fds]  # the caller may close its own during a restart of the child
        try:
            await self.start()
        except BaseException:
            for fd in copies:
                os.close(fd)
            raise
        self._number += 1
        number = self._number
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        data, extra = pack({"id": number, "op": op, **fields})
        self._outgoing.append((data, [*copies, *extra]))
        self._flush()
        try:
            if patience is None:
                return await future
            async with asyncio.timeout(patience):
                return await future
        except TimeoutError:
            raise errors.Unavailable(f"{self.what} did not answer {op!r} in {patience:g} s",
                                     hint=f"see {self._log}") from None
        finally:
            self._waiting.pop(number, None)

    def post(self, op: str, fields: dict[str, Any]) -> None:
        """Send a message without waiting; no effect when it does not run."""
        if self._sock is not None:
            self._outgoing.append(pack({"id": 0, "op": op, **fields}))
            self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._outgoing and self._sock is not None:
            data, fds = self._outgoing[0]
            try:
                socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._lost()
                return
            self._outgoing.pop(0)
            for fd in fds:
                os.close(fd)
        if self._sock is not None:
            loop.remove_writer(self._sock)

    def _readable(self) -> None:
        while self._sock is not None:
            try:
                data, fds = receive_packet(self._sock, self._buffer)
            except BlockingIOError:
                return
            except OSError:
                data, fds = memoryview(b""), []
            if not data:
                self._lost()
                return
            message = unpack(data, fds)
            for fd in fds:
                os.close(fd)
            self._told(message)
            future = self._waiting.get(int(message.get("id", 0)))
            if future is not None and not future.done():
                future.set_result(message)

    def _bury(self) -> None:
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1.0)
            if self._child.returncode is None:
                self._child.send_signal(signal.SIGKILL)
                self._child.wait()
            self._child = None

    def close(self) -> None:
        """End it. Resources that it created or serves remain. Idempotent."""
        if self._sock is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.remove_writer(self._sock)
        self._sock.close()
        self._sock = None
        for _, fds in self._outgoing:
            for fd in fds:
                os.close(fd)
        self._outgoing.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Ended(f"{self.what} ended before it responded", hint=self.again))
        self._bury()
