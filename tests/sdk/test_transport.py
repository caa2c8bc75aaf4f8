"""The transport against a real server, on both faces."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from wire_server import Request, Wire, answer, echo, number_of, say, serve

from rock import errors
from rock.sdk.transport import POOL, Transport
from rock.sync.transport import POOL as BLOCKING_POOL
from rock.sync.transport import Transport as BlockingTransport


@pytest.fixture(autouse=True)
def no_connection_is_left() -> Iterator[None]:
    yield
    POOL.clear()
    BLOCKING_POOL.clear()


def call(face: str, url: str, method: str = "POST", target: str = "/x", body: Any = None, **options: Any) -> Any:
    """One JSON request on one of the faces; each asynchronous one runs in an asyncio.run of its own."""
    if face == "sync":
        return BlockingTransport(url, reconnect_timeout=0).json(method, target, body, **options)
    return asyncio.run(Transport(url, reconnect_timeout=0).json(method, target, body, **options))


faces = pytest.mark.parametrize("face", ["async", "sync"])


@faces
def test_one_connection_serves_calls_that_each_run_in_their_own_loop(face: str) -> None:
    with serve(echo) as wire:
        for number in range(20):
            assert call(face, wire.url, body={"n": number}) == {"n": number}
        assert wire.connections == 1


@faces
def test_many_threads_each_call_in_its_own_asyncio_run(face: str) -> None:
    async def slow_echo(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        await asyncio.sleep(0.001)
        writer.write(answer(request.body))

    with serve(slow_echo) as wire:

        def work(thread: int) -> int:
            for number in range(25):
                body = {"thread": thread, "number": number}
                assert call(face, wire.url, body=body) == body
            return thread

        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(work, range(16))) == list(range(16))
        assert wire.connections <= 16
        assert len({request.headers["idempotency-key"] for request in wire.requests}) == 16 * 25


def test_many_tasks_of_one_loop() -> None:
    with serve(echo) as wire:
        transport = Transport(wire.url)

        async def main() -> list[Any]:
            return await asyncio.gather(*(transport.json("POST", "/x", number) for number in range(100)))

        assert asyncio.run(main()) == list(range(100))


@faces
def test_a_forked_child_opens_a_connection_of_its_own(face: str) -> None:
    with serve(echo) as wire:
        assert call(face, wire.url, body=1) == 1
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(write_end, b"%d" % call(face, wire.url, body=2))
                status = 0
            finally:
                os._exit(status)
        os.close(write_end)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(read_end, 10) == b"2"
        os.close(read_end)
        assert call(face, wire.url, body=3) == 3  # the parent's connection still works
        assert wire.connections == 2


@faces
def test_a_connection_that_the_server_closed_is_not_used(face: str) -> None:
    with serve(say(answer(b"1"), close=True)) as wire:
        for _ in range(3):
            assert call(face, wire.url) == 1
            time.sleep(0.02)  # the end of the connection arrives
        assert wire.connections == 3 and len(wire.requests) == 3


@faces
def test_a_request_that_met_a_closing_connection_is_sent_again_with_its_key(face: str) -> None:
    async def second_request_is_dropped(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> bool:
        if len(wire.requests) == 2:
            return True  # closed without an answer, as a server does whose keep-alive ran out just then
        writer.write(answer(request.body))
        return False

    with serve(second_request_is_dropped) as wire:
        assert call(face, wire.url, body=1) == 1
        assert call(face, wire.url, body=2) == 2
        assert [request.body for request in wire.requests] == [b"1", b"2", b"2"]
        assert wire.requests[1].headers["idempotency-key"] == wire.requests[2].headers["idempotency-key"]
        assert wire.connections == 2


@faces
def test_a_new_connection_without_an_answer_is_not_tried_again(face: str) -> None:
    with serve(say(b"", close=True)) as wire:
        with pytest.raises(errors.Unavailable, match="broke"):
            call(face, wire.url)
        assert len(wire.requests) == 1


@faces
def test_chunked_and_lengthless_answers(face: str) -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n"
    with serve(say(chunked)) as wire:
        assert [call(face, wire.url) for _ in range(3)] == [[1, 2]] * 3
        assert wire.connections == 1
    with serve(say(b"HTTP/1.0 200 OK\r\n\r\n[3]", close=True)) as wire:
        assert call(face, wire.url) == [3]


@faces
@pytest.mark.parametrize("raw", [b"220 smtp ready\r\n", b"HTTP/1.1 200 OK\n\n", b"HTTP/1.1 200 OK\r\nbad\r\n\r\n"])
def test_a_malformed_answer_is_an_error_at_once(face: str, raw: bytes) -> None:
    with serve(say(raw)) as wire:
        began = time.monotonic()
        with pytest.raises(errors.ServerError, match="malformed"):
            call(face, wire.url, timeout=None)
        assert time.monotonic() - began < 5


@faces
def test_an_answer_that_is_cut_off(face: str) -> None:
    with serve(say(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n123", close=True)) as wire:
        with pytest.raises(errors.ServerError, match="middle of an answer"):
            call(face, wire.url)
        assert len(wire.requests) == 1


@faces
def test_an_answer_that_is_not_json(face: str) -> None:
    with serve(say(answer(b"<html>"))) as wire, pytest.raises(errors.ServerError, match="not JSON"):
        call(face, wire.url)


@faces
def test_a_silent_server_is_left_after_the_timeout(face: str) -> None:
    async def silent(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        await asyncio.sleep(30)

    with serve(silent) as wire:
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match=r"within 0\.2 seconds"):
            call(face, wire.url, timeout=0.2)
        assert time.monotonic() - began < 5


@faces
def test_nobody_listens(face: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(errors.Unavailable) as caught:
        call(face, f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port}" in str(caught.value)
    assert "start it with: rock admin start" in str(caught.value)


@faces
def test_errors_come_back_as_what_was_raised(face: str) -> None:
    import orjson

    error = errors.NotFound("session 'x' does not exist", sandbox_id="s1", hint="create it")
    with serve(say(answer(orjson.dumps(error.to_wire()), "404 Not Found"))) as wire:
        with pytest.raises(errors.NotFound) as caught:
            call(face, wire.url)
    assert (caught.value.sandbox_id, caught.value.hint) == ("s1", "create it")
    with serve(say(answer(b"<h1>Bad gateway</h1>", "502 Bad Gateway"))) as wire:
        with pytest.raises(errors.Unavailable, match="Bad gateway"):
            call(face, wire.url)
    with serve(say(answer(b"", "302 Found", "location: /elsewhere"))) as wire:
        with pytest.raises(errors.ServerError, match="redirection"):
            call(face, wire.url)


@faces
def test_what_is_sent(face: str) -> None:
    with serve(echo) as wire:
        url = f"{wire.url}/under/a%20path/"
        if face == "sync":
            BlockingTransport(url, "secret", {"X-Extra": "1"}).json("GET", "/v1/x?a=b", timeout=5)
        else:
            asyncio.run(Transport(url, "secret", {"X-Extra": "1"}).json("GET", "/v1/x?a=b", timeout=5))
        call(face, url, "DELETE", "/v1/x")
    get, delete = wire.requests
    assert get.line == "GET /under/a%20path/v1/x?a=b HTTP/1.1"
    assert get.headers["authorization"] == "Bearer secret" and get.headers["x-extra"] == "1"
    assert get.headers["host"] == f"127.0.0.1:{wire.port}" and "idempotency-key" not in get.headers
    assert len(delete.headers["idempotency-key"]) == 32 and delete.headers["content-length"] == "0"


class Numbers:
    """A body of unknown length, made while it is sent."""

    def __init__(self, count: int, size: int | None) -> None:
        self.count = count
        self.size = size

    def chunks(self) -> Iterator[bytes]:
        for number in range(self.count):
            yield b"%08d" % number * 8192


@faces
@pytest.mark.parametrize("known", [True, False])
def test_streamed_bodies(face: str, known: bool) -> None:
    body = Numbers(100, 100 * 65536 if known else None)
    with serve(echo) as wire:
        if face == "sync":
            back = BlockingTransport(wire.url).call("PUT", "/x", body)
        else:
            back = asyncio.run(Transport(wire.url).call("PUT", "/x", body))
        assert back == b"".join(body.chunks())
        assert ("content-length" in wire.requests[0].headers) is known


@faces
def test_a_refusal_in_the_middle_of_an_upload_is_told(face: str) -> None:
    import orjson

    refusal = orjson.dumps(errors.StorageFull("the disk is full").to_wire())

    async def main(port: list[int], ready: threading.Event, stop: threading.Event) -> None:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(refusal, "507 Insufficient Storage", "connection: close"))
            await writer.drain()
            writer.write_eof()
            while await reader.read(1 << 16):  # reading on, so that the answer is not lost to a reset
                pass
            writer.close()

        server = await asyncio.start_server(client, "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        await asyncio.to_thread(stop.wait)
        server.close()
        await asyncio.sleep(0.05)  # the connections end

    port: list[int] = []
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main(port, ready, stop)))
    thread.start()
    ready.wait(5)
    try:
        url = f"http://127.0.0.1:{port[0]}"
        with pytest.raises(errors.StorageFull):
            if face == "sync":
                BlockingTransport(url).call("PUT", "/x", Numbers(200, None))
            else:
                asyncio.run(Transport(url).call("PUT", "/x", Numbers(200, None)))
    finally:
        stop.set()
        thread.join(5)


@faces
def test_streamed_answers_come_in_constant_memory(face: str) -> None:
    async def large(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        count = number_of(request)
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {count << 16}\r\n\r\n".encode())
        for _ in range(count):
            writer.write(b"x" * 65536)
            await writer.drain()

    async def asynchronous(url: str) -> tuple[int, int]:
        size = largest = 0
        async with await Transport(url).open("GET", "/1000") as download:
            async for part in download:
                size, largest = size + len(part), max(largest, len(part))
        return size, largest

    def blocking(url: str) -> tuple[int, int]:
        size = largest = 0
        with BlockingTransport(url).open("GET", "/1000") as download:
            for part in download:
                size, largest = size + len(part), max(largest, len(part))
        return size, largest

    with serve(large) as wire:
        for _ in range(2):
            size, largest = blocking(wire.url) if face == "sync" else asyncio.run(asynchronous(wire.url))
            assert size == 1000 << 16 and largest <= 1 << 20
        assert wire.connections == 1


def test_leaving_a_download_early_closes_its_connection() -> None:
    with serve(say(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n12345")) as wire:
        with BlockingTransport(wire.url).open("GET", "/") as download:
            assert download.next() == b"12345"
        assert wire.connections == 1
        with BlockingTransport(wire.url).open("GET", "/"):
            pass
        assert wire.connections == 2


def test_a_cancelled_call_spoils_only_its_own_connection() -> None:
    async def slow_first(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        if number_of(request) == 1:
            await asyncio.sleep(0.5)
        writer.write(answer(request.line.encode().split()[1][1:]))

    with serve(slow_first) as wire:
        transport = Transport(wire.url)

        async def main() -> list[int]:
            task = asyncio.create_task(transport.json("GET", "/1"))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [await transport.json("GET", f"/{number}") for number in (2, 3)]

        assert asyncio.run(main()) == [2, 3]


@faces
def test_ipv6(face: str) -> None:
    try:
        with serve(echo, host="::1") as wire:
            assert call(face, f"http://[::1]:{wire.port}", body=1) == 1
            assert wire.requests[0].headers["host"] == f"[::1]:{wire.port}"
    except OSError:
        pytest.skip("no IPv6 on this machine")


@pytest.mark.parametrize("details", [b'{"x": [1], "resumes": {}}', b"[1]", b'"text"'])
def test_details_of_any_shape_are_the_error_that_was_told(details: bytes) -> None:
    """What is asked again by itself is told by the details; of one that is not, they may be anything."""
    body = b'{"error": {"code": "unavailable", "message": "told", "details": %b}}' % details
    with serve(say(answer(body, "503 Service Unavailable"))) as wire:
        with pytest.raises(errors.Unavailable, match="told"):
            BlockingTransport(wire.url).call("POST", "/x", b"", timeout=5)
        assert len(wire.requests) == 1
