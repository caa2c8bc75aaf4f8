"""pid 1 of a container that an engine made. It connects to the server, instead of being connected to.

    server ── listens on a socket in a folder that is mounted read-only at /.rock/link ◄── pid 1

So nothing inside can stand in for either: the folder cannot be written to from inside, and the server looks at who
connects. A server that went away is looked for until it is back.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys

from rock.guest import init
from rock.guest.init import Init
from rock.guest.wire import Connection

_SOON, _LATER = 0.05, 1.0  # seconds between two attempts


class Dialling(Init):
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


def main() -> None:
    """Run as a program: `boot.py '{"socket": PATH}'`; never returns before its end."""
    options = json.loads(sys.argv[1])
    os.environ.clear()
    os.chdir("/")
    if os.getsid(0) != os.getpid():
        os.setsid()
    one = init.hidden(Dialling(str(options["socket"])))
    gc.freeze()
    one.later(0.0, one.begin)
    one.run()
