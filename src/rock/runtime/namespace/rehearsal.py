"""What every pid 1 does first, done by the zygote before its memory becomes a file: what Python works out on the way is
then in the file, for all.

The interpreter writes into code, types and caches as it meets them, until it has settled; each pid 1 would have those
pages to itself. No file of this machine is read: it would be in the memory of every pid 1. Standard library only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator

from rock.guest import init

_TIMES = 10  # the interpreter has settled on how to run a function after eight
_PATIENCE = 2.0  # seconds for all of it
_PROGRAM = "/bin/true"
_ENVIRONMENT = {"HOME": "/", "PATH": "/usr/bin:/bin"}  # without a HOME it would be looked up


class _Rehearsed(init.Init):
    """An Init that serves one connection, of its own process."""

    def __init__(self) -> None:
        super().__init__(None, os.geteuid(), outside=False)
        theirs, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.adopt(theirs)
        self.number = 0
        self.end = time.monotonic() + _PATIENCE

    def ask(self, **request: object) -> None:
        """Have a request served; what is answered does not matter."""
        self.number += 1
        self.ours.send(json.dumps({"id": self.number, **request}).encode())
        while time.monotonic() < self.end:
            self.later(0.02, lambda: None)
            self.turn()
            self.guard(self._reap)
            if self.number in list(self._answered()):
                return
        raise TimeoutError

    def _answered(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.ours, 65536, 64)
                for fd in fds:
                    os.close(fd)
                yield json.loads(data).get("id", 0)

    def close(self) -> None:
        for program in self.programs.values():
            program.release()
            if program.ended is None:
                os.kill(program.pid, signal.SIGKILL)
                os.waitpid(program.pid, 0)
        for connection in list(self.connections):
            self.drop(connection)
        self.ours.close()
        self.epoll.close()


def rehearse() -> None:
    """In a process without children that is to be copied. Without it the copies are larger."""
    files, mask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o022)
    buried = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a pid is then its program's until we ask for its end
    try:
        _play()
    finally:
        signal.signal(signal.SIGCHLD, buried)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.umask(mask)
        gc.collect()
        gc.freeze()


def _play() -> None:
    one = _Rehearsed()
    try:
        for _ in range(_TIMES):
            one.ask(op="hello")
            one.ask(op="stat", path=_PROGRAM)
            one.ask(op="spawn", argv=[_PROGRAM], env=_ENVIRONMENT, stdin="pipe", stdout="pipe", stderr="stdout",
                    channels={"197": "w", "199": "w"}, key=f"k{one.number}", keep=True)  # fmt: skip
    finally:
        one.close()
