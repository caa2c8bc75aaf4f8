"""The process of a session's shell: its streams, its running command, and the choice of a shell in an image.

The shell is a kept Process: pid 1 of the sandbox holds its streams, so it outlives a crash of the rocklet and is found
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from rock.errors import Lost, NotFound, RockError, SessionClosed
from rock.protocol.action import BashObservation, CreateBashSessionRequest
from rock.rocklet.commands import shell_protocol
from rock.rocklet.commands.output import Capped, Reader, as_text, is_pipe, write_all, write_now
from rock.rocklet.durability.spool import told_missing
from rock.runtime.base import CLOCK, ExitStatus, Files, Handle, Process, Program, Reopens, Runtime
from rock.runtime.pools import FirstProgram

# ---- the running command ----

Sink = Callable[[bool, bytes], None]  # (is stderr, bytes)


@dataclass
class Run:
    """The running command of a session."""

    token: int
    output: Capped
    errors: Capped
    done: asyncio.Future[shell_protocol.Report | ExitStatus]
    began: float  # seconds of CLOCK_BOOTTIME; processes that started later belong to this command
    sink: Sink | None = None
    interrupted: bool = False
    written: bool = False  # the shell has received the complete command
    dropped: int = 0  # bytes that were dropped before it began
    probe: int = -1  # the token of a later probe command, whose report proves that this one was never begun
    unbegun: bool = False
    by_file: bool = False  # the shell reads it from a file
    missing: int | None = None  # bytes of its output that an earlier rocklet process stored and that are damaged
    reports_damaged: bool = False  # the reports of its shell to an earlier rocklet process are lost

    def observe(
        self, report: shell_protocol.Report | ExitStatus, timeout: float | None, closed: str | None, restarted: bool
    ) -> BashObservation:
        """The result as an observation. timeout: the seconds after which it was terminated; closed: why its session
        closed, if it did."""
        code = report.shell_code if isinstance(report, ExitStatus) else report.code
        if self.interrupted and isinstance(report, shell_protocol.Restarted):
            code = 128 + signal.SIGINT  # the interrupt ended it; its own `$?` is that of the previous command
        reason = ""
        if timeout is not None:
            code, reason = None, f"timed out after {timeout:g} s; what it had started was killed"
        elif self.interrupted:
            reason = "interrupted"
        elif closed is not None:
            reason = f"the session is closed: {closed}"
        if self.missing is not None:
            reason += ("; " if reason else "") + told_missing(self.missing)
        if restarted:
            reason += "; the shell was started anew, its variables are lost"
        output, dropped = self.output.take()
        errors, dropped_errors = self.errors.take()
        text, exact = as_text(output)
        errors_text, errors_exact = as_text(errors)
        return BashObservation.made(
            output=text,
            output_b64=exact,
            stderr=errors_text,
            stderr_b64=errors_exact,
            exit_code=code,
            failure_reason=reason,
            timed_out=timeout is not None,
            interrupted=self.interrupted,
            session_closed=closed is not None,
            session_restarted=restarted,
            dropped_bytes=dropped + dropped_errors + self.dropped + (self.missing or 0),
            duration=time.clock_gettime(CLOCK) - self.began,
        )


# ---- the shell process ----


KEY = "session:"
RESTART_GRACE = 1.5  # seconds for a shell to save its state before it is killed
_END = 10.0  # seconds until a killed shell is reported as ended


class ShellProcess:
    """The current shell of a session; `spawn` replaces one that was released.

    on_output: receives (is stderr, bytes). on_reports: receives the bytes of its reports, for `reports`. on_exit:
    receives its exit status.
    """

    def __init__(
        self,
        spec: CreateBashSessionRequest,
        sh: Shell,
        on_output: Callable[[bool, bytes], None],
        on_reports: Callable[[bytes], None],
        on_exit: Callable[[ExitStatus], None],
    ) -> None:
        self.spec = spec
        self.shell = sh
        self.process: Process | None = None
        # readers of its output, of its errors where they are separate, and of its reports
        self.readers: list[Reader] = []
        self.reports = shell_protocol.ReportParser()
        self.piped = True  # its script is a kernel pipe, which reports how many bytes are unread
        self._on_output = on_output
        self._on_reports = on_reports
        self._on_exit = on_exit
        self._watch: asyncio.Task[None] | None = None
        self._closed_streams = False

    # ---- start and end ----

    def adopt(self, process: Process) -> None:
        """Use a shell that was just started. SessionClosed."""
        self._adopt(process)

    async def spawn(self, runtime: Runtime, handle: Handle, cwd: str | None) -> None:
        """Start the shell; cwd: start in that folder instead of the session's own."""
        self._adopt(await runtime.spawn(handle, program_of(self.spec, self.shell, cwd)))

    async def attach(self, runtime: Runtime, handle: Handle) -> None:
        """Attach to the shell that an earlier rocklet process started. NotFound."""
        self._adopt(await runtime.attach(handle, KEY + self.spec.session))

    def _adopt(self, process: Process) -> None:
        if process.stdout is None or self.shell.dialect.status not in process.channels:  # ended: pid 1 has closed them
            process.close()
            raise SessionClosed(f"the shell of session {self.spec.session} has ended", hint="open a new session")
        self.process = process
        self.reports = shell_protocol.ReportParser()
        self._read(process)

    def _read(self, process: Process) -> None:
        """Read its streams, and watch for its exit."""
        dialect = self.shell.dialect
        if process.stdout is None:
            raise SessionClosed(f"the shell of session {self.spec.session} has ended", hint="open a new session")
        self._closed_streams = False
        self.readers = [Reader(process.stdout, lambda data: self._on_output(False, data))]
        if dialect.errors in process.channels:
            self.readers.append(Reader(process.channels[dialect.errors], lambda data: self._on_output(True, data)))
        self.readers.append(Reader(process.channels[dialect.status], self._on_reports))
        fd = self.script
        self.piped = fd is not None and is_pipe(fd)
        self._watch = asyncio.create_task(self._watch_exit(process), name=f"session-{self.spec.session}")

    @property
    def has_streams(self) -> bool:
        """Whether its descriptors are open."""
        return not self._closed_streams

    async def close_streams(self, changed: Callable[[], None]) -> None:
        """Close its descriptors while no command runs, and end the task that waits for its exit. `changed` is called
        once, when `reopen_streams` is due. No effect where the runtime cannot do it. RockError."""
        process = self.process
        if self._closed_streams or not isinstance(process, Reopens) or not process.reopens:
            return
        for reader in self.readers:
            reader.pause()
        try:
            await process.close_streams(changed)
        except BaseException:
            for reader in self.readers:
                reader.resume()
            raise
        self._closed_streams = True
        await self.detach()
        self.readers = []

    async def reopen_streams(self) -> None:
        """Open the descriptors again. Idempotent. RockError."""
        process = self.process
        if self._closed_streams and isinstance(process, Reopens):
            try:
                await process.reopen_streams()
            except (Lost, NotFound):
                self._closed_streams = False
                self._on_exit(ExitStatus())
                return
            self._read(process)

    async def _watch_exit(self, process: Process) -> None:
        try:
            status = await process.wait()
        except Exception:
            status = ExitStatus()
        if self.process is process:
            self._on_exit(status)

    async def kill(self) -> None:
        """Terminate its process tree."""
        if self.process is None:
            return
        with contextlib.suppress(RockError, TimeoutError):
            await self.process.kill_tree()
            async with asyncio.timeout(_END):
                await self.process.wait()

    async def detach(self) -> None:
        """Detach from it and leave it running."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for reader in self.readers:
            reader.close()

    def close(self) -> None:
        """Close its streams, once it has ended."""
        if self.process is not None:
            self.process.close()

    # ---- input and signals ----

    @property
    def script(self) -> int | None:
        """The descriptor of its script."""
        if self.process is None:
            return None
        return self.process.stdin if self.spec.pty is None else self.process.channels[self.shell.dialect.script]

    @property
    def terminal(self) -> int | None:
        """The descriptor of its terminal, where it has one."""
        return None if self.spec.pty is None or self.process is None else self.process.stdin

    @property
    def tells(self) -> bool:
        """Whether its pipe shows if it received a command: bash reads byte by byte what it is about to run."""
        return self.piped and self.shell.dialect.is_bash

    async def write(self, script: bytes, timeout: float | None = None) -> None:
        """Write a script. timeout: seconds to wait for space in the pipe; TimeoutError."""
        fd = self.script
        assert fd is not None
        rest = write_now(fd, script)
        if rest:
            async with asyncio.timeout(timeout):
                await write_all(fd, rest)

    async def interrupt(self, run: Run) -> None:
        """Ctrl-C: SIGINT to the shell and to the processes of a command."""
        assert self.process is not None
        if self.terminal is not None:
            await write_all(self.terminal, b"\x03")
        else:
            await self.process.signal(signal.SIGINT, tree=True, since=run.began)

    async def abort(self, run: Run) -> shell_protocol.Report | ExitStatus:
        """Terminate the process tree of a command."""
        process = self.process
        assert process is not None
        if run.done.done():
            return run.done.result()
        if not run.written:  # half a command is in its pipe, so the shell could not parse the next one
            await process.kill_tree()
            return await run.done
        # The signal arrives while the shell is stopped. Otherwise the shell would continue with its next line when the
        # process that it waits for is killed, or the processes that save its state would be killed too.
        await process.kill_tree(
            since=run.began, root=False, tell=signal.SIGTERM if self.shell.dialect.is_bash else None
        )
        try:
            async with asyncio.timeout(RESTART_GRACE if self.shell.dialect.is_bash else 0.05):
                return await asyncio.shield(run.done)
        except TimeoutError:
            await process.kill_tree()
            return await run.done

    # ---- output ----

    def begin(self) -> None:
        """Output from now on belongs to another command."""
        for reader in self.readers:
            reader.begin()

    def drain(self) -> None:
        """Read the output written until now."""
        for reader in self.readers[:-1]:
            reader.drain()

    def pause(self) -> None:
        """Pause reading its output; its reports are still read."""
        for reader in self.readers[:-1]:
            reader.pause()

    def resume(self) -> None:
        for reader in self.readers[:-1]:
            reader.resume()

    def let_go(self) -> None:
        """Stop reading: later output is read by the next rocklet process."""
        for reader in self.readers:
            reader.pause()


# ---- choice of the shell ----

@dataclass
class Shell:
    """The shell of an image, and its dialect."""

    path: str
    dialect: shell_protocol.Dialect


def program_of(spec: CreateBashSessionRequest, shell: Shell, cwd: str | None = None) -> Program:
    """The shell of a session as a program; cwd: start in that folder instead of the session's own."""
    pty = spec.pty is not None
    dialect = shell.dialect
    channels: dict[int, str] = {dialect.status: "w"}
    if pty:
        channels[dialect.script] = "r"
    else:
        channels[dialect.errors] = "w"
    return Program(
        argv=dialect.argv(shell.path, pty),
        env={"PS1": "", "PS2": "", "SHELL": shell.path, **({"TERM": "xterm-256color"} if pty else {}),
             **(spec.env or {}), **dialect.environment(pty)},
        cwd=cwd or spec.cwd,
        user=spec.remote_user,
        stdin="pipe",
        stderr="stdout",
        pty=spec.pty,
        channels=channels,  # type: ignore[arg-type]
        key=KEY + spec.session,
        keep=True,
    )


