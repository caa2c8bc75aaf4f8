"""Ports of programs in a sandbox, reached from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from rock import errors
from rock.protocol.routes import ROUTES
from rock.sdk import primitives
from rock.sdk.sandbox.link import Link, headers_of

if TYPE_CHECKING:
    from rock.sdk.forward import PortForward


class Ports(Link):
    """They are dialled from inside: a sandbox needs no network for them."""

    def url_of(self, port: int) -> str:
        """Where programs reach what speaks HTTP on a port inside; the server's key goes with it as for every call."""
        return self.url + ROUTES["port"].url(sandbox_id=self._id(), port=_checked(port, 1), rest="")

    @asynccontextmanager
    async def port_forward(self, remote: int, local: int = 0) -> AsyncIterator[PortForward]:
        """A port of this machine that leads to port `remote` inside, while this is entered; 0 takes one that is free.

            async with sandbox.port_forward(5432) as forward:
                connect(forward.host, forward.port)

        Conflict: `local` is taken.
        """
        from rock.sdk.forward import PortForward  # with its WebSockets, which no other call should wait for

        _checked(local, 0)
        target = ROUTES["tunnel"].url(sandbox_id=self._id(), port=_checked(remote, 1))
        forward = PortForward(self.url, target, headers_of(self.config), local)
        await primitives.in_thread(forward.open)
        try:
            yield forward
        finally:
            await primitives.in_thread(forward.close)


def _checked(port: int, lowest: int) -> str:
    if not lowest <= port < 65536:
        raise errors.InvalidConfig(f"{port} is not a port", hint=f"a number from {lowest} to 65535")
    return str(port)
