"""One-shot programs and background processes of a sandbox, over `Runtime.spawn`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig, NotFound, Unavailable, Unsupported
from rock.protocol.action import Command, CommandResponse, ProcessInfo
from rock.protocol.routes import RESUMES
from rock.rocklet.commands.output import Capped, Reader, as_text, write_all
from rock.rocklet.commands.shell_process import Shell
from rock.rocklet.durability.checksums import Checksums, Slot, digest
from rock.rocklet.durability.spool import SpoolFile, told_missing
from rock.runtime.base import ExitStatus, Handle, Process, Program, Runtime, Snapshots
from rock.telemetry import tracing

KEY = "process:"
EXECUTED = "execute:"  # prefix of the keys of programs with an idempotency key whose caller waits for the end
_TOKEN = 1  # the token of every program in its spool files, which restart for each program
LOG_CAP = 1 << 30  # bytes of a log on the server's disk; later output is counted and dropped

Sink = Callable[[bool, bytes], None]


class Detached(Unavailable):
    """The server stops; the program goes on, and its end is had by asking again with the key."""

    def __init__(self) -> None:
        hint = "ask again with the same Idempotency-Key when the server is back"
        super().__init__("the server is stopping; the program goes on", hint=hint, details=RESUMES)


def argv_of(command: str | list[str], sh: Shell | None) -> list[str]:
    """A list as it is; a string through the image's shell. NotFound when the image has none."""
    if isinstance(command, list):
        return command
    if sh is None:
        raise NotFound("the image has no shell to run a string with", hint="give the command as a list")
    return [sh.path, "-c", command]


