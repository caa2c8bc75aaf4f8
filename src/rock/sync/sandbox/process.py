# GENERATED from src/rock/sdk/sandbox/process.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Programs in a sandbox, apart from any session: one-shot commands, and processes in the background."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rock import errors
from rock.protocol.action import BashAction, BashObservation, Command, CommandResponse, ProcessInfo
from rock.protocol.node import ProcessList
from rock.protocol.routes import LOG_NEXT, LOG_RUNNING
from rock.sync.sandbox.link import SLACK, Link, parse
from rock.sync.sandbox.stream import OutputStream

POLL = 30.0  # seconds of one long-poll
LOG_PORTION = 1 << 20

LogName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class LogPart:
    """Bytes of a log. `next`: the offset to go on at; `running`: more may come."""

    data: bytes
    next: int
    running: bool


class Process:
    """A process in the background; it goes on when the call that started it has ended. `info`: what was last heard."""

    def __init__(self, link: Link, info: ProcessInfo) -> None:
        self._link = link
        self.info = info

    def __repr__(self) -> str:
        return f"Process({self.id!r}, running={self.info.running}, exit_code={self.info.exit_code})"

    @property
    def id(self) -> str:
        return self.info.process_id

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or when nobody saw its end."""
        return self.info.exit_code

    def status(self) -> ProcessInfo:
        return self._ask("get_process")

    def wait(self, timeout: float | None = None) -> ProcessInfo:
        """Wait for its end, at most `timeout` seconds: `info.running` tells which came first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = POLL if deadline is None else min(POLL, max(0.0, deadline - time.monotonic()))
            info = self._ask("get_process", wait=left)
            if not info.running or (deadline is not None and time.monotonic() >= deadline):
                return info

    def logs(
        self, stream: LogName = "stdout", offset: int = 0, limit: int = LOG_PORTION, wait: float | None = None
    ) -> LogPart:
        """Bytes of its output from an offset, at most `limit`. `wait`: seconds to wait for some when there are none."""
        target = self._link._path(
            "process_logs", process_id=self.id, stream=stream, offset=offset, limit=limit, wait=wait
        )
        with self._link._transport.open("GET", target, timeout=(wait or 30.0) + SLACK) as answer:
            data = answer.read()
            after = int(answer.headers.get(LOG_NEXT, offset + len(data)))
            running = answer.headers.get(LOG_RUNNING, "0") not in ("0", "false", "")
        return LogPart(data, after, running)

    def follow(self, stream: LogName = "stdout", offset: int = 0) -> Iterator[bytes]:
        """Its output from an offset on, until it ends."""
        while True:
            part = self.logs(stream, offset, wait=POLL)
            if part.data:
                yield part.data
            elif not part.running:
                return
            offset = part.next

    def signal(self, number: int, tree: bool = True) -> ProcessInfo:
        """Send a signal (15 is SIGTERM), to all that it started as well when `tree`."""
        return self._ask("signal_process", {"signal": int(number), "tree": tree})

    def kill(self) -> ProcessInfo:
        """Kill it and all that it started."""
        return self.signal(9)

    def write_stdin(self, data: bytes | str, close: bool = False) -> ProcessInfo:
        """Write to its standard input; `close` ends that input."""
        target = self._link._path("process_stdin", process_id=self.id, close=close or None)
        body = data.encode() if isinstance(data, str) else data
        raw = self._link._transport.json_raw(
            "POST", target, body, timeout=SLACK, content_type="application/octet-stream"
        )
        self.info = parse(ProcessInfo, raw)
        return self.info

    def forget(self) -> ProcessInfo:
        """Kill it if it runs, and drop its logs."""
        return self._ask("forget_process")

    def _ask(self, name: str, body: Any = None, wait: float | None = None) -> ProcessInfo:
        target = self._link._path(name, process_id=self.id, wait=wait and round(wait, 3))
        self.info = parse(ProcessInfo, self._link._call(name, target, body, wait=wait or 0.0))
        return self.info