_FOLDERS = ("/bin", "/usr/bin", "/usr/local/bin")


def first_program(spec: CreateBashSessionRequest, state: bytes | None = None) -> FirstProgram:
    """The bash of a session, for a runtime that starts it together with a sandbox. state: a script that it runs before
    all others."""
    paths = [f"{folder}/bash" for folder in _FOLDERS]
    program = program_of(spec, Shell(paths[0], shell_protocol.BASH))
    if state is None:
        return FirstProgram(paths, program)
    env = {**program.env, **shell_protocol.BASH.environment(inherits=True)}
    return FirstProgram(paths, dataclasses.replace(program, env=env), shell_protocol.inherited(state))


async def find_shell(runtime: Runtime, handle: Handle, wanted: str | None = None) -> Shell:
    """The shell to use: the `wanted` one, else bash, else sh. NotFound when the image has none."""
    names = (
        [wanted]
        if wanted and "/" in wanted
        else [
            f"{folder}/{name}" for name in ([wanted] if wanted else ["bash", "sh"]) for folder in _FOLDERS
        ]
    )
    if isinstance(runtime, Files):
        for path in names:
            try:
                found = await runtime.stat(handle, path)
            except NotFound:
                continue
            if found.kind == "file" and found.mode & 0o111:
                return Shell(path, shell_protocol.BASH if path.endswith("bash") else shell_protocol.SH)
    raise NotFound(
        f"the image has no shell ({', '.join(names)})",
        hint="run programs with execute and a list, or use an image with bash or sh",
    )
