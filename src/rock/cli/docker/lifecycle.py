"""`docker ps`, `inspect`, `stop`, `kill`, `rm`, `wait`, `logs` and `cp` over sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rock.cli.commands.copy import cp as copy_command
from rock.cli.commands.logs import copy_output
from rock.cli.connection import client
from rock.cli.docker.containers import (
    KILLED,
    LIVING,
    Container,
    attached,
    chosen,
    document,
    find,
    listed,
    own_labels,
    refusal,
    row,
)
from rock.cli.docker.flags import Call, Refused
from rock.cli.docker.images import document_of
from rock.cli.docker.templates import compiled, expanded, print_rows, safe
from rock.cli.output import printable
from rock.errors import NotFound, RockError
from rock.protocol.sandbox import State
from rock.sdk.sandbox.processes import LogName
from rock.sdk.sandbox.processes import Process as AsyncProcess
from rock.sdk.sandbox.sandbox import Sandbox as AsyncSandbox
from rock.sync import Client

_POLL = 20.0  # seconds of one long-poll
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL, as in Docker
_PORTION = 1 << 20
COLUMNS = {"CONTAINER ID": "ID", "IMAGE": "Image", "COMMAND": "Command", "CREATED": "RunningFor", "STATUS": "Status",
           "PORTS": "Ports", "NAMES": "Names"}  # fmt: skip


def ps(call: Call) -> int:
    """List containers."""
    last = call.number("last", int) if "last" in call.texts else 1 if call.on("latest") else None
    filters = call.many("filter")
    ended = call.on("all") or last is not None or any(text.startswith(("status=", "exited=")) for text in filters)
    test = chosen(filters)
    found = [one for one in listed(client(), None if ended else LIVING)
             if test(one) and (ended or one.status != "exited")]  # fmt: skip
    if last is not None:
        found = found[: int(last)]
    if call.on("quiet"):
        for one in found:
            print(row(one, call.on("no-trunc"))["ID"])
        return 0
    print_rows([row(one, call.on("no-trunc")) for one in found], COLUMNS, call.text("format"))
    return 0


def inspect(call: Call) -> int:
    """Show containers and images as JSON, or with a template."""
    server, template, kind = client(), call.text("format"), call.text("type")
    if kind not in (None, "", "container", "image"):
        raise Refused(f"docker: ROCK does not support --type {kind}", hint="use container or image")
    apply = None if template is None or template == "json" else compiled(expanded(template))
    found, status = [], 0
    for name in call.words:
        one = None
        if kind != "image":
            with contextlib.suppress(NotFound):
                one = document(find(server, name))
        if one is None and kind != "container":
            one = document_of(name)
        if one is not None:
            found.append(one)
            continue
        what = f"Error response from daemon: No such {kind}" if kind else "Error: No such object"
        print(f"{what}: {printable(name)}", file=sys.stderr)
        status = 1
    if apply is None:
        print(json.dumps(found, ensure_ascii=False) if template else json.dumps(found, indent=4, ensure_ascii=False))
        return status
    for one in found:
        print(safe(apply(one)))
    return status


def _each(names: list[str], act: Callable[[Client, str], None]) -> int:
    """Apply an operation to containers; prints each name, and returns 1 when one failed."""
    server, status = client(), 0
    for name in names:
        try:
            act(server, name)
        except RockError as error:
            print(printable(refusal(error)), file=sys.stderr)
            status = 1
        except Refused as error:
            print(printable(str(error)), file=sys.stderr)
            status = error.code
        else:
            print(name)
    return status


def stop(call: Call) -> int:
    """Send SIGTERM to the main program, wait, and stop the sandbox."""
    grace = call.number("timeout", float) if "timeout" in call.texts else call.number("time", float)
    wait = _GRACE if grace is None else float(grace)
    return _each(call.words, lambda server, name: _stop(server, find(server, name), signal.SIGTERM, wait))


def kill(call: Call) -> int:
    """Send a signal to the main program; SIGKILL, the default, stops the sandbox."""
    number = _signal(call.text("signal") or "KILL")

    def one(server: Client, name: str) -> None:
        container = find(server, name)
        if container.status not in ("running", "paused"):
            raise Refused(f"Error response from daemon: cannot kill container: {name}: container {container.id} is "
                          "not running", 1)  # fmt: skip
        if number == signal.SIGKILL:
            _stop(server, container, number, 0.0)
        elif container.process is None:
            raise Refused(f"Error response from daemon: container {name} has no main program, and ROCK cannot send it "
                          f"signal {number}", 1)  # fmt: skip
        else:
            attached(container.info).processes.get(container.process.process_id).signal(number, tree=False)

    return _each(call.words, one)


def _signal(text: str) -> int:
    name = text.upper().removeprefix("SIG")
    known = {one.name.removeprefix("SIG"): int(one) for one in signal.Signals}
    if name in known:
        return known[name]
    if not name.isdecimal() or int(name[:4]) not in known.values():
        raise Refused(f"Error response from daemon: Invalid signal: {text}", 1)
    return int(name)


def _stop(server: Client, container: Container, number: int, wait: float) -> None:
    """End the main program and the sandbox, and record the exit code. A container of --rm is deleted."""
    if container.status in ("running", "exited") and container.info.state is State.RUNNING:
        process = container.process
        record = container.record
        if process is not None:
            main = attached(container.info).processes.get(process.process_id)
            if main.info.running and wait > 0:
                main.signal(number, tree=False)
                main.wait(wait)
            container.process = main.info
            record.code = container.code if not main.info.running else KILLED
            server.update_sandbox(container.id, labels=record.labels(own_labels(container.info)))
    if container.record.remove:
        server.delete_sandbox(container.id, force=True)
    else:
        server.stop_sandbox(container.id)


def rm(call: Call) -> int:
    """Delete containers; --force stops those that run."""
    force = call.on("force")

    def one(server: Client, name: str) -> None:
        try:
            container = find(server, name)
        except NotFound as error:
            if not force:
                raise
            print(printable(refusal(error)), file=sys.stderr)
            return
        if not force and container.status in ("running", "paused"):
            raise Refused(f'Error response from daemon: cannot remove container "{name}": container is '
                          f"{container.status}: stop the container before removing or force remove", 1)  # fmt: skip
        server.delete_sandbox(container.id, force=True)

    return _each(call.words, one)


def wait(call: Call) -> int:
    """Wait for the ends of containers, and print their exit codes."""
    server, status = client(), 0
    for name in call.words:
        try:
            container = find(server, name)
            pause = 0.1
            while container.status not in ("exited", "dead"):
                if container.process is not None:
                    attached(container.info).processes.get(container.process.process_id).wait(_POLL)
                else:
                    time.sleep(pause)
                    pause = min(2.0, pause * 1.5)
                container = find(server, container.id)
            print(container.code)
        except RockError as error:
            print(printable(refusal(error)), file=sys.stderr)
            status = 1
    return status


# ---- output of the main program


def logs(call: Call) -> int:
    """The output of the main program: stdout to stdout, stderr to stderr."""
    text = call.text("tail")
    if text not in (None, "all") and not str(text).isdecimal():
        raise Refused(f'Error response from daemon: invalid value for "tail": {text}', 1)
    tail = None if text in (None, "all") else int(str(text)[:9])
    name = call.words[0]
    container = find(client(), name)
    if container.record.process is None:
        raise Refused(f"Error response from daemon: ROCK has no logs of container {name}: its program did not start "
                      "with --detach", 1, hint="start it with `docker run -d`")  # fmt: skip
    if container.info.state is not State.RUNNING:
        raise Refused(f"Error response from daemon: ROCK has no logs of container {name} after its stop", 1,
                      hint="read the logs before `docker stop`")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a write to a full pipe blocks
        signal.signal(number, _interrupted)
    asyncio.run(_logs(container, call.on("follow"), tail))
    return 0


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


async def _logs(container: Container, follow: bool, tail: int | None) -> None:
    sandbox = AsyncSandbox(attached(container.info).config)
    sandbox.sandbox_id = container.id
    process = await sandbox.processes.get(container.record.process or "")
    async with asyncio.TaskGroup() as group:
        for name in ("stdout", "stderr"):
            group.create_task(_show(process, name, follow, tail))


async def _show(process: AsyncProcess, name: LogName, follow: bool, tail: int | None) -> None:
    offset = 0
    if tail is not None:
        size = process.info.stdout_size if name == "stdout" else process.info.stderr_size
        offset = await _begin_of_tail(process, name, size, tail)
    await copy_output(process, name, offset, follow)


async def _begin_of_tail(process: AsyncProcess, name: LogName, size: int, lines: int) -> int:
    """The offset of the last lines of an output, which is read backwards in portions."""
    end, missing, last = size, lines, True
    while end > 0 and lines:
        begin = max(0, end - _PORTION)
        data = (await process.logs(name, begin, end - begin)).data[: end - begin]
        place = len(data) - 1 if last and data.endswith(b"\n") else len(data)
        last = False
        while (place := data.rfind(b"\n", 0, place)) >= 0:
            missing -= 1
            if not missing:
                return begin + place + 1
        end = begin
    return size if not lines else 0


def cp(call: Call) -> int:
    """Copy files between a container and this machine. A relative path in a container starts at /."""
    server = client()
    sides = []
    for text in call.words:
        name, colon, path = text.partition(":")
        if not colon or "/" in name or not name or text == "-":
            sides.append(text)
            continue
        container = find(server, name)
        if container.info.state is not State.RUNNING:
            raise Refused(f"Error response from daemon: container {name} is stopped, and its files are deleted", 1,
                          hint="copy files before `docker stop`")
        sides.append(f"{container.id}:{path if path.startswith('/') else '/' + path}")
    callback = copy_command.callback
    assert callback is not None
    callback(sides[0], sides[1], parents=False, recursive=False, archive=False, preserve=False)
    return 0
