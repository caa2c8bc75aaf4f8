"""Requests to a ROCK server over kept-alive connections.

The hot path is a handful of calls: one send, one receive, no locks, no models. A request that met a connection which
the server had just closed is sent once more over a new one; it carries the same `Idempotency-Key`, so that it is never
done twice.
"""

from __future__ import annotations

import atexit
import os
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import orjson

from rock import errors, settings
from rock.protocol.planes import role_for
from rock.protocol.routes import OTHER_KEY, RESUMES
from rock.sdk import primitives
from rock.sdk.connection import Connection
from rock.sdk.http import SENT, Address, Answer, Source, header_lines
from rock.sdk.ownerkey import has_key, key_for
from rock.sdk.pool import Pool
from rock.sdk.servers import Servers
from rock.sdk.trace import begin

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0
STREAM_READ_SIZE = 1 << 20
UNSENT = {"unsent": True}  # in the details of an Unavailable: no connection was had
RESUME = 30.0  # seconds that a server may be away in the middle of a command
HINT = "start it with: rock admin start"

POOL: Pool[Connection] = Pool()
atexit.register(POOL.clear)

Body = bytes | Source


class Transport:
    """How to reach a server, or the servers of a cluster.

    base_url: may have a path; of a cluster see servers.py. api_key: sent as `Authorization: Bearer`. headers: sent with
    every request.
    Timeouts are seconds; the timeout of a call is how long the server may be silent, and None is no limit.
    InvalidConfig: the URL or a header cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        connect_timeout: float | None = CONNECT_TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        given = {"authorization": f"Bearer {api_key}"} if api_key else {}
        given |= {name.lower(): value for name, value in (headers or {}).items()}
        self.url = base_url.strip().rstrip("/")
        servers = Servers.parse(base_url)
        made = {address: _Server(address, given, connect_timeout, ssl_context)
                for address in (*servers.write, *servers.read)}  # fmt: skip
        self._one = next(iter(made.values())) if len(made) == 1 else None
        self._write = [made[address] for address in servers.write]
        self._read = [made[address] for address in servers.read]

    @property
    def address(self) -> Address:
        """Of who is asked to look, and to reach into sandboxes."""
        return self._read[0].address

    async def json(
        self,
        method: str,
        target: str,
        body: Any = None,
        *,
        timeout: float | None = ANSWER_TIMEOUT,
        key: str | None = None,
    ) -> Any:
        """The answer to a JSON body, decoded. Any RockError that the server answers with; Unavailable, ServerError."""
        raw = await self.call(method, target, b"" if body is None else orjson.dumps(body), timeout=timeout, key=key)
        return decode(raw)

    async def json_raw(
        self, method: str, target: str, body: Body, *, timeout: float | None = ANSWER_TIMEOUT, content_type: str
    ) -> Any:
        """The JSON answer to a body that is not JSON. Raises what `json` does."""
        return decode(await self.call(method, target, body, timeout=timeout, content_type=content_type))

    async def call(
        self,
        method: str,
        target: str,
        body: Body = b"",
        *,
        timeout: float | None = ANSWER_TIMEOUT,
        key: str | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The body of the answer. Raises what `json` does."""
        _, _, answer = await self._exchange(method, target, body, timeout, key, content_type, whole=True)
        data = answer.take()
        if answer.status >= 300:
            raise failure(answer.status, data, self.url)
        return data

    async def call_once(self, method: str, target: str, body: bytes, *, timeout: float | None) -> bytes:
        """`call` for what goes on when the server is killed or stopped meanwhile: it is asked again, with the same key,
        for up to RESUME seconds. Raises what `call` did first."""
        key = os.urandom(16).hex()
        told: errors.Unavailable | None = None
        end, pause = 0.0, 0.05
        while True:
            try:
                return await self.call(method, target, body, timeout=timeout, key=key)
            except errors.Unavailable as error:
                if told is None and not any(error.details.get(name) is True for name in (*SENT, *RESUMES)):
                    raise
                now = time.monotonic()
                if told is None:
                    told, end = error, now + RESUME
                if now > end:
                    raise told from None
            await primitives.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    async def open(
        self,
        method: str,
        target: str,
        body: Body = b"",
        *,
        timeout: float | None = ANSWER_TIMEOUT,
        key: str | None = None,
        content_type: str = "application/json",
    ) -> Download:
        """An answer to be read while it comes. Raises what `json` does."""
        server, connection, answer = await self._exchange(method, target, body, timeout, key, content_type)
        download = Download(server, connection, answer, timeout)
        if answer.status >= 300:
            raise failure(answer.status, await download.read(limit=1 << 20), self.url)
        return download

    async def _exchange(
        self,
        method: str,
        target: str,
        body: Body,
        timeout: float | None,
        key: str | None,
        content_type: str,
        whole: bool = False,
    ) -> tuple[_Server, Connection, Answer]:
        """With the first server of the role that takes a connection; one that does not is asked last from then on."""
        if self._one is not None:
            return self._one, *await self._one.exchange(method, target, body, timeout, key, content_type, whole)
        writes = role_for(method, target.partition("?")[0]) == "write"
        servers = self._write if writes else self._read
        for server in servers[:-1]:
            try:
                return server, *await server.exchange(method, target, body, timeout, key, content_type, whole)
            except errors.Unavailable as error:
                if not error.details.get("unsent"):
                    raise
                rest = [other for other in (self._write if writes else self._read) if other is not server]
                if writes:
                    self._write = [*rest, server]
                else:
                    self._read = [*rest, server]
        last = servers[-1]
        return last, *await last.exchange(method, target, body, timeout, key, content_type, whole)


