"""Requests to one sandbox that are executed once, also when the rocklet process ends meanwhile.

Each request is recorded before it is begun, and its response when it has ended. `recover` resolves the unfinished
requests of an earlier rocklet process: a running operation is resumed, an operation without a response to a client is
undone, and a request that was never begun is dropped. A repeated request with the key gets the one response.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rock import faults
from rock.errors import Conflict, NotFound, RockError, Unavailable
from rock.http.asgi import Answer, answer, failure
from rock.protocol.action import BashAction, Command, CommandResponse, CreateBashSessionRequest
from rock.rocklet.commands import programs
from rock.rocklet.commands.handover import JournalEntry, ended_with_client, unseen
from rock.rocklet.commands.shell_process import KEY
from rock.rocklet.durability.spool import SpoolFile
from rock.rocklet.sandbox import Supervisor
from rock.runtime.base import CLOCK, Process

_CUT = "the server was started again while its input was being given; it was killed"


async def run(sandbox: Supervisor, action: BashAction, place: str | None) -> Answer:
    """Run a command in a session."""
    known = await sandbox.journal.known(place)
    if known is not None:
        return known
    session = await sandbox.sessions.get(action.session)
    if place is None:
        return answer(await session.run(action))
    return await session.run_kept(action, JournalEntry(sandbox.journal, place))


async def create_session(sandbox: Supervisor, spec: CreateBashSessionRequest, place: str | None) -> Answer:
    """Create a session."""
    journal = sandbox.journal
    known = await journal.known(place)
    if known is not None:
        return known
    with _written_down(sandbox, place, kind="session", session=spec.session):
        reply = answer({"output": await sandbox.sessions.create(spec), "session_type": "bash"}, 201)
    journal.finish(place, reply)
    return reply


async def done_once(sandbox: Supervisor, place: str | None, work: Callable[[], Awaitable[Answer]]) -> Answer:
    """Execute a short operation that must not be repeated, such as an append. After a crash in the middle of it, the
    outcome is unknown; its key is then a Conflict."""
    known = await sandbox.journal.known(place)
    if known is not None:
        return known
    with _written_down(sandbox, place, kind="call"):
        reply = await work()
    sandbox.journal.finish(place, reply)
    return reply


async def start_process(sandbox: Supervisor, command: Command, place: str | None) -> Answer:
    """Start a background process."""
    journal, key = sandbox.journal, uuid.uuid4().hex[:12]
    known = await journal.known(place)
    if known is not None:
        return known
    with _written_down(sandbox, place, kind="start", id=key, command=command.model_dump(mode="json")):
        reply = answer((await sandbox.start_process(command, key)).info, 201)
    journal.finish(place, reply)
    return reply


async def execute(sandbox: Supervisor, command: Command, place: str | None) -> Answer:
    """Run a program to its end."""
    journal, key = sandbox.journal, uuid.uuid4().hex[:12]
    known = await journal.known(place)
    if known is not None:
        return known
    sh = await sandbox.shell_for(command)
    if place is not None and sandbox.leaving:
        raise programs.Detached
    if place is None:
        started = await programs.start(sandbox.runtime, sandbox.handle, command, sh)
        return answer(_with_memory_kill(sandbox, await programs.Execution(started, command).run()))
    spools: list[SpoolFile] = []
    with contextlib.suppress(OSError):  # the server's disk is full: the program runs, and a crash loses its output
        spools.append(journal.borrow())
        spools.append(journal.borrow())
    # The journal stores only whether there is input: the input cannot be repeated, and may be large.
    told = command if command.input is None else command.model_copy(update={"stdin": "", "stdin_base64": None})
    entry: dict[str, Any] = {"id": key, "command": told.model_dump(mode="json"), "began": time.clock_gettime(CLOCK)}
    if len(spools) == 2:
        entry["spools"] = [[spool.path.name, spool.begin()] for spool in spools]
    process: Process | None = None
    going_on = False
    try:
        with _written_down(sandbox, place, kind="execute", **entry):
            process = await programs.start(
                sandbox.runtime, sandbox.handle, command, sh, key=programs.EXECUTED + key, keep=True
            )
            await faults.point("execute.started")
            kept = spools if len(spools) == 2 else ()
            execution = programs.Execution(process, command, None, kept, kept=True)
            execution.on_fed = lambda: journal.written(place)
            reply = answer(await _run(sandbox, execution))
        await faults.point("execute.ended")
        journal.finish(place, reply)
    except programs.Detached:
        going_on = True
        for spool in spools:
            spool.close()  # they are the next rocklet's
        spools.clear()
        raise
    finally:
        # Both only now: until the answer is written down, a rocklet after this one needs the program and its output.
        if process is not None:
            process.close(forget=not going_on)
        for spool in spools:
            journal.give_back(spool)
    return reply


def _with_memory_kill(sandbox: Supervisor, response: CommandResponse) -> CommandResponse:
    reason = sandbox.memory_kill(response.exit_code)
    return response.model_copy(update={"failure_reason": reason}) if reason else response


async def _run(sandbox: Supervisor, execution: programs.Execution, *, fed: bool = False) -> CommandResponse:
    """Run a program that is detached when the server stops."""
    sandbox.executions.add(execution)
    try:
        if sandbox.leaving:
            execution.let_go()
        return _with_memory_kill(sandbox, await (execution.take_up() if fed else execution.run()))
    finally:
        sandbox.executions.discard(execution)


@contextlib.contextmanager
def streamed(sandbox: Supervisor, place: str | None) -> Any:
    """Record a request with a streamed response: it must not be started again."""
    sandbox.journal.begin(place, kind="stream")
    try:
        yield
    finally:
        sandbox.journal.finish(place, _streamed())


def _streamed() -> Answer:
    return failure(
        Conflict(
            "a request with this key was begun already, and its answer was a stream, which is not kept",
            hint="look what it did; ask without ?stream=1 for an answer that can be had again",
        )
    )


@contextlib.contextmanager
def _written_down(sandbox: Supervisor, place: str | None, **entry: Any) -> Any:
    """Record the intent, and an end that is an error; the caller with a response calls `finish`."""
    journal = sandbox.journal
    journal.begin(place, **entry)
    try:
        yield
    except programs.Detached:
        raise
    except RockError as error:
        if place is not None and not error.retryable:
            journal.finish(place, failure(error))
        elif place is not None:
            journal.forget(place)
        raise
    except asyncio.CancelledError:
        # the operation may have run for a while
        if place is not None and entry["kind"] in ("execute", "start", "call"):
            journal.finish(place, failure(ended_with_client()))
        elif place is not None:
            journal.forget(place)
        raise
    except BaseException:
        if place is not None:
            journal.forget(place)
        raise


# ---- recovery ----


async def recover(sandbox: Supervisor, record: dict[str, Any]) -> None:
    """Recover the sessions, processes and unfinished requests that an earlier rocklet process left in a sandbox."""
    sandbox.load_journal(record)
    kept = await sandbox.runtime.processes(sandbox.handle)
    await _settle_sessions(sandbox, kept, record.get("sessions", {}))
    await sandbox.attach(record, kept)
    await _settle(sandbox, kept)


async def _settle_sessions(sandbox: Supervisor, kept: Sequence[str], known: Any) -> None:
    """End shells that were started for a session whose client got no response."""
    for place, entry in list(sandbox.journal.begun.items()):
        if entry.get("kind") != "session":
            continue
        name = str(entry["session"])
        if name in known:
            sandbox.journal.finish(place, answer({"output": "", "session_type": "bash"}, 201))
            continue
        if KEY + name in kept and name != "default":  # the default session always exists
            await _kill(sandbox, KEY + name)
        sandbox.journal.forget(place)


async def _settle(sandbox: Supervisor, kept: Sequence[str]) -> None:
    """Resume the operations of an earlier rocklet process; sessions have resumed their commands already."""
    journal = sandbox.journal
    wanted = set()
    for place, entry in list(journal.begun.items()):
        kind = entry.get("kind")
        if kind == "execute":
            wanted.add(programs.EXECUTED + entry["id"])
            journal.resume(place, asyncio.create_task(_go_on(sandbox, place, entry), name="taken up"))
        elif kind == "start":
            try:
                found, command = sandbox.processes.get(entry["id"]), Command.model_validate(entry["command"])
                if found is None:
                    found = await sandbox.adopt_process(entry["id"], command)
                # input is written after the response is recorded, so the process has received none
                elif command.input is not None:
                    found.feed(command.input)
                journal.finish(place, answer(found.info, 201))
            except NotFound:
                journal.not_begun(place)
        elif kind == "stream":
            journal.finish(place, _streamed())
        elif kind == "call":
            journal.finish(place, failure(Conflict(
                "the server was killed in the middle of this; it may have been done, or a part of it",
                sandbox_id=sandbox.id, hint="look what was done")))  # fmt: skip
        elif kind == "run" and entry.get("session") not in sandbox.sessions:
            if entry.get("written"):  # its shell ended with it, and pid 1 was told to forget the shell
                journal.finish(place, failure(unseen(sandbox.id)))
            else:
                journal.not_begun(place)
    journal.settled()
    journal.sweep()
    for key in kept:
        if key.startswith(programs.EXECUTED) and key not in wanted:
            await _kill(sandbox, key)


async def _kill(sandbox: Supervisor, key: str) -> None:
    with contextlib.suppress(RockError):
        process = await sandbox.runtime.attach(sandbox.handle, key)
        try:
            await process.kill_tree()
            await process.wait()
        finally:
            process.close()


async def _go_on(sandbox: Supervisor, place: str, entry: dict[str, Any]) -> Answer | None:
    """Resume a program whose caller waited for its end."""
    journal = sandbox.journal
    try:
        process = await sandbox.runtime.attach(sandbox.handle, programs.EXECUTED + entry["id"])
    except NotFound:
        reply = journal.not_begun(place)
        journal.sweep()
        return reply
    command = Command.model_validate(entry["command"])
    cut = command.input is not None and not entry.get("written")
    if command.timeout is not None:
        left = command.timeout - (time.clock_gettime(CLOCK) - float(entry["began"]))
        command = command.model_copy(update={"timeout": max(0.001, left)})
    spools: list[SpoolFile] = []
    try:
        for name, _ in entry.get("spools", ()):
            spools.append(journal.file(name))
    except OSError as error:
        process.close(forget=False)
        for spool in spools:
            spool.close()
        raise Unavailable(
            f"what the program wrote before the server was started again cannot be read: {error.strerror or error}",
            sandbox_id=sandbox.id,
            hint="the program goes on; start the server again when its disk can be read",
        ) from None
    finished = False
    try:
        execution = programs.Execution(process, command, None, spools, kept=True)
        execution.resume_at([start for _, start in entry.get("spools", ())] if spools else ())
        if cut:
            await execution.end()
        response = await _run(sandbox, execution, fed=True)
        if cut:
            response = response.model_copy(update={"failure_reason": _CUT})
        reply = answer(response)
        await faults.point("execute.ended")
        journal.finish(place, reply)
        finished = True
    finally:
        process.close(forget=finished)
        for spool in spools:
            spool.close()
    for spool in spools:
        spool.remove()
    return reply
