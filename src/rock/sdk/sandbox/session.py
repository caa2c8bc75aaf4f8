"""Sessions: shells held open in a sandbox, and the commands that run in them."""

from __future__ import annotations

import shlex
import time
from typing import Any

import orjson

from rock import errors
from rock.protocol.action import (
    BACKGROUND_PID,
    MAX_OUTPUT,
    BashAction,
    BashObservation,
    Check,
    CloseBashSessionRequest,
    CloseBashSessionResponse,
    Command,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    ExecuteBashSessionResponse,
    SessionInfo,
)
from rock.protocol.node import SessionList
from rock.sdk import primitives
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.link import LATE, SLACK, parse
from rock.sdk.sandbox.process import LOG_PORTION, Process, Programs, raise_if_failed, wire

# ---- commands in the background ----
#
# `arun(mode="nohup")`: a command in the background of a sandbox, waited for, with its true exit status.

_START = 30.0  # seconds for a command of the session that is over at once
# Its arguments: the command, the file for its output ("" is none), and the shell ("" is bash, or sh).
SCRIPT = """
if [ -n "$2" ]; then
    case $2 in */*) mkdir -p -- "${2%/*}" || exit 125 ;; esac
    exec > "$2" || exit 125
fi
exec 2>&1
shell=$3
if [ -z "$shell" ]; then
    if command -v bash > /dev/null 2>&1; then shell=bash; else shell=sh; fi
fi
exec "$shell" -c "$1"
"""


async def run_nohup(
    sandbox: Sessions,
    cmd: str,
    session: str | None,
    timeout: float | None,
    output_file: str | None,
    limit: int | None,
    ignore_output: bool,
) -> BashObservation:
    """Start, wait, and read what came. After a timeout `exit_code` is None and the process is left running."""
    started = time.monotonic()
    if ignore_output and not output_file:
        output_file = f"/tmp/tmp_{time.time_ns()}.out"
    process = await sandbox.start_process(await _command(sandbox, cmd, session, output_file))
    info = await process.wait(timeout)
    seen = BashObservation(exit_code=info.exit_code)
    if info.running:
        took = time.monotonic() - started
        seen.timed_out = True
        seen.failure_reason = (
            f"Process {info.pid} did not complete within {took:.1f}s (timeout: {timeout:g}s); "
            f"it is left running as process {info.process_id}"
        )
    elif info.exit_code is None:
        seen.failure_reason = f"Process {info.pid} ended and its exit status is not known"
    if ignore_output:
        assert output_file is not None
        seen.output = await _where(sandbox, output_file, seen)
    else:
        data, size = await _read(sandbox, process, output_file, MAX_OUTPUT if limit is None else limit)
        seen.output = data.decode("utf-8", "replace")
        seen.dropped_bytes = max(0, size - len(data))
    if not info.running:
        await process.forget()
    seen.duration = time.monotonic() - started
    return seen


# ---- ROCK's three steps of the same, for code that takes them one by one: the process is a job of the session's shell.


async def start_in_session(
    sandbox: Sessions, cmd: str, tmp_file: str, session: str
) -> tuple[int | None, BashObservation | None]:
    """(pid, None), or (None, what the session saw) where it could not be started."""
    line = f"{cmd} < /dev/null > {shlex.quote(tmp_file)} 2>&1 & echo PIDSTART${{!}}PIDEND; disown 2>/dev/null || :"
    seen = await sandbox.arun(line, session, _START)
    found = BACKGROUND_PID.search(seen.output)
    if found is None:
        seen.failure_reason = seen.failure_reason or "the command could not be started in the background"
        return None, seen
    return int(found[1]), None


async def wait_in_session(sandbox: Sessions, pid: int, session: str, timeout: float) -> tuple[bool, str]:
    """(True, how long it took) when the process ended in time, else (False, why not)."""
    started, pause = time.monotonic(), 0.02
    while True:
        alive = (await sandbox.arun(f"kill -0 {int(pid)}", session, _START)).exit_code == 0
        took = time.monotonic() - started
        if not alive:
            return True, f"Process completed successfully in {took:.1f}s"
        if took + pause > timeout:
            return False, f"Process {pid} did not complete within {took:.1f}s (timeout: {timeout:g}s)"
        await primitives.sleep(pause)
        pause = min(pause * 1.5, 1.0)


async def output_of_session(
    sandbox: Sessions, tmp_file: str, success: bool, message: str, ignore_output: bool, limit: int | None
) -> BashObservation:
    """The output file as an observation: exit_code 0 after a success, as in ROCK, which does not know the status."""
    seen = BashObservation(exit_code=0 if success else 1, failure_reason="" if success else message)
    if ignore_output:
        seen.output = await _where(sandbox, tmp_file, seen)
        return seen
    try:
        size = (await sandbox.fs.stat(tmp_file)).size
        data = await sandbox.fs.read(tmp_file, length=MAX_OUTPUT if limit is None else limit)
    except errors.NotFound:
        size, data = 0, b""
    seen.output = data.decode("utf-8", "replace")
    seen.dropped_bytes = max(0, size - len(data))
    return seen


