"""Calls over a server that is away for a while: the same key again and again, until it is back or the time is over."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from wire_server import Request, Wire, answer, echo, say, serve

from rock import errors, settings
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.sandbox.link import transport_of
from rock.sdk.transport import POOL, Transport
from rock.sync import Client
from rock.sync.transport import POOL as BLOCKING_POOL
from rock.sync.transport import Transport as BlockingTransport

faces = pytest.mark.parametrize("face", ["async", "sync"])


@pytest.fixture(autouse=True)
def no_connection_is_left() -> Iterator[None]:
    yield
    POOL.clear()
    BLOCKING_POOL.clear()


def call(face: str, url: str, method: str = "POST", seconds: float | None = None, **options: object) -> object:
    if face == "sync":
        return BlockingTransport(url, reconnect_timeout=seconds).json(method, "/x", 1, **options)  # type: ignore[arg-type]
    return asyncio.run(Transport(url, reconnect_timeout=seconds).json(method, "/x", 1, **options))  # type: ignore[arg-type]


@faces
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_server_that_comes_back_is_asked_again_with_the_same_key(face: str, method: str) -> None:
    """It is killed after it has read the request; connections are refused, then broken, then a front answers 502."""
    keys: list[str | None] = []

    async def die(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> bool:
        keys.append(request.headers.get("idempotency-key"))
        writer.transport.abort()
        return True

    with serve(echo) as wire:
        port = wire.port
        assert call(face, wire.url) == 1
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(call(face, f"http://127.0.0.1:{port}", method)))
    with serve(die, port=port):
        thread.start()
        while len(keys) < 2:
            time.sleep(0.01)
    time.sleep(0.3)
    with serve(say(answer(b"<html>", "502 Bad Gateway")), port=port) as front:
        while len(front.requests) < 2:
            time.sleep(0.01)
    with serve(say(answer(b"7")), port=port) as back:
        thread.join(20)
        assert done == [7]
        keys += [request.headers.get("idempotency-key") for request in (*front.requests, *back.requests)]
    assert len(set(keys)) == 1 and (method == "GET" or keys[0])


@faces
def test_a_server_that_was_never_there_is_told_soon(face: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # not listening: nobody else gets the port
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match="no ROCK server"):
            call(face, f"http://127.0.0.1:{nobody.getsockname()[1]}", seconds=60)
        assert time.monotonic() - began < 8


@faces
def test_no_longer_than_it_was_told(face: str) -> None:
    with serve(echo) as wire:
        url = wire.url
        assert call(face, url) == 1
    for seconds, options, least, most in ((0.0, {}, 0.0, 0.5), (1.0, {}, 0.4, 4.0), (60.0, {"timeout": 1.0}, 0.4, 4.0)):
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match="no ROCK server"):
            call(face, url, seconds=seconds, **options)
        assert least <= time.monotonic() - began < most


@faces
@pytest.mark.parametrize(("status", "code"), [
    ("503 Service Unavailable", "unavailable"), ("503 Service Unavailable", "no_capacity"), ("500 Oh", "internal"),
    ("409 Conflict", "conflict"),
])  # fmt: skip
def test_what_a_server_says_itself_is_raised_at_once(face: str, status: str, code: str) -> None:
    body = b'{"error": {"code": "%b", "message": "told"}}' % code.encode()
    with serve(say(answer(body, status))) as wire:
        with pytest.raises(errors.RockError, match="told"):
            call(face, wire.url)
        assert len(wire.requests) == 1


@faces
def test_what_may_not_be_repeated_is_not(face: str) -> None:
    with serve(echo) as wire:
        assert call(face, wire.url) == 1
        port = wire.port
    with serve(say(b"", close=True), port=port) as wire:
        with pytest.raises(errors.Unavailable, match="broke"):
            call(face, wire.url, repeats=False)
        assert len(wire.requests) <= 2  # the second over a new connection, where a kept one had ended


def test_where_the_time_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:1"
    assert Transport(url).reconnect_timeout == settings.RECONNECT_TIMEOUT == 60
    assert Client(url, reconnect_timeout=3).transport.reconnect_timeout == 3
    config = SandboxConfig(base_url=url, reconnect_timeout=0)
    assert transport_of(config).reconnect_timeout == 0 and "reconnect_timeout" not in config.model_dump()
    monkeypatch.setenv("ROCK_RECONNECT_TIMEOUT", "7.5")
    assert Transport(url).reconnect_timeout == 7.5
    for wrong in ("-1", "soon", "nan"):
        monkeypatch.setenv("ROCK_RECONNECT_TIMEOUT", wrong)
        with pytest.raises(errors.InvalidConfig, match="ROCK_RECONNECT_TIMEOUT"):
            Transport(url)