class _Server:
    """One server, by its address and the headers that it is sent."""

    def __init__(
        self, address: Address, headers: Mapping[str, str], connect_timeout: float | None,
        ssl_context: ssl.SSLContext | None,
    ) -> None:  # fmt: skip
        self.address = address
        self.connect_timeout = connect_timeout
        self._ssl_context = ssl_context
        given = {"host": address.host_header, "user-agent": "rock-sdk", "accept": "*/*", **headers}
        self._common = header_lines(given)
        self._keyed = has_key(given)
        self._traces = settings.trace()
        self._key = (address.host, address.port, address.tls, ssl_context)

    @property
    def url(self) -> str:
        return self.address.url

    def release(self, connection: Connection, answer: Answer) -> None:
        """Keep a connection whose answer is complete; close any other."""
        if answer.reusable:
            POOL.give((primitives.scope(), self._key), connection)
        else:
            connection.close()

    def _head(self, method: str, target: str, body: Body, key: str | None, content_type: str, more: str) -> bytes:
        lines = f"{method} {self.address.path}{target} HTTP/1.1\r\n{more}"
        if method != "GET":
            lines += f"idempotency-key: {key or os.urandom(16).hex()}\r\n"
            size = len(body) if isinstance(body, bytes) else body.size
            lines += "transfer-encoding: chunked\r\n" if size is None else f"content-length: {size}\r\n"
            if size != 0:
                lines += f"content-type: {content_type}\r\n"
        if not self._keyed and (own := key_for(self.address)):
            lines += f"{OTHER_KEY}: {own}\r\n"
        return b"%b%b\r\n" % (lines.encode("ascii"), self._common)

    async def exchange(
        self,
        method: str,
        target: str,
        body: Body,
        timeout: float | None,
        key: str | None,
        content_type: str,
        whole: bool = False,
    ) -> tuple[Connection, Answer]:
        """Send and read, to the end of the answer when `whole` (its connection is then released), else to its head."""
        call = begin(method, target, self._traces)
        head = self._head(method, target, body, key, content_type, "" if call is None else call.headers)
        if call is None:
            return await self._carry(head, body, timeout, whole)
        try:
            connection, answer = await self._carry(head, body, timeout, whole)
        except BaseException as error:
            call.end(0, f"{type(error).__name__}: {error}")
            raise
        call.end(answer.status)
        return connection, answer

    async def _carry(
        self, head: bytes, body: Body, timeout: float | None, whole: bool
    ) -> tuple[Connection, Answer]:
        connection = POOL.take((primitives.scope(), self._key))
        kept, sent = connection is not None, False
        while True:
            if connection is None:
                try:
                    connection = await self._connect()
                except errors.Unavailable as error:
                    if not sent:
                        raise
                    raise errors.Unavailable(error.message, hint=error.hint, details=SENT) from error
            answer = Answer()
            try:
                await self._send(connection, answer, head, body, timeout)
                await self._read(connection, answer, timeout, whole)
                return connection, answer
            except TimeoutError:
                connection.close()
                raise errors.Unavailable(f"{self.url} did not answer within {timeout} seconds") from None
            except OSError as error:
                connection.close()
                if not kept or answer.received:
                    raise errors.Unavailable(f"the connection to {self.url} broke: {error}", details=SENT) from error
                connection, kept, sent = None, False, True
            except BaseException:
                connection.close()
                raise

    async def _connect(self) -> Connection:
        try:
            return await Connection.open(self.address, self.connect_timeout, self._ssl_context)
        except TimeoutError:
            message = f"nothing answers at {self.url} within {self.connect_timeout} seconds"
            raise errors.Unavailable(message, hint=HINT, details=UNSENT) from None
        except ssl.SSLError as error:
            raise errors.Unavailable(f"no TLS connection to {self.url}: {error}", details=UNSENT) from error
        except ConnectionRefusedError:
            raise errors.Unavailable(f"no ROCK server at {self.url}", hint=HINT, details=UNSENT) from None
        except OSError as error:
            raise errors.Unavailable(f"cannot reach {self.url}: {error}", hint=HINT, details=UNSENT) from error

    async def _send(
        self, connection: Connection, answer: Answer, head: bytes, body: Body, timeout: float | None
    ) -> None:
        limit = ANSWER_TIMEOUT if timeout is None else timeout
        try:
            if isinstance(body, bytes):
                if len(body) < 32 << 10:
                    await connection.send(head + body, limit)
                else:
                    await connection.send(head, limit)
                    await connection.send(body, limit)
                return
            await connection.send(head, limit)
            await _send_source(connection, body, limit)
        except (BrokenPipeError, ConnectionResetError):
            await self._refusal(connection, answer, timeout)

    async def _refusal(self, connection: Connection, answer: Answer, timeout: float | None) -> None:
        """The server closed its side while we were sending: it may have said why."""
        while not answer.done:
            data = await connection.receive(timeout)
            if not data:
                if not answer.received:
                    raise ConnectionResetError("the server closed it")
                answer.end()
                break
            answer.feed(data)

    async def _read(self, connection: Connection, answer: Answer, timeout: float | None, whole: bool) -> None:
        while not (answer.done if whole else answer.status):
            data = await connection.receive(timeout)
            if data:
                answer.feed(data)
            elif answer.received:
                answer.end()
            else:
                raise ConnectionResetError("the server closed it")
        if whole:
            self.release(connection, answer)


