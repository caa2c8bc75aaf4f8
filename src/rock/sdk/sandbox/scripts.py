"""`sandbox.process`: whole scripts, written into the sandbox and run there; and commands in the background, which
`arun(mode="nohup")` waits for with their true exit status."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Any, Protocol

from rock import errors
from rock.protocol.action import BACKGROUND_PID, MAX_OUTPUT, BashObservation, Check, Command
from rock.sdk import primitives
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.processes import LOG_PORTION, Process, Processes
from rock.sdk.sandbox.sessions import Sessions

CLEAN_UP = 15.0  # seconds


class Runs(Protocol):
    """ROCK's `arun`."""

    async def arun(
        self, cmd: str, session: str | None, wait_timeout: float | None, wait_interval: float, mode: str, /
    ) -> BashObservation: ...


class Scripts:
    """Shell scripts. `sandbox.exec` runs one program, `sandbox.processes.start` a background process."""

    def __init__(self, files: Files, sandbox: Runs) -> None:
        self._files = files
        self._sandbox = sandbox

    async def execute_script(
        self,
        script_content: str,
        script_name: str | None = None,
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
        cleanup: bool = True,
    ) -> BashObservation:
        """Write a script to /tmp and run it by bash (sh where there is no bash), apart from any session.

        script_name: its name below /tmp; one of our own unless given. wait_timeout: seconds; then it is left running
        and the observation says `timed_out`. cleanup: the file is removed afterwards. The status is the script's own.
        """
        path = f"/tmp/{script_name or f'script_{time.time_ns()}.sh'}"
        word = shlex.quote(path)
        command = f"if command -v bash > /dev/null 2>&1; then exec bash {word}; else exec sh {word}; fi"
        await self._files.write(path, script_content)
        try:
            return await self._sandbox.arun(command, None, wait_timeout, wait_interval, "nohup")
        finally:
            if cleanup:
                await primitives.settle(lambda: self._remove(path), CLEAN_UP)

    async def _remove(self, path: str) -> None:
        try:
            await self._files.remove(path)
        except errors.NotFound:
            return  # the script removed itself


# ---- commands in the background ----


class Host(Protocol):
    """What these functions use of a `Sandbox`."""

    sandbox_id: str | None
    files: Files
    sessions: Sessions
    processes: Processes

    async def arun(
        self, cmd: str, session: str | None = None, wait_timeout: float | None = 300, *, check: Check = "silent"
    ) -> BashObservation: ...


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
    sandbox: Host,
    cmd: str,
    session: str | None,
    timeout: float | None,
    output_file: str | None,
    limit: int | None,
    ignore_output: bool,
    started: Callable[[int], Any] | None = None,
) -> BashObservation:
    """Start, wait, and read what came. After a timeout `exit_code` is None and the process is left running. started:
    called with the process id inside, and waited for."""
    began = time.monotonic()
    if ignore_output and not output_file:
        output_file = f"/tmp/tmp_{time.time_ns()}.out"
    process = await sandbox.processes.begin(await _command(sandbox, cmd, session, output_file))
    if started is not None:
        await started(process.info.pid)
    info = await process.wait(timeout)
    seen = BashObservation(exit_code=info.exit_code)
    if info.running:
        took = time.monotonic() - began
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
    seen.duration = time.monotonic() - began
    return seen


# ---- ROCK's three steps of the same, for code that takes them one by one: the process is a job of the session's shell.


async def start_in_session(
    sandbox: Host, cmd: str, tmp_file: str, session: str
) -> tuple[int | None, BashObservation | None]:
    """(pid, None), or (None, what the session saw) where it could not be started."""
    line = f"{cmd} < /dev/null > {shlex.quote(tmp_file)} 2>&1 & echo PIDSTART${{!}}PIDEND; disown 2>/dev/null || :"
    seen = await sandbox.arun(line, session, _START)
    found = BACKGROUND_PID.search(seen.output)
    if found is None:
        seen.failure_reason = seen.failure_reason or "the command could not be started in the background"
        return None, seen
    return int(found[1]), None


async def wait_in_session(sandbox: Host, pid: int, session: str, timeout: float) -> tuple[bool, str]:
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
    sandbox: Host, tmp_file: str, success: bool, message: str, ignore_output: bool, limit: int | None
) -> BashObservation:
    """The output file as an observation: exit_code 0 after a success, as in ROCK, which does not know the status."""
    seen = BashObservation(exit_code=0 if success else 1, failure_reason="" if success else message)
    if ignore_output:
        seen.output = await _where(sandbox, tmp_file, seen)
        return seen
    try:
        size = (await sandbox.files.stat(tmp_file)).size
        data = await sandbox.files.read(tmp_file, length=MAX_OUTPUT if limit is None else limit)
    except errors.NotFound:
        size, data = 0, b""
    seen.output = data.decode("utf-8", "replace")
    seen.dropped_bytes = max(0, size - len(data))
    return seen


async def _command(sandbox: Host, cmd: str, session: str | None, output_file: str | None) -> Command:
    """The command as a program of its own, in the folder, environment, user and shell of its session if it has one."""
    argv = ["sh", "-c", SCRIPT, "sh", cmd, output_file or "", ""]
    if session is None:
        return Command(command=argv, timeout=None)
    info = next((found for found in await sandbox.sessions.list() if found.session == session), None)
    if info is None:
        raise errors.NotFound(
            f"session {session!r} does not exist", hint="create it with sessions.create", sandbox_id=sandbox.sandbox_id
        )
    told = await sandbox.arun("pwd; env -0", session, 30, check="raise")
    folder, _, rest = told.output_bytes.partition(b"\n")
    pairs = (pair.partition(b"=") for pair in rest.split(b"\0") if b"=" in pair)
    env = {_text(name): _text(value) for name, _, value in pairs}
    argv[-1] = info.shell
    return Command(command=argv, timeout=None, env=env, cwd=_text(folder), user=info.user)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


async def _read(sandbox: Host, process: Process, output_file: str | None, limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes of the output, and how many there are in all."""
    if output_file:
        try:
            size = (await sandbox.files.stat(output_file)).size
            return await sandbox.files.read(output_file, length=limit), size
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


async def _where(sandbox: Host, output_file: str, seen: BashObservation) -> str:
    """ROCK's block of text for an output that is not sent back."""
    try:
        size = f"{(await sandbox.files.stat(output_file)).size} bytes"
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