class Execution:
    """One program run to its end, its output collected or passed to a sink."""

    def __init__(
        self,
        process: Process,
        command: Command,
        sink: Sink | None = None,
        spools: Sequence[SpoolFile] = (),
        *,
        kept: bool = False,
    ) -> None:
        """spools: to which stdout and stderr go on their way.

        kept: the caller closes the process, after its answer is written down. pid 1 forgets a closed program, and a
        rocklet that does not find a program takes its request for one that was never begun.
        """
        self.process = process
        self._kept = kept
        self._command = command
        self._out, self._err = Capped(command.max_output_bytes), Capped(command.max_output_bytes)
        put = sink or self._keep
        self._readers = [
            Reader(fd, lambda data, e=is_errors: put(e, data))  # type: ignore[misc]
            for is_errors, fd in ((False, process.stdout), (True, process.stderr))
            if fd is not None
        ]
        self.on_fed: Callable[[], None] = lambda: None
        self._fed = process.stdin is None
        self._waiting: asyncio.Task[Any] | None = None  # the task that waits for the end
        self._leaving = False
        self._spools = spools
        # bytes that an earlier rocklet process stored and that are damaged
        self._missing: list[int | None] = [None, None]
        for reader, spool in zip(self._readers, spools, strict=bool(spools)):
            reader.take = spool.take

    def _keep(self, is_errors: bool, data: bytes) -> None:
        kept = self._err if is_errors else self._out
        kept.add(data)
        if self._spools:
            self._spools[is_errors].keep_short(_TOKEN, kept)

    def resume_at(self, starts: Sequence[int]) -> None:
        """Load the output that an earlier rocklet process had read."""
        for number, (spool, start) in enumerate(zip(self._spools, starts, strict=False)):
            self._missing[number] = spool.load(_TOKEN, start, (self._out, self._err)[number])

    def pause(self) -> None:
        for reader in self._readers:
            reader.pause()

    def resume(self) -> None:
        for reader in self._readers:
            reader.resume()

    def let_go(self) -> None:
        """The server is about to stop: `run` raises Detached and the program continues. Its further output stays in its
        pipes. A program that still receives its input is not detached: the next rocklet could not continue that."""
        if not self._fed or self._leaving:
            return
        self._leaving = True
        self.pause()
        if self._waiting is not None:
            self._waiting.cancel()

    async def take_up(self) -> CommandResponse:
        """Resume a program of an earlier rocklet process until its end; a cancellation leaves it running."""
        return await self.run(fed=True)

    async def run(self, *, fed: bool = False) -> CommandResponse:
        """Wait for the end, or the time-out. Whatever happens, descriptors are released (of a `kept` one by its
        caller), and after a time-out or a cancellation nothing of the program runs on. Detached: see `let_go`."""
        began = time.monotonic()
        self._fed |= fed
        feed = asyncio.create_task(self._feed()) if self.process.stdin is not None and not fed else None
        timed_out = False
        try:
            try:
                async with asyncio.timeout(self._command.timeout):
                    status = await self._ended()
            except TimeoutError:
                timed_out = True
                await self.end()
                status = ExitStatus()
            for reader in self._readers:
                reader.drain()  # a daemon of the program may hold the pipe open; its end is not awaited
            return self._response(status, timed_out, time.monotonic() - began)
        except asyncio.CancelledError:
            if not fed:
                await asyncio.shield(self.end())
            raise
        finally:
            if feed is not None:
                feed.cancel()
                await asyncio.gather(feed, return_exceptions=True)
            for reader in self._readers:
                reader.close()
            if not self._kept:
                self.process.close()

    async def _ended(self) -> ExitStatus:
        """How it ended. Detached when it has not, and `let_go` was called."""
        task = self._waiting = asyncio.current_task()
        assert task is not None
        try:
            if not self._leaving:
                return await self.process.wait()
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            task.uncancel()
        finally:
            self._waiting = None
        try:
            async with asyncio.timeout(0):
                return await self.process.wait()  # it ended at the same moment: the status is delivered only once
        except TimeoutError:
            raise Detached from None

    async def end(self) -> None:
        """Terminate the process tree."""
        await self.process.kill_tree()
        await self.process.wait()

    async def _feed(self) -> None:
        assert self.process.stdin is not None
        await write_all(self.process.stdin, self._command.input or b"")
        await self.process.close_stdin()
        self._fed = True
        self.on_fed()

    def _response(self, status: ExitStatus, timed_out: bool, duration: float) -> CommandResponse:
        out, out_dropped = self._out.take()
        err, err_dropped = self._err.take()
        out_text, out_exact = as_text(out)
        err_text, err_exact = as_text(err)
        reason = ""
        if timed_out:
            reason = f"timed out after {self._command.timeout:g} s; the whole process tree was killed"
        elif status.signal is not None:
            reason = f"killed by signal {status.signal}"
        elif status.code is None:
            reason = "it ended and nobody saw how"
        out_missing, err_missing = self._missing
        if out_missing is not None or err_missing is not None:
            told = told_missing((out_missing or 0) + (err_missing or 0))
            reason = f"{reason}; {told}" if reason else told
        return CommandResponse.made(
            stdout=out_text,
            stderr=err_text,
            stdout_b64=out_exact,
            stderr_b64=err_exact,
            exit_code=status.shell_code,
            signal=status.signal,
            timed_out=timed_out,
            failure_reason=reason,
            stdout_dropped=out_dropped + (out_missing or 0),
            stderr_dropped=err_dropped + (err_missing or 0),
            duration=duration,
        )


async def start(
    runtime: Runtime,
    handle: Handle,
    command: Command,
    sh: Shell | None,
    *,
    key: str = "",
    keep: bool = False,
    stdin: bool | None = None,
) -> Process:
    """Spawn the program that a Command describes."""
    argv = argv_of(command.command, sh) if not command.entrypoint else _by_entrypoint(runtime, handle, command)
    wants_stdin = command.input is not None if stdin is None else stdin
    return await runtime.spawn(
        handle,
        Program(
            argv,
            env={**tracing.environment(), **(command.env or {})},
            cwd=command.cwd,
            user=command.user,
            stdin="pipe" if wants_stdin else "null",
            key=key,
            keep=keep,
        ),
    )


