"""The stream to a sandbox's pid 1: two named pipes in its run folder, which are its standard streams.

    in   rocklet writes, pid 1 reads      out   pid 1 writes, rocklet reads

runsc holds both ends of each pipe, so neither side sees an end of file while no server runs. The next server opens them
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

_PIECE = 256 << 10
_ROOM = 1 << 20  # capacity of a pipe in bytes, if the kernel permits it


def make_pipes(folder: Path) -> tuple[int, int]:
    """Create both pipes and return pid 1's ends, for its standard input and output; the caller closes them."""
    ends: list[int] = []
    try:
        for name in ("in", "out"):
            os.mkfifo(folder / name, 0o600)
            ends.append(os.open(folder / name, os.O_RDWR | os.O_CLOEXEC))
            with contextlib.suppress(OSError):
                fcntl.fcntl(ends[-1], fcntl.F_SETPIPE_SZ, _ROOM)
    except OSError:
        for fd in ends:
            os.close(fd)
        raise
    return ends[0], ends[1]


class Pipes:
    """The rocklet's ends of the pipes in `folder`: a `ByteStream`. OSError (ENXIO) when the other ends are closed."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._writing = os.open(folder / "in", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._reading = os.open(folder / "out", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            os.close(self._writing)
            raise
        self._closed = False

    async def read(self) -> bytes:
        """Read available bytes; empty at the end."""
        while not self._closed:
            try:
                return os.read(self._reading, _PIECE)
            except BlockingIOError:
                await self._until(self._reading, reading=True)
        return b""

    async def write(self, data: bytes) -> None:
        """Write; returns when all bytes are in the pipe. OSError when the pipe is broken."""
        view = memoryview(data)
        while view:
            if self._closed:
                raise BrokenPipeError("the stream was closed")
            try:
                view = view[os.write(self._writing, view) :]
            except BlockingIOError:
                await self._until(self._writing, reading=False)

    async def _until(self, fd: int, *, reading: bool) -> None:
        ready = asyncio.Event()
        add, remove = (
            (self._loop.add_reader, self._loop.remove_reader)
            if reading else (self._loop.add_writer, self._loop.remove_writer)
        )  # fmt: skip
        add(fd, ready.set)
        try:
            await ready.wait()
        finally:
            if not self._closed:
                remove(fd)

    def close(self) -> None:
        """Close both pipes. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._reading)
        self._loop.remove_writer(self._writing)
        os.close(self._reading)
        os.close(self._writing)
