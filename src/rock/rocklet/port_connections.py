"""Connections to ports inside: made through the runtime, and cut when their sandbox ends or the server stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from rock.errors import InvalidConfig, NotFound, PortFailed, PortTimeout, RockError, Unavailable, Unsupported
from rock.runtime.base import Ports

if TYPE_CHECKING:
    from rock.rocklet.sandbox import Supervisor

CONNECT_WITHIN = 10.0  # seconds
CHUNK = 128 << 10
_LOOPBACK = ("127.0.0.1", "::1")  # some servers listen on one of them only


class Connections:
    """Those that are open to one sandbox."""

    def __init__(self) -> None:
        self._open: set[asyncio.WriteTransport] = set()

    @contextlib.contextmanager
    def holding(self, transport: asyncio.WriteTransport) -> Iterator[None]:
        """One of them, which is closed when this ends, whatever it has not sent."""
        self._open.add(transport)
        try:
            yield
        finally:
            self._open.discard(transport)
            transport.abort()

    def cut(self) -> None:
        """Close all. Who waits for one sees its end."""
        for transport in self._open:
            transport.abort()


def port_of(text: str) -> int:
    """A port's number; InvalidConfig when it is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise InvalidConfig(f"{text[:40]!r} is not a port", hint="a number from 1 to 65535")
    return int(text)


async def dial(sandbox: Supervisor, port: int) -> socket.socket:
    """A connection to a port inside. Unavailable when nothing listens, PortTimeout, Unsupported."""
    runtime = sandbox.runtime
    if not isinstance(runtime, Ports):
        raise Unsupported(f"the runtime {sandbox.handle.runtime} reaches no ports", sandbox_id=sandbox.id)
    fd = -1
    for host in _LOOPBACK:
        try:
            fd = await runtime.dial(sandbox.handle, port, host=host, timeout=CONNECT_WITHIN)
            break
        except NotFound:
            pass
        except PortTimeout:
            raise
        except RockError:  # it may have no IPv6 at all
            if host == _LOOPBACK[0]:
                raise
    else:
        raise Unavailable(
            f"nothing listens on port {port} in sandbox {sandbox.id}",
            sandbox_id=sandbox.id,
            hint="start a server there, on 127.0.0.1 or 0.0.0.0; one that was just started may need a moment",
        )
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:  # pid 1 runs inside, and may have been made to hand out anything
        os.close(fd)
        raise PortFailed(f"port {port} gave no connection: {error}", sandbox_id=sandbox.id) from None
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def given_away(sock: socket.socket, sandbox: Supervisor, port: int) -> Iterator[None]:
    """While what was dialled goes over to a transport: closed when that fails, as PortFailed where it broke."""
    try:
        yield
    except (OSError, ValueError) as error:
        sock.close()
        raise PortFailed(f"the connection to port {port} broke: {error}", sandbox_id=sandbox.id) from None
    except BaseException:
        sock.close()
        raise


@contextlib.asynccontextmanager
async def streams(sandbox: Supervisor, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a port inside, to read from and to write to. Raises what `dial` does."""
    sock = await dial(sandbox, port)
    with given_away(sock, sandbox, port):
        reader, writer = await asyncio.open_connection(sock=sock, limit=CHUNK)
    with sandbox.connections.holding(writer.transport):
        yield reader, writer
