"""Fake sandboxes: their files, their processes, the programs that these run, and the streams of the programs.

A program is a function of a `Call`, asynchronous or not, that returns its exit status (None is 0). Streams are real
pipes to the server, or pipes and files in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import posixpath
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Self

from rock import errors
from rock.runtime.base import CLOCK, ExitStatus
from rock.runtime.fake.tree import Node, Tree

# Linux numbers on every platform: the sandboxes of this runtime are Linux sandboxes.
_KILL, _PIPE = 9, 13
_HARMLESS = frozenset({17, 18, 19, 23, 28})  # CHLD, CONT, STOP, URG, WINCH
_PORTION = 64 << 10
_FOLDERS = ("/bin", "/usr/bin", "/usr/local/bin")
_PATIENCE = 10.0  # seconds for a killed program to end
MOST_PROCESSES = 4096
log = logging.getLogger(__name__)


class ToolFailed(Exception):
    """A program cannot do its work; the text is printed on its standard error, and its status is 1."""


class Call:
    """A call of a program: its arguments, files and streams.

    argv, env, cwd: as given; argv[0] is its name. files: of the sandbox. Data passed to `out` and `err` is written when
    the program ends, or by `flush`.
    """

    def __init__(self, process: FakeProcess, argv: list[str], env: Mapping[str, str]) -> None:
        self.process = process
        self.argv = argv
        self.env = dict(env)
        self._pending: list[tuple[int, bytes]] = []

    @property
    def cwd(self) -> str:
        return self.process.cwd

    @property
    def files(self) -> Tree:
        return self.process.sandbox.files

    def path(self, path: str) -> str:
        """The absolute path; relative ones are below the working directory."""
        return path if path.startswith("/") else f"{self.cwd.rstrip('/')}/{path}"

    def out(self, text: str | bytes, fd: int = 1) -> None:
        """Print; adds no newline."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        self._pending.append((fd, data))

    def err(self, text: str | bytes) -> None:
        self.out(text, 2)

    async def flush(self) -> None:
        pending, self._pending = self._pending, []
        for fd, data in pending:
            stream = self.process.fds.get(fd)
            if stream is not None and data:
                await stream.write(data)

    async def read(self, most: int = _PORTION) -> bytes:
        """Up to `most` bytes of standard input; b"" is its end."""
        return await self.process.fds[0].read(most)

    async def read_all(self) -> bytes:
        data = bytearray()
        while piece := await self.read():
            data += piece
        return bytes(data)

    async def become(self, argv: list[str], env: Mapping[str, str] | None = None) -> int:
        """Replace this program by another one; 127 when no program has that name."""
        await self.flush()
        env = self.env if env is None else env
        try:
            program, words = self.process.sandbox.program(argv, env, self.cwd)
        except errors.RockError as error:
            self.err(f"{self.argv[0]}: {error.message}\n")
            return 127 if isinstance(error, errors.NotFound) else 126
        return await self.process.play(program, words, env)

    async def child(self, argv: list[str]) -> ExitStatus:
        """Run another program to its end, with the same streams."""
        await self.flush()
        return await self.process.child(lambda child: child.play(_becomes, argv, self.env)).wait()


Program = Callable[[Call], int | Awaitable[int | None] | None]


async def _becomes(call: Call) -> int:
    return await call.become(call.argv)


