"""pid 1 of an engine's container, which connects to the server instead of listening. Standard library only.

    server ── listens on a socket in a folder that is mounted read-only at /.rock/link ◄── pid 1

No process inside can impersonate either side: the folder is not writable from inside, and the server checks the peer.
pid 1 reconnects after the server was lost.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
import sys

from rock.guest.init import pid1, syscalls
from rock.guest.init.link import Connection
from rock.guest.init.multiplexer import Multiplexer
from rock.guest.init.pid1 import Init

_SOON, _LATER = 0.05, 1.0  # seconds between two attempts


class ConnectingInit(Init):
    """An Init with one outgoing connection, to the socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(None, 0, False)
        self._path = path
        self._pause = _SOON

    def begin(self) -> None:
        """Connect to the server, now and after each loss."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            self.later(self._pause, self.begin)
            self._pause = min(self._pause * 1.5, _LATER)
            return
        self._pause = _SOON
        self.adopt(sock)

    def drop(self, connection: Connection) -> None:
        known = connection in self.connections
        super().drop(connection)
        if known:
            self.later(self._pause, self.begin)


class MultiplexedInit(Init):
    """An Init that is reached over its own standard streams, see multiplexer.py."""

    def begin(self) -> None:
        """Move the streams to descriptors that programs do not inherit."""
        source, sink = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1))
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)
        self._mux = Multiplexer(self, source, sink, self.adopt)


def main() -> None:
    """Entry point: `boot.py '{"socket": PATH}'`, or '{}' for the standard streams.

    filter: a system call filter in hexadecimal for all programs inside, where no outside process has installed one.
    """
    options = json.loads(sys.argv[1])
    os.environ.clear()
    os.chdir("/")
    if os.getsid(0) != os.getpid():
        os.setsid()
    if "filter" in options:
        syscalls.filter_calls(bytes.fromhex(str(options["filter"])))
    one = pid1.hidden(
        ConnectingInit(str(options["socket"])) if "socket" in options else MultiplexedInit(None, 0, False)
    )
    gc.freeze()
    one.begin()
    one.run()
