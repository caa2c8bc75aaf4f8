"""Upgraded connections: requests as frames, what their clients may send, and how much of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rock.cli.serve.serve import http_over, listen
from rock.http import multiplexing
from rock.protocol.formats import multiplexing as wire
from rock.protocol.formats.multiplexing import (
    ABORT,
    CANCEL,
    CLOSE,
    CREDIT,
    DATA,
    END,
    HEAD,
    LIMIT,
    NAME,
    RESPONSE,
    WINDOW,
)
from rock.sdk import multiplexing as async_channels
from rock.sdk import transport as of_async
from rock.settings import Settings
from rock.sync import multiplexing as sync_channels
from rock.sync import transport as of_sync

fuzz = settings(
    max_examples=int(os.environ.get("ROCK_TEST_FUZZ", "60")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
UPGRADE = f"GET /v1/connection HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: {NAME}\r\n".encode()


class App:
    """An application behind upgraded connections. canceled: how many requests lost their client."""

    def __init__(self) -> None:
        self.canceled = 0
        self.under_way = 0
        self.most = 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await getattr(self, scope["path"].strip("/").partition("/")[0])(scope, receive, send)
        finally:
            self.under_way -= 1

    async def v1(self, scope: Any, receive: Any, send: Any) -> None:
        status = 101 if scope.get(multiplexing.UPGRADE) == NAME else 426
        await self._say(send, status, b"")

    async def echo(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await self._say(send, 200, body)

    async def size(self, scope: Any, receive: Any, send: Any) -> None:
        count, more = 0, True
        while more:
            message = await receive()
            count, more = count + len(message.get("body", b"")), message.get("more_body", False)
            await asyncio.sleep(0)
        await self._say(send, 200, b"%d" % count)

    async def about(self, scope: Any, receive: Any, send: Any) -> None:
        seen = {name: scope[name] for name in ("method", "path", "raw_path", "query_string", "headers", "type")}
        await self._say(send, 200, repr(seen).encode())

    async def wait(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        gone, going = asyncio.ensure_future(receive()), asyncio.ensure_future(self.go.wait())
        await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.canceled += 1
        else:
            await self._say(send, 200, b"went")
        for one in (gone, going):
            one.cancel()
        await asyncio.gather(gone, going, return_exceptions=True)

    async def stream(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for number in range(int(scope["query_string"])):
            await send({"type": "http.response.body", "body": b"%07d\n" % number * 1000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def silent(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.wait(scope, receive, send)

    async def fails(self, scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("on purpose")

    async def breaks(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("on purpose")

    async def nothing(self, scope: Any, receive: Any, send: Any) -> None:
        return

    async def _say(self, send: Any, status: int, body: bytes) -> None:
        headers = [(b"content-type", b"application/json"), (b"x-own", b"1"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(app: App, settings_: Settings | None = None) -> AsyncIterator[int]:
    listener = listen("127.0.0.1", 0)
    http = http_over(app, settings_, frames=True)
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        app.go.set()
        http.should_exit = True
        await task
        listener.close()
        assert app.under_way == 0 and not http.server_state.tasks and not http.server_state.connections


class Client:
    """Frames, written and read one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = wire.FrameReader(wire.OF_SERVER)
        self._ready: list[tuple[int, int, int, int, bytes]] = []

    @classmethod
    async def open(cls, port: int, more: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(UPGRADE + more + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ") and f"upgrade: {NAME}\r\n".encode() in head
        assert b"content-length" not in head and b"chunked" not in head
        return cls(reader, writer)

    def ask(self, number: int, target: str, body: bytes = b"", *, method: str = "POST", key: bytes = b"",
            headers: wire.Headers | None = None, window: int = 1 << 30, end: bool = True) -> None:  # fmt: skip
        packed = wire.pack_headers(headers or [])
        self.writer.write(wire.request(method, target.encode(), key, body, number, headers=packed, window=window,
                                       end=end))  # fmt: skip

    async def next(self) -> tuple[int, int, int, int, bytes]:
        """The next frame; EOFError at the end of the connection."""
        async with asyncio.timeout(60):
            while not self._ready:
                data = await self.reader.read(1 << 16)
                if not data:
                    raise EOFError
                self._ready += self._frames.feed(data)
        return self._ready.pop(0)

    async def answer(self, number: int) -> tuple[int, wire.Headers, bytes]:
        """The complete response to a request, of which no other has begun."""
        kind, flags, status, found, payload = await self.next()
        assert (kind, found) == (RESPONSE, number)
        headers, body = wire.response_of(payload)
        while not flags & END:
            kind, flags, _, found, payload = await self.next()
            assert (kind, found) == (DATA, number)
            body += payload
        return status, headers, body

    async def closed(self) -> str:
        """The reason for which the server closes the connection, after responses that it had sent."""
        reason = ""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                kind, _, _, _, payload = await self.next()
                if kind == CLOSE:
                    reason = payload.decode()
        assert reason
        return reason

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def client_of(app: App, more: bytes = b"") -> AsyncIterator[Client]:
    async with serving(app) as port:
        client = await Client.open(port, more)
        try:
            yield client
        finally:
            await client.close()


loops = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


def run(new_loop: Any, work: Any) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


@loops
def test_requests_and_responses(new_loop: Any) -> None:
    async def work() -> None:
        async with client_of(App(), b"x-common: yes\r\nauthorization: Bearer one\r\n") as client:
            client.ask(1, "/echo", b"body")
            assert await client.answer(1) == (200, [(b"x-own", b"1")], b"body"), "JSON is the usual type"
            client.ask(7, "/about/%41%2f?a=b&c", b"xy", method="PUT", key=b"the key")
            seen = eval((await client.answer(7))[2])  # of our own test
            assert (seen["method"], seen["path"], seen["query_string"]) == ("PUT", "/about/A/", b"a=b&c")
            assert seen["raw_path"] == b"/about/%41%2f" and seen["type"] == "http"
            headers = seen["headers"]
            assert (b"x-common", b"yes") in headers and (b"idempotency-key", b"the key") in headers
            assert (b"authorization", b"Bearer one") in headers and (b"content-length", b"2") in headers
            assert (b"content-type", b"application/json") in headers
            assert not {b"upgrade", b"connection"} & {name for name, _ in headers}
            client.ask(8, "/about", b"x", headers=[(b"authorization", b"Bearer two"), (b"content-type", b"text/x")])
            headers = eval((await client.answer(8))[2])["headers"]
            assert [value for name, value in headers if name == b"authorization"] == [b"Bearer two"]
            assert [value for name, value in headers if name == b"content-type"] == [b"text/x"]
            client.ask(9, "/about", method="GET")
            assert not {b"content-type", b"idempotency-key"} & dict(eval((await client.answer(9))[2])["headers"]).keys()
            client.ask(10, "/echo", b"no body in the response", method="HEAD")
            assert (await client.answer(10))[2] == b""

    run(new_loop, work)


@loops
def test_errors_of_the_application_are_responses(new_loop: Any) -> None:
    async def work() -> None:
        async with client_of(App()) as client:
            client.ask(1, "/fails")
            status, _, body = await client.answer(1)
            assert status == 500 and b'"internal"' in body
            client.ask(2, "/nothing")
            assert (await client.answer(2))[0] == 500
            client.ask(3, "/breaks")
            kinds = [(await client.next())[0] for _ in range(3)]
            assert kinds == [RESPONSE, DATA, ABORT]
            client.ask(4, "/echo", b"goes on")
            assert (await client.answer(4))[2] == b"goes on"

    run(new_loop, work)


@loops
def test_a_thousand_requests_at_once_and_no_more_than_the_limit(new_loop: Any) -> None:
    async def work() -> None:
        app = App()
        async with client_of(app) as client:
            for number in range(1, wire.MOST_REQUESTS + 1):
                client.ask(number, "/wait")
            client.ask(5000, "/echo")
            status, headers, _ = await client.answer(5000)
            assert status == 429 and dict(headers)[b"x-rock-error"] == b"quota_exceeded"
            assert app.most == wire.MOST_REQUESTS
            app.go.set()
            seen = set()
            for _ in range(wire.MOST_REQUESTS):
                kind, flags, status, number, payload = await client.next()
                assert (kind, flags, status, wire.response_of(payload)[1]) == (RESPONSE, END, 200, b"went")
                seen.add(number)
            assert len(seen) == wire.MOST_REQUESTS
            client.ask(5001, "/echo", b"free again")
            assert (await client.answer(5001))[2] == b"free again"

    run(new_loop, work)


@loops
def test_a_canceled_request_and_one_whose_connection_ends(new_loop: Any) -> None:
    async def work() -> None:
        app = App()
        async with serving(app) as port:
            client = await Client.open(port)
            client.ask(1, "/wait")
            client.ask(2, "/wait")
            client.writer.write(wire.pack(CANCEL, 1))
            client.ask(3, "/echo", b"x")
            assert (await client.answer(3))[2] == b"x"
            await until(lambda: app.canceled == 1)
            client.writer.write(wire.pack(CANCEL, 1))  # its response was complete, or never comes
            await client.close()
            await until(lambda: app.canceled == 2)
            await until(lambda: app.under_way == 0)

    run(new_loop, work)


async def until(what: Any) -> None:
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@loops
def test_large_bodies_in_both_directions(new_loop: Any) -> None:
    async def work() -> None:
        async with client_of(App()) as client:
            body = os.urandom(700_000)
            client.ask(1, "/echo", body)
            assert (await client.answer(1))[2] == body, "in one frame"
            client.ask(2, "/echo", b"", end=False)
            credit, at, got, whole = WINDOW, 0, b"", False
            large = os.urandom(5 << 20)
            while not whole:
                while credit and at < len(large):
                    part = large[at : at + min(credit, 100_000)]
                    at, credit = at + len(part), credit - len(part)
                    client.writer.write(wire.pack(DATA, 2, part, flags=END if at == len(large) else 0))
                await client.writer.drain()
                kind, flags, _, number, payload = await client.next()
                assert number == 2
                if kind == CREDIT:
                    credit += wire.credit_of(payload)
                    continue
                got += wire.response_of(payload)[1] if kind == RESPONSE else payload
                whole = bool(flags & END)
            assert got == large

    run(new_loop, work)


@loops
def test_a_stream_waits_for_credit_and_others_do_not(new_loop: Any) -> None:
    async def work() -> None:
        async with client_of(App()) as client:
            client.ask(1, "/stream?100", method="GET", window=20_000)
            size = 0
            while size < 20_000:
                kind, flags, _, _, payload = await client.next()
                size += len(payload if kind == DATA else wire.response_of(payload)[1])
                assert not flags & END
            assert size == 20_000, "never more than was accepted"
            client.ask(2, "/echo", b"beside it")
            assert (await client.answer(2))[2] == b"beside it"
            client.writer.write(wire.credit(1, 1_000_000))
            flags = 0
            while not flags & END:
                _, flags, _, number, payload = await client.next()
                assert number == 1
                size += len(payload)
            assert size == 800_000

    run(new_loop, work)


@loops
def test_the_head_of_a_stream_comes_before_its_body(new_loop: Any) -> None:
    async def work() -> None:
        async with client_of(App()) as client:
            client.ask(1, "/silent", method="GET")
            kind, flags, status, _, _ = await client.next()
            assert (kind, flags, status) == (RESPONSE, 0, 200)
            client.writer.write(wire.pack(CANCEL, 1))

    run(new_loop, work)


@loops
def test_a_client_that_does_not_read_stops_itself(new_loop: Any) -> None:
    async def work() -> None:
        app = App()
        async with serving(app) as port:
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, UPGRADE + b"\r\n")
            assert (await loop.sock_recv(sock, 1000)).startswith(b"HTTP/1.1 101")
            body, sent = b"x" * 200_000, 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3):
                    for number in range(1, 2000):
                        await loop.sock_sendall(sock, wire.request("POST", b"/echo", b"", body, number, window=1 << 30))
                        sent += 1
            assert sent < 500, "reading stops while responses are not read"
            other = await Client.open(port)
            other.ask(1, "/echo", b"served")
            assert (await other.answer(1))[2] == b"served"
            await other.close()
            sock.close()
            await until(lambda: app.under_way == 0)

    run(new_loop, work)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_the_sdk_over_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    trusting = ssl.create_default_context(cafile=str(cert))
    bodies = [os.urandom(size) for size in (0, 1, 10, 1000, 20_000, 70_000, 200_000)] * 3

    def block(url: str) -> list[bytes]:
        transport = of_sync.Transport(url, ssl_context=trusting)
        return [transport.call("POST", "/echo", body) for body in bodies]

    async def work() -> None:
        app = App()
        async with serving(app, Settings(tmp_path, tls_cert=str(cert), tls_key=str(key))) as port:
            url = f"https://127.0.0.1:{port}"
            assert await asyncio.to_thread(block, url) == bodies
            transport = of_async.Transport(url, ssl_context=trusting)
            for _ in range(5):
                await transport.call("POST", "/echo", b"x")
            assert await asyncio.gather(*(transport.call("POST", "/echo", body) for body in bodies)) == bodies
            channels = [*async_channels._KNOWN.values(), *sync_channels._KNOWN.values()]
            assert [len(found._all) for found in channels if found.offered] == [1, 1]
            async_channels.clear()
            sync_channels.clear()
            of_async.POOL.clear()
            of_sync.POOL.clear()

    async_channels._KNOWN.clear()
    sync_channels._KNOWN.clear()
    run(uvloop.new_event_loop, work)


