"""Connections that wait in a line unread: each request has its own answer, however its bytes come, whoever leaves."""

from __future__ import annotations

import asyncio

from rock.http.fair_queue import FairQueue, QueuePlace
from rock.testing import FakeServer

CONNECTIONS, EACH = 48, 12


def asked(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length)


def port_of(server: FakeServer) -> int:
    return int(server.url.rpartition(":")[2])


async def flood(port: int, number: int) -> None:
    """One connection: requests that each name another sandbox, whole, in two parts, or two at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for count in range(EACH):
            names = [f"none-{number}-{count}-{part}" for part in range(2 if count % 4 == 3 else 1)]
            data = b"".join(asked(f"/v1/sandboxes/{name}/sessions") for name in names)
            cut = 9 if count % 3 == 1 else len(data)
            writer.write(data[:cut])
            if cut < len(data):
                await asyncio.sleep(0.005)
                writer.write(data[cut:])
            for name in names:
                status, body = await answer(reader)
                assert status == 404 and name.encode() in body, (status, body)
    finally:
        writer.close()


async def leaver(port: int) -> None:
    """Asks, and is gone before the answer of its second request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(asked("/v1/sandboxes/gone/sessions"))
    await answer(reader)
    writer.write(asked("/v1/sandboxes/gone/sessions") * 3)
    await writer.drain()
    writer.transport.abort()


def test_each_request_of_a_flood_has_its_own_answer() -> None:
    async def play(port: int) -> None:
        await asyncio.wait_for(
            asyncio.gather(*(flood(port, n) for n in range(CONNECTIONS)), *(leaver(port) for _ in range(16))), 120
        )
        await asyncio.wait_for(flood(port, CONNECTIONS), 60)  # alone, with lines that are gone

    with FakeServer() as server:
        asyncio.run(play(port_of(server)))


def test_who_stops_answers_those_who_wait_or_ends_their_connections() -> None:
    async def ask_on(port: int) -> int:
        answers = 0
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                writer.write(asked("/v1/sandboxes/none/sessions"))
                await answer(reader)
                answers += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            return answers
        finally:
            writer.close()

    async def play(server: FakeServer) -> None:
        clients = [asyncio.create_task(ask_on(port_of(server))) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.stop)
        assert sum(await asyncio.wait_for(asyncio.gather(*clients), 60)) > CONNECTIONS

    with FakeServer() as server:
        asyncio.run(play(server))


def test_a_turn_that_was_waited_for_is_good_for_its_client_alone() -> None:
    async def play() -> None:
        turns, place = FairQueue(), QueuePlace()
        assert not place.wait(lambda: None)  # nobody knows it yet
        first = [asyncio.create_task(turns.take("a")) for _ in range(12)]
        await asyncio.sleep(0)
        assert turns.waiting == 8
        known = asyncio.create_task(turns.take("a", place))
        await asyncio.sleep(0)
        assert place.line == "a" and not known.done()
        read = asyncio.Event()
        assert place.wait(read.set) and turns.waiting >= 2
        await asyncio.wait_for(read.wait(), 60)
        assert await turns.take("a", place) == 0  # it has had its turn
        last = [asyncio.create_task(turns.take("b")) for _ in range(12)]
        await asyncio.sleep(0)
        again = asyncio.create_task(turns.take("b", place))  # the same connection, with another key
        await asyncio.sleep(0)
        assert not again.done() and place.line == "b"
        for number in await asyncio.wait_for(asyncio.gather(*first, known, *last, again), 60):
            turns.leave(number)
        assert turns.waiting == 0

    asyncio.run(play())
