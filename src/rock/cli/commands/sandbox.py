"""`rock run`, `ps`, `exec`, `shell`, `logs`, `stop`, `restart`, `archive`, `rm`, `commit`, `connections`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rock.cli.output import OPTIONS, age, as_json, busy, fail, table
from rock.errors import InvalidConfig, NotFound, RockError

if TYPE_CHECKING:
    from rock.protocol.sandbox import SandboxInfo
    from rock.sync import Client, Sandbox
    from rock.sync.sandbox.stream import OutputStream

OWN_OPTIONS_FIRST = {"allow_interspersed_args": False}

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.", show_default=False)]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="-- CMD", help="The program and its arguments.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="A variable for the program.")]
Cwd = Annotated[str | None, typer.Option("--cwd", "-w", help="Folder to run it in.")]
User = Annotated[str | None, typer.Option("--user", "-u", help="User to run it as.")]
Stdin = Annotated[bool, typer.Option("--stdin", "-i", help="Give it the standard input, read to its end first.")]
Memory = Annotated[str, typer.Option("--memory", "-m", help="Memory limit, like 512m or 8g.")]
Cpus = Annotated[float, typer.Option("--cpus", "-c", help="CPU limit, in cores.")]
Network = Annotated[str | None, typer.Option(help="none (the default), nat or host.")]
Egress = Annotated[
    list[str] | None,
    typer.Option(metavar="ENTRY", help="Where it may connect to, like example.com:443; several times. Implies nat."),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds after which it is killed.")]


def client() -> Client:
    from rock.sync import Client

    return Client(OPTIONS.base_url, OPTIONS.api_key)


def new_sandbox(image: str, **fields: Any) -> Sandbox:
    """An unstarted sandbox on the server that the options name."""
    from rock.sync import Sandbox, SandboxConfig

    where = {"base_url": OPTIONS.base_url, "api_key": OPTIONS.api_key}
    given = {k: v for k, v in {**where, **fields}.items() if v is not None}
    return Sandbox(SandboxConfig(image=image, **given))


def find(text: str) -> SandboxInfo:
    """The sandbox with this id, or the only living one with this id prefix. NotFound, InvalidConfig."""
    server = client()
    try:
        return server.get_sandbox(text)
    except NotFound:
        found = [info for info in server.list_sandboxes("pending,running") if info.sandbox_id.startswith(text)]
        if not found:
            raise
    if len(found) > 1:
        names = ", ".join(info.sandbox_id for info in found[:5])
        raise InvalidConfig(f"{text} is the beginning of several ids: {names}")
    return found[0]


def attached(text: str) -> Sandbox:
    """The sandbox with this id, connected."""
    info = find(text)
    sandbox = new_sandbox(info.image)
    sandbox.sandbox_id = info.sandbox_id
    return sandbox


def variables(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InvalidConfig(f"{pair!r} is not K=V")
        found[name] = value
    return found


def play(stream: OutputStream) -> int:
    """Print output as it arrives; returns the exit status."""
    with stream:
        for chunk in stream:
            out = sys.stdout.buffer if chunk.kind == "stdout" else sys.stderr.buffer
            out.write(chunk.data)
            out.flush()
    result = stream.result
    assert result is not None
    if result.exit_code is None or result.timed_out:
        print(f"error: {result.failure_reason or 'the exit status is not known'}", file=sys.stderr)
    if result.timed_out:
        return 124
    return 125 if result.exit_code is None else result.exit_code


def program(words: list[str] | None, stdin: bool, **fields: Any) -> dict[str, Any]:
    """The fields of a Command."""
    if words and words[0] == "--":
        words = words[1:]
    if not words:
        raise typer.BadParameter("no command was given; write it after --", param_hint="CMD")
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if stdin else None
    return {"command": words, "stdin": text, **fields}


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def run(
    image: Annotated[str, typer.Argument(help="Name of an image, or host: this machine's own system.")],
    command: Words = None,
    memory: Memory = "2g",
    cpus: Cpus = 2.0,
    env: Env = None,
    cwd: Cwd = None,
    user: User = None,
    network: Network = None,
    egress: Egress = None,
    timeout: Timeout = None,
    stdin: Stdin = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the sandbox running, and print its id.")] = False,
    keep_files: Annotated[
        int | None,
        typer.Option(metavar="SECONDS", help="Keep its files so long after its stop, for `rock restart`."),
    ] = None,
    entrypoint: Annotated[
        bool, typer.Option("--entrypoint", help="By the image's ENTRYPOINT; without a command its CMD.")
    ] = False,
) -> None:
    """Start a sandbox, run a program in it, show its output, exit with its status, stop the sandbox."""
    if entrypoint:
        words = command or []
        command = words[1:] if words[:1] == ["--"] else words
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if stdin else None
        spec: dict[str, Any] = {"command": command, "stdin": text, "cwd": cwd, "user": user, "timeout": timeout,
                                "entrypoint": True}  # fmt: skip
    else:
        spec = program(command, stdin, cwd=cwd, user=user, timeout=timeout)
    signal.signal(signal.SIGTERM, _terminated)
    sandbox = new_sandbox(
        image, memory=memory, cpus=cpus, env=variables(env), network=network, egress=egress,
        auto_delete_seconds=keep_files,
    )  # fmt: skip
    with busy(f"starting a sandbox of {image}"):
        sandbox.start()
    try:
        status = play(sandbox.stream(spec.pop("command"), **spec))
    except BaseException:
        if not keep:
            sandbox.close()
        raise
    if keep or keep_files:
        print(sandbox.sandbox_id, file=sys.stderr)
    if not keep:
        sandbox.stop()
    raise typer.Exit(status)


def exec_(
    sandbox_id: Id,
    command: Words = None,
    session: Annotated[
        str | None, typer.Option("--session", "-s", help="Run it as a command line in this session.")
    ] = None,
    env: Env = None,
    cwd: Cwd = None,
    user: User = None,
    timeout: Timeout = None,
    stdin: Stdin = False,
) -> None:
    """Run a program in a sandbox, show its output, exit with its status."""
    if session is not None and (env or cwd or user or stdin):
        raise typer.BadParameter("a session has its own environment, folder, user and input", param_hint="--session")
    spec = program(command, stdin, env=variables(env) or None, cwd=cwd, user=user, timeout=timeout)
    sandbox = attached(sandbox_id)
    if session is not None:
        raise typer.Exit(play(sandbox.stream(" ".join(spec["command"]), session=session, timeout=timeout)))
    raise typer.Exit(play(sandbox.stream(spec.pop("command"), **spec)))


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those that have ended as well.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
    json: Json = False,
) -> None:
    """List sandboxes."""
    found = client().list_sandboxes(None if everything else "pending,running,stopping")
    if json:
        as_json([info.model_dump(mode="json") for info in found])
    elif quiet:
        for info in found:
            print(info.sandbox_id)
    else:
        columns = ["ID", "IMAGE", "STATE", "ISOLATION", "MEMORY", "CPUS", "AGE"] + ["WHY"] * everything
        rows = [
            [
                info.sandbox_id,
                info.image,
                info.state.value,
                info.isolation.value if info.isolation else None,
                info.memory,
                f"{info.cpus:g}",
                age(info.created_at, info.stopped_at),
                *([info.reason] * everything),
            ]
            for info in found
        ]
        table(columns, rows, "no sandboxes")


def logs(
    sandbox_id: Id,
    process: Annotated[str | None, typer.Argument(help="Id of a background process; without it, list them.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the process ends.")] = False,
    json: Json = False,
) -> None:
    """Show the output of a background process: stdout to stdout, stderr to stderr."""
    sandbox = attached(sandbox_id)
    if process is not None:
        _show_logs(sandbox, process, follow)
        return
    found = [item.info for item in sandbox.processes.list()]
    if json:
        as_json([info.model_dump(mode="json") for info in found])
        return
    rows = [
        [
            info.process_id,
            info.pid,
            "running" if info.running else "ended" if info.exit_code is None else f"exit {info.exit_code}",
            age(info.started_at, info.ended_at),
            info.command if isinstance(info.command, str) else " ".join(info.command),
        ]
        for info in found
    ]
    table(["PROCESS", "PID", "STATE", "AGE", "COMMAND"], rows, "no background processes")


def _show_logs(sandbox: Sandbox, process_id: str, follow: bool) -> None:
    from functools import partial

    from rock.sync.primitives import gather

    process = sandbox.processes.get(process_id)

    def show(stream: Any, out: Any) -> None:
        offset = 0
        while True:
            part = process.logs(stream, offset, wait=20.0 if follow else None)
            out.write(part.data)
            out.flush()
            if not part.data and not (follow and part.running):
                return
            offset = part.next

    for outcome in gather([partial(show, "stdout", sys.stdout.buffer), partial(show, "stderr", sys.stderr.buffer)]):
        if isinstance(outcome, BaseException):
            raise outcome


def stop(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that run.")] = False,
) -> None:
    """Stop sandboxes. What stays is their tombstone, which `rock ps -a` shows, and files that are to be kept."""
    server = client()
    _each(_chosen(server, ids, everything), server.stop_sandbox)


def restart(ids: Annotated[list[str], typer.Argument(metavar="ID...", show_default=False)]) -> None:
    """Start stopped or archived sandboxes again over their kept files (see `rock run --keep-files`)."""
    _each(ids, client().restart_sandbox)


def archive(ids: Annotated[list[str], typer.Argument(metavar="ID...", show_default=False)]) -> None:
    """Bring the kept files of stopped sandboxes to the server's archive; `rock restart` brings them back."""
    _each(ids, client().archive_sandbox)


