"""Requests to a ROCK server over kept-alive connections.

The hot path is a handful of calls: one send, one receive, no locks, no models. A request that met a connection which
the server had just closed is sent once more over a new one; it carries the same `Idempotency-Key`, so that it is never
done twice. While a server is away (`lost_contact`) the request is sent again, with the same key, for
`reconnect_timeout` seconds and no longer than the call itself has.
"""

from __future__ import annotations

import atexit
import os
import random
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import orjson

from rock import errors, settings
from rock.protocol.formats import multiplexing as wire
from rock.protocol.routes import (
    FRAMES_OFFERED,
    LOST_CONTACT,
    NOTHING_BEGUN,
    OTHER_KEY,
    ROUTES,
    SENT,
    UNSENT,
    role_for,
)
from rock.sdk import primitives
from rock.sdk.connection import Connection, send_source, tls_hint, tls_problem
from rock.sdk.direct import CONNECT_TIMEOUT as DIRECT_TIMEOUT
from rock.sdk.direct import DirectRequests, at_worker
from rock.sdk.http import Address, Answer, Source, decode, failure, header_lines
from rock.sdk.multiplexing import Channel, channels_of, upgrade
from rock.sdk.ownerkey import has_key, key_for
from rock.sdk.pool import Pool
from rock.sdk.servers import Servers
from rock.sdk.trace import begin

CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0
STREAM_READ_SIZE = 1 << 20
FIRST_CONTACT = 2.0  # seconds to reach a server that this process has never reached: there may be none
PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two tries; each is drawn from 0.5 to 1.5 of it

POOL: Pool[Connection] = Pool()
atexit.register(POOL.clear)

_REACHED: set[tuple[str, int]] = set()  # servers that answered this process once, by host and port

Body = bytes | Source


