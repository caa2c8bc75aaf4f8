"""Transports to a container's pid 1: a unix socket, or the container's standard streams where descriptors cannot cross.

`InitListener` accepts the connection of one container. Its folder is mounted read-only inside, so nothing in the
container can replace the socket. The kernel reports the peer's pid, and only the container's own pid 1 is accepted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Protocol

from rock import errors
from rock.runtime.docker.engine import Engine
from rock.runtime.init import python
from rock.runtime.init.link import SOCKET_NAME, InitLink, bind_listener
from rock.runtime.init.multiplexer import Multiplexer


class InitTransport(Protocol):
    """One attempt to connect to a pid 1, before the container starts or after a lost connection. Always `close` it."""

    folder: str | None  # folder to mount in the container, if any

    @property
    def options(self) -> dict[str, object]:
        """Options to pass to pid 1."""
        ...

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        """The link to the pid 1 of a running container. Unavailable, Lost."""
        ...

    async def close(self) -> None:
        """Release its resources; closes the link of a multiplexed stream. Idempotent."""
        ...


class SocketTransport:
    """Same kernel: descriptors cross, and pid 1 connects directly."""

    options: dict[str, object] = {"socket": f"{python.LINK}/s"}

    def __init__(self, folder: Path) -> None:
        self._door = InitListener(folder / "link")
        self.folder: str | None = str(folder / "link")

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        return InitLink(await self._door.enter(pid, sandbox_id, patience), sandbox_id)

    async def close(self) -> None:
        self._door.close()


class StreamTransport:
    """Separate kernel: bytes over the engine's attached streams."""

    options: dict[str, object] = {}
    folder: str | None = None

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._mux: Multiplexer | None = None

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        self._mux = Multiplexer(await self._engine.attach(engine_id), self._folder, sandbox_id)
        link = InitLink(await self._mux.begin(patience), sandbox_id)
        link.resize = self._mux.resize
        return link

    async def close(self) -> None:
        if self._mux is not None:
            self._mux.close()
            await self._mux.gone()


# ---- listener ----

class InitListener:
    """A listening socket in `folder`, which is created when missing. `close` it; a successful `enter` closes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.chmod(0o755)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / SOCKET_NAME)
        self._listener: socket.socket | None = bind_listener(folder)
        self._listener.setblocking(False)
        # Root inside may map to another user outside; the parent folder is accessible to the server's user only.
        os.chmod(folder / SOCKET_NAME, stat.S_IRUSR | stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)

    async def enter(self, pid: int, sandbox_id: str, patience: float) -> socket.socket:
        """Accept the connection of process `pid` and reject others. Unavailable on a timeout."""
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
            raise errors.Unavailable(f"the container's pid 1 did not connect in {patience:g} s", sandbox_id=sandbox_id,
                                     hint="raise startup_timeout, or check the load of the engine's machine") from None
        raise errors.Lost("the sandbox is being removed", sandbox_id=sandbox_id)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._folder / SOCKET_NAME)