def _by_entrypoint(runtime: Runtime, handle: Handle, command: Command) -> list[str]:
    if not isinstance(runtime, Snapshots):
        raise Unsupported(f"runtime {handle.runtime!r} does not run entry points of images",
                          hint="give argv, or use the namespace runtime")
    image = runtime.image(handle)
    argv = [*image.entrypoint, *(command.command or image.cmd)]
    if not argv:
        raise NotFound(f"image {image.name} has neither ENTRYPOINT nor CMD", hint="give a command")
    return argv


class Background:
    """A process that outlives the request that started it. Its output goes to two log files of the server, read by
    offset.

    pid 1 of the sandbox holds its streams, so the process outlives the rocklet too. While no rocklet reads, its writes
    block.
    """

    def __init__(
        self,
        process_id: str,
        command: str | list[str],
        process: Process,
        folder: Path,
        started_at: float | None = None,
        *,
        marks: Checksums,
        found: Mapping[int, Slot] | None = None,
    ) -> None:
        """marks: the checksums file that stores the sizes of its logs. found: the sizes that an earlier rocklet process
        stored."""
        self.id = process_id
        self.command = command
        self.process = process
        self.started_at = started_at or time.time()
        self.ended_at: float | None = None
        self.status: ExitStatus | None = None
        self._folder = folder
        self._grown = asyncio.Condition()
        self._marks = marks
        self._names = {name: digest(f"log {process_id} {name}") for name in ("stdout", "stderr")}
        # The logs are opened for each portion: a sandbox may have thousands of ended processes that were not removed
        # yet.
        self._sizes = {name: self._log(name, b"") for name in ("stdout", "stderr")}
        self._lost = dict.fromkeys(self._sizes, 0)  # bytes at the beginning of a log that are missing
        for name in self._sizes if found else ():
            slot = (found or {}).get(self._names[name])
            if slot is not None:
                self._lost[name] = slot.start if self._sizes[name] >= slot.end else slot.end
                self._sizes[name] = max(self._sizes[name], slot.end)
                self._mark(name)
        self._readers = [
            Reader(fd, self._append) for fd in (process.stdout, process.stderr) if fd is not None
        ]
        for reader, name in zip(self._readers, ("stdout", "stderr"), strict=False):
            reader.take = functools.partial(self._take, name)
        self._watch = asyncio.create_task(self._watch_exit(), name=f"process-{process_id}")
        self._tasks: set[asyncio.Task[None]] = set()
        self._input = asyncio.Lock()

    @property
    def info(self) -> ProcessInfo:
        status = self.status
        return ProcessInfo(
            process_id=self.id,
            pid=self.process.pid,
            command=self.command,
            running=status is None,
            exit_code=status.shell_code if status else None,
            signal=status.signal if status else None,
            started_at=self.started_at,
            ended_at=self.ended_at,
            stdout_size=self._sizes["stdout"],
            stderr_size=self._sizes["stderr"],
        )

    def _take(self, name: str, fd: int, limit: int) -> bytes:
        """Move output of the program to its log by one system call, so that a crash leaves each byte in the pipe or in
        the log."""
        room = LOG_CAP - self._sizes[name]
        if room > 0:
            log = self._open(name)
            try:
                if os.fstat(log).st_size < self._sizes[name]:
                    self._lost[name] = self._sizes[name]  # the log was removed or truncated
                count = os.splice(fd, log, min(limit, room), offset_dst=self._sizes[name])
                self._sizes[name] += count
                self._mark(name)
                return b"." * count  # the caller uses only the length
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EIO):
                    raise
            finally:
                os.close(log)
        data = os.read(fd, limit)
        if room > 0:
            # When the server's disk is full the program continues; the size is that of the readable part.
            with contextlib.suppress(OSError):
                self._sizes[name] = self._log(name, data[:room])
                self._mark(name)
        return data

    def _open(self, name: str) -> int:
        """Open a log for writing; creates it and its folder again when they were removed. OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self._folder / name, flags, 0o600)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            return os.open(self._folder / name, flags, 0o600)

    def _mark(self, name: str) -> None:
        """Store the length of a log, and how much of it is missing."""
        self._marks.slot(self._names[name], Slot(self._lost[name], self._sizes[name], 0, 0))

    def _append(self, data: bytes) -> None:
        self._wake()

    def _log(self, name: str, data: bytes) -> int:
        """Append to a log; returns its new size."""
        fd = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if data:
                os.write(fd, data)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _wake(self) -> None:
        self._spawn(self._notify())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._grown:
            self._grown.notify_all()

    async def _watch_exit(self) -> None:
        try:
            status = await self.process.wait()
        except Exception:
            status = ExitStatus()
        for reader in self._readers:
            reader.drain()
        self.status, self.ended_at = status, time.time()
        await self._notify()
        async with self._input:
            await self.process.close_stdin()

    async def wait(self, seconds: float) -> ProcessInfo:
        """Its state as soon as it has ended, at the latest after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._grown:
                await self._grown.wait_for(lambda: self.status is not None)
        except TimeoutError:
            pass
        return self.info

    async def read(self, stream: str, offset: int, limit: int, wait: float) -> tuple[bytes, bool]:
        """(bytes of a log from `offset`, whether more may follow). Waits up to `wait` seconds while there are none."""
        if stream not in self._sizes:
            raise InvalidConfig(f"no such stream: {stream!r}", hint="stdout or stderr")
        self._check_there(stream, offset)
        if wait and self._sizes[stream] <= offset:
            try:
                async with asyncio.timeout(wait), self._grown:
                    await self._grown.wait_for(lambda: self.status is not None or self._sizes[stream] > offset)
            except TimeoutError:
                pass
        running, size = self.status is None, self._sizes[stream]  # it may grow while the thread reads
        try:
            data = await asyncio.to_thread(_read_at, self._folder / stream, offset, limit)
        except FileNotFoundError:
            self._lost[stream] = size
            data = b""
        if not data and offset < size:
            self._lost[stream] = max(self._lost[stream], size)  # the log was truncated
        self._check_there(stream, offset)
        return data, running or offset + len(data) < self._sizes[stream]

    def _check_there(self, stream: str, offset: int) -> None:
        """NotFound for output that is lost."""
        lost = self._lost[stream]
        if offset < lost:
            raise NotFound(
                f"{lost - offset} bytes of {stream} of process {self.id} are lost: "
                "the server's file of them was removed or cut",
                hint=f"read on at offset {lost}",
                details={"damaged": "output", "offset": lost},
            )

    def feed(self, data: bytes) -> None:
        """Write all its input and then end of file, as fast as the process reads."""
        self._spawn(self._feed(data))

    async def _feed(self, data: bytes) -> None:
        with contextlib.suppress(InvalidConfig):  # the process ended before it read its input
            await self.write(data, True)

    async def write(self, data: bytes, close: bool) -> None:
        """Write input, after that of earlier calls; returns when the input is in the program's pipe."""
        async with self._input:
            if self.process.stdin is None:
                raise InvalidConfig(f"process {self.id} has no open stdin: it was closed, or the process has ended",
                                    hint="start it again, and write before its stdin is closed")
            if data and not await write_all(self.process.stdin, data):
                close = True
            if close:
                await self.process.close_stdin()

    async def detach(self) -> None:
        """Detach from it and leave it running."""
        tasks = [self._watch, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reader in self._readers:
            reader.close()

    async def forget(self) -> None:
        """Kill it if it runs, and delete its logs."""
        if self.status is None:
            await self.process.kill_tree()
            await self.wait(5.0)
        await self.detach()
        self.process.close()
        for name in self._names.values():
            self._marks.drop(name)
        shutil.rmtree(self._folder, ignore_errors=True)


def _read_at(path: Path, offset: int, limit: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(limit)
