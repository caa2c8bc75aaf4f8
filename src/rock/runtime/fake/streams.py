"""What the programs of a fake sandbox read and write: real pipes to the server, and pipes and files in memory."""

from __future__ import annotations

import asyncio
import os
from typing import Self

from rock.runtime.fake.tree import Node, Tree

_FULL = 64 << 10  # bytes that a pipe in memory holds


class Open:
    """An open file, shared by all descriptors that are copies of each other; `close` of the last one ends it."""

    def __init__(self) -> None:
        self._holders = 1

    def copy(self) -> Self:
        self._holders += 1
        return self

    def close(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self.end()

    def end(self) -> None:
        """Nobody has it any more."""

    async def read(self, most: int) -> bytes:
        """Up to `most` bytes; b"" is the end."""
        raise OSError("not open for reading")

    async def write(self, data: bytes) -> None:
        """All of it. BrokenPipeError when nobody reads."""
        raise OSError("not open for writing")


class Null(Open):
    """/dev/null."""

    async def read(self, most: int) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        return


class Text(Open):
    """Something to be read that is there already: a file, a here-document."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    async def read(self, most: int) -> bytes:
        piece = self._data[self._at : self._at + most]
        self._at += len(piece)
        return piece


class Appended(Open):
    """A file of the tree, open for writing at its end."""

    def __init__(self, tree: Tree, path: str, *, keep: bool) -> None:
        super().__init__()
        if not keep or tree.get(path) is None:
            tree.write(path, b"")
        self._tree = tree
        self._node: Node = tree.find(path)

    async def write(self, data: bytes) -> None:
        self._tree.grow(self._node, data)


class Collected(Open):
    """What a command substitution takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.data += data


class _Channel:
    """The bytes between the two ends of a pipe in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.written = self.read = True  # whether the ends are open
        self.changed = asyncio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class _Reading(Open):
    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    async def read(self, most: int) -> bytes:
        channel = self._channel
        while not channel.data and channel.written:
            await channel.changed.wait()
        piece = bytes(channel.data[:most])
        del channel.data[:most]
        channel.tell()
        return piece

    def end(self) -> None:
        self._channel.read = False
        self._channel.tell()


class _Writing(Open):
    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    async def write(self, data: bytes) -> None:
        channel = self._channel
        while channel.read and len(channel.data) >= _FULL:
            await channel.changed.wait()
        if not channel.read:
            raise BrokenPipeError
        channel.data += data
        channel.tell()

    def end(self) -> None:
        self._channel.written = False
        self._channel.tell()


def pipe() -> tuple[Open, Open]:
    """(for reading, for writing), in memory."""
    channel = _Channel()
    return _Reading(channel), _Writing(channel)


class Descriptor(Open):
    """The program's end of a real pipe, non-blocking, on the event loop."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    async def read(self, most: int) -> bytes:
        while True:
            try:
                return os.read(self._fd, most)
            except BlockingIOError:
                await self._ready(write=False)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._ready(write=True)

    async def _ready(self, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        # A copy of its own: programs that wait for the same pipe would take each other's callback away.
        fd = os.dup(self._fd)
        (loop.add_writer if write else loop.add_reader)(fd, _set, ready)
        try:
            await ready
        finally:
            (loop.remove_writer if write else loop.remove_reader)(fd)
            os.close(fd)

    def end(self) -> None:
        os.close(self._fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
