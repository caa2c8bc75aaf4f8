"""Sessions: shells that stay open in a sandbox, and the commands that run in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import orjson

from rock import errors
from rock.protocol.action import (
    BashAction,
    BashObservation,
    CloseBashSessionResponse,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    SessionInfo,
)
from rock.protocol.node import SessionList
from rock.sdk.sandbox.link import LATE, SLACK, Link, parse
from rock.sdk.sandbox.options import RunOptions, SessionOptions, known, require_flag
from rock.sdk.sandbox.processes import raise_if_failed, wire
from rock.sdk.sandbox.stream import OutputStream

DEFAULT = "default"
TIMEOUT = 300.0  # seconds


class Sessions:
    """`sandbox.sessions`: shells that keep their working directory and variables between commands.

    The session "default" opens at its first use; `create` opens others.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def create(
        self, session: str = DEFAULT, *, timeout: float = 10.0, **options: Unpack[SessionOptions]
    ) -> CreateBashSessionResponse:
        """Open a session within `timeout` seconds. Conflict: a session of this name is open."""
        known(options, SessionOptions, "a session")
        fields: dict[str, Any] = dict(options)
        if "user" in fields:
            fields["remote_user"] = fields.pop("user")
        return await self.open(CreateBashSessionRequest(session=session, startup_timeout=timeout, **fields))

    async def open(self, request: CreateBashSessionRequest) -> CreateBashSessionResponse:
        """Open the session of a request."""
        link, body = self._link, request.model_dump(mode="json", exclude_none=True)
        answer = await link._call("create_session", link._path("create_session"), body, wait=request.startup_timeout)
        return parse(CreateBashSessionResponse, answer)

    async def close(self, session: str = DEFAULT) -> CloseBashSessionResponse:
        """Close a session and kill its processes. Nothing happens when it is not open."""
        link = self._link
        try:
            answer = await link._call("close_session", link._path("close_session", session))
        except errors.NotFound:
            await link._call("list_sessions", link._path("list_sessions"))  # NotFound if the sandbox is missing
            return CloseBashSessionResponse()
        return parse(CloseBashSessionResponse, answer or {})

    async def run(
        self,
        command: str,
        *,
        session: str = DEFAULT,
        timeout: float | None = TIMEOUT,
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> BashObservation:
        """`Sandbox.run`."""
        require_flag("check", check)
        body: dict[str, Any] = {"command": command, "timeout": timeout, "check": "silent"}
        if options:
            known(options, RunOptions, "run")
            body.update(options)
        result = await self.send(session, body, timeout)
        if check:
            raise_if_failed(command, result, result.output, "", self._link.sandbox_id)
        return result

    async def act(self, action: BashAction) -> BashObservation:
        """Run the command of an action. CommandFailed, CommandTimeout with `check` "raise"; SessionClosed."""
        result = await self.send(action.session, wire(action), action.timeout)
        if action.check == "raise":
            raise_if_failed(action.command, result, result.output, action.error_msg, self._link.sandbox_id)
        return result

    def stream(
        self,
        command: str,
        *,
        session: str = DEFAULT,
        timeout: float | None = TIMEOUT,
        **options: Unpack[RunOptions],
    ) -> OutputStream:
        """`Sandbox.stream` of a command in a session."""
        known(options, RunOptions, "a command in a session")
        return self.stream_of(_action(command, session, timeout, options))

    def stream_of(self, action: BashAction) -> OutputStream:
        """The output of an action while it runs."""
        target = self._link._path("run", action.session, stream=True)
        return OutputStream(self._link, target, wire(action), BashObservation)

    async def interrupt(self, session: str = DEFAULT) -> SessionInfo:
        """Send Ctrl-C to the command of a session."""
        target = self._link._path("interrupt", session)
        return parse(SessionInfo, await self._link._call("interrupt", target))

    async def resize(self, rows: int, columns: int, session: str = DEFAULT) -> SessionInfo:
        """Change the size of the terminal of a session."""
        body = {"rows": rows, "columns": columns}
        return parse(SessionInfo, await self._link._call("resize", self._link._path("resize", session), body))

    async def send_input(self, data: bytes | str, session: str = DEFAULT) -> SessionInfo:
        """Send input to the terminal of a session while a command runs in it."""
        raw = data.encode() if isinstance(data, str) else data
        target = self._link._path("session_input", session)
        kind = "application/octet-stream"
        return parse(SessionInfo, await self._link._transport.json_raw("POST", target, raw, content_type=kind))

    async def send(self, session: str, body: dict[str, Any], limit: float | None) -> BashObservation:
        """Send the body of a command; `limit`: its timeout in seconds."""
        target = self._link._path("run", session)
        raw = orjson.dumps(body)
        timeout = None if limit is None else limit + SLACK
        late = None if limit is None else limit + LATE
        answer = await self._link._transport.call("POST", target, raw, timeout=timeout, limit=late)
        try:
            return BashObservation.model_validate_json(answer)  # faster than to decode it and to build the model
        except ValueError:
            raise errors.ServerError(f"malformed answer: {answer[:80]!r} is not a BashObservation") from None

    async def list(self) -> list[SessionInfo]:
        """The open sessions."""
        target = self._link._path("list_sessions")
        return parse(SessionList, await self._link._call("list_sessions", target)).items


def _action(command: str, session: str, timeout: float | None, options: Mapping[str, Any]) -> BashAction:
    if not isinstance(command, str):
        raise errors.InvalidConfig("a session runs a command line", hint="pass a string, or run a list without session")
    return BashAction(command=command, session=session, timeout=timeout, check="silent", **options)
