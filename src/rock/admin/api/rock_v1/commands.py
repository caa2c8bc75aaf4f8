"""Commands and sessions in the ROCK dialect, over the data plane."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from typing import Any, Literal

from pydantic import Field

from rock.admin.api.rock_v1.envelope import AboutSandbox, DataPlane, Failed, Row, body_of, enveloped
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unsupported
from rock.http.asgi import Request
from rock.protocol.action import BACKGROUND_PID, SESSION_PATTERN, Check
from rock.protocol.keys import Access

_SESSION = re.compile(SESSION_PATTERN)
_PROMPT = "SHELLPS1PREFIX"  # the prompt that ROCK's server includes in every observation
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SYNTAX = 2  # exit status of bash for a syntax error
_REMEMBERED = 10_000
_SUBMIT = "& echo PIDSTART${!}PIDEND;disown"  # the suffix with which clients start a background command
# the command by which clients check a background process; while it runs, they sleep for 5 s or more
_PROBE = re.compile(r"kill -0 (\d+)")
_HELD = 1.0  # seconds that the first check waits for the end of a short command
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.1  # seconds between two checks
_MARGIN = 0.25  # seconds: clients wait as long as the command may take, and expect to time out first


class ExecuteRequest(AboutSandbox):
    command: str | list[str]
    timeout: float | None = 1200.0
    cwd: str | None = None
    env: dict[str, str] | None = None
    check: bool = False
    error_msg: str = ""


class CreateSession(AboutSandbox):
    session: str = "default"
    session_type: Literal["bash"] = "bash"
    startup_source: list[str] = Field(default_factory=list)
    env_enable: bool = False
    env: dict[str, str] | None = None
    remote_user: str | None = None


class CloseSession(AboutSandbox):
    session: str = "default"
    session_type: Literal["bash"] = "bash"


class ActionRequest(AboutSandbox):
    command: str
    session: str = "default"
    action_type: Literal["bash"] = "bash"
    timeout: float | None = None
    check: Check = "raise"
    is_interactive_command: bool = False
    is_interactive_quit: bool = False
    error_msg: str = ""


class Commands:
    """Handlers of commands and sessions, by method and path."""

    def __init__(self, data: DataPlane) -> None:
        self._data = data
        self._shaped: OrderedDict[str, None] = OrderedDict()  # sandboxes whose default session a client has configured
        # (sandbox, pid) of processes without a check yet
        self._started: OrderedDict[tuple[str, str], None] = OrderedDict()

    def routes(self) -> list[Row]:
        return [
            ("POST", "/execute", enveloped(self.execute, "execute command failed"), Access.RUN),
            ("POST", "/create_session", enveloped(self.create_session, "create session failed"), Access.RUN),
            ("POST", "/run_in_session", enveloped(self.run_in_session, "run in session failed"), Access.RUN),
            ("POST", "/close_session", enveloped(self.close_session, "close session failed"), Access.RUN),
        ]

    # ---- commands ----

    async def execute(self, request: Request) -> dict[str, Any]:
        """The result of a command. A command that could not run, or exceeded its timeout, has the status -1 and the
        reason."""
        spec = await body_of(request, ExecuteRequest)
        body = spec.model_dump(include={"command", "timeout", "cwd", "env"})
        try:
            seen = await self._data.json(request, "execute", spec.sandbox_id, body)
        except RockError as error:
            if error.status >= 500:
                raise  # an error of the server; the program may be running normally
            seen = {"exit_code": -1, "stdout": "", "stderr": str(error)}
        code, errors = seen["exit_code"], seen["stderr"]
        if code is None:
            code, errors = -1, "\n".join(filter(None, [errors, seen["failure_reason"]]))
        if spec.check and code != 0:
            raise Failed(
                _told(spec.error_msg, f"Command {spec.command!r} failed with exit code {code}", seen["stdout"] + errors)
            )
        return {"stdout": seen["stdout"], "stderr": errors, "exit_code": code}

    # ---- sessions ----

    async def create_session(self, request: Request) -> dict[str, Any]:
        """Open a session. An existing name is no error in ROCK, and its session stays unchanged."""
        spec = await body_of(request, CreateSession)
        # With this switch even "default" is a session that the client created: it reads .bashrc, as all of ROCK's do.
        body = {**spec.model_dump(exclude={"sandbox_id"}), "env_enable": True}
        body["session"] = name = session_name(spec.session)
        place = f"{spec.sandbox_id}/{name}"
        body["startup_source"], noise = await self._sources(request, spec)
        try:
            reply = await self._data.json(request, "create_session", spec.sandbox_id, body)
        except Conflict:
            if name != "default" or place in self._shaped:
                return {"output": "", "session_type": "bash"}
            # The existing default session of every sandbox is not the one that this client requests.
            await self._data.bytes(request, "close_session", spec.sandbox_id, session=name)
            reply = await self._data.json(request, "create_session", spec.sandbox_id, body)
        if name == "default":
            self._shaped[place] = None
            while len(self._shaped) > _REMEMBERED:
                self._shaped.popitem(last=False)
        return {"output": plain(noise + reply["output"]), "session_type": "bash"}

    async def _sources(self, request: Request, spec: CreateSession) -> tuple[list[str], str]:
        """The existing files to source, and the error text of a shell for the others. ROCK does not treat missing files
        as an error, and clients request root's .bashrc for any image."""
        found, noise = [], ""
        for path in spec.startup_source:
            try:
                await self._data.bytes(request, "stat_file", spec.sandbox_id, query={"path": path})
            except NotFound:
                noise += f"bash: {path}: No such file or directory\n"
                continue
            except InvalidConfig:
                pass  # not absolute: the shell may resolve it
            found.append(path)
        return found, noise

    async def close_session(self, request: Request) -> dict[str, Any]:
        """Close a session; a missing one counts as closed."""
        spec = await body_of(request, CloseSession)
        name = session_name(spec.session)
        try:
            await self._data.bytes(request, "close_session", spec.sandbox_id, session=name)
        except NotFound:
            pass
        self._shaped.pop(f"{spec.sandbox_id}/{name}", None)
        return {"session_type": "bash"}

    async def run_in_session(self, request: Request) -> dict[str, Any]:
        """The observation of a command; an exit status other than 0 is a failure, unless `check` is set otherwise."""
        spec = await body_of(request, ActionRequest)
        if spec.is_interactive_command or spec.is_interactive_quit:
            raise Unsupported("interactive commands are not supported in this dialect", hint="use the terminal")
        name = session_name(spec.session)
        timeout = None if spec.timeout is None else spec.timeout + _MARGIN
        body = {"command": _kept(spec.command), "timeout": timeout, "check": "silent"}
        try:
            seen = await self._probed(request, spec, body, name)
        except NotFound as error:
            raise Failed(f"session {spec.session!r} does not exist: {error}") from None
        code, output = seen["exit_code"], plain(seen["output"])
        if spec.command.endswith(_SUBMIT) and (started := BACKGROUND_PID.search(output)) is not None:
            self._started[spec.sandbox_id, started[1]] = None
            while len(self._started) > _REMEMBERED:
                self._started.popitem(last=False)
        if code is None:
            raise Failed(_told(spec.error_msg, seen["failure_reason"], output), told=False)
        if code == _SYNTAX:
            await self._refuse_syntax(request, spec, output)
        if code != 0 and spec.check == "raise":
            text = f"Command {spec.command!r} failed with exit code {code}"
            raise Failed(_told(spec.error_msg, text, output), told=False)
        return {
            "session_type": "bash",
            "output": output,
            "exit_code": None if spec.check == "ignore" else code,
            "failure_reason": seen["failure_reason"],
            "expect_string": _PROMPT,
        }

    async def _probed(self, request: Request, spec: ActionRequest, body: dict[str, Any], name: str) -> Any:
        """The result of the command. The first check of a background command is repeated until the command has ended,
        for at most one second: after a check that finds it running, clients sleep for 5 s or more."""
        probe = _PROBE.fullmatch(spec.command.strip())
        first = probe is not None and (spec.sandbox_id, probe[1]) in self._started
        if probe is not None:
            self._started.pop((spec.sandbox_id, probe[1]), None)
        clock = asyncio.get_running_loop().time
        end, pause = clock() + (_HELD if first else 0.0), _FIRST_PAUSE
        while True:
            seen = await self._data.json(request, "run", spec.sandbox_id, body, session=name)
            if seen["exit_code"] != 0 or clock() + pause > end:
                return seen
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    async def _refuse_syntax(self, request: Request, spec: ActionRequest, output: str) -> None:
        """Failed when bash cannot parse the command, with the text that agents search for.

        Only bash can determine that. The check runs after the command and only on a suspicious result, so that no valid
        command waits.
        """
        if "syntax error" not in output and "unexpected EOF" not in output:
            return
        body = {"command": ["/bin/bash", "-n"], "stdin": spec.command, "timeout": 10.0}
        try:
            seen = await self._data.json(request, "execute", spec.sandbox_id, body)
        except RockError:
            return  # an image without bash
        if seen["exit_code"]:
            raise Failed(
                f"Error (exit code {_SYNTAX}) while checking bash command\n{spec.command!r}\n{seen['stderr']}",
                told=False,
            )


def session_name(name: str) -> str:
    """A name that is valid in paths: clients may use any text as the name of a session."""
    if _SESSION.match(name):
        return name
    return "rock-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _kept(command: str) -> str:
    """A command for the session. A terminal's shell keeps an ended job until it has reported it; our shell has removed
    the job by then, so `disown` would fail."""
    return f"{command} 2>/dev/null || :" if command.endswith(_SUBMIT) else command


def plain(output: str) -> str:
    """Output as ROCK shows it: without terminal color codes and surrounding whitespace."""
    return (_ESCAPE.sub("", output) if "\x1b" in output else output).strip()


def _told(prefix: str, text: str, output: str) -> str:
    head = f"{prefix}: {text}" if prefix else text
    return f"{head}. Here is the output:\n{output!r}"