class Transport:
    """How to reach a server, or the servers of a cluster.

    base_url: may have a path; of a cluster see servers.py. api_key: sent as `Authorization: Bearer`. headers: sent with
    every request.
    Timeouts are seconds; the timeout of a call is how long the server may be silent, and None is no limit.
    reconnect_timeout: how long a call is tried again while the server is away; None is ROCK_RECONNECT_TIMEOUT, 0 is not
    at all. A server that this process has never reached is tried for FIRST_CONTACT seconds.
    InvalidConfig: the URL, a header or the reconnect timeout cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        connect_timeout: float | None = CONNECT_TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
        reconnect_timeout: float | None = None,
    ) -> None:
        try:
            self.reconnect_timeout = settings.reconnect_timeout(reconnect_timeout)
            given = {name.lower(): value for name, value in settings.extra_headers().items()}
        except ValueError as error:
            raise errors.InvalidConfig(
                f"a setting of the client is wrong: {error}", hint="correct the environment variable"
            ) from None
        given |= {"authorization": f"Bearer {api_key}"} if api_key else {}
        given |= {name.lower(): value for name, value in (headers or {}).items()}
        self.url = base_url.strip().rstrip("/")
        servers = Servers.parse(base_url)
        made = {address: _Server(address, given, connect_timeout, ssl_context)
                for address in (*servers.write, *servers.read)}  # fmt: skip
        self._one = next(iter(made.values())) if len(made) == 1 else None
        self._write = [made[address] for address in servers.write]
        self._read = [made[address] for address in servers.read]
        self._direct: DirectRequests[_Server] | None = None
        if settings.direct():
            self._direct = DirectRequests(self.address, self._worker, self._access)

    def _worker(self, address: Address, token: str) -> _Server:
        """The worker of a sandbox. It gets the token only, no key."""
        return _Server(address, {"authorization": f"Bearer {token}"}, DIRECT_TIMEOUT, None)

    async def _access(self, sandbox_id: str) -> Any:
        target = ROUTES["direct_access"].url(sandbox_id=sandbox_id)
        return await self.json("GET", target, timeout=5.0, deadline=0.0)

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
        deadline: float | None = None,
        limit: float | None = None,
        repeats: bool = True,
    ) -> Any:
        """The answer to a JSON body, decoded. Any RockError that the server answers with; Unavailable, ServerError."""
        raw = await self.call(method, target, b"" if body is None else orjson.dumps(body), timeout=timeout, key=key,
                              deadline=deadline, limit=limit, repeats=repeats)  # fmt: skip
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
        deadline: float | None = None,
        limit: float | None = None,
        repeats: bool = True,
        views: bool = False,
    ) -> bytes:
        """The body of the answer, which is a memoryview where `views` permits one. Raises what `json` does.

        deadline: seconds from now after which it is not tried again; `timeout` where it is None. limit: the same for
        what was silent for long: seconds that what is asked may take. repeats: whether it may be sent again when the
        connection broke after it was sent: its key makes the server do it once.
        """
        key = key or os.urandom(16).hex()
        began = time.monotonic()
        retry: _Retry | None = None
        while True:
            try:
                left = timeout if retry is None else retry.left(timeout)
                _, _, answer = await self._exchange(method, target, body, left, key, content_type, whole=True)
                data = answer.take()
                if answer.status >= 300:
                    raise failure(answer.status, bytes(data), self.url)
                return data if views else bytes(data)
            except errors.Unavailable as error:
                if retry is None:
                    retry = self._retry(error, began, timeout if deadline is None else deadline, limit)
                pause = retry.pause(error, LOST_CONTACT if repeats else NOTHING_BEGUN)
            await primitives.sleep(pause)

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
        """An answer to be read while it comes. Raises what `json` does. Only a GET is sent again after its connection
        broke: what was begun by another one is a stream that cannot be had twice."""
        key = key or os.urandom(16).hex()
        began = time.monotonic()
        retry: _Retry | None = None
        while True:
            try:
                server, connection, answer = await self._exchange(method, target, body, timeout, key, content_type)
                assert connection is not None
                download = Download(server, connection, answer, timeout)
                if answer.status >= 300:
                    raise failure(answer.status, await download.read(limit=1 << 20), self.url)
                return download
            except errors.Unavailable as error:
                if retry is None:
                    retry = self._retry(error, began, timeout)
                pause = retry.pause(error, LOST_CONTACT if method == "GET" else NOTHING_BEGUN)
            await primitives.sleep(pause)

    def _retry(
        self, error: errors.Unavailable, began: float, deadline: float | None, limit: float | None = None
    ) -> _Retry:
        """How long to go on with a call that began at `began`, and has failed for the first time."""
        seconds = self.reconnect_timeout
        if not any(server.reached for server in (*self._write, *self._read)):
            seconds = min(seconds, FIRST_CONTACT)
        return _Retry(seconds, began, deadline, limit)

    async def _exchange(
        self,
        method: str,
        target: str,
        body: Body,
        timeout: float | None,
        key: str | None,
        content_type: str,
        whole: bool = False,
    ) -> tuple[_Server, Connection | None, Answer]:
        """With the worker itself where that is possible, else with the first server of the role that takes a
        connection; one that does not is asked last from then on."""
        if self._direct is not None and (direct := await self._direct.target(target)) is not None:
            found = await at_worker(direct, method, target, body, timeout, key, content_type, whole)
            if found is not None:
                return found
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


class _Retry:
    """The tries of one call after its first failure. Made right after that."""

    def __init__(self, seconds: float, began: float, deadline: float | None, limit: float | None) -> None:
        """seconds: how long to go on. deadline, limit: of the call, from `began`, a time of the monotonic clock."""
        self._began = began
        self._end = time.monotonic() + seconds
        if deadline is not None:
            self._end = min(self._end, began + deadline)
        self._limit = self._end if limit is None else min(self._end, began + limit)
        self._pause = PAUSE
        self._told: errors.Unavailable | None = None
        self._silent = False  # the last try ended because a worker answered nothing

    def left(self, timeout: float | None) -> float | None:
        """Seconds that the next try has, of a `timeout` that began with the call. A worker that was silent gets no
        more time than the call has."""
        now = time.monotonic()
        left = None if timeout is None else max(1.0, timeout - (now - self._began))
        if not self._silent:
            return left
        return max(0.1, self._limit - now if left is None else min(left, self._limit - now))

    def pause(self, error: errors.Unavailable, names: tuple[str, ...]) -> float:
        """Seconds to wait before the next try. Raises when there is no time for one: the first error of those after
        which something may have been begun, else the first. An error that is no lost contact is raised at once."""
        if not _lost_contact(error, names):
            raise self._told if self._told is not None and self._silent and not error.details else error
        self._silent = bool(error.details.get("silent"))
        if self._told is None or (self._told.details.get("unsent") and not error.details.get("unsent")):
            self._told = error
        pause = self._pause * random.uniform(0.5, 1.5)  # clients that were cut together do not come back together
        if time.monotonic() + pause > (self._limit if self._silent else self._end):
            raise self._told
        self._pause = min(self._pause * 1.5, LONGEST_PAUSE)
        return pause


def _lost_contact(error: errors.Unavailable, names: tuple[str, ...]) -> bool:
    """Whether a server, or something behind it, is away for a while; not what it says itself, such as a refusal."""
    details = error.details
    if details.get("tls"):
        return False  # a certificate does not become another one
    return any(details.get(name) is True for name in names) or (
        "sent" in names and details.get("http_status") in (502, 503)  # of a proxy in front of a server
    )


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
        self._key = (address.unix or address.host, address.port, address.tls, ssl_context)
        self._place = (address.host, address.port)
        # Requests with different keys share an upgraded connection: each has its own authorization.
        self._authorization = given.get("authorization", "").encode("latin-1")
        rest = header_lines({name: value for name, value in given.items() if name != "authorization"})
        can_frame = settings.multiplex() and not address.path and os.name != "nt"
        self._channels = channels_of((self._key, rest, bool(self._authorization))) if can_frame else None

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def reached(self) -> bool:
        """Whether it has answered this process."""
        return self._place in _REACHED

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
    ) -> tuple[Connection | None, Answer]:
        """Send and read, to the end of the answer when `whole` (its connection is then released), else to its head."""
        call = begin(method, target, self._traces)
        sent = False
        if whole and self._channels is not None and isinstance(body, bytes) and len(body) <= wire.WINDOW:
            channel = self._channels.take()
            if channel is None and self._channels.is_due():
                channel = await self._upgraded()
            if channel is not None:
                more = "" if call is None else call.headers
                answer, sent = await self._framed(channel, method, target, body, timeout, key, content_type, more)
                if answer is not None:
                    if call is not None:
                        call.end(answer.status)
                    return None, answer
        head = self._head(method, target, body, key, content_type, "" if call is None else call.headers)
        if call is None:
            return await self._carry(head, body, timeout, whole, sent)
        try:
            connection, answer = await self._carry(head, body, timeout, whole, sent)
        except BaseException as error:
            call.end(0, f"{type(error).__name__}: {error}")
            raise
        call.end(answer.status)
        return connection, answer

    async def _upgraded(self) -> Channel | None:
        """A new upgraded connection; None where the server, or something before it, makes none."""
        assert self._channels is not None
        try:
            connection = await Connection.open(self.address, self.connect_timeout, self._ssl_context)
            own = "" if self._keyed else key_for(self.address)
            headers = self._common + (header_lines({OTHER_KEY: own}) if own else b"")
            channel = await upgrade(connection, headers, self._authorization)
        except (OSError, TimeoutError, errors.ServerError):
            self._channels.refused()
            return None
        channel.claim()
        self._channels.opened(channel)
        return channel

    async def _framed(
        self, channel: Channel, method: str, target: str, body: bytes, timeout: float | None, key: str | None,
        content_type: str, more: str,
    ) -> tuple[Answer | None, bool]:  # fmt: skip
        """The response over an upgraded connection; None and True when the connection broke before it came, so that the
        request has to be sent again."""
        assert self._channels is not None
        headers = []
        if content_type != "application/json" and body:
            headers.append((b"content-type", content_type.encode("ascii")))
        if self._authorization != channel.authorization:
            headers.append((b"authorization", self._authorization))
        for line in more.splitlines():
            name, _, value = line.partition(": ")
            headers.append((name.encode("ascii"), value.encode("latin-1")))
        given = b"" if method == "GET" else (key or os.urandom(16).hex()).encode("ascii")
        try:
            return await channel.ask(method, target.encode("ascii"), body, given, headers, timeout), True
        except TimeoutError:
            raise errors.Unavailable(
                f"{self.url} did not respond within {timeout} seconds", hint="try again, or increase the timeout"
            ) from None
        except OSError:
            return None, True
        finally:
            self._channels.give(channel)

    async def _carry(
        self, head: bytes, body: Body, timeout: float | None, whole: bool, sent: bool = False
    ) -> tuple[Connection, Answer]:
        """sent: it was sent already over a connection that broke."""
        connection = POOL.take((primitives.scope(), self._key))
        kept = connection is not None
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
                if not kept and self._place not in _REACHED:
                    _REACHED.add(self._place)
                if self._channels is not None and not self._channels.offered:
                    self._channels.offered = answer.headers.get(FRAMES_OFFERED) == "1"
                return connection, answer
            except TimeoutError:
                connection.close()
                raise errors.Unavailable(
                    f"{self.url} did not respond within {timeout} seconds", hint="try again, or increase the timeout"
                ) from None
            except OSError as error:
                connection.close()
                if not kept or answer.received:
                    raise errors.Unavailable(
                        f"the connection to {self.url} broke: {error}", hint="try again", details=SENT
                    ) from error
                connection, kept, sent = None, False, True
            except BaseException:
                connection.close()
                raise

    def _hint(self) -> str:
        host = self.address.host
        if host == "localhost" or host == "::1" or host.startswith("127."):
            return "start it with: rock admin start"
        return "check the host name and the port of base_url or ROCK_BASE_URL, and whether the server runs"

    async def _connect(self) -> Connection:
        try:
            return await Connection.open(self.address, self.connect_timeout, self._ssl_context)
        except TimeoutError:
            message = f"nothing answers at {self.url} within {self.connect_timeout} seconds"
            raise errors.Unavailable(message, hint=self._hint(), details=UNSENT) from None
        except ssl.SSLError as error:
            raise errors.Unavailable(f"no TLS connection to {self.url}: {tls_problem(error)}", hint=tls_hint(error),
                                     details={**UNSENT, "tls": True}) from error  # fmt: skip
        except ConnectionRefusedError:
            raise errors.Unavailable(f"no ROCK server at {self.url}", hint=self._hint(), details=UNSENT) from None
        except OSError as error:
            raise errors.Unavailable(
                f"cannot reach {self.url}: {error.strerror or error}", hint=self._hint(), details=UNSENT
            ) from error

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
            await send_source(connection, body, limit)
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
                raise errors.Unavailable(
                    f"{self._server.url} sent nothing for {self._timeout} seconds", hint="try again"
                ) from None
            except OSError as error:
                self.close()
                raise errors.Unavailable(f"the connection to {self._server.url} broke: {error}", hint="try again",
                                         details=SENT) from error  # fmt: skip
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
