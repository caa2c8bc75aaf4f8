"""The shell interpreter of a session: runs one command at a time and resynchronizes after each.

A long command is passed by a file in the sandbox, because a shell reads its pipe byte by byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from rock import faults
from rock.errors import NotFound, StorageFull
from rock.http.event_loop import settled
from rock.protocol.action import MAX_OUTPUT, BashAction, BashObservation, CreateBashSessionRequest
from rock.rocklet.commands import shell_protocol
from rock.rocklet.commands.handover import Handover, JournalEntry
from rock.rocklet.commands.output import Capped
from rock.rocklet.commands.shell_process import RESTART_GRACE, Run, Shell, ShellProcess, Sink
from rock.runtime.base import CLOCK, ExitStatus, Files, Handle, Process, Runtime
from rock.telemetry import tracing

_IDLE_OUTPUT = 1 << 20  # bytes retained of the output of background jobs between commands


class Interpreter:
    """The shell of a session. The caller begins a command only after the previous one has ended.

    handle: the sandbox; it changes when a session that was opened ahead is claimed. closed: the reason why no more
    commands are accepted. first: a script to run ahead of the next command. run: the current command. status: the exit
    status of the last one. rc: a new shell reads its .bashrc.
    """

    def __init__(
        self, runtime: Runtime, handle: Handle, spec: CreateBashSessionRequest, sh: Shell, rc: bool = True
    ) -> None:
        self.handle = handle
        self.closed: str | None = None
        self.first = b""
        self.run: Run | None = None
        self.process = ShellProcess(spec, sh, self._on_output, self._on_reports, self._on_exit)
        self.handover = Handover(self.process)
        self._runtime = runtime
        self._spec = spec
        self._shell = sh
        self._rc = rc
        # reports to an earlier rocklet process never match a token of this one
        self._token = int(time.time() * 1000) % 1_000_000_000
        self.status = 0
        self._cwd: str | None = None
        self._idle_output = Capped(_IDLE_OUTPUT)
        self.replaced = False  # the shell ended between two commands, and its successor waits for its state
        self._traced = False  # the environment of the shell has the trace of the last command

    # ---- start and end ----

    async def open(self, started: Process | None = None) -> BashObservation:
        """Start the shell, unless it was `started`; returns the output of its start-up files."""
        if started is not None:
            self.process.adopt(started)
        else:
            await self._spawn()
        await faults.point("session.spawned")
        run = self._begin(MAX_OUTPUT)
        try:
            return await self.finish(run, self._preamble_script(run), self._spec.startup_timeout)
        finally:
            self.run = None

    async def _spawn(self) -> None:
        await self.process.spawn(self._runtime, self.handle, self._cwd)

    async def attach(self) -> None:
        """Attach to the shell that an earlier rocklet process started. NotFound."""
        await self.process.attach(self._runtime, self.handle)
        if self._spec.pty is None:
            self.first = shell_protocol.begun(self._shell.dialect)

    def take_up(self, keep: JournalEntry, entry: Mapping[str, Any]) -> Run:
        """Resume a command of an earlier rocklet process, with its stored output."""
        limit = int(entry["limit"])
        done: asyncio.Future[shell_protocol.Report | ExitStatus] = asyncio.get_running_loop().create_future()
        run = self.run = Run(int(entry["token"]), Capped(limit), Capped(limit), done, float(entry["began"]))
        self._token = max(self._token, run.token)
        self._on_reports(self.handover.take_up(keep.journal, entry, run))
        return run

    @property
    def can_ask(self) -> bool:
        """Whether the shell can report which command it runs."""
        return self.process.script is not None

    async def was_begun(self, run: Run, written: bool) -> bool:
        """Whether the shell received a command of an earlier rocklet process. written: whether that process recorded
        it."""
        return await self.handover.was_begun(run, written, lambda: self._ask(run))

    async def settle_unknown(self) -> None:
        """Wait for the end of an unknown command of an earlier rocklet process, and discard its output."""
        run = self._begin(MAX_OUTPUT)
        try:
            await self.process.write(self.first + shell_protocol.report(self._shell.dialect, run.token))
            self.first = b""
            await settled(run.done)
        finally:
            self.run = None

    async def _ask(self, run: Run) -> None:
        """Make the shell report, as a command that follows one whose start is uncertain."""
        self._token += 1
        run.probe = self._token
        await self.process.write(self.first + shell_protocol.report(self._shell.dialect, run.probe))
        self.first = b""

    async def detach(self) -> None:
        """Detach from the shell and leave it running, for the next rocklet process."""
        await self.process.detach()
        self.handover.close()

    async def release(self) -> None:
        """Release the resources of a shell that has ended."""
        self.handover.give_back()
        await self.detach()
        self.process.close()
        if self.run is not None and not self.run.done.done():
            self.run.done.set_result(ExitStatus())

    # ---- output of the shell ----

    def _on_exit(self, status: ExitStatus) -> None:
        if self.run is not None and not self.run.done.done():
            self.run.done.set_result(status)
        elif self.closed is None:
            self.closed = f"its shell ended with status {_tell(status)}"

    def _on_output(self, is_errors: bool, data: bytes) -> None:
        run = self.run
        if run is None:
            self._idle_output.add(data)  # output of a background job; the next command returns it
        elif run.sink is not None:
            run.sink(is_errors, data)
        else:
            kept = run.errors if is_errors else run.output
            kept.add(data)
            self.handover.bound_output(is_errors, run.token, kept)

    def _on_reports(self, data: bytes) -> None:
        self.handover.bound_reports()
        for report in self.process.reports.feed(data):
            run = self.run
            if run is None and isinstance(report, shell_protocol.Restarted):
                self.replaced = True
            if isinstance(report, shell_protocol.Done):
                self._cwd = report.cwd
                if run is not None and report.token == run.probe and not run.done.done():
                    run.unbegun = True
                    run.done.set_result(report)
                if run is None or report.token != run.token:
                    continue  # the report of an abandoned command
            if run is not None and not run.done.done():
                self.process.drain()
                run.done.set_result(report)

    # ---- commands ----

    def begin(self, action: BashAction, sink: Sink | None, keep: JournalEntry | None) -> Run:
        """Create a command that is about to be sent to the shell. Its output begins with that of background jobs."""
        held, dropped = self._idle_output.take()
        run = self._begin(action.max_output_bytes, sink, (held, dropped))
        if keep is not None:
            self.handover.write_down(keep, run, action, held, by_file=len(action.command) >= LONG)
        else:
            self.handover.flush()
        return run

    def _begin(self, limit: int, sink: Sink | None = None, idle: tuple[bytes, int] | None = None) -> Run:
        """idle: bytes that were already taken from `_idle_output`."""
        self._token += 1
        output = Capped(limit)
        data, dropped = self._idle_output.take() if idle is None else idle
        self._idle_output = Capped(_IDLE_OUTPUT)
        done: asyncio.Future[shell_protocol.Report | ExitStatus] = asyncio.get_running_loop().create_future()
        run = Run(self._token, output, Capped(limit), done, time.clock_gettime(CLOCK), sink)
        run.dropped = dropped
        self.run = run
        self.process.begin()
        if data:
            self._on_output(False, data)
        return run

    async def by_file(self, run: Run, command: str) -> str:
        """Store a long command in a file, where possible; returns the command that the shell reads instead.
        StorageFull."""
        if not self._shell.dialect.is_bash or not isinstance(self._runtime, Files):
            return command
        told = await write(self._runtime, self.handle, self._spec, run.token, command)
        run.by_file = True
        return told

    async def remove_file(self, run: Run) -> None:
        """Remove the file of a command, if it has one."""
        await remove(self._runtime, self.handle, self._spec, run.token)

    def script(self, run: Run, command: str, separate: bool) -> bytes:
        """The bytes to send to the shell, once. separate: stdout and stderr are kept apart."""
        script = shell_protocol.frame(
            self._shell.dialect,
            command,
            run.token,
            previous=self.status,
            separate=separate,
            pty=self._spec.pty is not None,
        )
        traced, before = tracing.environment(), self._traced
        self._traced = bool(traced)
        # Lines that set the trace of this command and remove that of the last one.
        trace = shell_protocol.trace(traced.get("TRACEPARENT")) if traced or before else b""
        script, self.first = self.first + trace + script, b""
        return script

    async def aside(self, action: BashAction) -> BashObservation:
        """Run a command between those of the session; the status that the next one sees stays."""
        status = self.status
        run = self.begin(action, None, None)
        try:
            return await self.finish(run, self.script(run, action.command, False), action.timeout)
        finally:
            self.run = None
            self.status = status
            self.handover.ended()

    async def finish(
        self,
        run: Run,
        script: bytes | None,
        timeout: float | None,
        restarted: bool = False,
        keep: JournalEntry | None = None,
    ) -> BashObservation:
        """Run a command to its end and return its outcome. script: None when the shell already has the command."""
        timed_out = False
        try:
            end = None if timeout is None else time.monotonic() + timeout
            if script is not None:
                await faults.point("run.begun")
                await self.process.write(script, timeout)
                run.written = True
                if keep is not None:
                    keep.journal.written(keep.place, found=self.process.tells)
                await faults.point("run.written")
            await settled(run.done, None if end is None else max(0.0, end - time.monotonic()))
            await faults.point("run.ended")
            if not run.done.done():
                raise TimeoutError
            report = run.done.result()
        except TimeoutError:
            timed_out = True
            report = await self.process.abort(run)
        restarted |= await self._settle(run, report, timed_out)
        observation = run.observe(report, timeout if timed_out else None, self.closed, restarted)
        self.status = (observation.exit_code if observation.exit_code is not None else 124) & 255
        return observation

    async def _settle(self, run: Run, report: shell_protocol.Report | ExitStatus, given_up: bool) -> bool:
        """Resynchronize the shell after a command; True when its state was lost."""
        if isinstance(report, shell_protocol.Restarted):
            return self.closed is None and not await self.restore()
        if isinstance(report, ExitStatus):
            self.process.drain()
            if self.closed is None and (given_up or (run.interrupted and report.signal is not None)):
                return await self._respawn()
            self.closed = self.closed or f"its shell ended with status {_tell(report)}"
            await self.release()
        return False

    async def give_up(self, run: Run) -> None:
        """Abort a command whose caller disconnected: terminate its processes and keep the shell synchronized."""
        await self._settle(run, await self.process.abort(run), True)

    def _preamble_script(self, run: Run) -> bytes:
        """The first script of a new shell; a replacement shell starts in the working directory of its predecessor."""
        pty = self._spec.pty is not None
        sources = self._spec.startup_source
        return shell_protocol.preamble(
            self._shell.dialect, run.token, cwd=self._cwd, sources=sources, rc=self._rc, pty=pty
        )

    # ---- replacement of the shell ----

    async def restore(self) -> bool:
        """Complete the shell's replacement of itself; False when that failed and a fresh shell was started."""
        self.replaced = False
        run = self._begin(MAX_OUTPUT)
        try:
            await self.process.write(shell_protocol.restore(self._shell.dialect, run.token, self._spec.pty is not None))
            async with asyncio.timeout(RESTART_GRACE):
                report = await asyncio.shield(run.done)
            if isinstance(report, shell_protocol.Done):
                return True
        except TimeoutError:
            assert self.process.process is not None
            await self.process.process.kill_tree()
        finally:
            self.run = None
            data, _ = run.output.take()
            self._idle_output.add(data)  # output of a background job
        return not await self._respawn()

    async def _respawn(self) -> bool:
        """Start a new shell in place of one that cannot continue; True on success."""
        await self.release()
        self.run = None
        try:
            await self._spawn()
            if self.closed is not None:  # closed meanwhile
                await self.process.kill()
                return False
            run = self._begin(MAX_OUTPUT)
            await self.process.write(self._preamble_script(run))
            async with asyncio.timeout(self._spec.startup_timeout):
                await asyncio.shield(run.done)
        except Exception as error:
            self.closed = f"its shell could not be started again: {error}"
            return False
        finally:
            self.run = None
        return True


