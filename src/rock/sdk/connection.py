"""One connection to a server: a socket, and TLS over it where the URL says https."""

from __future__ import annotations

import functools
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from typing import TypeVar

from rock.errors import ClientError
from rock.sdk import primitives
from rock.sdk.http import Address, Source

R = TypeVar("R")

READ_SIZE = 64 << 10
TLS_READ_SIZE = 256 << 10


@functools.cache
def default_context() -> ssl.SSLContext:
    """How servers are verified: by the system's certificates (SSL_CERT_FILE and SSL_CERT_DIR change them)."""
    return ssl.create_default_context()


class Connection:
    """Bytes both ways. `released`: when it went idle, for the pool."""

    __slots__ = ("_incoming", "_outgoing", "_tls", "released", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.released = 0.0
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()

    @classmethod
    async def open(cls, address: Address, timeout: float | None, context: ssl.SSLContext | None = None) -> Connection:
        """Connect to the first address of the host that answers. OSError, TimeoutError."""
        if address.unix:
            return await cls._open_unix(address.unix, timeout)
        failure: OSError = OSError(f"{address.host} has no address")
        for family, kind, protocol, _, target in await primitives.resolve(address.host, address.port):
            sock = socket.socket(family, kind, protocol)
            connection = cls(sock)
            try:
                await primitives.connect(sock, target, timeout)
                _tune(sock)
                if address.tls:
                    await connection._handshake(context or default_context(), address.host, timeout)
                return connection
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
        raise failure

    @classmethod
    async def _open_unix(cls, path: str, timeout: float | None) -> Connection:
        """Connect to a Unix socket of this user or of root. Its path may be longer than the kernel takes. OSError."""
        folder, _, name = path.rpartition("/")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                await primitives.connect(sock, f"/proc/self/fd/{place}/{name}", timeout)
            finally:
                os.close(place)
            _, owner, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if owner not in (0, os.geteuid()) and os.geteuid() != 0:
                raise PermissionError(f"{path} is served by another user")
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        if self._tls is None:
            await primitives.send(self.sock, data, timeout)
        elif data:
            tls = self._tls
            await self._carry(lambda: tls.write(data), timeout)

    async def receive(self, timeout: float | None, size: int = READ_SIZE) -> bytes:
        """What has come; b"" at the end."""
        if self._tls is None:
            return await primitives.receive(self.sock, size, timeout)
        tls = self._tls
        try:
            return await self._carry(lambda: tls.read(size), timeout)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    # ---- for a caller that reads and writes the socket itself ----

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the socket are those of the peer, without TLS."""
        return self._tls is None

    def encoded(self, data: bytes) -> bytes:
        """The bytes that the socket sends for `data`."""
        if self._tls is None:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    def decoded(self, data: bytes) -> tuple[bytes, bool]:
        """What `data` from the socket means, and whether it is the end. OSError."""
        if self._tls is None:
            return data, not data
        if not data:
            return b"", True
        self._incoming.write(data)
        parts: list[bytes] = []
        while True:
            try:
                part = self._tls.read(TLS_READ_SIZE)
            except ssl.SSLWantReadError:
                return b"".join(parts), False
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b"".join(parts), True
            if not part:
                return b"".join(parts), True
            parts.append(part)

    def close(self) -> None:
        self.sock.close()

    async def _handshake(self, context: ssl.SSLContext, host: str, timeout: float | None) -> None:
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._tls = tls
        await self._carry(tls.do_handshake, timeout)

    async def _carry(self, step: Callable[[], R], timeout: float | None) -> R:
        """Do a step of TLS, moving its bytes between the memory and the socket until it is through."""
        while True:
            try:
                result = step()
                await self._flush(timeout)
                return result
            except ssl.SSLWantReadError:
                await self._flush(timeout)
                data = await primitives.receive(self.sock, TLS_READ_SIZE, timeout)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    async def _flush(self, timeout: float | None) -> None:
        data = self._outgoing.read()
        if data:
            await primitives.send(self.sock, data, timeout)


def _tune(sock: socket.socket) -> None:
    """No delay for small requests; a peer that vanished is noticed within minutes, even when a call waits for long."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


async def send_source(connection: Connection, body: Source, timeout: float | None) -> None:
    """Send a body that is not held in memory. ClientError when its size changes meanwhile."""
    chunks = body.chunks()
    left = body.size
    while chunk := await primitives.in_thread(next, chunks, b""):
        if left is None:
            await connection.send(b"%x\r\n" % len(chunk), timeout)
            await connection.send(chunk, timeout)
            await connection.send(b"\r\n", timeout)
            continue
        left -= len(chunk)
        if left < 0:
            raise ClientError("the file grew while it was being sent")
        await connection.send(chunk, timeout)
    if left is None:
        await connection.send(b"0\r\n\r\n", timeout)
    elif left:
        raise ClientError("the file shrank while it was being sent")


def tls_problem(error: ssl.SSLError) -> str:
    """Why there is no TLS connection."""
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "the server does not use TLS on this port"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    return str(error)


def tls_hint(error: ssl.SSLError) -> str:
    """What to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "set SSL_CERT_FILE to the certificate of its authority, and use a host name of its certificate"
    return "use http:// in base_url, or start the server with --tls-cert and --tls-key"
