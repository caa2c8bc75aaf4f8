"""The routes of SWE-ReX for one sandbox, below /swerex/SANDBOX, for `RemoteRuntime(host=URL, auth_token=KEY)`.

A session of SWE-ReX is a native session of its own, so the default session of a sandbox is not affected. A repetition
of a request with the same X-Request-ID gets the same response, by the idempotency keys of the native requests.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import IO, Any

from pydantic import ValidationError

from rock.dialects.api import LocalApi, api_of, limited_body
from rock.dialects.swerex.archive import LARGEST, entries_of, tar_of
from rock.dialects.swerex.interactive import InteractivePrograms, Place, TerminalProgram
from rock.dialects.swerex.messages import (
    CloseSession,
    CreateSession,
    Execute,
    Interrupt,
    ReadFile,
    Refused,
    Run,
    WriteFile,
    failed,
    is_own,
    malformed,
    refused,
    request_of,
    session_name,
)
from rock.errors import Forbidden, InvalidConfig, NotFound, QuotaExceeded, RockError, Unauthorized
from rock.http.asgi import Answer, App, Found, Handler, Request, Router, answer
from rock.http.multipart import Form, Part, boundary_of
from rock.protocol.keys import Access
from rock.protocol.route import Route
from rock.protocol.sandbox import State

PREFIX = "/swerex/{sandbox_id}"
_BODY = 64 << 20  # bytes of a JSON body
_CHUNK = 1 << 20
_STARTED = 10.0  # seconds for the start of a shell, beside those of its files
_PROMPT = "SHELLPS1PREFIX"  # the value of expect_string after a command that has ended
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SYNTAX = 2  # exit status of bash for a syntax error
_REQUEST_ID = re.compile(r"^[A-Za-z0-9_-]{1,100}\Z")

Work = Callable[[LocalApi, Request, bytes, str], Awaitable[dict[str, Any]]]


class SwerexEndpoint:
    """The routes of all sandboxes. api: the application that serves the native API."""

    def __init__(self, api: App) -> None:
        self._api = api
        self._programs = InteractivePrograms(api)
        self._router = Router("swerex")
        json = self._json
        for method, path, handler, access in (
            ("GET", "/is_alive", self.is_alive, Access.READ),
            ("POST", "/create_session", json(create_session), Access.RUN),
            ("POST", "/run_in_session", json(self.run_in_session), Access.RUN),
            ("POST", "/close_session", json(self.close_session), Access.RUN),
            ("POST", "/execute", json(execute), Access.RUN),
            ("POST", "/read_file", json(read_file), Access.READ),
            ("POST", "/write_file", json(write_file), Access.RUN),
            ("POST", "/upload", self.upload, Access.RUN),
            ("POST", "/close", json(self.close_sessions), Access.RUN),
        ):
            row = Route(f"swerex{path}", method, PREFIX + path, "data", "SWE-ReX", access=access)
            self._router.add(row, _raising(handler))

    def match(self, method: str, path: str) -> Found | None:
        """The handler of a request."""
        return self._router.match(method, path)

    def _json(self, work: Work) -> Handler:
        """A handler of a JSON body, whose result is the complete response."""

        async def reply(request: Request) -> Answer:
            data = await limited_body(request, _BODY)
            given = request.header(b"x-request-id") or ""
            key = f"swerex-{given}" if _REQUEST_ID.match(given) else ""
            return answer(await work(api_of(self._api, request), request, data, key))

        return reply

    async def is_alive(self, request: Request) -> Answer:
        """Whether the sandbox runs; a missing one is not an error."""
        await limited_body(request, _BODY)
        try:
            info = await api_of(self._api, request).json("get_sandbox", sandbox_id=request.path["sandbox_id"])
        except NotFound as error:
            return answer({"is_alive": False, "message": str(error)})
        alive = info["state"] == State.RUNNING
        return answer({"is_alive": alive, "message": "" if alive else f"the sandbox is {info['state']}"})

    # ---- sessions, and programs in them ----

    async def close_session(self, api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
        spec: CloseSession = request_of(data, CloseSession)
        sandbox_id, name = request.path["sandbox_id"], session_name(spec.session)
        await self._programs.end((api.caller.owner, sandbox_id, name))
        await api.bytes("close_session", sandbox_id=sandbox_id, session=name, key=key)
        return {"session_type": "bash"}

    async def close_sessions(self, api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
        """Close the sessions of this dialect. The sandbox stays until it is stopped, or idle for its timeout."""
        sandbox_id = request.path["sandbox_id"]
        await self._programs.end_all(api.caller.owner, sandbox_id)
        for item in (await api.json("list_sessions", sandbox_id=sandbox_id))["items"]:
            if is_own(item["session"]):
                try:
                    await api.bytes("close_session", sandbox_id=sandbox_id, session=item["session"])
                except NotFound:
                    pass  # it ended by itself
        return {}

    async def run_in_session(self, api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
        spec = request_of(data, Run, Interrupt)
        place = (api.caller.owner, request.path["sandbox_id"], session_name(spec.session))
        program = self._programs.find(place)
        if isinstance(spec, Interrupt):
            if program is None:
                return await _interrupt(api, request.path["sandbox_id"], spec)
            return await self._interrupt_program(place, program, spec)
        if program is not None:
            if not (spec.is_interactive_command or spec.is_interactive_quit):
                raise Refused("SwerexException", f"an interactive program runs in session {spec.session!r}; end it "
                                                 "with is_interactive_quit or an interrupt")
            async with program.lock:
                program.write(spec.command.encode("utf-8", "surrogatepass") + b"\n")
                return await self._read(program, spec, [] if spec.is_interactive_quit else spec.expect)
        if spec.is_interactive_command:
            program = await self._programs.start(api, place, spec.command)
            async with program.lock:
                return await self._read(program, spec, spec.expect)
        if spec.expect:
            raise Refused("SwerexException", "expect is supported for interactive commands alone; another command ends "
                                             "when the shell has run it")
        return await _run(api, request.path["sandbox_id"], spec, key)

    async def _read(self, program: TerminalProgram, spec: Run, expected: list[str]) -> dict[str, Any]:
        try:
            seen = await program.read(expected, spec.timeout)
        except TimeoutError:
            raise Refused("CommandTimeoutError", f"timeout after {spec.timeout} seconds while running command "
                                                 f"{spec.command!r}") from None  # fmt: skip
        output = _plain(seen.output).lstrip().removeprefix(spec.command).strip()
        return _ended(output, seen.expected or _PROMPT)

    async def _interrupt_program(self, place: Place, program: TerminalProgram, spec: Interrupt) -> dict[str, Any]:
        """Send Ctrl-C until an expected text is printed or the program ends; at last end it."""
        async with program.lock:
            for _ in range(spec.n_retry):
                program.write(b"\x03")
                try:
                    seen = await program.read(spec.expect, spec.timeout)
                except TimeoutError:
                    continue
                return _ended(_plain(seen.output).strip(), seen.expected or _PROMPT)
        await self._programs.end(place)
        return _ended("", _PROMPT)

    async def close(self) -> None:
        """End the interactive programs."""
        await self._programs.close()

    async def upload(self, request: Request) -> Answer:
        """A form with a file, target_path, and unzip for a folder."""
        form = Form(request.chunks(), boundary_of(request.header(b"content-type")))
        fields: dict[str, str] = {}
        with tempfile.TemporaryFile() as kept:
            found = False
            async with aclosing(form.parts()) as parts:
                async for part in parts:
                    if part.name != "file":
                        if len(fields) < 16:
                            fields[part.name] = (await part.text()).strip()
                    elif not found:
                        found = True
                        await _spool(part, kept)
            missing = ["file"] * (not found) + ["target_path"] * (not fields.get("target_path"))
            if missing:
                raise InvalidConfig(f"the form has no {' and no '.join(missing)}",
                                    hint="send file, target_path and unzip")
            api, sandbox_id = api_of(self._api, request), request.path["sandbox_id"]
            query = {"path": fields["target_path"]}
            if fields.get("unzip", "false").lower() in ("true", "1", "on", "yes"):
                entries = await asyncio.to_thread(entries_of, kept)
                await api.bytes("upload_dir", tar_of(kept, entries), query=query, sandbox_id=sandbox_id)
            else:
                kept.seek(0)
                await api.bytes("write_file", _pieces(kept), query=query, sandbox_id=sandbox_id)
        return answer({})


def _raising(handler: Handler) -> Handler:
    """A handler whose errors are those of the client's classes, except for keys and quotas."""

    async def reply(request: Request) -> Answer:
        try:
            return await handler(request)
        except ValidationError as error:
            return malformed(error)
        except Refused as error:
            return failed(error)
        except (Unauthorized, Forbidden, QuotaExceeded):
            raise
        except RockError as error:
            return failed(refused(error))

    return reply