def _tell(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"{128 + status.signal} (signal {status.signal})"
    return "unknown" if status.code is None else str(status.code)


# ---- commands in files ----

LONG = 16 << 10  # characters from which on a command is passed by a file


def _path(spec: CreateBashSessionRequest, token: int) -> str:
    return f"/tmp/.rock-{spec.session}-{token}"


async def write(runtime: Files, handle: Handle, spec: CreateBashSessionRequest, token: int, command: str) -> str:
    """Write a command of a session to its file; returns the command that the shell reads instead. StorageFull."""
    path = _path(spec, token)
    fd, commit = await runtime.open_write(handle, path, mode=0o600, user=spec.remote_user)
    try:
        await asyncio.to_thread(_write_and_close, fd, shell_protocol.encode(command))
    except OSError as error:
        await runtime.abort_write(handle, commit)
        raise StorageFull(
            f"there is no room for a command of {len(command)} characters: {error.strerror or error}",
            sandbox_id=handle.id,
            hint="free some space in the sandbox's /tmp, or on the server's disk",
        ) from None
    except BaseException:
        await runtime.abort_write(handle, commit)
        raise
    await runtime.commit_write(handle, commit)
    return f'eval "$(<{shell_protocol.quote(path)})"'


async def remove(runtime: Runtime, handle: Handle, spec: CreateBashSessionRequest, token: int) -> None:
    """Remove the file of a command, if it has one."""
    if isinstance(runtime, Files):
        try:
            await runtime.remove(handle, _path(spec, token))
        except NotFound:
            pass


def _write_and_close(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)
