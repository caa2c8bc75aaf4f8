"""The service process.Process: start programs, follow their output, and send them input and signals."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

from rock.dialects.e2b import connect
from rock.dialects.e2b.call import Call
from rock.dialects.e2b.connect import Envelopes, Events, Message
from rock.dialects.e2b.errors import RpcError, text_of
from rock.dialects.e2b.interpreter import command_line
from rock.dialects.e2b.programs import KEPT, Program, Programs
from rock.dialects.e2b.terminals import Terminal, Terminals
from rock.errors import InvalidConfig, NotFound
from rock.http.asgi import Answer
from rock.protocol.keys import Access

SERVICE = "/process.Process/"
_SIGNALS = {"SIGNAL_SIGTERM": 15, "SIGNAL_SIGKILL": 9}
_SIGNAL_TEXTS = {
    1: "hangup", 2: "interrupt", 3: "quit", 4: "illegal instruction", 5: "trace/breakpoint trap", 6: "aborted",
    7: "bus error", 8: "floating point exception", 9: "killed", 10: "user defined signal 1",
    11: "segmentation fault", 12: "user defined signal 2", 13: "broken pipe", 14: "alarm clock", 15: "terminated",
}  # fmt: skip
_MOST_SIDE = 10_000  # rows and columns of a terminal


class ProcessService:
    """Handlers by method name."""

    def __init__(self, programs: Programs, terminals: Terminals) -> None:
        self._programs = programs
        self._terminals = terminals

    async def serve(self, method: str, call: Call) -> Answer | None:
        """The response to a call; None for an unknown method."""
        call.require(Access.READ if method in ("List", "Connect") else Access.RUN)
        request = call.request
        if method == "Start":
            return await connect.server_stream(request, lambda message: self._start(call, message), call.cleanup)
        if method == "Connect":
            return await connect.server_stream(request, lambda message: self._connect(call, message), call.cleanup)
        if method == "StreamInput":
            return await connect.client_stream(request, lambda messages: self._stream_input(call, messages))
        unary = {"List": self._list, "Update": self._update, "SendInput": self._send_input,
                 "SendSignal": self._send_signal, "CloseStdin": self._close_stdin}.get(method)  # fmt: skip
        if unary is None:
            return None
        return await connect.unary(request, lambda message: unary(call, message))

    # ---- start and follow ----

    async def _start(self, call: Call, message: Message) -> Events:
        config = connect.message_of(message, "process") or {}
        program = Program(call.sandbox.id, "", 0, connect.text(config, "cmd"), connect.texts(config, "args"),
                          connect.text_map(config, "envs"), connect.text(config, "cwd"),
                          connect.text(message, "tag"))  # fmt: skip
        if not program.cmd:
            raise RpcError("invalid_argument", "field 'process.cmd' is missing: it is the program to start")
        for name in program.envs:
            if not name or "=" in name:
                raise RpcError("invalid_argument", f"field 'process.envs': {name[:80]!r} is no name of a variable")
        seconds = connect.seconds_of(call.request)
        pty = connect.message_of(message, "pty")
        account = await call.account()
        env = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, **program.envs}
        cwd = await call.path(program.cwd)
        if pty is not None:
            size = _size(pty)
            assert size is not None
            terminal, output = await self._terminals.start(call.sandbox, program, env, cwd, account.native, size,
                                                           seconds)  # fmt: skip
            async with aclosing(self._follow_terminal(call, terminal, output)) as events:
                async for event in events:
                    yield event
            return
        command: dict[str, Any] = {"command": [program.cmd, *program.args], "env": env, "cwd": cwd,
                                   "user": account.native, "timeout": None}  # fmt: skip
        if not connect.flag(message, "stdin"):
            command["stdin"] = ""  # the input ends at once
        try:
            await self._programs.start(call.sandbox, program, command, seconds)
        except NotFound as error:  # of the program, or of the working directory
            raise RpcError("invalid_argument", text_of(error)) from None
        yield _event("start", {"pid": program.pid})
        async with aclosing(self._follow(call, program, (0, 0))) as events:
            async for event in events:
                yield event

    async def _connect(self, call: Call, message: Message) -> Events:
        found = await self._find(call, message)
        if isinstance(found, Terminal):
            async with aclosing(self._follow_terminal(call, found, found.subscribe())) as events:
                async for event in events:
                    yield event
            return
        info = await self._programs.info(call.sandbox, found.id)
        if not info["running"] and time.time() - (info["ended_at"] or 0) > KEPT:
            raise _unknown(message)
        yield _event("start", {"pid": found.pid})
        starts = info["stdout_size"], info["stderr_size"]
        async with aclosing(self._follow(call, found, starts)) as events:
            async for event in events:
                yield event

    async def _follow(self, call: Call, program: Program, starts: tuple[int, int]) -> Events:
        """The output of a program and its end."""
        async with aclosing(self._programs.output(call.sandbox, program.id, starts)) as output:
            async for name, data in output:
                yield _event("data", {name: connect.base64_of(data)})
        info = await self._programs.info(call.sandbox, program.id, 5.0)
        while info["running"]:
            info = await self._programs.info(call.sandbox, program.id, 60.0)
        if program.expired:
            raise RpcError("deadline_exceeded", "the time limit of the program was over: it was killed")
        yield _event("end", _end(info))

    async def _follow_terminal(self, call: Call, terminal: Terminal, queue: asyncio.Queue[bytes]) -> Events:
        try:
            yield _event("start", {"pid": terminal.program.pid})
            async with aclosing(terminal.output(queue)) as output:
                async for data in output:
                    yield _event("data", {"pty": connect.base64_of(data)})
        finally:
            terminal.leave(queue)
        if terminal.program.expired:
            raise RpcError("deadline_exceeded", "the time limit of the terminal was over: it was closed")
        if terminal.exit_code is None and terminal.signal is None:
            await call.sandbox.read("list_processes")  # NotRunning: it has ended with its sandbox
        yield _event("end", _end({"exit_code": terminal.exit_code, "signal": terminal.signal}))

    # ---- unary calls ----

    async def _list(self, call: Call, message: Message) -> Message:
        known = self._programs.of(call.sandbox.id)
        listed = await call.sandbox.json("list_processes")
        found = [known.get(item["process_id"]) or _of_native(call.sandbox.id, item)
                 for item in listed["items"] if item["running"] and item["command"] != command_line()]  # fmt: skip
        found += [terminal.program for terminal in self._terminals.of(call.sandbox.id)]
        return {"processes": [_described(program) for program in found]}

    async def _update(self, call: Call, message: Message) -> Message:
        found = await self._find(call, message)
        size = _size(connect.message_of(message, "pty"))
        if size is None:
            return {}
        if not isinstance(found, Terminal):
            raise RpcError("failed_precondition", f"process {found.pid} has no terminal")
        await found.resize(*size)
        return {}

    async def _send_input(self, call: Call, message: Message) -> Message:
        await self._write(call, await self._find(call, message), connect.message_of(message, "input"))
        return {}

    async def _stream_input(self, call: Call, messages: Envelopes) -> Message:
        found: Program | Terminal | None = None
        while (message := await messages.next()) is not None:
            start, data = connect.message_of(message, "start"), connect.message_of(message, "data")
            if start is not None:
                found = await self._find(call, start)
            elif data is not None:
                if found is None:
                    raise RpcError("failed_precondition", "the first message of the stream has no field 'start'")
                await self._write(call, found, connect.message_of(data, "input"))
        return {}

    async def _write(self, call: Call, found: Program | Terminal, given: Message | None) -> None:
        stdin, pty = connect.data_of(given or {}, "stdin"), connect.data_of(given or {}, "pty")
        if isinstance(found, Terminal):
            if pty is None:
                raise RpcError("invalid_argument", "field 'input' has no 'pty': the process has a terminal")
            await found.write(pty)
            return
        if stdin is None:
            raise RpcError("invalid_argument", "field 'input' has no 'stdin': the process has no terminal")
        try:
            await call.sandbox.read("process_stdin", stdin, process_id=found.id)
        except InvalidConfig as error:
            raise RpcError("failed_precondition", str(error)) from None

    async def _send_signal(self, call: Call, message: Message) -> Message:
        number = connect.word(message, "signal", _SIGNALS)
        found = await self._find(call, message)
        if isinstance(found, Terminal):
            await found.end(number)
            return {}
        info = await self._programs.info(call.sandbox, found.id)
        if not info["running"]:
            raise _unknown(message)
        await self._programs.signal(call.sandbox, found.id, number)
        return {}

    async def _close_stdin(self, call: Call, message: Message) -> Message:
        found = await self._find(call, message)
        if isinstance(found, Terminal):
            raise RpcError("invalid_argument", "a terminal has no stdin to close: write the byte 4 (Ctrl-D) to it")
        try:
            await call.sandbox.read("process_stdin", b"", {"close": 1}, process_id=found.id)
        except InvalidConfig:
            pass  # it is closed already
        return {}

    async def _find(self, call: Call, message: Message) -> Program | Terminal:
        """The program of a ProcessSelector. RpcError."""
        selector = connect.message_of(message, "process") or {}
        pid, tag = connect.number(selector, "pid"), connect.text(selector, "tag")
        if not pid and not tag:
            raise RpcError("invalid_argument", "field 'process' selects nothing: give pid or tag")
        for terminal in self._terminals.of(call.sandbox.id):
            if terminal.program.pid == pid or (tag and terminal.program.tag == tag):
                return terminal
        for program in reversed(self._programs.of(call.sandbox.id).values()):
            if program.pid == pid or (tag and program.tag == tag):
                return program
        if pid:  # a program of an earlier run of the server, or of a native client
            listed = await call.sandbox.json("list_processes")
            for item in reversed(listed["items"]):
                if item["pid"] == pid:
                    return _of_native(call.sandbox.id, item)
        raise _unknown(message)


def _unknown(message: Message) -> RpcError:
    selector = connect.message_of(message, "process") or {}
    pid, tag = connect.number(selector, "pid"), connect.text(selector, "tag")
    which = f"tag {tag[:80]!r}" if tag else f"pid {pid}"
    return RpcError("not_found", f"process with {which} not found: it has ended, or never existed")


def _event(kind: str, value: Message) -> Message:
    return {"event": {kind: value}}


def _of_native(sandbox_id: str, item: dict[str, Any]) -> Program:
    words = item["command"] if isinstance(item["command"], list) else ["/bin/sh", "-c", item["command"]]
    return Program(sandbox_id, item["process_id"], item["pid"], words[0] if words else "", words[1:])


def _described(program: Program) -> Message:
    config: Message = {"cmd": program.cmd, "args": program.args, "envs": program.envs}
    if program.cwd:
        config["cwd"] = program.cwd
    return {"config": config, "pid": program.pid, **({"tag": program.tag} if program.tag else {})}


def _end(info: dict[str, Any]) -> Message:
    """The end event of a program. exitCode is never omitted: a missing one means 0."""
    code, signal = info["exit_code"], info["signal"]
    if signal is not None:
        status = f"signal: {_SIGNAL_TEXTS.get(signal, f'signal {signal}')}"
        return {"exitCode": -1, "exited": False, "status": status, "error": status}
    if code is None:
        status = "the exit status is unknown"
        return {"exitCode": -1, "exited": False, "status": status, "error": status}
    status = f"exit status {code}"
    return {"exitCode": code, "exited": True, "status": status, **({"error": status} if code else {})}


def _size(pty: Message | None) -> tuple[int, int] | None:
    """(rows, columns) of a PTY message. RpcError."""
    if pty is None:
        return None
    size = connect.message_of(pty, "size") or {}
    rows = connect.number(size, "rows", _MOST_SIDE) or 24
    columns = connect.number(size, "cols", _MOST_SIDE) or 80
    return rows, columns
