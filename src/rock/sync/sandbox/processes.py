# GENERATED from src/rock/sdk/sandbox/processes.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Programs in a sandbox, independent of sessions: one-shot programs and background processes."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from rock import errors
from rock.protocol.action import BashAction, BashObservation, Command, CommandResponse, ProcessInfo
from rock.protocol.node import ProcessList
from rock.protocol.routes import LOG_NEXT, LOG_RUNNING
from rock.sync.sandbox.link import SLACK, Link, parse
from rock.sync.sandbox.options import ProgramOptions, known
from rock.sync.sandbox.stream import OutputStream

TIMEOUT = 1200.0  # seconds
POLL = 30.0  # seconds of one long-poll
LOG_PORTION = 1 << 20

LogName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class LogPart:
    """Bytes of a log. `next`: the offset to continue at; `running`: more may come."""

    data: bytes
    next: int
    running: bool


class Process:
    """A background process. It continues after the call that started it. `info`: its last known state."""

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
        """None while it runs, or when its end was not observed."""
        return self.info.exit_code

    def status(self) -> ProcessInfo:
        return self._ask("get_process")

    def wait(self, timeout: float | None = None) -> ProcessInfo:
        """Wait for its end, at most `timeout` seconds; `running` of the result is True after a timeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = POLL if deadline is None else min(POLL, max(0.0, deadline - time.monotonic()))
            info = self._ask("get_process", wait=left)
            if not info.running or (deadline is not None and time.monotonic() >= deadline):
                return info

    def logs(
        self, stream: LogName = "stdout", offset: int = 0, limit: int = LOG_PORTION, wait: float | None = None
    ) -> LogPart:
        """Bytes of its output from an offset, at most `limit`. `wait`: seconds to wait for the first byte."""
        target = self._link._path(
            "process_logs", process_id=self.id, stream=stream, offset=offset, limit=limit, wait=wait
        )
        with self._link._transport.open("GET", target, timeout=(wait or 30.0) + SLACK) as answer:
            data = answer.read()
            after = int(answer.headers.get(LOG_NEXT, offset + len(data)))
            running = answer.headers.get(LOG_RUNNING, "0") not in ("0", "false", "")
        return LogPart(data, after, running)

    def follow(self, stream: LogName = "stdout", offset: int = 0) -> Iterator[bytes]:
        """Its output from an offset on, until it ends. A chunk is bytes and may end within a character."""
        while True:
            part = self.logs(stream, offset, wait=POLL)
            if part.data:
                yield part.data
            elif not part.running:
                return
            offset = part.next

    def signal(self, number: int, tree: bool = True) -> ProcessInfo:
        """Send a signal (15 is SIGTERM); with `tree`, also to all processes that it started."""
        return self._ask("signal_process", {"signal": int(number), "tree": tree})

    def kill(self) -> ProcessInfo:
        """Kill it and all processes that it started."""
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
        """Kill it if it runs, and delete its logs."""
        return self._ask("forget_process")

    def _ask(self, name: str, body: Any = None, wait: float | None = None) -> ProcessInfo:
        target = self._link._path(name, process_id=self.id, wait=wait and round(wait, 3))
        self.info = parse(ProcessInfo, self._link._call(name, target, body, wait=wait or 0.0))
        return self.info


class Processes:
    """`sandbox.processes`: one-shot programs and background processes."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def start(
        self, command: str | Sequence[str], *, timeout: float | None = None, **options: Unpack[ProgramOptions]
    ) -> Process:
        """Start a program in the background. A list is an argv; a string is run by the image's shell.

        timeout: seconds after which it is killed. The other options are those of `ProgramOptions`; its standard input
        stays open for `Process.write_stdin`.
        """
        return self.begin(command_of(command, timeout, options))

    def begin(self, command: Command) -> Process:
        """Start a `Command` in the background."""
        answer = self._link._call("start_process", self._link._path("start_process"), wire(command))
        return Process(self._link, parse(ProcessInfo, answer))

    def get(self, process_id: str) -> Process:
        """A background process by its id. NotFound."""
        target = self._link._path("get_process", process_id=process_id)
        return Process(self._link, parse(ProcessInfo, self._link._call("get_process", target)))

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = TIMEOUT,
        check: bool = False,
        **options: Unpack[ProgramOptions],
    ) -> CommandResponse:
        """`Sandbox.exec`."""
        return self.execute(command_of(command, timeout, options), check)

    def execute(self, command: Command, check: bool = False) -> CommandResponse:
        """Run a `Command` to its end. CommandFailed, CommandTimeout with `check`."""
        link = self._link
        wait = None if command.timeout is None else command.timeout + 1
        response = parse(CommandResponse, link._call("execute", link._path("execute"), wire(command), wait=wait))
        if check or command.check:
            output = response.stdout + response.stderr
            raise_if_failed(command.command, response, output, command.error_msg, link.sandbox_id)
        return response

    def stream(
        self, command: str | Sequence[str], *, timeout: float | None = TIMEOUT, **options: Unpack[ProgramOptions]
    ) -> OutputStream:
        """`Sandbox.stream` of a program."""
        return self.stream_of(command_of(command, timeout, options))

    def stream_of(self, command: Command) -> OutputStream:
        """The output of a `Command` while it runs."""
        return OutputStream(self._link, self._link._path("execute", stream=True), wire(command), CommandResponse)

    def list(self) -> list[Process]:
        """The background processes, ended ones included."""
        found = parse(ProcessList, self._link._call("list_processes", self._link._path("list_processes")))
        return [Process(self._link, info) for info in found.items]


def command_of(command: str | Sequence[str], timeout: float | None, options: Mapping[str, Any]) -> Command:
    """The `Command` of typed options. InvalidConfig."""
    known(options, ProgramOptions, "a program")
    fields = dict(options)
    stdin = fields.get("stdin")
    if isinstance(stdin, bytes | bytearray | memoryview):
        fields["stdin"], data = None, bytes(stdin)
        try:
            fields["stdin"] = data.decode()
        except UnicodeDecodeError:
            fields["stdin_base64"] = b64encode(data).decode()
    if isinstance(command, str | list):
        words: Any = command
    else:
        words = list(command) if isinstance(command, tuple) else command
    return Command(command=words, timeout=timeout, **fields)


def wire(model: Command | BashAction) -> dict[str, Any]:
    """The body of a request. `check` is not sent: the client raises."""
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
    """CommandTimeout or CommandFailed unless the exit status is 0; `observation` holds the result."""
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