class FakeProcess:
    """A process of a fake sandbox: a task, descriptors, a parent. Its starter reaps it."""

    def __init__(self, sandbox: FakeSandbox, parent: FakeProcess | None, cwd: str, fds: dict[int, Open]) -> None:
        self.sandbox = sandbox
        self.parent = parent
        self.cwd = cwd
        self.fds = fds
        self.pid = sandbox.next_pid()
        self.start = time.clock_gettime(CLOCK)
        self.status: ExitStatus | None = None
        self.ended = asyncio.Event()
        self.traps: dict[int, Callable[[], None] | None] = {}  # action per signal; None: ignore
        self._killed_by: int | None = None
        self._task: asyncio.Task[int] | None = None

    def run(self, work: Callable[[], Coroutine[None, None, int]]) -> None:
        """Run the process; releases its resources at the end in any case."""
        self._task = asyncio.create_task(self._live(work), name=f"fake process {self.pid}")
        self._task.add_done_callback(self._end)

    @staticmethod
    async def _live(work: Callable[[], Coroutine[None, None, int]]) -> int:
        return await work()

    def _end(self, task: asyncio.Task[int]) -> None:
        if task.cancelled():
            self.status = ExitStatus(signal=self._killed_by or _KILL)
        elif (error := task.exception()) is not None:
            self.status = ExitStatus(signal=_PIPE) if isinstance(error, BrokenPipeError) else ExitStatus()
            if not isinstance(error, BrokenPipeError):
                log.error("a fake process failed", exc_info=error)
        else:
            self.status = ExitStatus(code=task.result() & 255)
        for stream in self.fds.values():
            stream.close()
        self.fds.clear()
        self.sandbox.gone(self)
        self.ended.set()

    async def play(self, program: Program, argv: list[str], env: Mapping[str, str]) -> int:
        """Run this program to its end; an exception is printed on standard error, with status 1."""
        call = Call(self, argv, env)
        try:
            code = program(call)
            if inspect.isawaitable(code):
                code = await code
        except BrokenPipeError:
            raise
        except errors.RockError as error:
            call.err(f"{argv[0]}: {error.message}\n")
            code = 1
        except (OSError, ToolFailed) as error:
            call.err(f"{argv[0]}: {error}\n")
            code = 1
        except Exception:
            call.err(traceback.format_exc())
            code = 1
        await call.flush()
        return int(code or 0)

    def deliver(self, number: int) -> None:
        """Deliver a signal: ignored, trapped, or fatal."""
        if self.status is not None or (number in _HARMLESS and number not in self.traps):
            return
        if number != _KILL and number in self.traps:
            trap = self.traps[number]
            if trap is not None:
                trap()
            return
        if self._killed_by is None:
            self._killed_by = number
        if self._task is not None:
            self._task.cancel()

    def child(self, work: Callable[[FakeProcess], Coroutine[None, None, int]],
              changes: Mapping[int, Open] | None = None) -> FakeProcess:
        """Start a child process with copies of its descriptors, some of them replaced."""
        fds = self.copies()
        for number, stream in (changes or {}).items():
            if number in fds:
                fds[number].close()
            fds[number] = stream
        made = FakeProcess(self.sandbox, self, self.cwd, fds)
        self.sandbox.processes[made.pid] = made
        made.run(lambda: work(made))
        return made

    async def wait(self) -> ExitStatus:
        await self.ended.wait()
        assert self.status is not None
        return self.status

    def descends_from(self, other: FakeProcess) -> bool:
        at = self.parent
        while at is not None and at is not other:
            at = at.parent
        return at is other

    def copies(self) -> dict[int, Open]:
        return {number: stream.copy() for number, stream in self.fds.items()}


def tree_of(root: FakeProcess, since: float | None, *, include: bool) -> Iterator[FakeProcess]:
    """Living descendants of a process that began at or after `since`, and itself."""
    for process in list(root.sandbox.processes.values()):
        if process is root:
            if include:
                yield process
        elif process.descends_from(root) and (since is None or process.start >= since - 0.01):
            yield process


