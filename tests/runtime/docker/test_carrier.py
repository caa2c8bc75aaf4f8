"""The carrier against the worst that can be inside: nonsense, lies about channels, more than was allowed."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rock import errors
from rock.guest.init import channels
from rock.guest.init.channels import Parser, frame
from rock.runtime.base import Program
from rock.runtime.init.link import InitLink
from rock.runtime.init.multiplexer import Multiplexer
from tests.runtime.boxes import read_all, run


class Inside:
    """A pid 1 that says what the test wants: a stream for a Carrier, and what came over it."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[bytes] = asyncio.Queue()
        self.heard: asyncio.Queue[tuple[int, int, bytes]] = asyncio.Queue()
        self.closed = False
        self._parser = Parser()

    async def read(self) -> bytes:
        return await self.said.get()

    async def write(self, data: bytes) -> None:
        for kind, number, payload in self._parser.feed(data):
            if kind == channels.BEGIN:
                self.said.put_nowait(b"of before\xa5" + frame(channels.READY, 0, payload[len(channels.MAGIC):]))
            else:
                self.heard.put_nowait((kind, number, payload))

    def close(self) -> None:
        self.closed = True
        self.said.put_nowait(b"")

    def say(self, *frames: bytes) -> None:
        self.said.put_nowait(b"".join(frames))

    async def request(self) -> bytes:
        while True:
            kind, _, payload = await self.heard.get()
            if kind == channels.PACKET:
                return payload


def carried(tmp_path: Path, work: Callable[[Inside, InitLink, Multiplexer], Awaitable[None]]) -> None:
    async def main() -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        inside = Inside()
        mux = Multiplexer(inside, tmp_path, "x")
        link = InitLink(await mux.begin(10), "x")
        try:
            await work(inside, link, mux)
        finally:
            link.close()
            mux.close()
            await mux.gone()
        assert inside.closed and sorted(os.listdir("/proc/self/fd")) == before

    run(main())


SPAWNED = b'{"id": 1, "ok": true, "pid": 7, "pty": false, "streams": ["stdin", "stdout"]}'


def test_a_program_by_hand(tmp_path: Path) -> None:
    async def work(inside: Inside, link: InitLink, mux: Multiplexer) -> None:
        spawning = asyncio.create_task(link.spawn(Program(["x"], stdin="pipe", stderr="null")))
        await inside.request()
        inside.say(frame(channels.OPEN, 1, b"w"), frame(channels.OPEN, 2, b"r"), frame(channels.PACKET, 0, SPAWNED))
        process = await spawning
        assert process.stdin is not None and process.stdout is not None
        os.write(process.stdin, b"to it")
        assert await inside.heard.get() == (channels.DATA, 1, b"to it")
        await process.close_stdin()
        assert (await inside.heard.get())[:2] == (channels.END, 1)
        inside.say(frame(channels.DATA, 2, b"from it"), frame(channels.END, 2, bytes(4)))
        assert await read_all(process.stdout) == b"from it"
        process.close()

    carried(tmp_path, work)


