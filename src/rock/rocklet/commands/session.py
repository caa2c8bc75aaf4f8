"""A session: a shell that stays open in a sandbox and runs commands in order, with persistent shell state.

The shell is a kept Process, so a session outlives a crash of the rocklet, and `attach` finds it again.
shell_protocol.py defines the framing; interpreter.py runs the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from rock.errors import InvalidConfig, RockError, SessionClosed, StartFailed, Unavailable
from rock.http.asgi import Answer, answer, failure
from rock.protocol.action import BashAction, BashObservation, CreateBashSessionRequest, SessionInfo
from rock.protocol.routes import RESUMES
from rock.rocklet.commands import shell_protocol
from rock.rocklet.commands.handover import JournalEntry, ended_with_client, unseen
from rock.rocklet.commands.interpreter import LONG, Interpreter
from rock.rocklet.commands.output import write_all
from rock.rocklet.commands.shell_process import Run, Shell, Sink
from rock.rocklet.durability.journal import Journal
from rock.runtime.base import CLOCK, Handle, Process, Runtime

log = logging.getLogger("rock.node")
DEFAULT = CreateBashSessionRequest()  # the session that every sandbox has


class Session:
    """One session. Commands run one after the other; callers queue."""

    def __init__(self, runtime: Runtime, handle: Handle, spec: CreateBashSessionRequest, sh: Shell) -> None:
        self.spec = spec
        self.shell = sh
        self.created_at = time.time()
        self.startup_output = ""
        # The default session reads no .bashrc: no client configured it, and reading may take a second.
        self._interpreter = Interpreter(runtime, handle, spec, sh, rc=spec != DEFAULT)
        self._lock = asyncio.Lock()
        self._leaving = False
        self._reading: asyncio.Task[None] | None = None
        self.reopened: Callable[[], None] = lambda: None  # called when output has opened its descriptors
        self.memory_kill: Callable[[int | None], str] = lambda exit_code: ""  # see Supervisor.memory_kill

    @property
    def closed(self) -> str | None:
        """The reason why the session is closed; None while it is open."""
        return self._interpreter.closed

    @property
    def between_commands(self) -> asyncio.Lock:
        """Held while a command runs."""
        return self._lock

    @property
    def status(self) -> int:
        """The exit status of the last command."""
        return self._interpreter.status

    def continues(self, status: int, env: Mapping[str, str]) -> None:
        """Continue the shell of another sandbox, of which this one is a copy: its last exit status, and variables that
        have other values here."""
        self._interpreter.status = status
        self._interpreter.first += shell_protocol.exports(
            {name: value for name, value in env.items() if shell_protocol.can_export(name)})

    # ---- start and end ----

    async def open(self, started: Process | None = None) -> None:
        """Start the shell, unless it was `started`; `startup_output` is the output of the start-up files. Raises
        StartFailed, which contains it."""
        try:
            observation = await self._interpreter.open(started)
        except BaseException:
            await asyncio.shield(self.close())
            raise
        if observation.exit_code != 0:
            await self.close()
            raise StartFailed(
                f"session {self.spec.session!r} could not start: {observation.output.strip() or 'the shell ended'}",
                sandbox_id=self._interpreter.handle.id,
                hint="look at startup_source, cwd and remote_user",
            )
        self.startup_output = observation.output

    async def attach(self, journal: Journal | None = None) -> None:
        """Attach to a shell that an earlier rocklet process started, and to the command that it runs."""
        await self._interpreter.attach()
        runs = [] if journal is None else [
            (place, entry) for place, entry in journal.begun.items()
            if entry.get("kind") == "run" and entry.get("session") == self.spec.session
        ]  # fmt: skip
        if journal is not None and runs:
            place, entry = runs[-1]
            over = [*runs[:-1]]  # a shell runs one command at a time: they ended, and their ends are damaged
            if entry.get("superseded") or self._interpreter.handover.is_superseded(journal, entry):
                over.append(runs[-1])
            for earlier, _ in over:
                journal.finish(earlier, failure(unseen(self._interpreter.handle.id, True)))
        if journal is not None and runs and len(over) < len(runs):
            keep = JournalEntry(journal, place)
            run = self._interpreter.take_up(keep, entry)
            journal.resume(place, asyncio.create_task(self._bring_home(keep, entry, run), name="taken up"))
            return
        # What the shell told a former rocklet's command is not meant for ours.
        self._interpreter.process.readers[-1].drain()
        if journal is not None and journal.damage is not None and self.spec.pty is None:
            task = asyncio.create_task(self._settle_unknown(), name="unknown command")
            journal.resume(f"unknown\n{self.spec.session}", task)

    async def _settle_unknown(self) -> None:
        """Handle a running command whose journal entry is damaged: the next command waits for its end and does not get
        its output."""
        async with self._lock:
            await self._interpreter.settle_unknown()

    async def _bring_home(self, keep: JournalEntry, entry: Mapping[str, Any], run: Run) -> Answer | None:
        """Wait for the end of a command of an earlier rocklet process; None when its shell had not begun it."""
        async with self._lock:
            try:
                written = bool(entry.get("written")) or run.reports_damaged
                if run.reports_damaged and not self._interpreter.can_ask:
                    reply = failure(unseen(self._interpreter.handle.id, True))
                    keep.journal.finish(keep.place, reply)
                    return reply
                if not await self._interpreter.was_begun(run, written):
                    return keep.journal.not_begun(keep.place)
                run.written = True
                left = entry.get("timeout")
                if left is not None:
                    left = max(0.0, float(left) - (time.clock_gettime(CLOCK) - run.began))
                observation = await self._interpreter.finish(run, None, left)
                sandbox_id, damaged = self._interpreter.handle.id, run.reports_damaged
                reply = failure(unseen(sandbox_id, damaged)) if run.unbegun else answer(observation)
                keep.journal.finish(keep.place, reply)
                return reply
            finally:
                self._interpreter.run = None
                self._interpreter.handover.ended()
                self.resume()
                if entry.get("file") and not self._leaving:
                    with contextlib.suppress(RockError):
                        await self._interpreter.remove_file(run)

    def claim(self, handle: Handle, env: Mapping[str, str]) -> bool:
        """Assign a session that was opened in the warm pool to a sandbox; False when that is not possible.

        env: variables of the sandbox's programs beyond those that the shell was started with.
        """
        if self.closed is not None or not all(shell_protocol.can_export(name) for name in env):
            return False
        self._interpreter.handle = handle
        self._interpreter.first = shell_protocol.exports(env)
        self.created_at = time.time()
        return True

    async def close(self) -> None:
        """Terminate the shell and its process tree; its name is free afterwards."""
        interpreter = self._interpreter
        interpreter.closed = interpreter.closed or "it was closed"
        await self._end_reading()
        busy = self._lock.locked()
        await interpreter.process.kill()
        async with self._lock:  # the running command has seen the end, and waiting callers were rejected
            if busy:  # it may have started another shell meanwhile
                await interpreter.process.kill()
            await interpreter.release()

    def let_go(self) -> None:
        """Prepare for the stop of the server: callers that wait for a command get an error, and the command
        continues."""
        self._leaving = True
        self._interpreter.process.let_go()
        run = self._interpreter.run
        if run is not None and not run.done.done():
            run.done.set_exception(self._unavailable())
            run.done.exception()  # there may be no waiting caller

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"the server is stopping; what runs in session {self.spec.session!r} goes on",
            sandbox_id=self._interpreter.handle.id,
            hint="rock admin start finds the session again",
            details=RESUMES,
        )

    async def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def detach(self) -> None:
        """Detach from the shell and leave it running, for the next rocklet process."""
        await self._end_reading()
        await self._interpreter.detach()

    async def discard(self) -> None:
        """Release its resources: its sandbox is being removed."""
        await self._end_reading()
        await self._interpreter.release()

    # ---- descriptors of an idle session ----

    async def close_streams(self) -> bool:
        """Close the descriptors of the shell until the next use. Output and the end of the shell open them again. False
        when it has to be tried again later, as while a command runs."""
        if self._leaving:
            return True
        if self._lock.locked():
            return False
        async with self._lock:
            if self.closed is not None:
                await self._interpreter.release()
                return True
            try:
                await self._interpreter.process.close_streams(self._stream_changed)
                return True
            except RockError as error:
                log.debug("session %s keeps its descriptors: %s", self.spec.session, error)
                return False

    def _stream_changed(self) -> None:
        if not self._leaving:
            self._reading = asyncio.create_task(self._read_again(), name=f"read-{self.spec.session}")

    async def _read_again(self) -> None:
        try:
            await self._reopened()
        except RockError as error:  # the next command gets the error
            log.debug("session %s is not read: %s", self.spec.session, error)
        self.reopened()

    async def _reopened(self) -> None:
        if not self._interpreter.process.has_streams:
            async with self._lock:
                await self._interpreter.process.reopen_streams()

    def pause(self) -> None:
        """Pause reading its output: the streaming client is slow, and the program has to wait."""
        self._interpreter.process.pause()

    def resume(self) -> None:
        if not self._leaving:
            self._interpreter.process.resume()

    # ---- commands ----

    @property
    def info(self) -> SessionInfo:
        process = self._interpreter.process.process
        return SessionInfo(
            session=self.spec.session,
            shell=self.shell.path,
            pid=process.pid if process else 0,
            busy=self._interpreter.run is not None,
            pty=self.spec.pty is not None,
            user=self.spec.remote_user,
            created_at=self.created_at,
        )

    async def run(self, action: BashAction, sink: Sink | None = None) -> BashObservation:
        """Run a command after those that came before it. Raises SessionClosed when the shell has ended."""
        return await self._run_now(action, sink, None)

    async def run_kept(self, action: BashAction, keep: JournalEntry) -> Answer:
        """Run a command as `run` does and store its response; stores what is needed to resume the command after a
        crash."""
        try:
            observation = await self._run_now(action, None, keep)
        except asyncio.CancelledError:
            if not self._leaving:
                # a repeated request with the key must not run it again
                keep.journal.finish(keep.place, failure(ended_with_client()))
            raise
        except RockError as error:
            if not error.retryable:
                keep.journal.finish(keep.place, failure(error))
            raise
        reply = answer(observation)
        found = observation.exit_code is not None and not observation.failure_reason
        keep.journal.finish(keep.place, reply, found=found)
        return reply

    async def run_aside(self, action: BashAction) -> BashObservation:
        """Run a command of the rocklet itself, whose caller holds `between_commands`. `$?` stays as it was."""
        await self._interpreter.process.reopen_streams()
        return await self._interpreter.aside(action)

    async def _run_now(self, action: BashAction, sink: Sink | None, keep: JournalEntry | None) -> BashObservation:
        if self.spec.pty is not None and action.separate:
            raise InvalidConfig("stdout and stderr cannot be separate on a pty: a terminal has one stream",
                                hint="leave separate out, or create the session without pty")
        interpreter = self._interpreter
        async with self._lock:
            self._check_open()
            await interpreter.process.reopen_streams()
            self._check_open()
            lost = interpreter.replaced and not await interpreter.restore()
            self._check_open()
            run = interpreter.begin(action, sink, keep)
            try:
                command = action.command
                if len(command) >= LONG:
                    command = await interpreter.by_file(run, command)
                script = interpreter.script(run, command, action.separate)
                observation = await interpreter.finish(run, script, action.timeout, lost, keep)
                if not observation.failure_reason and (reason := self.memory_kill(observation.exit_code)):
                    observation = observation.model_copy(update={"failure_reason": reason})
                return observation
            except asyncio.CancelledError:  # the caller disconnected
                await asyncio.shield(interpreter.give_up(run))
                raise
            except Exception:
                if keep is not None and not run.written:
                    keep.journal.forget(keep.place)  # it must not be resumed after a crash
                raise
            finally:
                interpreter.run = None
                interpreter.handover.ended()
                if not self._leaving:
                    interpreter.process.resume()  # a slow client may have left it paused
                    if run.by_file:
                        await interpreter.remove_file(run)

    def _check_open(self) -> None:
        if self._leaving:
            raise self._unavailable()
        closed = self._interpreter.closed
        if closed is not None:
            raise SessionClosed(
                f"session {self.spec.session!r} is closed: {closed}",
                sandbox_id=self._interpreter.handle.id,
                hint="open it again with create_session",
            )

    async def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the shell and to the processes of the running command; no effect when it is idle."""
        run, process = self._interpreter.run, self._interpreter.process
        if run is None or process.process is None:
            return
        run.interrupted = True
        await process.interrupt(run)

    async def type(self, data: bytes) -> None:
        """Write bytes to its terminal as typed input."""
        await self._reopened()
        terminal = self._interpreter.process.terminal
        if terminal is None:
            raise InvalidConfig("only a session with a pty can be typed into", hint="create_session with pty=(24, 80)")
        self._check_open()
        await write_all(terminal, data)

    async def resize(self, rows: int, columns: int) -> None:
        await self._reopened()
        process = self._interpreter.process.process
        if self.spec.pty is None or process is None:
            raise InvalidConfig("only a session with a pty has a size", hint="create_session with pty=(24, 80)")
        self._check_open()
        await process.resize(rows, columns)
