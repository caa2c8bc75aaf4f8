"""The rocklet's side of the launcher: start it, ask it, start it again when it crashed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.wire import pack, receive_packet, unpack

_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_START_PATIENCE = 30.0


class LaunchLink:
    """One launcher at a time. `options` are those of `launcher.Launcher`, without the descriptor.

    made: called with the name of each run folder that was made ahead.
    """

    def __init__(self, options: dict[str, Any], log: Path, made: Callable[[str], None] = lambda name: None) -> None:
        self._options = options
        self._made = made
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._number = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()
        self._outgoing: list[tuple[bytes, list[int]]] = []
        self._buffer = bytearray(1 << 17)

    @property
    def pid(self) -> int | None:
        """The launcher's process, when it runs."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> None:
        """Start it when it does not run. Unsupported, with the reason, when it cannot."""
        async with self._starting:
            if self._sock is not None:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            try:
                self._child = self._fork(theirs)
                async with asyncio.timeout(_START_PATIENCE):
                    data = await asyncio.get_running_loop().sock_recv(ours, 65536)
            except (OSError, TimeoutError) as error:
                ours.close()
                raise errors.Unsupported(f"the launcher did not start: {error!r}", hint=f"see {self._log}") from None
            except BaseException:
                ours.close()
                raise
            if not data:
                ours.close()
                self._bury()
                raise errors.Unavailable("the launcher ended while it started", hint=f"see {self._log}")
            answer = json.loads(data)
            if "error" in answer:
                ours.close()
                self._bury()
                raise errors.Unsupported(f"this host cannot make namespaces: {answer['error']}",
                                         hint=f"`rock doctor` tells what is missing; the launcher's log is {self._log}")
            self._sock = ours
            asyncio.get_running_loop().add_reader(ours, self._readable)

    def _fork(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        options = json.dumps({**self._options, "fd": theirs.fileno()})
        with theirs, open(self._log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", _LAUNCHER, options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[theirs.fileno()], cwd="/", start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"})

    async def request(self, op: str, fields: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
        """Ask the launcher, starting it first when it is gone. Unavailable when it dies meanwhile.

        fd: a descriptor that it gets a copy of.
        """
        await self.start()
        self._number += 1
        number = self._number
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        data, extra = pack({"id": number, "op": op, **fields})
        self._outgoing.append((data, extra if fd is None else [os.dup(fd), *extra]))
        self._flush()
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    def post(self, op: str, fields: dict[str, Any]) -> None:
        """Tell it without waiting; nothing happens when it does not run."""
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
                self._lost()
                return
            if not data:
                self._lost()
                return
            message = unpack(data, fds)
            if "made" in message:
                self._made(str(message["made"]))
            future = self._waiting.get(int(message["id"]))
            if future is not None and not future.done():
                future.set_result(message)

    def _lost(self) -> None:
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
                future.set_exception(errors.Unavailable("the launcher ended", hint="the next request starts it again"))
        self._bury()

    def _bury(self) -> None:
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1.0)
            if self._child.returncode is None:
                self._child.send_signal(signal.SIGKILL)
                self._child.wait()
            self._child = None

    def close(self) -> None:
        """End the launcher; the sandboxes that it made stay."""
        self._lost()
