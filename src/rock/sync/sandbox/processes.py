# GENERATED from src/rock/sdk/sandbox/processes.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Programs in a sandbox, independent of sessions: one-shot programs and background processes."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

from rock import errors
from rock.protocol.action import BashAction, BashObservation, Command, CommandResponse, ProcessInfo
from rock.protocol.node import ProcessList
from rock.protocol.routes import LOG_NEXT, LOG_RUNNING
from rock.sync import primitives
from rock.sync.sandbox.link import SLACK, Link, parse
from rock.sync.sandbox.options import ProgramOptions, known, require_flag
from rock.sync.sandbox.stream import Chunk, OutputStream
from rock.sdk.stdin import SMALL, Pump, piece_of

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
        """Its id in its sandbox, as in `rock` and in the HTTP API."""
        return self.info.process_id

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or when its end was not observed."""
        return self.info.exit_code

    def status(self) -> ProcessInfo:
        """Its present state and exit code. NotFound."""
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

    def start(self, command: str | Sequence[str], **options: Unpack[ProgramOptions]) -> Process:
        """Start a program in the background. A list is an argv; a string is run by the image's shell.

        It has no time limit: use `Process.wait(timeout)` and `Process.kill`. Without `stdin`, its standard input stays
        open for `Process.write_stdin`.
        """
        source, spec = split_input(command, None, options)
        if source is not None:
            raise errors.InvalidConfig(
                "a background process has no streamed standard input",
                hint="pass at most 1 MiB as stdin, or start it without stdin and call write_stdin",
            )
        return self.begin(spec)

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
        require_flag("check", check)
        source, spec = split_input(command, timeout, options)
        if source is None:
            return self.execute(spec, check)
        output = FedStream(self._link, self, spec, source)
        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        with output:
            for chunk in output:
                parts[chunk.kind].append(chunk.data)
        assert isinstance(output.result, CommandResponse)
        result = output.result.model_copy(update=_outputs(parts, spec.max_output_bytes))
        if check:
            raise_if_failed(spec.command, result, result.stdout + result.stderr, "", self._link.sandbox_id)
        return result

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
        source, spec = split_input(command, timeout, options)
        return self.stream_of(spec) if source is None else FedStream(self._link, self, spec, source)

    def stream_of(self, command: Command) -> OutputStream:
        """The output of a `Command` while it runs."""
        return OutputStream(self._link, self._link._path("execute", stream=True), wire(command), CommandResponse)

    def list(self) -> list[Process]:
        """The background processes, ended ones included."""
        found = parse(ProcessList, self._link._call("list_processes", self._link._path("list_processes")))
        return [Process(self._link, info) for info in found.items]


def split_input(command: str | Sequence[str], timeout: float | None, options: Mapping[str, Any]) -> tuple[Any, Command]:
    """(the input to stream or None, the `Command` of typed options with a small input). InvalidConfig."""
    known(options, ProgramOptions, "a program")
    fields = dict(options)
    source = fields.pop("stdin", None)
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, bytes | str) and len(source) <= SMALL:
        fields["stdin"] = source
        if isinstance(source, bytes):
            try:
                fields["stdin"] = source.decode()
            except UnicodeDecodeError:
                fields["stdin"], fields["stdin_base64"] = None, b64encode(source).decode()
        elif not source.isascii():
            try:
                source.encode()
            except UnicodeEncodeError:
                data = source.encode("utf-8", "surrogateescape")
                fields["stdin"], fields["stdin_base64"] = None, b64encode(data).decode()
        source = None
    elif source is not None and not isinstance(source, bytes | str | Iterable) and not (
        hasattr(source, "read") or isinstance(source, Iterable)
    ):  # fmt: skip
        raise errors.InvalidConfig(
            f"stdin is a {type(source).__name__}", hint="use bytes, str, a binary file or an iterator of bytes"
        )
    words: Any = list(command) if isinstance(command, tuple) else command
    return source, Command(command=words, timeout=timeout, **fields)


def _outputs(parts: Mapping[str, list[bytes]], limit: int) -> dict[str, Any]:
    """The fields of a CommandResponse for whole outputs, of which `limit` bytes are retained."""
    fields: dict[str, Any] = {}
    for name, pieces in parts.items():
        data = b"".join(pieces)
        dropped = max(0, len(data) - limit)
        if dropped:
            head = limit // 2
            data = data[:head] + data[len(data) - (limit - head) :]
        fields[f"{name}_dropped"] = dropped
        try:
            fields[name] = data.decode()
        except UnicodeDecodeError:
            fields[name], fields[f"{name}_b64"] = data.decode("utf-8", "replace"), b64encode(data).decode()
    return fields


class FedStream(OutputStream):
    """The output of a program whose standard input is streamed: a background process with an open input.

    The client reads the input while the program runs, and stops when it ends. An error of the input kills the program
    and is raised here.
    """

    def __init__(self, link: Link, processes: Processes, command: Command, source: Any) -> None:
        super().__init__(link, "", {}, CommandResponse)
        self._processes = processes
        self._command = command
        self._source = source
        self._process: Process | None = None
        self._tasks = primitives.Tasks()
        self._pump: Pump | None = None
        self._open = 2  # outputs that have not ended
        self._began = 0.0

    def _more(self) -> None:
        if self._process is None:
            self._began = time.monotonic()
            self._process = self._processes.begin(self._command.model_copy(update={"timeout": None}))
            self._tasks.start(partial(self._feed, self._process))
            self._tasks.start(partial(self._follow, self._process, "stdout"))
            self._tasks.start(partial(self._follow, self._process, "stderr"))
        limit = self._command.timeout
        timed_out = False
        try:
            item = self._tasks.get(None if limit is None else max(0.0, self._began + limit - time.monotonic()))
        except TimeoutError as error:
            if limit is None or time.monotonic() < self._began + limit:
                raise error
            timed_out, item = True, None
            self._open = 0
            self._process.kill()
        if isinstance(item, Chunk):
            self._chunks.append(self._decoding.chunk(item.kind, item.data))
        elif item is not None:
            self._open -= 1
        if not self._open:
            info = self._process.wait(SLACK)
            reason = f"timed out after {limit:g} s; its process tree was killed" if timed_out else ""
            if not timed_out and info.signal is not None:
                reason = f"killed by signal {info.signal}"
            self._chunks += self._decoding.end()
            self.result = CommandResponse(
                exit_code=None if timed_out else info.exit_code, signal=None if timed_out else info.signal,
                timed_out=timed_out, failure_reason=reason, duration=time.monotonic() - self._began,
            )  # fmt: skip
            self.close()

    def close(self) -> None:
        """Stop reading the input, kill the program if it runs, and delete its logs."""
        if self._pump is not None:
            self._pump.close()
        self._tasks.close()
        process, self._process = self._process, None
        if process is not None:
            primitives.settle(process.forget, SLACK)

    def _follow(self, process: Process, name: LogName) -> None:
        for data in process.follow(name):
            self._tasks.put(Chunk(name, data, ""))
        self._tasks.put(name)

    def _feed(self, process: Process) -> None:
        source = self._source
        if isinstance(source, bytes | str | Iterable) or hasattr(source, "read"):
            pump = self._pump = Pump(source)
            while data := primitives.in_thread(pump.take):
                if not _write(process, data):
                    pump.close()
                    return
        else:
            for piece in source:
                if not _write(process, piece_of(piece)):
                    return
        _write(process, b"", True)


def _write(process: Process, data: bytes, close: bool = False) -> bool:
    """Whether the program takes further input."""
    try:
        return (process.write_stdin(data, close)).running
    except (errors.InvalidConfig, errors.NotFound):
        return False  # it has ended


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