def rm(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that have ended; with --force all.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Stop it first when it runs.")] = False,
) -> None:
    """Forget sandboxes that have ended, and their kept files."""
    server = client()
    names = _chosen(server, ids, everything, None if force else "stopped,archived,deleted")
    _each(names, lambda name: server.delete_sandbox(name, force=force))


def _chosen(
    server: Client, ids: list[str] | None, everything: bool, states: str | None = "pending,running,stopping"
) -> list[str]:
    if bool(ids) == everything:
        raise typer.BadParameter("give ids, or --all", param_hint="ID")
    return ids or [info.sandbox_id for info in server.list_sandboxes(states)]


def _each(names: list[str], act: Any) -> None:
    """Apply an operation to all sandboxes concurrently; print the successful ids, and exit with 1 when one failed."""
    from functools import partial

    from rock.sync.primitives import gather

    def one(name: str) -> str:
        try:
            return str(act(name).sandbox_id)
        except NotFound:
            return str(act(find(name).sandbox_id).sandbox_id)

    failed = 0
    with busy(f"{len(names)} sandboxes"):
        outcomes = gather([partial(one, name) for name in names], 16)
    for outcome in outcomes:
        if isinstance(outcome, RockError):
            failed = fail(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            print(outcome)
    if failed:
        raise typer.Exit(failed)


def add_commands(app: typer.Typer) -> None:
    from rock.cli.commands import copy
    from rock.cli.commands import copy as forward

    app.command(context_settings=OWN_OPTIONS_FIRST)(run)
    app.command("ps")(ps)
    app.command("exec", context_settings=OWN_OPTIONS_FIRST)(exec_)
    app.command("shell")(shell)
    app.command("cp")(copy.cp)
    app.command("port-forward")(forward.port_forward)
    app.command("connections")(connections)
    app.command("logs")(logs)
    app.command("stop")(stop)
    app.command("restart")(restart)
    app.command("archive")(archive)
    app.command("commit")(commit)
    app.command("rm")(rm)


# ---- rock shell ----

def shell(
    target: Annotated[str, typer.Argument(metavar="ID|IMAGE", help="A running sandbox, or an image for a new one.")],
    command: Annotated[str | None, typer.Option("--command", help="Run this instead of a shell.")] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="User inside.")] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w", help="Folder to begin in.")] = None,
    memory: Annotated[str, typer.Option("--memory", "-m", help="Memory limit of a new one.")] = "2g",
    cpus: Annotated[float, typer.Option("--cpus", "-c", help="CPU limit of a new one.")] = 2.0,
    network: Annotated[str | None, typer.Option(help="none, nat or host, of a new one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave a new one running.")] = False,
) -> None:
    """Open a terminal in a sandbox. Given an image, a new sandbox is started and stopped afterwards."""
    import asyncio

    from rock.cli.commands.terminal import attend

    fresh = False
    try:
        sandbox = attached(target)
    except NotFound:
        sandbox, fresh = new_sandbox(target, memory=memory, cpus=cpus, network=network), True
        with busy(f"starting a sandbox of {target}"):
            sandbox.start()
    try:
        status = asyncio.run(attend(sandbox, {"command": command, "user": user, "cwd": cwd}))
    finally:
        if fresh and not keep:
            sandbox.close()
    if fresh and keep:
        print(sandbox.sandbox_id, file=sys.stderr)
    raise typer.Exit(status)


