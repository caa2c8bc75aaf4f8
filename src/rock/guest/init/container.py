"""pid 1 of a container that an engine made. It connects to the server, instead of being connected to.

    server ── listens on a socket in a folder that is mounted read-only at /.rock/link ◄── pid 1

So nothing inside can stand in for either: the folder cannot be written to from inside, and the server looks at who
connects. A server that went away is looked for until it is back.
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
    """An Init with the one connection that it made itself, to the socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(None, 0, False)
        self._path = path
        self._pause = _SOON

    def begin(self) -> None:
        """Look for the server, now and whenever it was lost."""
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
        """Take the streams away from where programs could find them."""
        source, sink = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1))
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)
        self._mux = Multiplexer(self, source, sink, self.adopt)


def main() -> None:
    """Run as a program: `boot.py '{"socket": PATH}'`, or '{}' to be reached over the standard streams.

    filter: of system calls, in hexadecimal, for all that runs inside where nobody outside has given it one.
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