NOBODY_ASKED = [
    part for message in range(30)
    for part in (*(frame(channels.OPEN, 100 + 50 * message + number, b"r") for number in range(50)),
                 frame(channels.PACKET, 0, b'{"id": 999, "ok": true}'))
]  # fmt: skip
TOO_MUCH = [frame(channels.DATA, 2, bytes(channels.MOST))] * (2 * channels.WINDOW // channels.MOST + 4)


@pytest.mark.parametrize("lies", [
    [b"\x63\0\0\0\0\0\0\0\0\0"], [b"\x05\0\0\0\0\xff\xff\xff\xff"], [frame(channels.OPEN, 9, b"?")],
    [frame(channels.OPEN, 9, b"r"), frame(channels.OPEN, 9, b"r")],
    [frame(channels.OPEN, number, b"r") for number in range(10, 90)],
    [frame(channels.PACKET, 0, b"[")], [frame(channels.PACKET, 0, b"[" * 20_000)], [frame(channels.PACKET, 0, b"{}")],
    [frame(channels.PACKET, 1, bytes(channels.MOST))] * 2100, [frame(channels.CREDIT, 1, b"1")], TOO_MUCH,
    [frame(channels.OPEN, 9, b"g"), frame(channels.PACKET, 0, b"[1]")],
    [frame(channels.OPEN, 9, b"g"), frame(channels.PACKET, 0, b"[" * 20_000)],
    [frame(channels.OPEN, 9, b"f"), frame(channels.PACKET, 0, b"{}"), frame(channels.END, 9, struct.pack(">I", 5))],
    NOBODY_ASKED,
], ids=range(15))  # fmt: skip
def test_whoever_breaks_the_rules_is_let_go(tmp_path: Path, lies: list[bytes]) -> None:
    async def work(inside: Inside, link: InitLink, mux: Multiplexer) -> None:
        spawning = asyncio.create_task(link.spawn(Program(["x"], stdin="pipe", stderr="null")))
        await inside.request()
        inside.say(frame(channels.OPEN, 1, b"w"), frame(channels.OPEN, 2, b"r"), frame(channels.PACKET, 0, SPAWNED))
        process = await spawning
        waiting = asyncio.create_task(link.request("hello"))
        await inside.request()
        inside.say(*lies)
        with pytest.raises(errors.Lost):
            await waiting
        with pytest.raises(errors.Lost):
            await process.wait()
        process.close()

    carried(tmp_path, work)


def test_what_nobody_reads_is_bounded(tmp_path: Path) -> None:
    async def work(inside: Inside, link: InitLink, mux: Multiplexer) -> None:
        spawning = asyncio.create_task(link.spawn(Program(["x"], stdin="pipe", stderr="null")))
        await inside.request()
        inside.say(frame(channels.OPEN, 1, b"w"), frame(channels.OPEN, 2, b"r"), frame(channels.PACKET, 0, SPAWNED))
        process = await spawning
        assert process.stdin is not None
        os.set_blocking(process.stdin, False)
        sent = 0
        for _ in range(200):  # it gives no credit: what we write has to stop
            try:
                sent += os.write(process.stdin, bytes(32 << 10))
            except BlockingIOError:
                pass
            await asyncio.sleep(0.002)
        assert sent <= channels.WINDOW + (64 << 10)
        # as if it were more than there is
        inside.say(frame(channels.CREDIT, 1, struct.pack(">I", 0xFFFFFFFF)))
        await asyncio.sleep(0.05)
        process.close()

    carried(tmp_path, work)


def test_a_file_that_does_not_fit_inside_is_refused(tmp_path: Path) -> None:
    async def work(inside: Inside, link: InitLink, mux: Multiplexer) -> None:
        opening = asyncio.create_task(link.request("open_write", {"path": "/x"}))
        await inside.request()
        inside.say(frame(channels.OPEN, 5, b"g"),
                   frame(channels.PACKET, 0, b'{"id": 1, "ok": true, "token": "{}"}'))
        reply, fds = await opening
        os.write(fds[0], b"content")
        os.close(fds[0])
        committing = asyncio.create_task(link.request("commit_write", {"token": reply["token"]}))
        assert await inside.heard.get() == (channels.DATA, 5, b"content")
        assert (await inside.heard.get())[:2] == (channels.END, 5)
        inside.say(frame(channels.END, 5, struct.pack(">I", 28)))
        with pytest.raises(errors.StorageFull):
            await committing

    carried(tmp_path, work)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1 << 32 - 1), st.binary(max_size=300)), max_size=8),
       st.binary(max_size=400), st.integers(1, 60), st.binary(min_size=16, max_size=16))
def test_frames_survive_any_beginning(frames: list[tuple[int, int, bytes]], before: bytes, step: int,
                                      nonce: bytes) -> None:
    """Whatever was broken off before, what comes after a BEGIN is understood, and nothing else is taken for it."""
    frames = [entry for entry in frames if entry[0] != channels.BEGIN]
    data = before + channels.begin(nonce) + b"".join(frame(*entry) for entry in frames)
    parser, found = Parser(), []
    for at in range(0, len(data), step):
        found += parser.feed(data[at : at + step])
    assert found[0] == (channels.BEGIN, 0, channels.MAGIC + nonce)
    assert found[1:] == frames


def test_a_frame_that_was_broken_off_does_nothing(tmp_path: Path) -> None:
    whole = frame(channels.DATA, 3, b"x" * 1000)
    for cut in (1, 5, 9, 500, len(whole) - 1):
        parser = Parser()
        list(parser.feed(channels.begin(bytes(16))))
        found = list(parser.feed(whole[:cut] + channels.begin(b"n" * 16) + frame(channels.GONE, 4)))
        assert [entry[0] for entry in found] == [channels.BEGIN, channels.GONE]