class Programs(Link):
    """One-shot commands and background processes."""

    def execute(self, command: Command | str | list[str], **options: Any) -> CommandResponse:
        """Run a program to its end; `options` are fields of `Command`.

        A list is an argv; a string is run by a shell. The outcome tells the true exit status, which is no error unless
        `check=True`: then it is CommandFailed, or CommandTimeout.
        """
        spec = as_command(command, options)
        wait = None if spec.timeout is None else spec.timeout + 1
        response = parse(CommandResponse, self._call("execute", self._path("execute"), wire(spec), wait=wait))
        if spec.check:
            raise_if_failed(spec.command, response, response.stdout + response.stderr, spec.error_msg, self.sandbox_id)
        return response

    def start_process(self, command: Command | str | list[str], **options: Any) -> Process:
        """Start a program in the background; `options` are fields of `Command`, whose `timeout` is None by default."""
        if not isinstance(command, Command):
            options = {"timeout": None, **options}
        body = wire(as_command(command, options))
        return Process(self, parse(ProcessInfo, self._call("start_process", self._path("start_process"), body)))

    def processes(self) -> list[Process]:
        """The background processes, those that ended as well."""
        found = parse(ProcessList, self._call("list_processes", self._path("list_processes")))
        return [Process(self, info) for info in found.items]

    def get_process(self, process_id: str) -> Process:
        """A background process by its id. NotFound."""
        target = self._path("get_process", process_id=process_id)
        return Process(self, parse(ProcessInfo, self._call("get_process", target)))

    def stream(
        self, command: Command | BashAction | str | list[str], session: str | None = None, **options: Any
    ) -> OutputStream:
        """Output while it comes. With a `session`, or as an Action, the command runs in that session, else by itself;
        `options` are fields of `Action` or of `Command`."""
        if session is not None or isinstance(command, BashAction):
            if isinstance(command, BashAction):
                action = command.model_copy(update=options)
            else:
                options = {"check": "silent", **options}
                action = BashAction(command=_one_line(command), session=session or "default", **options)
            target = self._path("run", action.session, stream=True)
            return OutputStream(self, target, wire(action), BashObservation)
        return OutputStream(
            self, self._path("execute", stream=True), wire(as_command(command, options)), CommandResponse
        )


def _one_line(command: Command | str | list[str]) -> str:
    if not isinstance(command, str):
        raise errors.InvalidConfig("a session runs a command line: give a string")
    return command


def as_command(command: Command | str | list[str], options: dict[str, Any]) -> Command:
    if isinstance(command, Command):
        return command.model_copy(update=options) if options else command
    return Command(command=command, **options)


def wire(model: Command | BashAction) -> dict[str, Any]:
    """A message as it travels. `check` stays with us: the answer tells the status, and we raise."""
    body = model.model_dump(mode="json", exclude_defaults=True)
    body["timeout"] = model.timeout
    if isinstance(model, BashAction):
        body["check"] = "silent"
    else:
        body.pop("check", None)
    return body


def raise_if_failed(
    command: str | list[str],
    outcome: CommandResponse | BashObservation,
    output: str,
    words: str = "",
    sandbox_id: str | None = None,
) -> None:
    """CommandTimeout or CommandFailed unless the exit status is 0; `observation` holds the outcome."""
    if outcome.exit_code == 0 and not outcome.timed_out:
        return
    error: errors.CommandTimeout | errors.CommandFailed
    shown = repr(command if isinstance(command, str) else " ".join(command))
    if len(shown) > 500:
        shown = shown[:480] + "..." + shown[-1]
    tail = output if len(output) <= 4000 else "..." + output[-4000:]
    details = {"exit_code": outcome.exit_code, "output": tail}
    prefix = f"{words}: " if words else ""
    if outcome.timed_out:
        error = errors.CommandTimeout(
            f"{prefix}Command {shown} timed out: {outcome.failure_reason}", sandbox_id=sandbox_id, details=details
        )
    else:
        status = "an unknown exit status" if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        error = errors.CommandFailed(
            f"{prefix}Command {shown} failed with {status}. Here is the output:\n{tail!r}",
            sandbox_id=sandbox_id,
            details=details,
        )
    error.observation = outcome
    raise error
