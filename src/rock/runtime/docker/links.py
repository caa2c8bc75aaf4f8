"""The two ways to a container's pid 1: a socket of ours, or its standard streams where no descriptor can cross."""

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
    """One attempt to reach a pid 1, made before the container starts or when it was lost. `close` it in any case."""

    folder: str | None  # what has to be mounted for it

    @property
    def options(self) -> dict[str, object]:
        """What pid 1 has to be told."""
        ...

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        """The link to the pid 1 of a container that runs. Unavailable, Lost."""
        ...

    async def close(self) -> None:
        """Release what it holds; the link ends with it where it is carried. Idempotent."""
        ...


class SocketTransport:
    """The same kernel: descriptors cross, and nothing is between us once pid 1 has connected."""

    options: dict[str, object] = {"socket": f"{python.LINK}/s"}

    def __init__(self, folder: Path) -> None:
        self._door = InitListener(folder / "link")
        self.folder: str | None = str(folder / "link")

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        return InitLink(await self._door.enter(pid, sandbox_id, patience), sandbox_id)

    async def close(self) -> None:
        self._door.close()


class StreamTransport:
    """Another kernel: bytes over the engine's attached streams."""

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


# ---- door ----
#
# Where the pid 1 of one container connects, and nobody else gets in.
#
# The folder is shown inside read-only, so that nothing can be put there in place of our socket. Who connects is told by
# the kernel: only the container's own pid 1 is served.

class InitListener:
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