async def _command(sandbox: Sessions, cmd: str, session: str | None, output_file: str | None) -> Command:
    """The command as a program of its own, in the folder, environment, user and shell of its session if it has one."""
    argv = ["sh", "-c", SCRIPT, "sh", cmd, output_file or "", ""]
    if session is None:
        return Command(command=argv, timeout=None)
    info = next((found for found in await sandbox.sessions() if found.session == session), None)
    if info is None:
        raise errors.NotFound(f"session {session!r} does not exist", sandbox_id=sandbox.sandbox_id)
    told = await sandbox.arun("pwd; env -0", session, 30, check="raise")
    folder, _, rest = told.output_bytes.partition(b"\n")
    pairs = (pair.partition(b"=") for pair in rest.split(b"\0") if b"=" in pair)
    env = {_text(name): _text(value) for name, _, value in pairs}
    argv[-1] = info.shell
    return Command(command=argv, timeout=None, env=env, cwd=_text(folder), user=info.user)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


async def _read(sandbox: Sessions, process: Process, output_file: str | None, limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes of the output, and how many there are in all."""
    if output_file:
        try:
            size = (await sandbox.fs.stat(output_file)).size
            return await sandbox.fs.read(output_file, length=limit), size
        except errors.NotFound:
            return b"", 0  # the command moved it away
    parts: list[bytes] = []
    got = 0
    while got < limit:
        part = await process.logs(offset=got, limit=min(LOG_PORTION, limit - got))
        if not part.data:
            break
        parts.append(part.data)
        got += len(part.data)
    return b"".join(parts), max(process.info.stdout_size, got)


async def _where(sandbox: Sessions, output_file: str, seen: BashObservation) -> str:
    """ROCK's block of text for an output that is not sent back."""
    try:
        size = f"{(await sandbox.fs.stat(output_file)).size} bytes"
    except errors.NotFound:
        size = "unknown"
    status = "running" if seen.timed_out else "completed" if seen.exit_code == 0 else "failed"
    detail = seen.failure_reason or f"exit code {seen.exit_code}"
    return (
        "Command executed in nohup mode without streaming the log content.\n"
        f"Status: {status}\n"
        f"Output file: {output_file}\n"
        f"File size: {size}\n"
        "Read it with sandbox.fs.read, or download it with sandbox.fs.download_file.\n"
        f"Detail: {detail}\n"
    )


# ---- session ----
#


DEFAULT = "default"


class Sessions(Programs, Files):
    """Commands in sessions. The session "default" is opened by its first use; others by `create_session`."""

    async def create_session(
        self, request: CreateBashSessionRequest | None = None, **fields: Any
    ) -> CreateBashSessionResponse:
        """Open a session; `fields` are those of the request. Conflict: it is open already."""
        spec = request or CreateBashSessionRequest(**fields)
        body = spec.model_dump(mode="json", exclude_none=True)
        answer = await self._call("create_session", self._path("create_session"), body, wait=spec.startup_timeout)
        return parse(CreateBashSessionResponse, answer)

    async def close_session(self, request: CloseBashSessionRequest | str) -> CloseBashSessionResponse:
        """Close a session and kill what runs in it. One that is not open is closed already."""
        name = request if isinstance(request, str) else request.session
        try:
            answer = await self._call("close_session", self._path("close_session", name))
        except errors.NotFound:
            await self._call("list_sessions", self._path("list_sessions"))  # unless it is the sandbox that is missing
            return CloseBashSessionResponse()
        return parse(CloseBashSessionResponse, answer or {})

    async def sessions(self) -> list[SessionInfo]:
        """The open sessions."""
        return parse(SessionList, await self._call("list_sessions", self._path("list_sessions"))).items

    async def arun(
        self,
        cmd: str,
        session: str | None = None,
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
        mode: str = "normal",
        response_limited_bytes_in_nohup: int | None = None,
        ignore_output: bool = False,
        output_file: str | None = None,
        *,
        check: Check = "silent",
        timeout: float | None = None,
        separate: bool = False,
        max_output_bytes: int | None = None,
    ) -> BashObservation:
        """Run a command line in a session ("default" when None) and give what was seen, with its true exit status.

        wait_timeout, timeout: two names for the limit in seconds; after it the command is killed and the observation
            says `timed_out`; the session stays usable. None for wait_timeout is no limit.
        check: "raise" makes a status other than 0 CommandFailed, and a timeout CommandTimeout.
        separate: stdout in `output`, stderr in `stderr`. max_output_bytes: more is cut out of the middle, and counted.
        mode: "nohup" runs it in the background, in the session's folder and environment; a timeout then leaves it
            running. output_file: a file inside that gets all of its output. response_limited_bytes_in_nohup: no more
            than so much is sent back. ignore_output: nothing is; `output` says where it is and how large. wait_interval
            has no effect: the end of the command is told when it comes.
        """
        limit = wait_timeout if timeout is None else timeout
        if mode == "normal":
            body: dict[str, Any] = {"command": cmd, "timeout": limit, "check": "silent"}
            if separate:
                body["separate"] = True
            if max_output_bytes is not None:
                body["max_output_bytes"] = max_output_bytes
            seen = await self._run(session or DEFAULT, body, limit)
        elif mode == "nohup":
            seen = await run_nohup(
                self, cmd, session, limit, output_file, response_limited_bytes_in_nohup, ignore_output
            )
        else:
            raise errors.InvalidConfig(f"Unsupported arun mode: {mode}", hint='it is "normal" or "nohup"')
        if check == "raise":
            raise_if_failed(cmd, seen, seen.output, "", self.sandbox_id)
        return seen

    async def run_nohup_and_wait(
        self,
        cmd: str,
        redirect_file_path: str = "/dev/null",
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
    ) -> ExecuteBashSessionResponse:
        """ROCK's older form of `arun(mode="nohup")`, with the output in a file: `success` is an end with status 0."""
        try:
            seen = await self.arun(
                cmd, None, wait_timeout, wait_interval, "nohup", ignore_output=True, output_file=redirect_file_path
            )
        except errors.RockError as error:
            return ExecuteBashSessionResponse(success=False, message=str(error))
        return ExecuteBashSessionResponse(
            success=seen.exit_code == 0, message=seen.failure_reason or f"exit code {seen.exit_code}"
        )

    async def start_nohup_process(
        self, cmd: str, tmp_file: str, session: str
    ) -> tuple[int | None, BashObservation | None]:
        """Start a command in the background of a session, its output to `tmp_file`: (pid, None), or (None, what the
        session saw) where that failed. `arun(mode="nohup")` does the whole and gives the true exit status."""
        return await start_in_session(self, cmd, tmp_file, session)

    async def wait_for_process_completion(
        self, pid: int, session: str, wait_timeout: float, wait_interval: float = 10
    ) -> tuple[bool, str]:
        """Wait for the end of such a process: (whether it ended within `wait_timeout` seconds, a sentence about it).
        wait_interval has no effect: it is looked at once a second or more often."""
        return await wait_in_session(self, pid, session, wait_timeout)

    async def handle_nohup_output(
        self,
        tmp_file: str,
        session: str,
        success: bool,
        message: str,
        ignore_output: bool = False,
        response_limited_bytes_in_nohup: int | None = None,
    ) -> BashObservation:
        """What such a process wrote, as an observation; `success` and `message` are of `wait_for_process_completion`.
        As in ROCK its exit_code is 0 after every end: the status of the process is not known."""
        return await output_of_session(
            self, tmp_file, success, message, ignore_output, response_limited_bytes_in_nohup
        )

    async def run_in_session(self, action: BashAction) -> BashObservation:
        """Run an action; its `check` is "raise" unless told otherwise. CommandFailed, CommandTimeout, SessionClosed."""
        seen = await self._run(action.session, wire(action), action.timeout)
        if action.check == "raise":
            raise_if_failed(action.command, seen, seen.output, action.error_msg, self.sandbox_id)
        return seen

    async def interrupt(self, session: str = DEFAULT) -> SessionInfo:
        """Send Ctrl-C to what runs in a session."""
        return parse(SessionInfo, await self._call("interrupt", self._path("interrupt", session)))

    async def resize(self, rows: int, columns: int, session: str = DEFAULT) -> SessionInfo:
        """Change the size of a session's terminal."""
        body = {"rows": rows, "columns": columns}
        return parse(SessionInfo, await self._call("resize", self._path("resize", session), body))

    async def type_into(self, data: bytes | str, session: str = DEFAULT) -> SessionInfo:
        """Type into a session that has a terminal, while a command runs in it."""
        raw = data.encode() if isinstance(data, str) else data
        target = self._path("session_input", session)
        kind = "application/octet-stream"
        return parse(SessionInfo, await self._transport.json_raw("POST", target, raw, content_type=kind))

    async def _run(self, session: str, body: dict[str, Any], limit: float | None) -> BashObservation:
        target = self._path("run", session)
        raw = orjson.dumps(body)
        timeout = None if limit is None else limit + SLACK
        late = None if limit is None else limit + LATE
        answer = await self._transport.call("POST", target, raw, timeout=timeout, limit=late)
        try:
            return BashObservation.model_validate_json(answer)  # faster than to decode it and to build the model
        except ValueError:
            raise errors.ServerError(f"malformed answer: {answer[:80]!r} is not a BashObservation") from None
