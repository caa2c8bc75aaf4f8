"""Sessions: shells held open in a sandbox, and the commands that run in them."""

from __future__ import annotations

from typing import Any

import orjson

from rock import errors
from rock.protocol.action import (
    BashAction,
    BashObservation,
    Check,
    CloseBashSessionRequest,
    CloseBashSessionResponse,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    ExecuteBashSessionResponse,
    SessionInfo,
)
from rock.protocol.node import SessionList
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.link import LATE, SLACK, parse
from rock.sdk.sandbox.nohup import output_of_session, run_nohup, start_in_session, wait_in_session
from rock.sdk.sandbox.process import Programs, raise_if_failed, wire

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
