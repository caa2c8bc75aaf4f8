"""The code interpreter of a sandbox, port 49999: contexts, and the results of code as they come.

A context is a background process that runs guest/interpreter.py with the Python of the image.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from rock.dialects.e2b.call import Call
from rock.dialects.e2b.errors import NotRunning
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.programs import Gate, Programs, logs_of
from rock.dialects.e2b.state import Body
from rock.errors import ClientError, InvalidConfig, NotFound, RockError, Unsupported
from rock.guest import interpreter as guest
from rock.http.asgi import Answer, Request, answer, validate
from rock.protocol.keys import Access

PORT = 49999
_PYTHON = ("python", "python3")
_DEFAULT = "default"
_MOST = 64  # contexts of one sandbox
_SANDBOXES = 2000  # sandboxes whose contexts are remembered
_LONGEST_LINE = 32 << 20  # bytes of one event
_MOST_OUTPUT = 900 << 20  # bytes of all events of a context; the log of a process has at most 1 GiB
_EVENTS = ("stdout", "stderr", "result", "error", "number_of_executions")
_SIGINT = 2
_ENDED = orjson.dumps({
    "type": "error", "name": "InterpreterEnded", "traceback": "",
    "value": "the interpreter ended: its code ended it, or it ran out of memory",
}) + b"\n"  # fmt: skip


@functools.cache
def command_line() -> list[str]:
    """The command line of an interpreter, which has its source."""
    return ["python3", "-u", "-c", Path(guest.__file__).read_text()]


class Execute(Body):
    code: str
    context_id: str | None = None
    language: str | None = None
    env_vars: dict[str, str] | None = None


class NewContext(Body):
    language: str | None = None
    cwd: str | None = Field(default=None, max_length=4096)


class Context:
    """One interpreter. lock: one cell runs at a time. offset: of its output, up to which events were read."""

    def __init__(self, context_id: str, cwd: str, user: str) -> None:
        self.id = context_id
        self.cwd = cwd
        self.user = user
        self.process_id = ""
        self.offset = 0
        self.lock = asyncio.Lock()

    @property
    def view(self) -> dict[str, str]:
        return {"id": self.id, "language": "python", "cwd": self.cwd}


class Interpreter:
    """The routes of the code interpreter. Contexts belong to this server process."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._contexts: OrderedDict[str, dict[str, Context]] = OrderedDict()

    async def serve(self, path: str, call: Call) -> Answer | None:
        """The response to a request; None for an unknown route."""
        method, parts = call.request.scope["method"], path.strip("/").split("/")
        call.require(Access.READ if method == "GET" else Access.RUN)
        if method == "GET" and path == "/health":
            await call.sandbox.read("list_processes")
            return answer({"status": "ok"})
        if method == "POST" and path == "/execute":
            return await self._execute(call)
        if method == "GET" and path == "/contexts":
            await call.sandbox.read("list_processes")  # NotRunning
            return answer([context.view for context in self._of(call).values()])
        if method == "POST" and path == "/contexts":
            return await self._create(call)
        if parts[0] != "contexts" or len(parts) not in (2, 3):
            return None
        context = self._of(call).get(parts[1])
        if context is None:
            raise NotFound(f"context {parts[1][:80]!r} not found", hint="create it again: a restart of the server or "
                           "of the sandbox ends contexts")  # fmt: skip
        if method == "DELETE" and len(parts) == 2:
            self._of(call).pop(context.id, None)
            await self._end(call.sandbox, context)
            return Answer(b"", 204)
        if method == "POST" and parts[2:] == ["restart"]:
            await self._end(call.sandbox, context)
            async with context.lock:
                await self._start(call, context)
            return answer(context.view)
        return None

    def _of(self, call: Call) -> dict[str, Context]:
        contexts = self._contexts.setdefault(call.sandbox.id, {})
        self._contexts.move_to_end(call.sandbox.id)
        while len(self._contexts) > _SANDBOXES:
            self._contexts.popitem(last=False)
        return contexts

    # ---- contexts ----

    async def _create(self, call: Call) -> Answer:
        spec = validate(NewContext, await call.request.json())
        _check_language(spec.language)
        context = await self._new(call, secrets.token_hex(16), spec.cwd or "")
        return answer(context.view, 201)

    async def _new(self, call: Call, context_id: str, cwd: str) -> Context:
        contexts = self._of(call)
        if len(contexts) >= _MOST:
            raise InvalidConfig(f"the sandbox has {_MOST} contexts", hint="remove one first")
        context = Context(context_id, await call.path(cwd), call.user)
        contexts[context_id] = context
        try:
            async with context.lock:
                await self._start(call, context)
        except BaseException:
            contexts.pop(context_id, None)
            raise
        return context

    async def _start(self, call: Call, context: Context) -> None:
        account = await call.accounts.find(call.sandbox, context.user)
        env = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name}
        command = {"command": command_line(), "env": env, "cwd": context.cwd, "user": account.native,
                   "timeout": None}  # fmt: skip
        try:
            made = await call.sandbox.json("start_process", command)
        except NotFound as error:
            raise Unsupported(f"the code interpreter cannot start: {error.message}",
                              hint="use an image with python3, and a folder that exists") from None
        context.process_id, context.offset = made["process_id"], 0

    async def _end(self, sandbox: Sandbox, context: Context) -> None:
        with contextlib.suppress(NotFound):
            await sandbox.read("forget_process", process_id=context.process_id)

    # ---- cells ----

    async def _execute(self, call: Call) -> Answer:
        spec = validate(Execute, await call.request.json())
        if spec.context_id and spec.language:
            raise InvalidConfig("context_id and language exclude each other", hint="give one of them")
        _check_language(spec.language)
        contexts = self._of(call)
        context = contexts.get(spec.context_id or _DEFAULT)
        if context is None and spec.context_id:
            raise NotFound(f"context {spec.context_id[:80]!r} not found", hint="create it again")
        if context is None:
            context = await self._new(call, _DEFAULT, "")
        for name in spec.env_vars or {}:
            if not name or "=" in name or "\0" in name:
                raise InvalidConfig(f"env_vars: {name[:80]!r} is no name of a variable", hint="correct the name")
        cell = self._cell(call, context, spec)
        call.cleanup.push_async_callback(cell.aclose)
        first = await anext(cell)  # an error of the start has its HTTP status
        return Answer(stream=_until_gone(call.request, first, cell), content_type=b"application/x-ndjson")

    async def _cell(self, call: Call, context: Context, spec: Execute) -> AsyncGenerator[bytes]:
        """The events of one cell, as lines. A cell whose client has left is interrupted."""
        async with context.lock:
            sandbox = call.sandbox
            info = await self._programs.info(sandbox, context.process_id)
            if not info["running"] or info["stdout_size"] > _MOST_OUTPUT:
                await self._end(sandbox, context)  # its code has ended it, or it has written too much
                await self._start(call, context)
            request = secrets.token_hex(8)
            line = orjson.dumps({"id": request, "code": spec.code, "env": spec.env_vars or {}}) + b"\n"
            await sandbox.read("process_stdin", line, process_id=context.process_id)
            ended = False
            lines = _lines(sandbox, self._programs.gate(sandbox.id), context)
            try:
                async with contextlib.aclosing(lines):
                    async for found in lines:
                        event = _event(found, request)
                        if event is None:
                            continue
                        kind = event.pop("id") and event["type"]
                        if kind == "done":
                            ended = True
                            return
                        if kind in _EVENTS:
                            yield orjson.dumps(event) + b"\n"
                ended = True
                yield _ENDED
            finally:
                if not ended:
                    await asyncio.shield(self._interrupt(sandbox.copy(), context))

    async def _interrupt(self, sandbox: Sandbox, context: Context) -> None:
        """Interrupt the code of a cell. The events that remain are skipped by the next one."""
        with contextlib.suppress(RockError, NotRunning):
            await self._programs.signal(sandbox, context.process_id, _SIGINT)
        await sandbox.close()


