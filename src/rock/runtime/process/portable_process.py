"""Programs as children of the server, for portable.py: streams, start, exit, and process trees by `ps`.

The process tree functions see less than guest/init/process_tree.py: start times are whole seconds, and a process that
left its group and lost its parent is not found."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal as signals
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from rock import errors
from rock.guest.init import child_setup
from rock.protocol.sandbox import Usage
from rock.runtime.base import CLOCK, ExitStatus, Program
from rock.runtime.refusals import not_a_terminal_size, unavailable_channel

_LOOK = 0.02  # polling interval for exits, in seconds


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
        """The same program for another caller, with new descriptors."""
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
        found = under(await scan(), self.pid, _epoch(since)) if tree else []
        count = sum(send(entry.pid, int(number)) for entry in found)
        return count + (send(self.pid, int(number)) if root and not self._ended() else 0)

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        if self._ended():
            return 0
        if tell is not None and not root:
            send(self.pid, tell)
        count = await kill_descendants(self.pid, _epoch(since), include=root)
        if root:
            await self.wait()
        return count

    async def resize(self, rows: int, columns: int) -> None:
        if not self._pty:
            raise errors.InvalidConfig("this program has no terminal", sandbox_id=self._sandbox.id,
                                       hint="start it with pty=(rows, columns)")
        if not (0 < rows < 65536 and 0 < columns < 65536):
            raise not_a_terminal_size(rows, columns, self._sandbox.id)
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

    def close(self, *, forget: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self.stdin, self.stdout, self.stderr, *self.channels.values()):
            if fd is not None:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = None
        self.channels = {}
        if forget and self._ended():
            self._sandbox.forget(self)

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class PlainSandbox:
    """State of one sandbox in this server."""

    def __init__(self, id: str, env: dict[str, str]) -> None:
        self.id = id
        self.env = env
        self.ended = asyncio.Event()
        self.children: dict[int, PlainProcess] = {}  # by pid: all that are not reaped
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
    """Convert a time of CLOCK to seconds since the epoch."""
    return None if since is None else time.time() - (time.clock_gettime(CLOCK) - since)


def streams_of(program: Program) -> tuple[dict[str, int], dict[int, int]]:
    """(the server's ends by name, the program's by number); the server's are non-blocking."""
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
            for number, name, spec in ((0, "stdin", program.stdin), (1, "stdout", program.stdout),
                                       (2, "stderr", program.stderr)):  # fmt: skip
                if spec == "stdout":
                    theirs[2] = theirs[1]
                elif spec == "null":
                    theirs[number] = os.open(os.devnull, os.O_RDWR)
                else:
                    _pipe(ours, theirs, name, number, reads=number == 0)
        for number, way in program.channels.items():
            if way == "m":
                continue  # shared memory is not supported here
            if not 3 <= number <= 255 or way not in ("r", "w"):
                raise unavailable_channel(number, way)
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


def start(spec: Mapping[str, object], fds: set[int]) -> subprocess.Popen[bytes]:
    """Start a child that executes a program (guest/init/child_setup.py), with these descriptors."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(spec).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", child_setup.__file__, str(file.fileno())], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env={}, pass_fds=[file.fileno(), *fds])


async def read_all(fd: int) -> bytes:
    """Read a pipe until its end."""
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


# ---- process trees by `ps` ----

_PATIENCE = 10.0


@dataclass(frozen=True)
class Entry:
    """One line of ps: `born` is the start as ps prints it, `start` the same in seconds since the epoch."""

    pid: int
    parent: int
    group: int
    memory: int
    cpu: float
    born: str
    start: float


async def scan() -> dict[int, Entry]:
    """Every living process, by pid."""
    return await asyncio.to_thread(scan_now)


def scan_now() -> dict[int, Entry]:
    """The same; blocks for some milliseconds."""
    argv = ["ps", "-A", "-o", "pid=,ppid=,pgid=,rss=,time=,stat=,lstart="]
    listing = subprocess.run(argv, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
    found = {}
    for line in listing.stdout.splitlines():
        words = line.split()
        with suppress(ValueError, IndexError):
            born = " ".join(words[6:11])
            start = time.mktime(time.strptime(born, "%a %b %d %H:%M:%S %Y"))
            pid, parent, group, kilobytes = (int(word) for word in words[:4])
            entry = Entry(pid, parent, group, kilobytes * 1024, _seconds(words[4]), born, start)
            if not words[5].startswith(("Z", "X")):
                found[entry.pid] = entry
    return found


def _seconds(text: str) -> float:
    """Parse [DD-]HH:MM:SS and MM:SS.ss."""
    days, _, rest = text.rpartition("-")
    total = 0.0
    for part in rest.split(":"):
        total = total * 60 + float(part)
    return total + 86400 * int(days or 0)


def under(table: dict[int, Entry], root: int, since: float | None = None) -> list[Entry]:
    """Descendants of a process, and members of its group, without itself. since: seconds since the epoch."""
    tree, grown = {root}, True
    while grown:
        more = {e.pid for e in table.values() if e.pid not in tree and (e.parent in tree or e.group == root)}
        tree |= more
        grown = bool(more)
    return [e for pid, e in table.items() if pid in tree and pid != root and (since is None or e.start >= int(since))]


def send(pid: int, number: int) -> bool:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


async def kill_descendants(root: int, since: float | None, *, include: bool) -> int:
    """Send SIGKILL to the tree until no process of it remains; returns the number of killed processes."""
    killed: set[tuple[int, str]] = set()
    end = time.monotonic() + _PATIENCE
    send(root, signals.SIGSTOP)
    try:
        while time.monotonic() < end and (left := under(await scan(), root, since)):
            for entry in left:  # stop all of them first, so that none starts a process that this scan misses
                send(entry.pid, signals.SIGSTOP)
            for entry in left:
                if send(entry.pid, signals.SIGKILL):
                    killed.add((entry.pid, entry.born))
    finally:
        if not include:
            send(root, signals.SIGCONT)
    if include and send(root, signals.SIGKILL):
        killed.add((root, ""))
    return len(killed)


async def usage(roots: list[int]) -> Usage:
    table = await scan()
    entries = {e.pid: e for root in roots for e in ([table[root]] if root in table else []) + under(table, root)}
    return Usage(memory_bytes=sum(e.memory for e in entries.values()), cpu_seconds=sum(e.cpu for e in entries.values()),
                 pids=len(entries))
