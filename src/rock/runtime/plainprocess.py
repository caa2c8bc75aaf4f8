"""Programs as children of the server, for plain.py: their streams, their start, their ends."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Mapping

from rock import errors
from rock.guest import begin
from rock.runtime import plaintree
from rock.runtime.base import CLOCK, ExitStatus, Program

_LOOK = 0.02  # seconds between two looks at whether a child has ended


class PlainProcess:
    """A child of the server: implements `Process`. A kept one holds copies of our ends, for `attach`."""

    def __init__(
        self, sandbox: PlainSandbox, child: subprocess.Popen[bytes], program: Program, ours: dict[str, int]
    ) -> None:
        self.pid = child.pid
        self.key = program.key
        self.child = child
        self._sandbox = sandbox
        self._pty = program.pty is not None
        self.keep = program.keep
        self.held = {name: os.dup(fd) for name, fd in ours.items()} if program.keep else {}
        self._closed = False
        self._hand_out(ours)

    def _hand_out(self, ours: dict[str, int]) -> None:
        self.stdin: int | None = ours.pop("stdin", None)
        self.stdout: int | None = ours.pop("stdout", None)
        self.stderr: int | None = ours.pop("stderr", None)
        self.channels: Mapping[int, int] = {int(name): fd for name, fd in ours.items()}

    def again(self) -> PlainProcess:
        """The same program for somebody else, with descriptors of its own."""
        copy = PlainProcess.__new__(PlainProcess)
        copy.__dict__.update(self.__dict__)
        copy._closed = False
        copy._hand_out({name: os.dup(fd) for name, fd in self.held.items()})
        return copy

    def _ended(self) -> bool:
        return self.child.poll() is not None

    async def wait(self) -> ExitStatus:
        while not self._ended():  # noqa: ASYNC110  what tells of a child's end is not the same on every Unix
            await asyncio.sleep(_LOOK)
        code = self.child.returncode
        return ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)

    async def signal(self, number: int, *, tree: bool = False, since: float | None = None, root: bool = True) -> int:
        if self._ended():
            return 0
        found = plaintree.under(await plaintree.scan(), self.pid, _epoch(since)) if tree else []
        count = sum(plaintree.send(entry.pid, int(number)) for entry in found)
        return count + (plaintree.send(self.pid, int(number)) if root and not self._ended() else 0)

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        if self._ended():
            return 0
        if tell is not None and not root:
            plaintree.send(self.pid, tell)
        count = await plaintree.kill_tree(self.pid, _epoch(since), include=root)
        if root:
            await self.wait()
        return count

    async def resize(self, rows: int, columns: int) -> None:
        if not self._pty:
            raise errors.InvalidConfig("this program has no terminal", sandbox_id=self._sandbox.id,
                                       hint="start it with pty=(rows, columns)")
        if not (0 < rows < 65536 and 0 < columns < 65536):
            raise errors.InvalidConfig(f"{rows} x {columns} is no terminal size", sandbox_id=self._sandbox.id)
        if self.stdin is not None:
            fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def close_stdin(self) -> None:
        if self.stdin is None or self._pty:
            return
        os.close(self.stdin)
        self.stdin = None
        held = self.held.pop("stdin", None)
        if held is not None:
            os.close(held)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self.stdin, self.stdout, self.stderr, *self.channels.values()):
            if fd is not None:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = None
        self.channels = {}
        if self._ended():
            self._sandbox.forget(self)

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class PlainSandbox:
    """What this server knows of one."""

    def __init__(self, id: str, env: dict[str, str]) -> None:
        self.id = id
        self.env = env
        self.ended = asyncio.Event()
        self.children: dict[int, PlainProcess] = {}  # by pid: all that were not reaped
        self.kept: dict[str, PlainProcess] = {}
        self.writing: set[str] = set()

    def forget(self, process: PlainProcess) -> None:
        self.children.pop(process.pid, None)
        if process.keep and process.key in self.kept:
            self.kept.pop(process.key).release()

    async def stop(self, grace: float) -> None:
        self.ended.set()
        if grace > 0:
            for process in list(self.children.values()):
                await process.signal(15, tree=True)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(p.child.poll() is None for p in self.children.values()):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)
        await asyncio.gather(*(process.kill_tree() for process in self.children.values()))


def _epoch(since: float | None) -> float | None:
    """A time of our clock, in seconds since the epoch."""
    return None if since is None else time.time() - (time.clock_gettime(CLOCK) - since)


def streams_of(program: Program) -> tuple[dict[str, int], dict[int, int]]:
    """(our ends by name, theirs by number); ours are non-blocking."""
    ours: dict[str, int] = {}
    theirs: dict[int, int] = {}
    try:
        if program.pty is not None:
            master, slave = os.openpty()
            rows, columns = (max(1, min(int(value), 65535)) for value in program.pty)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            ours.update(stdin=master, stdout=os.dup(master))
            theirs.update({0: slave, 1: slave, 2: slave})
        else:
            for number, name, wish in ((0, "stdin", program.stdin), (1, "stdout", program.stdout),
                                       (2, "stderr", program.stderr)):  # fmt: skip
                if wish == "stdout":
                    theirs[2] = theirs[1]
                elif wish == "null":
                    theirs[number] = os.open(os.devnull, os.O_RDWR)
                else:
                    _pipe(ours, theirs, name, number, reads=number == 0)
        for number, way in program.channels.items():
            if way == "m":
                continue  # no memory is shared here
            if not 3 <= number <= 255 or way not in ("r", "w"):
                raise errors.InvalidConfig(f"channel {number} must be 3 to 255, and r or w")
            _pipe(ours, theirs, str(number), number, reads=way == "r")
        for fd in ours.values():
            os.set_blocking(fd, False)
    except BaseException:
        close_all(ours.values(), theirs.values())
        raise
    return ours, theirs


def _pipe(ours: dict[str, int], theirs: dict[int, int], name: str, number: int, *, reads: bool) -> None:
    reading, writing = os.pipe()
    ours[name], theirs[number] = (writing, reading) if reads else (reading, writing)


def start(wish: Mapping[str, object], fds: set[int]) -> subprocess.Popen[bytes]:
    """A child that becomes a program (guest/begin.py), with these descriptors."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(wish).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", begin.__file__, str(file.fileno())], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env={}, pass_fds=[file.fileno(), *fds])


async def read_all(fd: int) -> bytes:
    """What comes out of a pipe until its end."""
    os.set_blocking(fd, False)
    loop, out = asyncio.get_running_loop(), bytearray()
    done: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        piece = os.read(fd, 65536)
        out.extend(piece)
        if not piece and not done.done():
            done.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await done
    finally:
        loop.remove_reader(fd)
    return bytes(out)


def close_all(*groups: Iterable[int]) -> None:
    """Close each of these descriptors once."""
    for fd in {fd for group in groups for fd in group}:
        os.close(fd)
