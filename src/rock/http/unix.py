"""Unix sockets of servers in private folders.

The path of a Unix socket is limited to 107 bytes. A folder of any depth is reached through /proc/self/fd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

SCHEME = "unix:"
_BACKLOG = 2048


def listen(file: Path) -> socket.socket:
    """A listening socket at a path, in place of an earlier one. Only the owner may connect. OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name, dir_fd=folder)
        listener.bind(f"/proc/self/fd/{folder}/{file.name}")
        os.chmod(file.name, 0o600, dir_fd=folder)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    return listener


async def dial(file: Path) -> socket.socket:
    """A connection to the socket at a path. OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        folder = os.open(file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{folder}/{file.name}")
        finally:
            os.close(folder)
    except BaseException:
        sock.close()
        raise
    return sock
