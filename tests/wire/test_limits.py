"""What a connection may send before a request is made of it, and for how long; and how many connections there are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop
from tests.waiting import slowness
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from rock.cli.serve.serve import http_over, listen
from rock.http import connections
from rock.http.connections import Admission

HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
SLOWEST = 0.5 * slowness()  # seconds that another client may wait here; bench/attacks.py measures how long it does


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with its path and what came as the body; echoes over WebSockets."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message.get("bytes")})
        return
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    body = f"{scope['path']} {size}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(head_within: float = 30.0, limits: Admission | None = None) -> AsyncIterator[int]:
    listener = listen("127.0.0.1", 0)
    http = http_over(app, admission=limits, head_within=head_within)
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        http.should_exit = True
        await task
        listener.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length)


async def refused(port: int, *parts: bytes, repeat: int = 0) -> tuple[int, bytes, int]:
    """(status, body, bytes that were sent) of a request, whose last part is sent up to `repeat` times more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = 0
    try:
        with contextlib.suppress(ConnectionError):
            for part in (*parts, *[parts[-1]] * repeat):
                writer.write(part)
                await writer.drain()
                sent += len(part)
                await asyncio.sleep(0.001)
                if reader._buffer:  # type: ignore[attr-defined]
                    break  # the answer is here, as clients see that send on
        async with asyncio.timeout(20):
            status, body = await answer_of(reader)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b"", "the connection is closed after that"
            return status, body, sent
    finally:
        writer.close()


async def slowest(port: int, attack: Any) -> float:
    """Seconds that the slowest of another client's requests took during an attack."""
    worst, running = 0.0, asyncio.ensure_future(attack)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while not running.done():
            began = time.monotonic()
            writer.write(HEAD + b"\r\n")
            assert (await answer_of(reader))[0] == 200
            worst = max(worst, time.monotonic() - began)
            await asyncio.sleep(0.005)
        await running
    finally:
        writer.close()
    return worst


PIECE = b"a" * 65536


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((HEAD + b"x: ", PIECE), 431),
        ((HEAD, b"x: 1\r\n" * 1000), 431),
        ((HEAD + b"".join(b"x%d: 1\r\n" % n for n in range(257)) + b"\r\n",), 431),
        ((b"GET /", PIECE), 414),
        ((b"GET /" + b"a" * 33_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",), 414),
        ((b"GE", b"T" * 65536), 400),
        ((b"PUT / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", PIECE), 0),
        ((b"PUT / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n5;x=", PIECE), 0),
    ],
)
def test_endless_heads_are_refused_before_they_are_kept(parts: tuple[bytes, ...], status: int) -> None:
    async def play() -> None:
        async with serving() as port:
            if status == 0:  # the request is under way: its connection ends without an answer
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await refused(port, *parts, repeat=200)
                return
            found, body, sent = await refused(port, *parts, repeat=200)
            assert found == status
            assert b'"code"' in body and b'"message"' in body
            assert sent < 12 << 20, "no more is taken in than what is on its way"

    asyncio.run(play())


def test_the_largest_allowed_head_is_served() -> None:
    async def play() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            lines = b"".join(b"x%d: %s\r\n" % (n, b"a" * 200) for n in range(250))
            for _ in range(2):
                writer.write(HEAD + lines + b"\r\n")
                assert (await answer_of(reader))[0] == 200
            writer.write(b"GET /" + b"a" * 32_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await answer_of(reader))[0] == 200
            writer.close()

    asyncio.run(play())


def test_a_head_has_to_come_in_time() -> None:
    async def play() -> None:
        async with serving(head_within=0.5) as port:
            assert (await refused(port, b"GET / HT"))[0] == 408
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(5):
                assert await reader.read() == b"", "without a byte there is nothing to answer"
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"\r\n")
            assert (await answer_of(reader))[0] == 200
            await asyncio.sleep(1.0)  # an idle connection is kept
            for byte in HEAD:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.03)
                if reader.at_eof() or reader._buffer:  # type: ignore[attr-defined]
                    break
            async with asyncio.timeout(5):
                assert (await answer_of(reader))[0] == 408, "however steadily it drips"
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PUT /slow HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n")
            for _ in range(4):
                await asyncio.sleep(0.3)
                writer.write(b"x")
            assert await answer_of(reader) == (200, b"/slow 4"), "a body may take longer"
            writer.close()

    asyncio.run(play())


def test_many_requests_in_one_packet_are_answered_in_order() -> None:
    async def play() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            count = 3000
            data = b"".join(b"PUT /%d HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc" % n
                            for n in range(count))  # fmt: skip

            async def send() -> None:
                writer.write(data)
                await writer.drain()

            sending = asyncio.create_task(send())
            async with asyncio.timeout(30):
                for number in range(count):
                    assert await answer_of(reader) == (200, b"/%d 3" % number)
            await sending
            writer.close()

    asyncio.run(play())