HOSTILE = {
    "a long frame": HEAD.pack(LIMIT + 1, wire.REQUEST, 0, 0, 1),
    "an unknown kind": wire.pack(9, 1),
    "a frame of servers": wire.pack(RESPONSE, 1, b"\0\0"),
    "the number 0": wire.request("GET", b"/echo", b"", b"", 0, window=1),
    "an unknown method": wire.pack(wire.REQUEST, 1, b"\0" * 9, value=99),
    "a short request": wire.pack(wire.REQUEST, 1, b"\0" * 8),
    "a target longer than the frame": wire.pack(wire.REQUEST, 1, struct.pack(">IHHB", 1, 500, 0, 0) + b"/x"),
    "a header longer than the frame": wire.request("GET", b"/echo", b"", b"", 1, window=1, headers=b"\x05ab"),
    "a value longer than the frame": wire.request("GET", b"/echo", b"", b"", 1, window=1, headers=b"\x01a\x00\x09b"),
    "many headers": wire.request("GET", b"/echo", b"", b"", 1, window=1,
                                 headers=wire.pack_headers([(b"a", b"b")] * (wire.MOST_HEADERS + 1))),
    "no path": wire.request("GET", b"echo", b"", b"", 1, window=1),
    "a line break in the target": wire.request("GET", b"/echo HTTP/1.1\r\nx: y", b"", b"", 1, window=1),
    "a fragment": wire.request("GET", b"/echo#x", b"", b"", 1, window=1),
    "a long target": wire.request("GET", b"/" + b"a" * 33_000, b"", b"", 1, window=1),
    "a line break in a value": wire.request("GET", b"/echo", b"", b"", 1, window=1,
                                            headers=wire.pack_headers([(b"a", b"b\r\nc: d")])),
    "a line break in a name": wire.request("GET", b"/echo", b"", b"", 1, window=1,
                                           headers=wire.pack_headers([(b"a: b\r\nc", b"d")])),
    "a header of framing": wire.request("POST", b"/echo", b"", b"x", 1, window=1,
                                        headers=wire.pack_headers([(b"transfer-encoding", b"chunked")])),
    "a line break in the key": wire.request("POST", b"/echo", b"a\r\nb", b"x", 1, window=1),
    "data of no request": wire.pack(DATA, 1, b"x"),
    "credit of no request": wire.credit(3, 1),
    "a short credit": wire.request("POST", b"/wait", b"", b"", 1, window=1) + wire.pack(CREDIT, 1, b"abc"),
    "too much credit": wire.request("POST", b"/wait", b"", b"", 1, window=9) + wire.credit(1, (1 << 32) - 5),
    "a repeated number": wire.request("GET", b"/wait", b"", b"", 1, window=1) * 2,
    "data after the end": wire.request("POST", b"/wait", b"", b"", 1, window=1) + wire.pack(DATA, 1, b"x"),
    "more than the window": wire.request("POST", b"/silent", b"", b"", 1, window=1, end=False)
                            + wire.pack(DATA, 1, b"x" * WINDOW) + wire.pack(DATA, 1, b"x"),
    "more than the window at once": wire.request("POST", b"/wait", b"", b"x" * (WINDOW + 1), 1, window=1, end=False),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_client_learns_why_and_disconnected(name: str) -> None:
    async def work() -> None:
        app = App()
        async with serving(app) as port:
            for size in (len(HOSTILE[name]), 7):
                client, data = await Client.open(port), HOSTILE[name]
                with contextlib.suppress(ConnectionError):
                    for at in range(0, min(len(data), 4000) if size == 7 else len(data), size):
                        client.writer.write(data[at : at + size])
                        if size == 7:
                            await asyncio.sleep(0)
                    client.writer.write(data[4000:] if size == 7 else b"")
                    await client.writer.drain()
                assert await client.closed()
                await client.close()
            good = await Client.open(port)
            good.ask(1, "/echo", b"others are served")
            assert (await good.answer(1))[2] == b"others are served"
            await good.close()
            await until(lambda: app.under_way == 0)

    run(uvloop.new_event_loop, work)


def test_frames_before_the_upgrade_are_no_requests() -> None:
    async def work() -> None:
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(UPGRADE + b"\r\n" + wire.request("POST", b"/echo", b"", b"early", 1, window=1 << 20))
            data = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while part := await reader.read(1000):
                        data += part
            assert b"early" not in data
            writer.close()
            for wrong in (b"websocket-x", b"h2c", b"rock-frames/2"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(UPGRADE.replace(NAME.encode(), wrong) + b"\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 426")
                writer.close()

    run(uvloop.new_event_loop, work)


def test_half_a_frame_and_an_idle_connection_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplexing.MultiplexedConnection.__init__, "__defaults__", (0.3, 1.0))

    async def work() -> None:
        async with serving(App()) as port:
            client = await Client.open(port)
            client.writer.write(wire.request("POST", b"/echo", b"", b"x", 1, window=1)[:15])
            assert "no whole frame" in await client.closed()
            await client.close()
            client = await Client.open(port)
            kind, _, _, _, payload = await client.next()
            assert (kind, payload) == (CLOSE, b"")
            with pytest.raises(EOFError):
                await client.next()
            await client.close()

    run(uvloop.new_event_loop, work)


@fuzz
@given(st.lists(
    st.binary(max_size=40)
    | st.builds(lambda kind, flags, value, number, payload: HEAD.pack(len(payload), kind, flags, value, number)
                + payload, st.sampled_from([1, 2, 3, 4, 5, 17, 255]), st.integers(0, 255), st.integers(0, 12),
                st.integers(0, 6), st.binary(max_size=60))
    | st.builds(lambda number, target, body, end, headers: wire.request(
        "POST", target, b"", body, number, window=1 << 20, end=end, headers=headers),
        st.integers(1, 6), st.sampled_from([b"/echo", b"/size", b"/wait", b"/fails", b"/breaks"]),
        st.binary(max_size=30), st.booleans(), st.just(b"") | st.binary(max_size=8)),
    min_size=1, max_size=8), st.integers(1, 50))  # fmt: skip
def test_any_bytes_leave_nothing_behind(parts: list[bytes], size: int) -> None:
    async def work() -> None:
        app = App()
        async with serving(app) as port:
            client, data = await Client.open(port), b"".join(parts)
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(data), size):
                    if client.writer.transport.is_closing():
                        break
                    client.writer.write(data[at : at + size])
                    await asyncio.sleep(0)
            frames = []
            with contextlib.suppress(EOFError, ConnectionError, TimeoutError):
                async with asyncio.timeout(0.05):
                    while True:
                        frames.append(await client.next())
            assert all(frame[0] in wire.OF_SERVER for frame in frames)
            await client.close()
            await until(lambda: app.under_way == 0)

    run(uvloop.new_event_loop, work)