# ---- sessions ----


async def create_session(api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
    """Open a session, and source its files. The output has the error text of missing ones."""
    spec: CreateSession = request_of(data, CreateSession)
    sandbox_id, name = request.path["sandbox_id"], session_name(spec.session)
    body = {"session": name, "env_enable": True, "startup_timeout": spec.startup_timeout + _STARTED}
    made = await api.json("create_session", body, sandbox_id=sandbox_id, key=key and f"{key}-create")
    output = made["output"]
    if spec.startup_source:
        words = [path if re.fullmatch(r"[\w./~+-]+", path) else _quoted(path) for path in spec.startup_source]
        action = {"command": "\n".join(f"source {word}" for word in words), "check": "silent",
                  "timeout": spec.startup_timeout + _STARTED}  # fmt: skip
        seen = await api.json("run", action, sandbox_id=sandbox_id, session=name, key=key and f"{key}-source")
        if seen["timed_out"] or seen["session_closed"]:
            await api.bytes("close_session", sandbox_id=sandbox_id, session=name)
            raise Refused("CommandTimeoutError" if seen["timed_out"] else "SessionNotInitializedError",
                          f"session {spec.session!r} did not start: {seen['failure_reason']}")
        output += seen["output"]
    return {"output": _plain(output), "session_type": "bash"}


async def _run(api: LocalApi, sandbox_id: str, spec: Run, key: str) -> dict[str, Any]:
    """Run a command. A syntax error is found before anything runs: bash executes the lines above it."""
    if "\n" in spec.command.strip():
        await _check_syntax(api, sandbox_id, spec.command)
    body = {"command": spec.command, "timeout": spec.timeout, "check": "silent"}
    seen = await api.json("run", body, sandbox_id=sandbox_id, session=session_name(spec.session), key=key)
    code, output = seen["exit_code"], _plain(seen["output"])
    if seen["timed_out"]:
        raise Refused("CommandTimeoutError", f"timeout after {spec.timeout} seconds while running command "
                                             f"{spec.command!r}", {"output": output})  # fmt: skip
    if code == _SYNTAX and ("syntax error" in output or "unexpected EOF" in output):
        await _check_syntax(api, sandbox_id, spec.command)
    if code is None and spec.check == "raise":
        raise Refused("NoExitCodeError", f"the exit code of {spec.command!r} is unknown: {seen['failure_reason']}")
    if code and spec.check == "raise":
        raise Refused("NonZeroExitCodeError", _prefixed(spec.error_msg, f"command {spec.command!r} failed with exit "
                                                        f"code {code}; its output: {output!r}"))  # fmt: skip
    return {"output": output, "exit_code": None if spec.check == "ignore" else code,
            "failure_reason": seen["failure_reason"], "expect_string": _PROMPT, "session_type": "bash"}  # fmt: skip


def _ended(output: str, expected: str) -> dict[str, Any]:
    return {"output": output, "exit_code": 0, "failure_reason": "", "expect_string": expected, "session_type": "bash"}


async def _check_syntax(api: LocalApi, sandbox_id: str, command: str) -> None:
    """Refused when bash cannot parse the command."""
    body = {"command": ["bash", "-n"], "stdin": command + "\n", "timeout": 30.0}
    try:
        seen = await api.json("execute", body, sandbox_id=sandbox_id)
    except NotFound as error:
        if error.message.startswith("Sandbox "):
            raise
        return  # an image without bash
    if seen["exit_code"]:
        extra = {"bash_stdout": seen["stdout"], "bash_stderr": seen["stderr"]}
        raise Refused("BashIncorrectSyntaxError", f"bash cannot parse {command!r}: {seen['stderr']}", extra)


async def _interrupt(api: LocalApi, sandbox_id: str, spec: Interrupt) -> dict[str, Any]:
    """Send Ctrl-C until the session is idle; its output is in the response of the command."""
    if spec.expect:
        raise Refused("SwerexException", "expect is supported for interactive programs alone, and none runs")
    name = session_name(spec.session)
    for _ in range(spec.n_retry):
        info = await api.json("interrupt", sandbox_id=sandbox_id, session=name)
        end = asyncio.get_running_loop().time() + spec.timeout
        while info["busy"] and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
            info = next((item for item in (await api.json("list_sessions", sandbox_id=sandbox_id))["items"]
                         if item["session"] == name), {"busy": False})  # fmt: skip
        if not info["busy"]:
            return _ended("", _PROMPT)
    raise Refused("CommandTimeoutError", f"the command in session {spec.session!r} ignores {spec.n_retry} interrupts; "
                                         "close the session")


# ---- commands and files ----


async def execute(api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
    """Run a program, with the meaning of subprocess.run."""
    spec: Execute = request_of(data, Execute)
    words = [spec.command] if isinstance(spec.command, str) else spec.command
    if spec.shell:
        words = ["/bin/sh", "-c", *words]
    if spec.merge_output_streams:
        words = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *words]
    body = {"command": words, "timeout": spec.timeout, "cwd": spec.cwd, "env": spec.env}
    seen = await api.json("execute", body, sandbox_id=request.path["sandbox_id"], key=key)
    if seen["timed_out"]:
        raise Refused("CommandTimeoutError", f"timeout after {spec.timeout} seconds while running {spec.command!r}",
                      {"stdout": seen["stdout"], "stderr": seen["stderr"]})  # fmt: skip
    code = -seen["signal"] if seen["signal"] else seen["exit_code"]
    if spec.check and code != 0:
        raise Refused("NonZeroExitCodeError", _prefixed(
            spec.error_msg, f"command {spec.command!r} failed with exit code {code}; stdout: {seen['stdout']!r}; "
                            f"stderr: {seen['stderr']!r}"))  # fmt: skip
    return {"stdout": seen["stdout"], "stderr": seen["stderr"], "exit_code": code}


async def read_file(api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
    spec: ReadFile = request_of(data, ReadFile)
    found = await api.bytes("read_file", query={"path": spec.path}, sandbox_id=request.path["sandbox_id"])
    try:
        return {"content": found.decode(spec.encoding or "utf-8", spec.errors or "strict")}
    except (LookupError, UnicodeError) as error:
        raise Refused("builtins.ValueError", f"{spec.path} cannot be read: {error}") from None


async def write_file(api: LocalApi, request: Request, data: bytes, key: str) -> dict[str, Any]:
    spec: WriteFile = request_of(data, WriteFile)
    content = spec.content.encode("utf-8", "surrogatepass")
    await api.bytes("write_file", content, query={"path": spec.path}, sandbox_id=request.path["sandbox_id"], key=key)
    return {}


async def _spool(part: Part, kept: IO[bytes]) -> None:
    """Store the file of a form. InvalidConfig above the limit."""
    size = 0
    async for piece in part.data:
        size += len(piece)
        if size > LARGEST:
            raise InvalidConfig(f"the file has more than {LARGEST} bytes", hint="upload it in parts")
        await asyncio.to_thread(kept.write, piece)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _CHUNK):
        yield piece


def _plain(output: str) -> str:
    """Output without control sequences of a terminal."""
    return (_ESCAPE.sub("", output) if "\x1b" in output else output).replace("\r\n", "\n")


def _prefixed(prefix: str, text: str) -> str:
    return f"{prefix}: {text}" if prefix else text


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"