class Download:
    """A body that is coming: `async for` its parts, or `read` it. Leaving it early closes its connection."""

    def __init__(self, server: _Server, connection: Connection, answer: Answer, timeout: float | None) -> None:
        self.headers = answer.headers
        self.status = answer.status
        self._server = server
        self._connection: Connection | None = connection
        self._answer = answer
        self._timeout = timeout

    async def next(self) -> bytes:
        """The next part; b"" at the end. Unavailable, ServerError."""
        answer, connection = self._answer, self._connection
        while True:
            part = answer.take()
            if part or connection is None:
                return part
            if answer.done:
                self._connection = None
                self._server.release(connection, answer)
                return b""
            try:
                data = await connection.receive(self._timeout, STREAM_READ_SIZE)
                if data:
                    answer.feed(data)
                else:
                    answer.end()
            except TimeoutError:
                self.close()
                raise errors.Unavailable(f"{self._server.url} was silent for {self._timeout} seconds") from None
            except OSError as error:
                self.close()
                raise errors.Unavailable(f"the connection to {self._server.url} broke: {error}") from error
            except BaseException:
                self.close()
                raise

    async def read(self, limit: int | None = None) -> bytes:
        """The rest of the body; no more than `limit` bytes of it, when given."""
        parts, size = [], 0
        while part := await self.next():
            parts.append(part)
            size += len(part)
            if limit is not None and size >= limit:
                self.close()
                break
        return b"".join(parts)[:limit]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if part := await self.next():
            return part
        raise StopAsyncIteration

    def close(self) -> None:
        """Stop reading."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _send_source(connection: Connection, body: Source, timeout: float | None) -> None:
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
            raise errors.ClientError("the file grew while it was being sent")
        await connection.send(chunk, timeout)
    if left is None:
        await connection.send(b"0\r\n\r\n", timeout)
    elif left:
        raise errors.ClientError("the file shrank while it was being sent")


def decode(raw: bytes) -> Any:
    """JSON of an answer; ServerError when it is none."""
    try:
        return orjson.loads(raw) if raw else None
    except orjson.JSONDecodeError:
        raise errors.ServerError(f"malformed answer: {raw[:80]!r} is not JSON") from None


def failure(status: int, body: bytes, url: str) -> errors.RockError:
    """The error that an answer stands for."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace")
    if status < 400:
        return errors.ServerError(f"{url} answered with a redirection ({status}), which is not followed")
    return errors.from_wire(content, status)