# ---- rock commit ----

def commit(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the image, like localhost:5000/team/tool:1.0.")],
    push: Annotated[bool, typer.Option("--push", help="Send it to the registry that its name tells.")] = False,
    username: Annotated[str | None, typer.Option(help="For the registry; its password is asked for.")] = None,
) -> None:
    """Make an image of a sandbox: of one that runs, which stands still meanwhile, or of one whose files are kept."""
    password = None if username is None else typer.prompt("Password", hide_input=True, err=True)
    with busy(f"committing {target} to {tag}"):
        status = attached(target).commit(tag, username, password, push=push)
    print(f"{status.image_tag}  {status.pushed_digest or status.image_digest}")


# ---- rock connections ----

def connections(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    refused: Annotated[bool, typer.Option("--refused", help="Those that were not allowed, only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what a sandbox connected to over network nat, or tried to; of a stopped one too."""
    found = attached(target).egress_log()
    items = [item for item in found.items if not (refused and item.allowed)]
    if json:
        as_json([item.model_dump(mode="json") for item in items])
        return
    rows = [
        [
            item.number,
            age(item.at, item.ended_at),
            "allowed" if item.allowed else "refused",
            item.protocol,
            item.host,
            f"{item.address}:{item.port}" if ":" not in item.address else f"[{item.address}]:{item.port}",
            item.sent,
            item.received,
            item.reason,
        ]
        for item in items
    ]
    table(["#", "TIME", "", "PROTOCOL", "HOST", "ADDRESS", "SENT", "RECEIVED", "WHY"], rows, "no connections")
    if found.dropped:
        print(f"{found.dropped} more are no longer remembered")
