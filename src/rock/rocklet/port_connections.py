"""Connections to ports inside: opened through the runtime, and closed when their sandbox ends or the server stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator

from rock.errors import InvalidConfig, NotFound, PortFailed, PortTimeout, RockError, Unavailable, Unsupported
from rock.runtime.base import Handle, Ports, Runtime

CONNECT_WITHIN = 10.0  # seconds
CHUNK = 128 << 10
_LOOPBACK = ("127.0.0.1", "::1")  # some servers listen on only one of them


class Connections:
    """Connections to the ports of one sandbox."""

    def __init__(self, sandbox_id: str, runtime: Runtime, handle: Handle) -> None:
        self._id = sandbox_id
        self._runtime = runtime
        self._handle = handle
        self._open: set[asyncio.WriteTransport] = set()

    @contextlib.contextmanager
    def holding(self, transport: asyncio.WriteTransport) -> Iterator[None]:
        """Register a connection, which is aborted at the end of the context, with its unsent data."""
        self._open.add(transport)
        try:
            yield
        finally:
            self._open.discard(transport)
            transport.abort()

    def cut(self) -> None:
        """Close all connections. Waiting callers see the end of their connection."""
        for transport in self._open:
            transport.abort()

    async def dial(self, port: int) -> socket.socket:
        """A connection to a port inside. Unavailable when nothing listens, PortTimeout, Unsupported."""
        if not isinstance(self._runtime, Ports):
            raise Unsupported(f"the runtime {self._handle.runtime!r} does not connect to ports of a sandbox",
                              sandbox_id=self._id,
                              hint="use another runtime; `rock doctor` lists those of this machine")
        fd = -1
        for host in _LOOPBACK:
            try:
                fd = await self._runtime.dial(self._handle, port, host=host, timeout=CONNECT_WITHIN)
                break
            except NotFound:
                pass
            except PortTimeout:
                raise
            except RockError:  # there may be no IPv6
                if host == _LOOPBACK[0]:
                    raise
        else:
            raise Unavailable(
                f"nothing listens on port {port} in sandbox {self._id}",
                sandbox_id=self._id,
                hint="start a server there, on 127.0.0.1 or 0.0.0.0; one that was just started may need a moment",
            )
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:  # pid 1 runs inside, and may return any kind of descriptor
            os.close(fd)
            raise PortFailed(f"port {port} gave no connection: {error}", sandbox_id=self._id) from None
        sock.setblocking(False)
        return sock

    @contextlib.contextmanager
    def given_away(self, sock: socket.socket, port: int) -> Iterator[None]:
        """Protects a new socket until a transport owns it: the socket is closed on failure, and a broken one raises
        PortFailed."""
        try:
            yield
        except (OSError, ValueError) as error:
            sock.close()
            raise PortFailed(f"the connection to port {port} broke: {error}", sandbox_id=self._id) from None
        except BaseException:
            sock.close()
            raise

    @contextlib.asynccontextmanager
    async def streams(self, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to a port inside, as a pair of streams. Raises the errors of `dial`."""
        sock = await self.dial(port)
        with self.given_away(sock, port):
            reader, writer = await asyncio.open_connection(sock=sock, limit=CHUNK)
        with self.holding(writer.transport):
            yield reader, writer


def port_of(text: str) -> int:
    """A port number; InvalidConfig for an invalid one."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise InvalidConfig(f"{text[:40]!r} is not a port", hint="a number from 1 to 65535")
    return int(text)
