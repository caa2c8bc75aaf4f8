"""Requests of this server to other HTTP servers: pooled connections, responses as they arrive.

    pool.send(method, target, headers, body) ──► Response: status, headers, pieces()

A connection belongs to one request at a time. `limit` bounds the concurrent requests of a pool; others wait. Responses
are not decompressed, and redirections are not followed. A request over a kept-alive connection that the server closed
meanwhile is sent again over a new one, if no byte of a response arrived: HTTP servers close idle connections at any
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from rock.http.forwarding import Broken, ClientConnection

_IDLE = 15.0  # seconds that an unused connection is kept
Headers = list[tuple[bytes, bytes]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ConnectFailed(Exception):
    """There is no connection; no byte of the request was sent."""


class Interrupted(Exception):
    """The connection broke, or was silent for too long, after the request was sent. begun: the head of a response had
    arrived. timed_out: because of silence."""

    def __init__(self, message: str, *, begun: bool, timed_out: bool = False) -> None:
        super().__init__(message)
        self.begun = begun
        self.timed_out = timed_out


class Response:
    """A response whose body is being read. Use as a context, which releases the connection."""

    def __init__(self, pool: Pool, connection: ClientConnection, timeout: float) -> None:
        self._pool = pool
        self._connection = connection
        self._timeout = timeout
        self.status = connection.status
        self.headers: Headers = connection.headers

    def header(self, name: bytes) -> str | None:
        return next((value.decode("latin-1") for key, value in self.headers if key == name), None)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives. Interrupted."""
        async with contextlib.aclosing(self._connection.pieces()) as pieces:
            while True:
                try:
                    async with asyncio.timeout(self._timeout):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except Broken as error:
                    raise Interrupted(str(error), begun=True) from None
                except TimeoutError:
                    raise Interrupted(f"the server was silent for {self._timeout:g} s", begun=True,
                                      timed_out=True) from None  # fmt: skip
                yield piece

    async def body(self, limit: int) -> bytes:
        """The complete body. Interrupted, also above `limit` bytes."""
        parts, size = [], 0
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                size += len(piece)
                if size > limit:
                    raise Interrupted(f"the response is over {limit} bytes", begun=True)
                parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.release(self._connection)


class Pool:
    """Connections to one server. allows: whether an address may be contacted; None is any. ValueError for the URL."""

    def __init__(
        self, url: str, *, limit: int = 512, connect_within: float = 10.0, tls: ssl.SSLContext | None = None,
        allows: Callable[[Address], bool] | None = None,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server")
        self.path = parts.path.rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._authority = parts.netloc.rpartition("@")[2].encode()
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._within = connect_within
        self._allows = allows
        self._turn = asyncio.Semaphore(limit)
        self._idle: list[ClientConnection] = []
        self._busy: set[ClientConnection] = set()
        self._retired = False

    async def send(self, method: str, target: str, headers: Headers, body: bytes, *, timeout: float) -> Response:
        """Send a request, and wait for the head of the response for up to `timeout` seconds. target: path and query.
        ConnectFailed, Interrupted."""
        lines = [f"{method} {target} HTTP/1.1".encode("latin-1"), b"host: " + self._authority]
        lines += [name + b": " + value for name, value in headers]
        lines.append(b"content-length: %d" % len(body))
        head = b"\r\n".join([*lines, b"", b""])
        await self._turn.acquire()
        try:
            while True:
                connection, fresh = await self._connection()
                try:
                    return await self._ask(connection, head, body, method, timeout)
                except Interrupted as error:
                    self._drop(connection)
                    if fresh or error.begun or error.timed_out:
                        raise
                except BaseException:
                    self._drop(connection)
                    raise
        except BaseException:
            self._turn.release()
            raise

    async def _ask(
        self, connection: ClientConnection, head: bytes, body: bytes, method: str, timeout: float
    ) -> Response:
        connection.ask(head + body if len(body) < 65536 else head, method == "HEAD")
        try:
            async with asyncio.timeout(timeout):
                if len(body) >= 65536:
                    await connection.write(body)
                connection.sent = True
                await connection.answered()
        except Broken as error:
            raise Interrupted(str(error), begun=bool(connection.status)) from None
        except TimeoutError:
            raise Interrupted(f"no response within {timeout:g} s", begun=False, timed_out=True) from None
        return Response(self, connection, timeout)

    async def _connection(self) -> tuple[ClientConnection, bool]:
        """A connection, and whether it is new. ConnectFailed."""
        now = time.monotonic()
        while self._idle:
            found = self._idle.pop()
            if found.alive and now - found.used_at < _IDLE:
                self._busy.add(found)
                return found, False
            found.close()
        loop = asyncio.get_running_loop()
        problem = "the name has no address"
        try:
            async with asyncio.timeout(self._within):
                for family, address in await self._addresses():
                    try:
                        _, made = await loop.create_connection(
                            ClientConnection, address, self._port, family=family, ssl=self._tls,
                            server_hostname=self._host if self._tls is not None else None,
                        )  # fmt: skip
                    except OSError as error:
                        problem = _words(error)
                        continue
                    self._busy.add(made)
                    return made, True
        except TimeoutError:
            problem = f"no connection within {self._within:g} s"
        raise ConnectFailed(problem)

    async def _addresses(self) -> Sequence[tuple[int, str]]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except UnicodeError:  # a label that is empty or too long
            raise ConnectFailed(f"{self._host[:80]!r} is no host name") from None
        except OSError as error:
            raise ConnectFailed(f"the name is not resolved: {_words(error)}") from None
        addresses = [(int(family), str(address[0])) for family, _, _, _, address in found]
        if self._allows is None:
            return addresses
        allowed = [row for row in addresses if self._allows(ipaddress.ip_address(row[1].partition("%")[0]))]
        if addresses and not allowed:
            raise ConnectFailed("its address belongs to a private network, which this tenant may not use")
        return allowed

    def release(self, connection: ClientConnection) -> None:
        """The response was read, or is not needed."""
        self._turn.release()
        self._busy.discard(connection)
        if connection.reusable and not self._retired:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def _drop(self, connection: ClientConnection) -> None:
        self._busy.discard(connection)
        connection.close()

    def retire(self) -> None:
        """Close idle connections now, and the others when their responses end."""
        self._retired = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def close(self) -> None:
        """Close all connections; pending requests are interrupted."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close their sockets


def _words(error: OSError) -> str:
    return error.strerror or str(error)
