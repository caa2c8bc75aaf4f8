"""Where the pid 1 of one container connects, and nobody else gets in.

The folder is shown inside read-only, so that nothing can be put there in place of our socket. Who connects is told by
the kernel: only the container's own pid 1 is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

from rock import errors
from rock.runtime.initlink import SOCKET_NAME, bind_listener


class Door:
    """A listening socket in `folder`, which is made when missing. `close` it; `enter` closes it when it succeeds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.chmod(0o755)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / SOCKET_NAME)
        self._listener: socket.socket | None = bind_listener(folder)
        self._listener.setblocking(False)
        # Root inside may be another user outside; what is over the folder is for our user alone.
        os.chmod(folder / SOCKET_NAME, stat.S_IRUSR | stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)

    async def enter(self, pid: int, sandbox_id: str, patience: float) -> socket.socket:
        """The connection of the process `pid`, others being turned away. Unavailable when it does not come in time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                while self._listener is not None:
                    sock, _ = await loop.sock_accept(self._listener)
                    peer = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                    if peer == pid:
                        self.close()
                        return sock
                    sock.close()
        except TimeoutError:
            raise errors.Unavailable(f"the container's pid 1 did not connect in {patience:g} s",
                                     sandbox_id=sandbox_id) from None
        raise errors.Lost("the sandbox is being removed", sandbox_id=sandbox_id)

    def close(self) -> None:
        """Nobody can connect any more. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._folder / SOCKET_NAME)