class FakeSandbox:
    """The complete state of a sandbox. Files and processes are created on demand. programs: functions by name."""

    __slots__ = ("_ended", "_files", "_pid", "alive", "env", "id", "processes", "programs", "writing")

    def __init__(self, id: str, env: dict[str, str], programs: Mapping[str, Program]) -> None:
        self.id = id
        self.env = env
        self.programs = programs
        self.alive = True
        self.processes: dict[int, FakeProcess] = {}
        self.writing: dict[str, int] = {}  # descriptors of files open for writing, by token
        self._files: Tree | None = None
        self._pid = 1
        self._ended: asyncio.Event | None = None

    @property
    def files(self) -> Tree:
        if self._files is None:
            self._files = Tree()
        return self._files

    @files.setter
    def files(self, tree: Tree) -> None:
        self._files = tree

    def next_pid(self) -> int:
        if len(self.processes) >= MOST_PROCESSES:
            raise errors.QuotaExceeded(f"a fake sandbox has its limit of {MOST_PROCESSES} processes",
                                       sandbox_id=self.id, hint="end some processes, or use the namespace runtime")
        self._pid += 1
        return self._pid

    def gone(self, process: FakeProcess) -> None:
        self.processes.pop(process.pid, None)

    # ---- programs ----

    def program(self, argv: list[str], env: Mapping[str, str], cwd: str) -> tuple[Program, list[str]]:
        """The function and the arguments of a command line. NotFound, PermissionDenied, InvalidConfig."""
        name = argv[0]
        known = self.programs.get(name)
        if "/" not in name:
            if known is not None:
                return known, argv
            for folder in env.get("PATH", ":".join(_FOLDERS)).split(":"):
                if folder.startswith("/") and self.files.get(f"{folder}/{name}") is not None:
                    return self._file(f"{folder}/{name}", argv)
            raise errors.NotFound(f"no such program: {name!r}", sandbox_id=self.id,
                                  hint="FakeRuntime(programs={name: function}) gives a fake sandbox further programs")
        path = name if name.startswith("/") else f"{cwd.rstrip('/')}/{name}"
        base = posixpath.basename(path)
        known = self.programs.get(path) or self.programs.get(base)
        if known is not None and posixpath.dirname(path) in _FOLDERS:
            return known, argv
        return self._file(path, argv)

    def _file(self, path: str, argv: list[str]) -> tuple[Program, list[str]]:
        node = self.files.get(path)
        if node is None:
            raise errors.NotFound(f"no such program: {argv[0]!r}", sandbox_id=self.id,
                                  hint="use a program of the fake runtime, such as sh, or the path of a script")
        if node.kind != "file" or not node.mode & 0o111:
            raise errors.PermissionDenied(f"program {path!r} is not an executable file", sandbox_id=self.id,
                                          hint="give the path of a file, and make it executable with chmod")
        if not node.data.startswith(b"#!"):
            raise errors.InvalidConfig(f"program {path!r} does not begin with #!, and the fake runtime runs scripts "
                                       "only", sandbox_id=self.id,
                                       hint="begin the script with a line such as #!/bin/sh")
        words = node.data[2:].split(b"\n", 1)[0].decode("utf-8", "replace").split()
        names = [posixpath.basename(word) for word in words]
        interpreter = names[1] if names[:1] == ["env"] and len(names) > 1 else names[0] if names else ""
        program = self.programs.get(interpreter)
        if program is None:
            raise errors.NotFound(f"the interpreter {interpreter!r} of program {path!r} does not exist",
                                  sandbox_id=self.id, hint="use an interpreter that exists, such as #!/bin/sh")
        return program, [interpreter, path, *argv[1:]]

    # ---- end ----

    async def kill(self, root: FakeProcess, since: float | None, *, include: bool) -> int:
        """Send SIGKILL to a tree until no process of it remains; returns the number of killed processes."""
        killed: set[int] = set()
        end = time.monotonic() + _PATIENCE
        while found := list(tree_of(root, since, include=include)):
            for process in found:
                killed.add(process.pid)
                process.deliver(9)
            left = max(0.0, end - time.monotonic())
            await _ended(found, left)
            if left == 0.0:
                break
        return len(killed)

    async def stop(self, grace: float) -> None:
        """Send SIGTERM to all, SIGKILL after `grace` seconds; then the sandbox is dead. Idempotent."""
        end = time.monotonic() + grace
        if grace > 0:
            for process in list(self.processes.values()):
                process.deliver(15)
        while self.processes and (left := end - time.monotonic()) > 0:
            await _ended(list(self.processes.values()), left)
        self.alive = False
        while self.processes:
            found = list(self.processes.values())
            for process in found:
                process.deliver(9)
            await _ended(found, _PATIENCE)
        if self._ended is not None:
            self._ended.set()

    async def ended(self) -> None:
        """Return when the sandbox is dead."""
        if self.alive:
            self._ended = self._ended or asyncio.Event()
            await self._ended.wait()


async def _ended(found: list[FakeProcess], seconds: float) -> None:
    """Wait until these have ended, up to the timeout."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for process in found:
                await process.ended.wait()


def null_streams() -> dict[int, Open]:
    null = Null()
    return {0: null, 1: null.copy(), 2: null.copy()}


@contextlib.contextmanager
def placed(process: FakeProcess, changes: dict[int, Open | None]) -> Iterator[None]:
    """Replace descriptors for the block and close them at its end; None is a closed descriptor."""
    before = {number: process.fds.get(number) for number in changes}
    for number, stream in changes.items():
        if stream is None:
            process.fds.pop(number, None)
        else:
            process.fds[number] = stream
    try:
        yield
    finally:
        for number, old in before.items():
            new = process.fds.pop(number, None)
            if new is not None:
                new.close()
            if old is not None:
                process.fds[number] = old


# ---- streams ----

_FULL = 64 << 10  # capacity of a pipe in memory, in bytes


class Open:
    """An open file, shared by all copies of its descriptor; `close` of the last one ends it."""

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
        """Called after the last close."""

    async def read(self, most: int) -> bytes:
        """Up to `most` bytes; b"" is the end."""
        raise OSError("not open for reading")

    async def write(self, data: bytes) -> None:
        """Write everything. BrokenPipeError without a reader."""
        raise OSError("not open for writing")


class Null(Open):
    """/dev/null."""

    async def read(self, most: int) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        return


class Text(Open):
    """A readable file with fixed content: a file, a here-document."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    async def read(self, most: int) -> bytes:
        piece = self._data[self._at : self._at + most]
        self._at += len(piece)
        return piece


class Appended(Open):
    """A file of the tree, open for appending."""

    def __init__(self, tree: Tree, path: str, *, keep: bool) -> None:
        super().__init__()
        if not keep or tree.get(path) is None:
            tree.write(path, b"")
        self._tree = tree
        self._node: Node = tree.find(path)

    async def write(self, data: bytes) -> None:
        self._tree.grow(self._node, data)


class Collected(Open):
    """Collects the output of a command substitution."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.data += data


class _Channel:
    """The bytes between the two ends of a pipe in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.written = self.read = True  # whether each end is open
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
        # A separate copy: programs that wait for the same pipe would replace each other's callback.
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