def test_large_bodies_arrive_whole() -> None:
    async def play() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            size = 32 << 20
            writer.write(b"PUT /large HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // len(PIECE)):
                writer.write(PIECE)
                await writer.drain()
            assert await answer_of(reader) == (200, b"/large %d" % size)
            writer.close()

    asyncio.run(play())


@pytest.mark.parametrize("first", [HEAD + b"x: ", b"GET /", b"PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n"])
def test_others_do_not_wait_for_an_endless_head(first: bytes) -> None:
    async def play() -> None:
        async def attack() -> None:
            for _ in range(10):
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await refused(port, first, b"y: 1\r\n" * 5000 if first.endswith(b"\n") else PIECE, repeat=20)

        async with serving() as port:
            assert await slowest(port, attack()) < SLOWEST

    asyncio.run(play())


def test_others_do_not_wait_for_a_flood_of_small_frames() -> None:
    async def play() -> None:
        async def attack() -> None:
            ping = bytes([0x89, 0x80, 0, 0, 0, 0])
            async with connect(f"ws://127.0.0.1:{port}/x", compression=None) as socket:
                for _ in range(8):
                    socket.transport.write(ping * 40_000)
                    await asyncio.sleep(0.05)
                with contextlib.suppress(ConnectionClosed):
                    await socket.send(b"still there")
                    assert await socket.recv() == b"still there"

        async with serving() as port:
            assert await slowest(port, attack()) < SLOWEST

    asyncio.run(play())


def test_half_open_connections_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "GRACE", 0.2)

    async def play() -> None:
        limits = Admission(total=40, unproven_each=16)
        async with serving(limits=limits) as port:
            held = []
            for _ in range(30):
                held.append(await asyncio.open_connection("127.0.0.1", port))
                held[-1][1].write(b"GET / HT")
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.1)
            assert limits.open <= 30
            for _ in range(20):  # of which the oldest go
                await asyncio.sleep(0.05)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                held.append((reader, writer))
                writer.write(HEAD + b"\r\n")
                assert (await answer_of(reader))[0] == 200
            assert limits.open <= 17
            for _, writer in held:
                writer.close()
            async with asyncio.timeout(10):
                while limits.open:  # noqa: ASYNC110, nobody tells
                    await asyncio.sleep(0.02)

    asyncio.run(play())


def test_beyond_the_limit_a_connection_is_told_so() -> None:
    async def play() -> None:
        limits = Admission(total=4)
        async with serving(limits=limits) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            await asyncio.sleep(0.05)
            assert (await refused(port, HEAD + b"\r\n"))[0] == 503
            assert limits.refused == 1
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"\r\n")
            assert (await answer_of(reader))[0] == 200
            writer.close()

    asyncio.run(play())


class _Counted:
    def __init__(self, address: str, made_at: float = 0.0) -> None:
        self.address, self.made_at, self.dropped = address, made_at, False

    def drop(self) -> None:
        self.dropped = True


def test_a_tenant_has_at_most_half_of_the_connections() -> None:
    limits = Admission(total=8)
    made = [_Counted("a") for _ in range(6)]
    assert all(limits.admit(each) for each in made)
    assert [limits.prove(each, "t1", True) for each in made] == [True] * 4 + [False] * 2
    assert limits.prove(made[4], "", False), "the owner is not bounded"
    limits.leave(made[0])
    assert limits.prove(made[5], "t1", True)
    for each in made[1:]:
        limits.leave(each)
    assert limits.open == 0


def test_proven_connections_are_never_dropped() -> None:
    limits = Admission(total=2)
    first, second, third, fourth = (_Counted("a") for _ in range(4))
    assert limits.admit(first) and limits.admit(second) and limits.prove(first, "", False)
    assert limits.admit(third) and second.dropped and not first.dropped
    limits.leave(second)
    assert limits.prove(third, "", False)
    assert not limits.admit(fourth)
    limits.leave(fourth)
    assert connections.HEAD_LIMIT == 64 << 10


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_few_connections_are_accepted_in_one_pass(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """However many wait in the kernel's queue, which is long enough for bursts, others have the loop in between."""
    count = 300

    async def play() -> None:
        limits = Admission(total=2000)
        async with serving(limits=limits) as port:
            # While the loop stands still.
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
            before = most = 0
            while limits.open < count:
                await asyncio.sleep(0)
                most, before = max(most, limits.open - before), limits.open
            for client in clients:
                client.close()
            while limits.open:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert most <= 17  # asyncio takes one more than its number

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(play(), 60))


def test_an_announced_body_opens_no_way_around_the_limits() -> None:
    """Only what is within a Content-Length is parsed without portions, and only once the head is whole."""

    async def play() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PUT /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n")
            for _ in range(40):
                writer.write(b"x: 1\r\n" * 100)
            assert (await answer_of(reader))[0] == 431
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = bytes(300_000)
            writer.write((HEAD.replace(b"GET", b"PUT") + b"content-length: 300000\r\n\r\n" + body) * 3)
            for _ in range(3):
                assert await answer_of(reader) == (200, b"/healthz 300000")
            writer.write(HEAD + b"x: " + b"a" * 100_000)
            assert (await answer_of(reader))[0] == 431
            writer.close()

    asyncio.run(asyncio.wait_for(play(), 60))
