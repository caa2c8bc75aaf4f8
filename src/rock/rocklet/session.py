"""A shell held open in a sandbox: ordered commands, kept state.

The shell is a kept Process: pid 1 of the sandbox holds its streams, so a session outlives a crash of the rocklet and is
found again by `attach`. The framing is shell.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rock import faults
from rock.errors import (
    Conflict,
    InvalidConfig,
    NotFound,
    RockError,
    SessionClosed,
    StartFailed,
    StorageFull,
    Unavailable,
)
from rock.protocol.action import MAX_OUTPUT, BashAction, BashObservation, CreateBashSessionRequest, SessionInfo
from rock.protocol.routes import RESUMES
from rock.rocklet import shell
from rock.rocklet.journal import Journal
from rock.rocklet.spool import SpoolFile
from rock.rocklet.streams import Capped, Reader, as_text, is_pipe, unread, write_all
from rock.runtime.base import CLOCK, ExitStatus, Files, Handle, Process, Program, Runtime
from rock.telemetry import tracing
from rock.wire.asgi import Answer, answer, failure
from rock.wire.waits import settled

KEY = "session:"
DEFAULT = CreateBashSessionRequest()  # the session that every sandbox has
_RESTART_GRACE = 1.5  # seconds for a shell to hand its state over before it is killed
_IDLE_OUTPUT = 1 << 20  # bytes kept of what background jobs write between commands
_END = 10.0  # seconds for a killed shell to be seen dead
_UNHEARD = 0.3  # seconds in which a shell that has begun a command, of a former rocklet, shows it
_STATUS = 1 << 20  # bytes of a command's reports that are kept for after a crash
_BULK = 16 << 10  # a pipe is read byte by byte by the shell: longer commands go by a file

Sink = Callable[[bool, bytes], None]  # (is stderr, bytes)


@dataclass
class _Run:
    """The command that runs now."""

    token: int
    output: Capped
    errors: Capped
    done: asyncio.Future[shell.Report | ExitStatus]
    began: float  # seconds of CLOCK_BOOTTIME: what is younger was started by this command
    sink: Sink | None = None
    interrupted: bool = False
    written: bool = False  # the shell has the whole of it
    dropped: int = 0  # bytes that were dropped before it began
    probe: int = -1  # the token of a command after it, by which is seen that it was never begun
    unbegun: bool = False


@dataclass(frozen=True)
class Keep:
    """Where a command is written down for the rocklet after this one, and what it is known by."""

    journal: Journal
    place: str


@dataclass
class Shell:
    """Which shell an image has, and how to talk to it."""

    path: str
    dialect: shell.Dialect


async def find_shell(runtime: Runtime, handle: Handle, wanted: str | None = None) -> Shell:
    """The shell to use: the `wanted` one, else bash, else sh. NotFound when the image has none."""
    names = (
        [wanted]
        if wanted and "/" in wanted
        else [
            f"{d}/{n}" for n in ([wanted] if wanted else ["bash", "sh"]) for d in ("/bin", "/usr/bin", "/usr/local/bin")
        ]
    )
    if isinstance(runtime, Files):
        for path in names:
            try:
                found = await runtime.stat(handle, path)
            except NotFound:
                continue
            if found.kind == "file" and found.mode & 0o111:
                return Shell(path, shell.BASH if path.endswith("bash") else shell.SH)
    raise NotFound(
        f"the image has no shell ({', '.join(names)})",
        hint="run programs with execute and a list, or use an image with bash or sh",
    )


class Session:
    """One session. Commands run one after the other; callers queue."""

    def __init__(self, runtime: Runtime, handle: Handle, spec: CreateBashSessionRequest, sh: Shell) -> None:
        self.spec = spec
        self.shell = sh
        self.created_at = time.time()
        self.closed: str | None = None
        self.startup_output = ""
        self._runtime = runtime
        self._handle = handle
        self._process: Process | None = None
        self._readers: list[Reader] = []
        self._reports = shell.ReportParser()
        self._run: _Run | None = None
        self._lock = asyncio.Lock()
        self._token = int(time.time() * 1000) % 1_000_000_000  # a report to a former rocklet is not taken for ours
        self._status = 0
        self._cwd: str | None = None
        self._watch: asyncio.Task[None] | None = None
        self._idle_output = Capped(_IDLE_OUTPUT)
        self._leaving = False
        self._piped = True  # its script is a pipe of the kernel's, which tells how much of it is unread
        self._first = b""  # to be run ahead of the next command
        self._spools: dict[str, SpoolFile] = {}  # by stream: out, err, status
        self._journal: Journal | None = None  # whose they are
        self._replaced = False  # the shell ended between two commands, and its successor waits for its state
        self._traced = False  # the shell's environment has the trace of the last command

    # ---- life ----

    async def open(self) -> None:
        """Start the shell; `startup_output` is what the start-up files printed. Raises StartFailed with it."""
        try:
            await self._spawn()
            await faults.point("session.spawned")
            observation = await self._preamble()
        except BaseException:
            await asyncio.shield(self.close())
            raise
        if observation.exit_code != 0:
            await self.close()
            raise StartFailed(
                f"session {self.spec.session!r} could not start: {observation.output.strip() or 'the shell ended'}",
                sandbox_id=self._handle.id,
                hint="look at startup_source, cwd and remote_user",
            )
        self.startup_output = observation.output

    async def attach(self, journal: Journal | None = None) -> None:
        """Take over a shell that a former rocklet started, with the command that it runs."""
        self._adopt(await self._runtime.attach(self._handle, KEY + self.spec.session))
        if self.spec.pty is None:
            self._first = shell.begun(self.shell.dialect)
        for place, entry in journal.begun.items() if journal is not None else ():
            if entry.get("kind") == "run" and entry.get("session") == self.spec.session:
                assert journal is not None
                self._take_up(Keep(journal, place), entry)
                return
        self._readers[-1].drain()  # what the shell told a former rocklet's command is not meant for ours

    def _take_up(self, keep: Keep, entry: Mapping[str, Any]) -> None:
        """Go on with a command of a former rocklet: with what it had written, and for as long as it still has."""
        limit = int(entry["limit"])
        done: asyncio.Future[shell.Report | ExitStatus] = asyncio.get_running_loop().create_future()
        run = self._run = _Run(int(entry["token"]), Capped(limit), Capped(limit), done, float(entry["began"]))
        self._token = max(self._token, run.token)
        for name, kept in (("out", run.output), ("err", run.errors)):
            if name in entry:
                self._spool(keep.journal, name).load(run.token, int(entry[name]), kept)
        self._watch_spools(run, separate="err" in entry)
        told = self._spools.get("status") or self._spool(keep.journal, "status")
        told.start = int(entry["status"])
        self._readers[-1].take = told.take
        self._on_status(told.read())
        keep.journal.resume(keep.place, asyncio.create_task(self._bring_home(keep, entry, run), name="taken up"))

    async def _bring_home(self, keep: Keep, entry: Mapping[str, Any], run: _Run) -> Answer | None:
        """The end of a command of a former rocklet; None when its shell had not begun it."""
        async with self._lock:
            try:
                if not await self._was_begun(run, bool(entry.get("written"))):
                    keep.journal.forget(keep.place)
                    return None
                run.written = True
                left = entry.get("timeout")
                if left is not None:
                    left = max(0.0, float(left) - (time.clock_gettime(CLOCK) - run.began))
                observation = await self._finish(run, None, left)
                reply = failure(self._unseen()) if run.unbegun else answer(observation)
                keep.journal.finish(keep.place, reply)
                return reply
            finally:
                self._run = None
                self._unspool()
                self.resume()
                if not self._leaving:
                    with contextlib.suppress(RockError):
                        await self._remove_bulk(run.token)

    async def _was_begun(self, run: _Run, written: bool) -> bool:
        """Whether the shell was given the command before the crash. While it runs, its pipe has what comes after."""
        fd = self._script_fd()
        if fd is None:
            return written
        if not written and not self._piped:
            return False
        end = time.monotonic() + _UNHEARD
        while not run.done.done() and time.monotonic() < end:
            if unread(fd):
                return True
            await asyncio.sleep(0.01)
        if not run.done.done():  # it waits for commands: it tells so before anything else, unless it runs this one
            self._token += 1
            run.probe = self._token
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END):  # few enough bytes to be written in whole or not at all
                    await self._write(self._first + shell.report(self.shell.dialect, run.probe))
                    self._first = b""
                    if not written:
                        await settled(run.done)
        # Where a carrier is between, its report may have gone to nobody: then that of the probe tells of its end.
        return written or not run.unbegun

    def _unseen(self) -> Conflict:
        return Conflict(
            "the command ended while no server was there, and how is not known",
            sandbox_id=self._handle.id,
            hint="look what it did",
        )

    def claim(self, handle: Handle, env: Mapping[str, str]) -> bool:
        """Give a session that was opened ahead to the sandbox that its place has become; False when it cannot be.

        env: what that sandbox's programs have in their environment beside what this shell began with.
        """
        if self.closed is not None or not all(shell.can_export(name) for name in env):
            return False
        self._handle = handle
        self._first = shell.exports(env)
        self.created_at = time.time()
        return True

    async def close(self) -> None:
        """Kill the shell and all that it started; its name is free again after that."""
        self.closed = self.closed or "it was closed"
        await self._kill()
        async with self._lock:  # the command that ran has seen the end, and whoever waited was refused
            await self._kill()
            await self._release()

    async def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(RockError, TimeoutError):
            await self._process.kill_tree()
            async with asyncio.timeout(_END):
                await self._process.wait()

    def let_go(self) -> None:
        """The server is about to stop: whoever waits for a command is told so, and the command goes on."""
        self._leaving = True
        for reader in self._readers:  # what comes from now on is for the rocklet after this one
            reader.pause()
        if self._run is not None and not self._run.done.done():
            self._run.done.set_exception(self._unavailable())
            self._run.done.exception()  # nobody may be waiting

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"the server is stopping; what runs in session {self.spec.session!r} goes on",
            sandbox_id=self._handle.id,
            hint="rock admin start finds the session again",
            details=RESUMES,
        )

    async def detach(self) -> None:
        """Let go of the shell and leave it running, for a rocklet that comes after this one."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for reader in self._readers:
            reader.close()
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()

    async def _release(self) -> None:
        if self._journal is not None:
            self._journal.flush()
            for spool in self._spools.values():
                self._journal.give_back(spool)
            self._spools.clear()
        await self.detach()
        if self._process is not None:
            self._process.close()
        if self._run is not None and not self._run.done.done():
            self._run.done.set_result(ExitStatus())

    async def _spawn(self) -> None:
        pty = self.spec.pty is not None
        dialect = self.shell.dialect
        channels: dict[int, str] = {dialect.status: "w"}
        if pty:
            channels[dialect.script] = "r"
        else:
            channels[dialect.errors] = "w"
        program = Program(
            argv=dialect.argv(self.shell.path, pty),
            env={"PS1": "", "PS2": "", "SHELL": self.shell.path, **({"TERM": "xterm-256color"} if pty else {}),
                 **(self.spec.env or {}), **dialect.environment(pty)},
            cwd=self._cwd or self.spec.cwd,
            user=self.spec.remote_user,
            stdin="pipe",
            stderr="stdout",
            pty=self.spec.pty,
            channels=channels,  # type: ignore[arg-type]
            key=KEY + self.spec.session,
            keep=True,
        )
        self._adopt(await self._runtime.spawn(self._handle, program))

    def _adopt(self, process: Process) -> None:
        self._process = process
        dialect = self.shell.dialect
        assert process.stdout is not None
        self._reports = shell.ReportParser()
        self._readers = [Reader(process.stdout, lambda data: self._on_output(False, data))]
        if dialect.errors in process.channels:
            self._readers.append(Reader(process.channels[dialect.errors], lambda data: self._on_output(True, data)))
        self._readers.append(Reader(process.channels[dialect.status], self._on_status))
        fd = self._script_fd()
        self._piped = fd is not None and is_pipe(fd)
        self._watch = asyncio.create_task(self._watch_exit(process), name=f"session-{self.spec.session}")

    async def _watch_exit(self, process: Process) -> None:
        try:
            status = await process.wait()
        except Exception:
            status = ExitStatus()
        if self._process is process:
            if self._run is not None and not self._run.done.done():
                self._run.done.set_result(status)
            elif self.closed is None:
                self.closed = f"its shell ended with status {_tell(status)}"

    # ---- bytes ----

    def _on_output(self, is_errors: bool, data: bytes) -> None:
        run = self._run
        if run is None:
            self._idle_output.add(data)  # a background job's; the next command shows it
        elif run.sink is not None:
            run.sink(is_errors, data)
        else:
            kept = run.errors if is_errors else run.output
            kept.add(data)
            spool = self._spools.get("err" if is_errors else "out")
            if spool is not None:
                spool.keep_short(run.token, kept)

    # ---- what a rocklet after this one has to know of the running command ----

    def _spool(self, journal: Journal, name: str) -> SpoolFile:
        found = self._spools.get(name)
        if found is None:
            digest = hashlib.blake2s(self.spec.session.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            found = self._spools[name] = journal.file(f"{digest}.{name}")
            self._journal = journal
        return found

    def _write_down(self, keep: Keep, run: _Run, action: BashAction, held: bytes) -> None:
        """The intent, before the shell has a byte of it."""
        if any(spool.full for spool in self._spools.values()):
            keep.journal.flush()  # it begins anew
        try:
            spooled = {name: self._spool(keep.journal, name).begin(held if name == "out" else b"")
                       for name in ("out", "status", *(["err"] if action.separate else []))}  # fmt: skip
        except OSError:
            return  # no room on the server's disk: the command runs, and a crash would lose it
        keep.journal.begin(
            keep.place, kind="run", session=self.spec.session, token=run.token, began=run.began,
            timeout=action.timeout, limit=action.max_output_bytes, **spooled,
        )  # fmt: skip
        self._watch_spools(run, action.separate)
        self._readers[-1].take = self._spools["status"].take

    def _watch_spools(self, run: _Run, separate: bool) -> None:
        self._readers[0].take = self._spools["out"].take
        if separate and len(self._readers) > 2:
            self._readers[1].take = self._spools["err"].take

    def _unspool(self) -> None:
        for reader in self._readers:
            reader.take = os.read

    @property
    def _tells(self) -> bool:
        """Whether its pipe tells if it was given a command: bash takes byte by byte what it is about to run."""
        return self._piped and self.shell.dialect.is_bash

    def _script_fd(self) -> int | None:
        if self._process is None:
            return None
        return self._process.stdin if self.spec.pty is None else self._process.channels[self.shell.dialect.script]

    def _on_status(self, data: bytes) -> None:
        spool = self._spools.get("status")
        if spool is not None and spool.size > _STATUS:  # a program writes there: it may not fill the server's disk
            spool.broken = True
        for report in self._reports.feed(data):
            run = self._run
            if run is None and isinstance(report, shell.Restarted):
                self._replaced = True
            if isinstance(report, shell.Done):
                self._cwd = report.cwd
                if run is not None and report.token == run.probe and not run.done.done():
                    run.unbegun = True
                    run.done.set_result(report)
                if run is None or report.token != run.token:
                    continue  # of a command that was given up
            if run is not None and not run.done.done():
                self._drain()
                run.done.set_result(report)

    def _drain(self) -> None:
        for reader in self._readers[:-1]:
            reader.drain()

    def pause(self) -> None:
        """Stop reading its output: whoever streams it is slow, and the program has to wait."""
        for reader in self._readers[:-1]:
            reader.pause()

    def resume(self) -> None:
        if self._leaving:
            return
        for reader in self._readers[:-1]:
            reader.resume()

    async def _write(self, data: bytes) -> None:
        fd = self._script_fd()
        assert fd is not None
        await write_all(fd, data)

    # ---- commands ----

    @property
    def info(self) -> SessionInfo:
        return SessionInfo(
            session=self.spec.session,
            shell=self.shell.path,
            pid=self._process.pid if self._process else 0,
            busy=self._run is not None,
            pty=self.spec.pty is not None,
            user=self.spec.remote_user,
            created_at=self.created_at,
        )

    async def run(self, action: BashAction, sink: Sink | None = None) -> BashObservation:
        """Run a command after those that came before it. Raises SessionClosed when the shell is gone."""
        return await self._run_now(action, sink, None)

    async def run_kept(self, action: BashAction, keep: Keep) -> Answer:
        """The same as an answer, which is kept; with what is needed to go on with the command after a crash."""
        try:
            observation = await self._run_now(action, None, keep)
        except asyncio.CancelledError:
            if not self._leaving:
                keep.journal.forget(keep.place)  # it was killed with its client
            raise
        except RockError as error:
            if not error.retryable:
                keep.journal.finish(keep.place, failure(error))
            raise
        reply = answer(observation)
        found = observation.exit_code is not None and not observation.failure_reason
        keep.journal.finish(keep.place, reply, found=found)
        return reply

    async def _run_now(self, action: BashAction, sink: Sink | None, keep: Keep | None) -> BashObservation:
        if self.spec.pty is not None and action.separate:
            raise InvalidConfig("a terminal has one stream: stdout and stderr cannot be kept apart on a pty")
        async with self._lock:
            self._check_open()
            lost = self._replaced and not await self._restore()
            self._check_open()
            held, dropped = self._idle_output.take()
            run = self._begin(action.max_output_bytes, sink, (held, dropped))
            if keep is not None:
                self._write_down(keep, run, action, held)
            elif self._journal is not None:
                self._journal.flush()  # what spool files have is that command's no longer
            bulk: str | None = None
            try:
                bulk = await self._bulk(action.command, run.token)
                script = shell.frame(
                    self.shell.dialect,
                    bulk or action.command,
                    run.token,
                    previous=self._status,
                    separate=action.separate,
                    pty=self.spec.pty is not None,
                )
                script, self._first = self._first + self._trace() + script, b""
                observation = await self._finish(run, script, action.timeout, lost, keep)
            except asyncio.CancelledError:
                # The caller went away: nothing of its command may run on, and the session has to stay in step.
                await asyncio.shield(self._give_up(run))
                raise
            except Exception:
                if keep is not None and not run.written:
                    keep.journal.forget(keep.place)  # nor may it be looked for after a crash
                raise
            finally:
                self._run = None
                self._unspool()
                self.resume()  # a slow client may have left it paused
                if bulk and not self._leaving:
                    await self._remove_bulk(run.token)
            return observation

    def _trace(self) -> bytes:
        """What gives the next command the trace it belongs to, and takes the last one's from it."""
        traced, before = tracing.environment(), self._traced
        self._traced = bool(traced)
        return shell.trace(traced.get("TRACEPARENT")) if traced or before else b""

    def _check_open(self) -> None:
        if self._leaving:
            raise self._unavailable()
        if self.closed is not None:
            raise SessionClosed(
                f"session {self.spec.session!r} is closed: {self.closed}",
                sandbox_id=self._handle.id,
                hint="open it again with create_session",
            )

    def _begin(self, limit: int, sink: Sink | None = None, idle: tuple[bytes, int] | None = None) -> _Run:
        """idle: what was taken of `_idle_output` already."""
        self._token += 1
        output = Capped(limit)
        data, dropped = self._idle_output.take() if idle is None else idle
        self._idle_output = Capped(_IDLE_OUTPUT)
        done: asyncio.Future[shell.Report | ExitStatus] = asyncio.get_running_loop().create_future()
        run = _Run(self._token, output, Capped(limit), done, time.clock_gettime(CLOCK), sink)
        run.dropped = dropped
        self._run = run
        for reader in self._readers:
            reader.begin()
        if data:
            self._on_output(False, data)
        return run

    def _bulk_path(self, token: int) -> str:
        return f"/tmp/.rock-{self.spec.session}-{token}"

    async def _bulk(self, command: str, token: int) -> str | None:
        if len(command) < _BULK or not self.shell.dialect.is_bash or not isinstance(self._runtime, Files):
            return None
        path = self._bulk_path(token)
        fd, commit = await self._runtime.open_write(self._handle, path, mode=0o600, user=self.spec.remote_user)
        try:
            await asyncio.to_thread(_write_and_close, fd, shell.encode(command))
        except OSError as error:
            await self._runtime.abort_write(self._handle, commit)
            raise StorageFull(
                f"there is no room for a command of {len(command)} characters: {error.strerror or error}",
                sandbox_id=self._handle.id,
                hint="free some space in the sandbox's /tmp, or on the server's disk",
            ) from None
        except BaseException:
            await self._runtime.abort_write(self._handle, commit)
            raise
        await self._runtime.commit_write(self._handle, commit)
        return f'eval "$(<{shell.quote(path)})"'

    async def _remove_bulk(self, token: int) -> None:
        if isinstance(self._runtime, Files):
            try:
                await self._runtime.remove(self._handle, self._bulk_path(token))
            except NotFound:
                pass

    async def _finish(
        self,
        run: _Run,
        script: bytes | None,
        timeout: float | None,
        restarted: bool = False,
        keep: Keep | None = None,
    ) -> BashObservation:
        """What came of a command. script: None for one that the shell has already."""
        timed_out = False
        try:
            async with asyncio.timeout(timeout):
                if script is not None:
                    await faults.point("run.begun")
                    await self._write(script)
                    run.written = True
                    if keep is not None:
                        keep.journal.written(keep.place, found=self._tells)
                    await faults.point("run.written")
                await settled(run.done)
                await faults.point("run.ended")
                report = run.done.result()
        except TimeoutError:
            timed_out = True
            report = await self._abort(run)
        restarted |= await self._settle(run, report, timed_out)
        return self._observe(run, report, timeout if timed_out else None, restarted)

    async def _settle(self, run: _Run, report: shell.Report | ExitStatus, given_up: bool) -> bool:
        """Bring the shell back in step after a command; True when its state was lost on the way."""
        if isinstance(report, shell.Restarted):
            return self.closed is None and not await self._restore()
        if isinstance(report, ExitStatus):
            self._drain()
            if self.closed is None and (given_up or (run.interrupted and report.signal is not None)):
                return await self._respawn()
            self.closed = self.closed or f"its shell ended with status {_tell(report)}"
            await self._release()
        return False

    async def _give_up(self, run: _Run) -> None:
        await self._settle(run, await self._abort(run), True)

    def _observe(
        self, run: _Run, report: shell.Report | ExitStatus, timeout: float | None, restarted: bool
    ) -> BashObservation:
        code = report.shell_code if isinstance(report, ExitStatus) else report.code
        if run.interrupted and isinstance(report, shell.Restarted):
            code = 128 + signal.SIGINT  # what ended it; its own `$?` is that of the command before
        reason = ""
        if timeout is not None:
            code, reason = None, f"timed out after {timeout:g} s; what it had started was killed"
        elif run.interrupted:
            reason = "interrupted"
        elif self.closed is not None:
            reason = f"the session is closed: {self.closed}"
        if restarted:
            reason += "; the shell was started anew, its variables are lost"
        self._status = (code if code is not None else 124) & 255
        output, dropped = run.output.take()
        errors, dropped_errors = run.errors.take()
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
            interrupted=run.interrupted,
            session_closed=self.closed is not None,
            session_restarted=restarted,
            dropped_bytes=dropped + dropped_errors + run.dropped,
            duration=time.clock_gettime(CLOCK) - run.began,
        )

    async def _preamble(self) -> BashObservation:
        run = self._begin(MAX_OUTPUT)
        try:
            return await self._finish(run, self._preamble_script(run), self.spec.startup_timeout)
        finally:
            self._run = None

    def _preamble_script(self, run: _Run) -> bytes:
        """What a new shell begins with; one that takes the place of another, in the folder of that one."""
        pty = self.spec.pty is not None
        sources = self.spec.startup_source
        # Not the session that is there from the start: nobody shaped it, and a .bashrc may take a second.
        rc = self.spec != DEFAULT
        return shell.preamble(self.shell.dialect, run.token, cwd=self._cwd, sources=sources, rc=rc, pty=pty)

    # ---- ends of commands that do not end by themselves ----

    async def _abort(self, run: _Run) -> shell.Report | ExitStatus:
        """End the running command and all that it started."""
        process = self._process
        assert process is not None
        if run.done.done():
            return run.done.result()
        if not run.written:  # half a command is in its pipe: no shell could make sense of the next one
            await process.kill_tree()
            return await run.done
        # Told while it is stopped: else it would go on to its next line when what it waits for is killed, or what it
        # starts to hand its state over would be killed with the rest.
        await process.kill_tree(
            since=run.began, root=False, tell=signal.SIGTERM if self.shell.dialect.is_bash else None
        )
        try:
            async with asyncio.timeout(_RESTART_GRACE if self.shell.dialect.is_bash else 0.05):
                return await asyncio.shield(run.done)
        except TimeoutError:
            await process.kill_tree()
            return await run.done

    async def _restore(self) -> bool:
        """Complete a shell's replacement of itself; False when that failed and it was started afresh."""
        self._replaced = False
        run = self._begin(MAX_OUTPUT)
        try:
            await self._write(shell.restore(self.shell.dialect, run.token, self.spec.pty is not None))
            async with asyncio.timeout(_RESTART_GRACE):
                report = await asyncio.shield(run.done)
            if isinstance(report, shell.Done):
                return True
        except TimeoutError:
            assert self._process is not None
            await self._process.kill_tree()
        finally:
            self._run = None
            data, _ = run.output.take()
            self._idle_output.add(data)  # a background job's
        return not await self._respawn()

    async def _respawn(self) -> bool:
        """A new shell in the place of one that could not be kept; True when it stands."""
        await self._release()
        self._run = None
        try:
            await self._spawn()
            if self.closed is not None:  # meanwhile
                await self._kill()
                return False
            run = self._begin(MAX_OUTPUT)
            await self._write(self._preamble_script(run))
            async with asyncio.timeout(self.spec.startup_timeout):
                await asyncio.shield(run.done)
        except Exception as error:
            self.closed = f"its shell could not be started again: {error}"
            return False
        finally:
            self._run = None
        return True

    async def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the shell and to what the running command started; nothing when it is idle."""
        if self._run is None or self._process is None:
            return
        self._run.interrupted = True
        if self.spec.pty is not None and self._process.stdin is not None:
            await write_all(self._process.stdin, b"\x03")
        else:
            await self._process.signal(signal.SIGINT, tree=True, since=self._run.began)

    async def type(self, data: bytes) -> None:
        """Bytes as typed at its terminal."""
        if self.spec.pty is None or self._process is None or self._process.stdin is None:
            raise InvalidConfig("only a session with a pty can be typed into", hint="create_session with pty=(24, 80)")
        self._check_open()
        await write_all(self._process.stdin, data)

    async def resize(self, rows: int, columns: int) -> None:
        if self.spec.pty is None or self._process is None:
            raise InvalidConfig("only a session with a pty has a size", hint="create_session with pty=(24, 80)")
        self._check_open()
        await self._process.resize(rows, columns)


def _write_and_close(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


def _tell(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"{128 + status.signal} (signal {status.signal})"
    return "unknown" if status.code is None else str(status.code)