def _check_language(language: str | None) -> None:
    if language is not None and language.lower() not in _PYTHON:
        raise Unsupported(f"language {language[:40]!r} is not supported by the code interpreter",
                          hint="use python, or run the program as a command")  # fmt: skip


def _event(line: bytes, request: str) -> dict[str, Any] | None:
    """An event of a request; None for a line of an earlier one, and for one that code has forged."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict) or value.get("id") != request or not isinstance(value.get("type"), str):
        return None
    return value


async def _lines(sandbox: Sandbox, gate: Gate, context: Context) -> AsyncGenerator[bytes]:
    """Lines of the output of a context from its offset on, until its process ends."""
    held = bytearray()
    more = True
    while more:
        at = context.offset + len(held)
        data, more = await logs_of(sandbox, gate, context.process_id, "stdout", at)
        held += data
        while (end := held.find(b"\n")) >= 0:
            line = bytes(held[:end])
            del held[: end + 1]
            context.offset += end + 1
            yield line
        if len(held) > _LONGEST_LINE:
            raise ClientError(f"an event of the interpreter is over {_LONGEST_LINE} bytes", hint="restart the context")


async def _until_gone(request: Request, first: bytes, cell: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The lines of a cell until its end, or until the client disconnects."""
    gone = asyncio.ensure_future(request.disconnected())
    pending: asyncio.Future[bytes | None] | None = None

    async def step() -> bytes | None:
        return await anext(cell, None)

    try:
        yield first
        while True:
            pending = asyncio.ensure_future(step())
            both: set[asyncio.Future[Any]] = {pending, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() or (line := pending.result()) is None:
                return
            yield line
    finally:
        left = [task for task in (gone, pending) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await cell.aclose()
