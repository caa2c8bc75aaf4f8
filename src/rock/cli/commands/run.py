"""`rock run`, `exec` and `shell`: programs in sandboxes, with their input, output and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import click

from rock.cli.commands.forward import port_pairs
from rock.cli.connection import connected, new_sandbox, variables
from rock.cli.output import busy, complain
from rock.cli.parsing import (
    NOT_RUN,
    OWN_OPTIONS_FIRST,
    TIMED_OUT,
    ProgramCommand,
    command,
    complete_id,
    complete_image,
    options,
    sandbox_argument,
)
from rock.errors import InvalidConfig, NotFound, RockError
from rock.sync import Sandbox
from rock.sync.sandbox.stream import OutputStream

words_argument = click.argument("words", metavar="[--] [COMMAND]...", nargs=-1, type=click.UNPROCESSED)
program_options = options(
    click.option("--detach", "-d", is_flag=True, help="Start the program in the background, and print an id."),
    click.option("--interactive", "-i", "interactive", is_flag=True,
                 help="Stream the standard input to the program."),
    click.option("--stdin", "interactive", is_flag=True, hidden=True),
    click.option("--tty", "-t", is_flag=True, help="Connect this terminal to the program; it implies -i."),
    click.option("--env", "-e", metavar="K=V", multiple=True,
                 help="Environment variable; K alone takes the value from here. Repeatable."),
    click.option("--cwd", "--workdir", "-w", "cwd", metavar="DIR", help="Working directory."),
    click.option("--user", "-u", help="User inside the sandbox."),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                 help="Kill the program after this time; the exit code is then 124."),
)  # fmt: skip
size_options = options(
    click.option("--memory", "-m", default="2g", show_default=True, metavar="SIZE",
                 help="Memory limit, like 512m or 8g. (The SDK has a default of 8g.)"),
    click.option("--cpus", "-c", type=float, default=2.0, show_default=True, help="Number of CPUs."),
    click.option("--network", type=click.Choice(["none", "nat", "host", "bridge"]),
                 help="none (the default), nat: public addresses over TCP, host, or bridge: runtime docker only."),
)  # fmt: skip
sandbox_options = options(
    click.option("--name", help="Name of the sandbox, unique while it runs. Commands accept it instead of the id."),
    click.option("--label", "-l", metavar="K=V", multiple=True, help="Label of the sandbox. Repeatable."),
    size_options,
    click.option("--egress", metavar="ENTRY", multiple=True,
                 help="Allowed destination, like example.com:443. It implies --network nat. Repeatable."),
    click.option("--publish", "-p", metavar="[LOCAL:]REMOTE", multiple=True,
                 help="Forward a local port to a port of the sandbox while the program runs. Repeatable."),
    click.option("--volume", metavar="NAME:PATH[:ro]", multiple=True,
                 help="Mount a volume (`rock volume`). Repeatable."),
    click.option("--snapshot", metavar="SNAPSHOT", help="Start from a snapshot of IMAGE (`rock checkpoint`)."),
    click.option("--auto-pause", type=float, metavar="SECONDS",
                 help="Stop its processes after so long without a request, until the next one."),
    click.option("--record", is_flag=True, help="Record all requests with their results (`rock log`, `rock replay`)."),
    click.option("--mount", metavar="HOST:PATH", multiple=True,
                 help="Mount a folder of the server's machine read-only, where its owner permits it. Repeatable."),
    click.option("--disk", metavar="SIZE", help="Limit of the written files; none by default."),
    click.option("--gpus", type=float, metavar="N", help="Number of GPUs."),
    click.option("--runtime", help="Runtime of the sandbox; `rock doctor` lists those of this machine."),
    click.option("--isolation", metavar="LEVEL", help="Exact isolation level, like namespaces, container or microvm."),
    click.option("--idle-timeout", type=click.IntRange(min=0), metavar="SECONDS",
                 help="Stop after this time without a request; 0: never. Default 300, with --detach 0."),
    click.option("--max-lifetime", type=float, metavar="SECONDS", help="Stop after this time in any case."),
    click.option("--retain", "--keep-files", "retain", type=int, metavar="SECONDS",
                 help="Retain the files of the stopped sandbox for this time, for `rock restart`."),
)  # fmt: skip


def standard_input() -> BinaryIO:
    """The standard input without a buffer, whose lock a thread that reads would hold at the end of the process."""
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def play(stream: OutputStream) -> int:
    """Print output as it arrives; returns the exit code."""
    with stream:
        for chunk in stream:
            out = sys.stdout.buffer if chunk.kind == "stdout" else sys.stderr.buffer
            out.write(chunk.data)
            out.flush()
    result = stream.result
    assert result is not None
    if result.exit_code is None or result.timed_out:
        complain(result.failure_reason or "the exit code is not known")
    if result.timed_out:
        return TIMED_OUT
    return NOT_RUN if result.exit_code is None else result.exit_code


def _words(given: tuple[str, ...]) -> list[str]:
    return list(given[1:] if given[:1] == ("--",) else given)


def _volumes(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        name, _, rest = text.partition(":")
        target, colon, mode = rest.partition(":")
        if not name or "/" in name or not target.startswith("/") or (colon and mode not in ("ro", "rw")):
            hint = "--mount mounts a folder of the server's machine" if name.startswith(("/", ".")) else (
                "write it like --volume data:/data or --volume data:/data:ro")  # fmt: skip
            raise InvalidConfig(f"--volume {text!r} is not NAME:PATH[:ro]", hint=hint)
        found.append({"name": name, "target": target, "read_only": mode == "ro"})
    return found


def _mounts(texts: tuple[str, ...]) -> list[dict[str, str]]:
    found = []
    for text in texts:
        source, _, target = text.partition(":")
        target = target.removesuffix(":ro")
        if not source.startswith("/") or not target.startswith("/"):
            raise InvalidConfig(f"--mount {text!r} is not HOST:PATH with two absolute paths",
                                hint="write it like --mount /data/sets:/data; the folder is on the server's machine")
        found.append({"source": source, "target": target})
    return found


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _exclusive(**given: bool) -> None:
    names = [f"--{name}" for name, value in given.items() if value]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other")


def open_terminal(
    sandbox: Sandbox, line: str | None, env: dict[str, str], cwd: str | None, user: str | None, timeout: float | None
) -> int:
    """Connect this terminal to a command line, or to a shell."""
    from rock.cli.commands.terminal import attend

    wrong = next((name for name in env if not re.fullmatch(r"[A-Za-z_]\w*", name)), None)
    if wrong is not None:
        raise InvalidConfig(f"--env: {wrong!r} is not a name that a shell accepts",
                            hint="use letters, digits and _, or leave -t out")
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    if line is None and exports:
        line = "exec ${SHELL:-/bin/sh} -i"
    query: dict[str, object] = {"command": None if line is None else exports + line, "cwd": cwd, "user": user}
    return asyncio.run(attend(sandbox, query, timeout))


@command(
    kind=ProgramCommand, context_settings=OWN_OPTIONS_FIRST,
    example="rock run python:3.11 -- python3 -c 'print(6 * 7)'\n"
            "rock run -it python:3.11\n"
            "rock run -d --name web -e PORT=80 python:3.11 -- python3 -m http.server 80",
)  # fmt: skip
@click.argument("image", shell_complete=complete_image)
@words_argument
@program_options
@sandbox_options
@click.option("--entrypoint", is_flag=True, help="Prefix the command with the ENTRYPOINT of the image.")
@click.option("--rm", "remove", is_flag=True, help="Delete the record of the sandbox too, after its end.")
@click.option("--keep", is_flag=True, help="Leave the sandbox running, and print its id. --idle-timeout applies.")
def run(
    image: str, words: tuple[str, ...], detach: bool, interactive: bool, tty: bool, env: tuple[str, ...],
    cwd: str | None, user: str | None, timeout: float | None, name: str | None, label: tuple[str, ...], memory: str,
    cpus: float, network: str | None, egress: tuple[str, ...], publish: tuple[str, ...], volume: tuple[str, ...],
    mount: tuple[str, ...], disk: str | None, gpus: float | None, runtime: str | None, isolation: str | None,
    idle_timeout: int | None, max_lifetime: float | None, retain: int | None, entrypoint: bool, remove: bool,
    keep: bool, snapshot: str | None, record: bool, auto_pause: float | None,
) -> int:  # fmt: skip
    """Run a program in a new sandbox.

    Starts a sandbox of IMAGE, shows the output of the program, stops the sandbox, and exits with the exit code of the
    program. Without COMMAND it runs the CMD of the image. The image `host` is the file system of the server's machine,
    read-only.

    Exit codes: 124 timeout, 125 error of rock, 126 the program cannot be executed, 127 no such program, 130 Ctrl-C.
    """
    _exclusive(detach=detach, interactive=interactive)
    _exclusive(detach=detach, tty=tty)
    _exclusive(detach=detach, rm=remove)
    _exclusive(detach=detach, timeout=timeout is not None)
    _exclusive(keep=keep, rm=remove)
    _exclusive(rm=remove, retain=retain is not None)
    argv, ports = _words(words), port_pairs(publish, "--publish")
    if detach and ports:
        raise InvalidConfig("--publish forwards ports while this command runs, and --detach ends it",
                            hint="start it without -p, then: rock port-forward SANDBOX LOCAL:REMOTE")
    by_image = entrypoint or not argv
    signal.signal(signal.SIGTERM, _terminated)
    sandbox = new_sandbox(
        image, name=name, labels=variables(label, "--label") or None, memory=memory, cpus=cpus,
        env=variables(env, lone=True), network=network, egress=list(egress) or None, volumes=_volumes(volume) or None,
        mounts=_mounts(mount) or None, disk=disk, num_gpus=gpus, runtime=runtime, isolation=isolation,
        auto_clear_seconds=0 if detach and idle_timeout is None else idle_timeout, timeout=max_lifetime,
        auto_delete_seconds=retain, snapshot=snapshot, record=record or None, auto_pause=auto_pause,
    )  # fmt: skip
    with busy(f"starting a sandbox of {image}"):
        sandbox.start()
    stays = keep or detach
    status = 0
    try:
        if detach:
            _start(sandbox, argv, entrypoint=by_image, cwd=cwd, user=user)
        else:
            with contextlib.ExitStack() as stack:
                for local, remote in ports:
                    forward = stack.enter_context(sandbox.port_forward(remote, local))
                    print(f"{forward.host}:{forward.port} -> port {remote}", file=sys.stderr, flush=True)
                if tty:
                    line = f"exec {shlex.join(argv)}" if argv else None
                    status = open_terminal(sandbox, line, {}, cwd, user, timeout)
                else:
                    stdin = standard_input() if interactive else None
                    status = play(sandbox.stream(argv, timeout=timeout, entrypoint=by_image, cwd=cwd, user=user,
                                                 stdin=stdin))  # fmt: skip
    except BaseException as error:
        if not (keep and isinstance(error, NotFound) and not argv):
            _end(sandbox, remove)
            raise
    if stays:
        print(sandbox.sandbox_id, file=sys.stdout if detach else sys.stderr)
        return status
    _end(sandbox, remove)
    if retain:
        print(sandbox.sandbox_id, file=sys.stderr)
    return status


def _end(sandbox: Sandbox, remove: bool) -> None:
    if remove:
        sandbox.delete()
    else:
        sandbox.stop()


def _start(sandbox: Sandbox, argv: list[str], **fields: Any) -> None:
    """Start the program of `run -d`. A sandbox of an image without ENTRYPOINT and CMD runs without a program."""
    try:
        sandbox.processes.start(argv, **fields)
    except NotFound as error:
        if argv or "neither ENTRYPOINT nor CMD" not in error.message:
            raise


@command(
    "exec", kind=ProgramCommand, context_settings=OWN_OPTIONS_FIRST,
    example="rock exec web -- ps aux\nrock exec -it web -- bash\ntar c . | rock exec -i web -- tar x -C /srv",
)  # fmt: skip
@sandbox_argument
@words_argument
@program_options
@click.option("--session", "-s", metavar="NAME",
              help="Run a command line in this session, which keeps its directory and variables.")  # fmt: skip
def exec_(
    sandbox: str, words: tuple[str, ...], detach: bool, interactive: bool, tty: bool, env: tuple[str, ...],
    cwd: str | None, user: str | None, timeout: float | None, session: str | None,
) -> int:  # fmt: skip
    """Run a program in a sandbox.

    Shows its output, and exits with its exit code. With --detach it prints the id of the background process, whose
    output `rock logs` shows.
    """
    argv, given = _words(words), variables(env, lone=True)
    if not argv:
        raise click.UsageError("no command was given; write it after --")
    _exclusive(detach=detach, interactive=interactive)
    _exclusive(detach=detach, tty=tty)
    if session is not None and (given or cwd or user or interactive or tty or detach):
        raise click.UsageError("a session has its own environment, directory, user and input: --session excludes -e, "
                               "-w, -u, -i, -t and -d")
    target = connected(sandbox)
    if session is not None:
        return play(target.stream(" ".join(argv), session=session, timeout=timeout))
    if tty:
        return open_terminal(target, f"exec {shlex.join(argv)}", given, cwd, user, timeout)
    if detach:
        if timeout is not None:
            raise click.UsageError("a background process has no time limit: --detach excludes --timeout")
        print(target.processes.start(argv, env=given or None, cwd=cwd, user=user).id)
        return 0
    stdin = standard_input() if interactive else None
    return play(target.stream(argv, env=given or None, cwd=cwd, user=user, timeout=timeout, stdin=stdin))


@command(kind=ProgramCommand, example="rock shell web\nrock shell python:3.11")
@click.argument("target", metavar="SANDBOX|IMAGE", shell_complete=complete_id)
@click.option("--command", "line", metavar="LINE", help="Run this command line instead of a shell.")
@click.option("--user", "-u", help="User inside the sandbox.")
@click.option("--cwd", "--workdir", "-w", "cwd", metavar="DIR", help="Working directory.")
@size_options
@click.option("--keep", is_flag=True, help="Leave a new sandbox running, and print its id.")
def shell(
    target: str, line: str | None, user: str | None, cwd: str | None, memory: str, cpus: float, network: str | None,
    keep: bool,
) -> int:  # fmt: skip
    """Open a terminal in a sandbox.

    Given an image, it starts a new sandbox, and stops it at the end; --memory, --cpus and --network are for that one.
    """
    fresh = False
    try:
        sandbox = connected(target)
    except NotFound:
        sandbox, fresh = new_sandbox(target, memory=memory, cpus=cpus, network=network), True
        with busy(f"starting a sandbox of {target}"):
            sandbox.start()
    try:
        status = open_terminal(sandbox, line, {}, cwd, user, None)
    finally:
        if fresh and not keep:
            _quietly(sandbox.stop)
    if fresh and keep:
        print(sandbox.sandbox_id, file=sys.stderr)
    return status


def _quietly(act: Callable[[], None]) -> None:
    """Clean up after an error, which is the one to report."""
    with contextlib.suppress(RockError):
        act()