@fuzz
@given(st.binary(max_size=300), st.integers(1, 20))
def test_a_reader_of_frames_is_the_same_for_any_portions(data: bytes, size: int) -> None:
    def read(portions: list[bytes]) -> tuple[list[Any], str]:
        reader, found = wire.FrameReader(frozenset(range(256))), []
        try:
            for portion in portions:
                found += reader.feed(portion)
        except wire.Malformed as error:
            return found, str(error)
        return found, ""

    whole = wire.pack(1, 5, data) + wire.pack(2, 6, data[: len(data) // 2]) + data
    assert read([whole]) == read([whole[at : at + size] for at in range(0, len(whole), size)])


@fuzz
@given(st.lists(st.integers(0, 100_000), max_size=6), st.lists(st.integers(1, 70_000), min_size=1), st.booleans())
def test_a_reader_of_large_frames_is_the_same_with_memory_of_their_size(
    sizes: list[int], portions: list[int], receives: bool
) -> None:
    """receives: the rest of a large frame is received into its memory, as a client does."""
    sent = [(1, 0, 7, number, random.Random(size).randbytes(size)) for number, size in enumerate(sizes)]
    rest = b"".join(wire.pack(kind, number, payload, value=value) for kind, _, value, number, payload in sent)
    reader, found, turn = wire.FrameReader(frozenset({1}), views=True), [], 0
    while rest:
        count = portions[turn % len(portions)]
        turn += 1
        room = reader.room if receives else None
        if room is not None:
            count = min(count, len(room), len(rest))
            room[:count] = rest[:count]
            new = list(reader.filled(count))
        else:
            new = list(reader.feed(rest[:count]))
        rest = rest[count:]
        found += [(*head, bytes(payload)) for *head, payload in new]
    assert found == sent and not reader.incomplete


@fuzz
@given(st.binary(max_size=200), st.integers(0, 20))
def test_any_payload_is_a_request_or_malformed(payload: bytes, value: int) -> None:
    for parse in (lambda: wire.request_of(value, payload), lambda: wire.response_of(payload),
                  lambda: wire.headers_of(payload), lambda: wire.credit_of(payload)):  # fmt: skip
        with contextlib.suppress(wire.Malformed):
            parse()
