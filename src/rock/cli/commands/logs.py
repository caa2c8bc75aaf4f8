"""`rock logs` and `rock processes`: the background processes of a sandbox, and their output."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from rock.cli.connection import connected, find, new_sandbox
from rock.cli.output import age, as_json, table
from rock.cli.parsing import command, json_option, sandbox_argument
from rock.errors import InvalidConfig, NotFound
from rock.protocol.action import ProcessInfo
from rock.sdk.sandbox.processes import LogName
from rock.sdk.sandbox.processes import Process as AsyncProcess
from rock.sdk.sandbox.sandbox import Sandbox as AsyncSandbox
from rock.sync import Sandbox
from rock.sync.sandbox.processes import Process

_POLL = 20.0  # seconds of one long-poll


@command(example="rock logs -f web\nrock logs web 3c1f")
@sandbox_argument
@click.argument("process", required=False)
@click.option("--follow", "-f", is_flag=True, help="Continue until the process ends.")
@click.option("--all", "-a", "everything", is_flag=True, help="Show the output of all background processes.")
@click.option("--tail", type=click.IntRange(min=0), metavar="BYTES", help="Begin this many bytes before the end.")
def logs(sandbox: str, process: str | None, follow: bool, everything: bool, tail: int | None) -> None:
    """Show the output of background processes.

    Without PROCESS it is the first one: the program of `rock run -d`. `rock processes SANDBOX` lists all of them.
    stdout goes to stdout, stderr to stderr.
    """
    if process is not None and everything:
        raise click.UsageError("--all and PROCESS exclude each other")
    signal.signal(signal.SIGINT, _interrupted)  # also where a write to a full pipe blocks, unlike asyncio's handler
    signal.signal(signal.SIGTERM, _interrupted)
    asyncio.run(_logs(sandbox, process, follow, everything, tail))


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


async def _logs(text: str, process: str | None, follow: bool, everything: bool, tail: int | None) -> None:
    info = find(text)
    sandbox = AsyncSandbox(new_sandbox(info.image).config)
    sandbox.sandbox_id = info.sandbox_id
    found = await sandbox.processes.list()
    if process is not None:
        found = [_with_prefix(found, process)]
    elif not found:
        raise NotFound(f"sandbox {text} has no background processes, and only they have logs",
                       hint="start one with `rock run -d` or `rock exec -d`")
    elif not everything:
        found = sorted(found, key=lambda item: item.info.started_at)
        if len(found) > 1 and sys.stderr.isatty():
            print(f"(process {found[0].id} of {len(found)}; --all shows all of them)", file=sys.stderr)
        found = found[:1]
    names: tuple[LogName, ...] = ("stdout", "stderr")
    shown = [asyncio.create_task(_show(item, name, follow, tail)) for item in found for name in names]
    closed = asyncio.create_task(_closed_pipe())
    try:
        while shown:
            done, _ = await asyncio.wait([*shown, closed], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises its error
            shown = [task for task in shown if not task.done()]
    finally:
        for task in [*shown, closed]:
            task.cancel()
        await asyncio.gather(*shown, closed, return_exceptions=True)


async def _closed_pipe() -> None:
    """BrokenPipeError when the reader of the standard output closes it, also while there is no output."""
    gone = asyncio.Event()
    if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        asyncio.get_running_loop().add_reader(sys.stdout.fileno(), gone.set)  # an error of the pipe wakes readers
    await gone.wait()
    raise BrokenPipeError


async def _show(process: AsyncProcess, name: LogName, follow: bool, tail: int | None) -> None:
    """Copy one output of a process, or its last `tail` bytes."""
    offset = 0
    if tail is not None:
        offset = max(0, (process.info.stdout_size if name == "stdout" else process.info.stderr_size) - tail)
    await copy_output(process, name, offset, follow)


async def copy_output(process: AsyncProcess, name: LogName, offset: int, follow: bool) -> None:
    """Copy one output of a process from `offset` on to the same output of this one, to its end. follow: wait for
    further output while the process runs."""
    out = sys.stdout.buffer if name == "stdout" else sys.stderr.buffer
    while True:
        part = await process.logs(name, offset, wait=_POLL if follow else None)
        out.write(part.data)
        out.flush()
        if not part.data and not (follow and part.running):
            return
        offset = part.next


@command(example="rock processes web")
@sandbox_argument
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def processes(sandbox: str, json_: bool, no_trunc: bool) -> None:
    """List the background processes of a sandbox.

    They are the program of `rock run -d`, and those of `rock exec -d` and of the SDK, ended ones included.
    """
    found = [item.info for item in connected(sandbox).processes.list()]
    if json_:
        as_json([info.model_dump(mode="json") for info in found])
        return
    rows = [[info.process_id, info.pid, _state(info), age(info.started_at, info.ended_at), _line(info.command)]
            for info in found]  # fmt: skip
    table(["PROCESS", "PID", "STATE", "AGE", "COMMAND"], rows, "no background processes", whole=no_trunc)


def _state(info: ProcessInfo) -> str:
    if info.running:
        return "running"
    return "ended" if info.exit_code is None else f"exit {info.exit_code}"


def _line(command: Any) -> str:
    return command if isinstance(command, str) else " ".join(command)


def process_of(sandbox: Sandbox, text: str) -> Process:
    """The background process with this id, or the only one with this id prefix. NotFound, InvalidConfig."""
    found: Process = _with_prefix(sandbox.processes.list(), text)
    return found


def _with_prefix(processes: list[Any], text: str) -> Any:
    exact = [item for item in processes if item.id == text]
    found = exact or [item for item in processes if item.id.startswith(text)]
    if not found:
        raise NotFound(f"the sandbox has no background process {text!r}", hint="`rock processes SANDBOX` lists them")
    if len(found) > 1:
        raise InvalidConfig(f"{text} is the beginning of several process ids",
                            hint=", ".join(item.id for item in found[:5]))
    return found[0]
