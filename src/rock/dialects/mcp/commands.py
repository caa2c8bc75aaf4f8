"""Tools for commands, background processes and code."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from pydantic import Field

from rock.dialects.mcp.context import ToolContext
from rock.dialects.mcp.tools import OUTPUT, InSandbox, Result, Tool
from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.action import SESSION_PATTERN
from rock.protocol.keys import Access

USUAL, LONGEST = 120.0, 3600.0  # seconds of a command
_INTERPRETERS = {"python": ["python3", "-"], "bash": ["bash", "-s"], "javascript": ["node", "-"]}


class Run(InSandbox):
    command: str = Field(min_length=1, max_length=1 << 20, description="A command line for the shell.")
    session: str | None = Field(
        default=None, pattern=SESSION_PATTERN,
        description="Run it in the shell of this name, which keeps its working directory and variables between "
                    "calls. Without a session each command has a new shell.")
    cwd: str | None = Field(default=None, max_length=4096, description="Working directory; not with session.")
    env: dict[str, str] | None = Field(default=None, description="Environment variables; not with session.")
    stdin: str | None = Field(default=None, max_length=4 << 20, description="Standard input; not with session.")
    timeout: float = Field(default=USUAL, gt=0, le=LONGEST, description="Seconds after which it is killed.")


class Code(InSandbox):
    code: str = Field(min_length=1, max_length=4 << 20, description="The program.")
    language: Literal["python", "bash", "javascript"] = "python"
    cwd: str | None = Field(default=None, max_length=4096, description="Working directory.")
    timeout: float = Field(default=USUAL, gt=0, le=LONGEST, description="Seconds after which it is killed.")


class Start(InSandbox):
    command: str = Field(min_length=1, max_length=1 << 20, description="A command line for the shell.")
    cwd: str | None = Field(default=None, max_length=4096, description="Working directory.")
    env: dict[str, str] | None = Field(default=None, description="Environment variables.")


class Process(InSandbox):
    process_id: str = Field(min_length=1, max_length=128, description="As start_process returned it.")


class Logs(Process):
    stream: Literal["stdout", "stderr"] = "stdout"
    offset: int = Field(default=0, ge=0, description="Read from this byte on; each result has the next offset.")
    wait: float = Field(default=0.0, ge=0, le=300, description="Seconds to wait for new output.")


class Stop(Process):
    signal: int = Field(default=15, ge=1, le=64, description="15 is SIGTERM, 9 is SIGKILL.")


async def run(context: ToolContext, given: Run) -> Result:
    if given.session is None:
        body = given.model_dump(include={"command", "cwd", "env", "stdin", "timeout"}, exclude_none=True)
        body["max_output_bytes"] = OUTPUT
        return _executed(await context.json("execute", body, given=given.sandbox_id))
    for name in ("cwd", "env", "stdin"):
        if getattr(given, name) is not None:
            raise InvalidConfig(f"{name} cannot be set for a command of a session",
                                hint=f"leave session or {name} out; a session keeps `cd` and `export`")
    body = {"command": given.command, "timeout": given.timeout, "check": "silent", "separate": True,
            "max_output_bytes": OUTPUT}  # fmt: skip
    try:
        seen = await context.json("run", body, given=given.sandbox_id, session=given.session)
    except NotFound as error:
        if not error.message.startswith("session "):
            raise
        with contextlib.suppress(Conflict):  # another call has created it
            await context.json("create_session", {"session": given.session}, given=given.sandbox_id)
        seen = await context.json("run", body, given=given.sandbox_id, session=given.session)
    return _executed({**seen, "stdout": seen["output"], "stdout_dropped": seen["dropped_bytes"]})


async def run_code(context: ToolContext, given: Code) -> Result:
    body: dict[str, Any] = {"command": _INTERPRETERS[given.language], "stdin": given.code, "timeout": given.timeout,
                            "max_output_bytes": OUTPUT}  # fmt: skip
    if given.cwd is not None:
        body["cwd"] = given.cwd
    return _executed(await context.json("execute", body, given=given.sandbox_id))


def _executed(seen: dict[str, Any]) -> Result:
    data: dict[str, Any] = {name: seen[name] for name in ("exit_code", "stdout", "stderr", "timed_out")}
    dropped = seen.get("stdout_dropped", 0) + seen.get("stderr_dropped", 0)
    data |= {"dropped_bytes": dropped, "duration": round(seen.get("duration", 0.0), 3)}
    if seen.get("failure_reason"):
        data["failure_reason"] = seen["failure_reason"]
    parts = [seen["stdout"].rstrip("\n"), f"[stderr]\n{seen['stderr'].rstrip()}" if seen["stderr"] else ""]
    end = f"[exit code {'unknown' if seen['exit_code'] is None else seen['exit_code']}]"
    if seen.get("failure_reason"):
        end += f" {seen['failure_reason']}"
    if dropped:
        end += f" [{dropped} bytes in the middle of the output are omitted]"
    return Result("\n".join([*filter(None, parts), end]), data)


async def start(context: ToolContext, given: Start) -> Result:
    body = given.model_dump(include={"command", "cwd", "env"}, exclude_none=True)
    made = await context.json("start_process", body, given=given.sandbox_id)
    return Result(f"process {made['process_id']} runs, pid {made['pid']}",
                  {"process_id": made["process_id"], "pid": made["pid"]})


async def logs(context: ToolContext, given: Logs) -> Result:
    query = {"stream": given.stream, "offset": given.offset, "limit": OUTPUT, "wait": given.wait}
    data = await context.bytes("process_logs", given=given.sandbox_id, query=query, process_id=given.process_id)
    found = await context.json("get_process", given=given.sandbox_id, process_id=given.process_id)
    shown = {"output": data.decode(errors="replace"), "next_offset": given.offset + len(data),
             "running": found["running"], "exit_code": found["exit_code"]}  # fmt: skip
    state = "running" if found["running"] else f"ended, exit code {found['exit_code']}"
    return Result(f"{shown['output']}\n[{state}; next offset {shown['next_offset']}]", shown)


async def stop(context: ToolContext, given: Stop) -> Result:
    body = {"signal": given.signal, "tree": True}
    await context.json("signal_process", body, given=given.sandbox_id, process_id=given.process_id)
    found = await context.json("get_process", given=given.sandbox_id, process_id=given.process_id, query={"wait": 5})
    shown = {"running": found["running"], "exit_code": found["exit_code"], "signal": found["signal"]}
    return Result("running" if found["running"] else "ended", shown)


TOOLS: list[Tool[Any]] = [
    Tool("run_command", "Run a command", "Run a shell command in the sandbox and return its output and exit code. Long "
         "output is cut in the middle.", Run, Access.RUN, run, destructive=True),
    Tool("run_code", "Run code", "Run a program in Python, Bash or JavaScript (node), with a new interpreter.", Code,
         Access.RUN, run_code, destructive=True),
    Tool("start_process", "Start a process", "Start a command in the background, for example a server. It returns a "
         "process_id for process_logs and stop_process.", Start, Access.RUN, start, destructive=True),
    Tool("process_logs", "Logs of a process", "Output of a background process from an offset, and whether it runs.",
         Logs, Access.READ, logs, read_only=True),
    Tool("stop_process", "Stop a process", "Send a signal to a background process and to its children.", Stop,
         Access.RUN, stop, destructive=True),
]  # fmt: skip
