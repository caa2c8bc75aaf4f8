"""`docker run` and `docker exec`: programs in new and in existing sandboxes."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from rock.cli.commands.forward import port_pairs
from rock.cli.commands.run import open_terminal, standard_input
from rock.cli.connection import client, new_sandbox, variables
from rock.cli.docker.containers import Record, code_of, find, refusal, running
from rock.cli.docker.flags import Call, Refused
from rock.errors import InvalidConfig, NotFound, PermissionDenied, RockError
from rock.protocol.sandbox import parse_size
from rock.settings import variable
from rock.sync import Client, Sandbox
from rock.sync.sandbox.stream import OutputStream

NETWORKS = {"none": "none", "bridge": "nat", "default": "nat", "nat": "nat", "host": "host"}
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}
_FINISH = {signal.SIGTERM: 143, signal.SIGHUP: 129}


def run(call: Call) -> int:
    """Start a sandbox of an image and its program; the exit code is the program's."""
    image, words = call.words[0], call.words[1:]
    record = Record(remove=call.on("rm"), tty=call.on("tty"), workdir=call.text("workdir"), user=call.text("user"))
    fields = _fields(call)
    ports = _ports(call)
    entrypoint = call.text("entrypoint")
    argv = [*([entrypoint] if entrypoint else []), *words]
    if entrypoint is not None and not argv:
        raise Refused("docker: Error response from daemon: no command specified.")
    own = variables(tuple(call.many("label")), "--label") if call.many("label") else {}
    record.argv = argv
    cidfile = _cidfile(call)
    server = client()
    _volumes_exist(server, fields)
    sandbox = new_sandbox(image, name=call.text("name"), labels=record.labels(own), **fields)
    for number, code in _FINISH.items():
        signal.signal(number, lambda *_, code=code: sys.exit(code))
    sandbox.start()
    started = False
    try:
        if cidfile is not None:
            cidfile.write_text(sandbox.sandbox_id or "")
        _check_platform(sandbox, call.text("platform"))
        if record.workdir is not None:
            sandbox.files.mkdir(record.workdir)
        options: dict[str, Any] = {"cwd": record.workdir, "user": record.user, "entrypoint": entrypoint is None}
        if call.on("detach"):
            keeps_input = call.on("interactive") or call.on("tty")
            if not keeps_input:
                options["stdin"] = ""
            process = sandbox.processes.start(argv, **options)
            record.process = process.id
            _note(server, sandbox, record, own)
            started = True
            print(sandbox.sandbox_id)
            return 0
        status = _foreground(call, sandbox, argv, ports, options)
        if not record.remove:
            record.code = status
            _note(server, sandbox, record, own)
        return status
    finally:
        if not started:
            _end(sandbox, record.remove or sys.exc_info()[0] is not None)


def _foreground(call: Call, sandbox: Sandbox, argv: list[str], ports: list[tuple[int, int]], options: dict[str, Any],
                ) -> int:  # fmt: skip
    with contextlib.ExitStack() as stack:
        for local, remote in ports:
            stack.enter_context(sandbox.port_forward(remote, local))
        if call.on("tty"):
            line = None if not argv else f"exec {shlex.join(argv)}"
            return open_terminal(sandbox, line, {}, options["cwd"], options["user"], None)
        stdin = standard_input() if call.on("interactive") else None
        return play(sandbox.stream(argv, timeout=None, stdin=stdin, **options))


def play(stream: OutputStream) -> int:
    """Print output as it arrives; returns the exit code in Docker's form."""
    with stream:
        for chunk in stream:
            out = sys.stdout.buffer if chunk.kind == "stdout" else sys.stderr.buffer
            out.write(chunk.data)
            out.flush()
    return code_of(stream.result)


def _note(server: Client, sandbox: Sandbox, record: Record, own: dict[str, str]) -> None:
    server.update_sandbox(sandbox.sandbox_id or "", labels=record.labels(own))


def _end(sandbox: Sandbox, remove: bool) -> None:
    if remove:
        sandbox.delete()
    else:
        sandbox.stop()


def execute(call: Call) -> int:
    """Run a program in a container that runs."""
    container = find(client(), call.words[0])
    sandbox, argv = running(container, call.words[0]), call.words[1:]
    env = environment(call)
    cwd, user = call.text("workdir") or container.record.workdir, call.text("user") or container.record.user
    if call.on("detach"):
        sandbox.processes.start(argv, env=env or None, cwd=cwd, user=user, stdin="")
        return 0
    if call.on("tty"):
        return open_terminal(sandbox, f"exec {shlex.join(argv)}", env, cwd, user, None)
    stdin = standard_input() if call.on("interactive") else None
    return play(sandbox.stream(argv, env=env or None, cwd=cwd, user=user, timeout=None, stdin=stdin))


def check_terminal(call: Call) -> None:
    """Refused where -i and -t need a terminal that this process does not have."""
    if call.on("tty") and call.on("interactive") and not call.on("detach") and not sys.stdin.isatty():
        raise Refused("the input device is not a TTY", 1)


# ---- the options of `run`


def environment(call: Call) -> dict[str, str]:
    """The variables of --env-file and -e; a name alone takes its value from here, and is left out if it has none."""
    found: dict[str, str] = {}
    for name in call.many("env-file"):
        try:
            lines = Path(name).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"docker: open {name}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        _add(found, [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")])
    _add(found, call.many("env"))
    return found


def _add(found: dict[str, str], pairs: list[str]) -> None:
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise Refused(f'invalid argument "{pair}" for "-e, --env" flag: invalid environment variable: {pair}',
                          usage=True)  # fmt: skip
        given = value if equals else variable(name)
        if given is not None:
            found[name] = given


def _fields(call: Call) -> dict[str, Any]:
    """The configuration of the sandbox. Refused for a value that ROCK does not support."""
    network = call.text("network")
    if network is not None and network not in NETWORKS:
        raise Refused(f"docker: ROCK does not support --network {network}", hint=f"use {', '.join(NETWORKS)}")
    if call.text("restart") not in (None, "no"):
        raise Refused(f"docker: ROCK does not support --restart {call.text('restart')}", hint="leave it out, or use no")
    if call.text("pull") not in (None, "always", "missing", "never"):
        raise Refused(f'invalid pull option: "{call.text("pull")}": must be one of "always", "missing" or "never"')
    volumes, mounts = _volumes(call.many("volume"))
    cpus, pids = call.number("cpus", float), call.number("pids-limit", int)
    return {
        "env": environment(call), "network": NETWORKS[network] if network else None,
        "memory": _size(call, "memory"), "cpus": cpus or None, "pids": pids or None,
        "shm_size": _size(call, "shm-size"), "nofile": _nofile(call.many("ulimit")), "num_gpus": _gpus(call),
        "pull": call.text("pull"), "volumes": volumes or None, "mounts": mounts or None, "auto_clear_seconds": 0,
    }  # fmt: skip


def _size(call: Call, name: str) -> str | None:
    text = call.text(name)
    if text is not None:
        try:
            parse_size(text, name)
        except ValueError:
            short = "-m, " if name == "memory" else ""
            raise Refused(f'invalid argument "{text}" for "{short}--{name}" flag: invalid size: \'{text}\'',
                          usage=True) from None  # fmt: skip
    return text


def _gpus(call: Call) -> float | None:
    text = call.text("gpus")
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 4:
        raise Refused(f"docker: ROCK does not support --gpus {text}", hint="give the number of GPUs")
    return float(text)


def _nofile(limits: list[str]) -> int | None:
    found = None
    for text in limits:
        name, _, value = text.partition("=")
        number = value.partition(":")[0]
        if name != "nofile" or not number.isdecimal() or len(number) > 9:
            raise Refused(f"docker: ROCK does not support --ulimit {text}", hint="use nofile=NUMBER")
        found = int(number)
    return found


def _volumes(texts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(volumes, folders of the server's machine). Refused for a writable folder."""
    volumes, mounts = [], []
    for text in texts:
        source, _, rest = text.partition(":")
        target, colon, mode = rest.partition(":")
        if not source or not target.startswith("/") or (colon and mode not in ("ro", "rw")):
            raise Refused(f"docker: ROCK does not support --volume {text}",
                          hint="use NAME:PATH[:ro] or /FOLDER:PATH:ro")
        if not source.startswith(("/", ".", "~")):
            volumes.append({"name": source, "target": target, "read_only": mode == "ro"})
        elif not source.startswith("/"):
            raise Refused(f"docker: ROCK does not support --volume {text}", hint="write an absolute path on the server")
        elif mode != "ro":
            raise Refused(f"docker: ROCK does not support --volume {text}: folders of the server are read-only",
                          hint=f"append :ro, or use a volume: --volume NAME:{target}")
        else:
            mounts.append({"source": source, "target": target})
    return volumes, mounts


def _volumes_exist(server: Client, fields: dict[str, Any]) -> None:
    """Create the volumes that do not exist, as Docker does."""
    for volume in fields["volumes"] or ():
        try:
            server.get_volume(volume["name"])
        except NotFound:
            server.create_volume(volume["name"])


def _ports(call: Call) -> list[tuple[int, int]]:
    """The ports to forward while the program runs. Refused with --detach, which ends the process that forwards."""
    found = []
    for text in call.many("publish"):
        address, _, pair = text.rpartition(":") if text.count(":") == 2 else ("", "", text)
        pair, _, protocol = pair.partition("/")
        if address not in ("", "127.0.0.1", "localhost") or protocol not in ("", "tcp"):
            raise Refused(f"docker: ROCK does not support --publish {text}",
                          hint="it forwards TCP ports of 127.0.0.1: --publish 8080:80")
        try:
            found += port_pairs((pair.removeprefix(":") if ":" in pair else f"0:{pair}",), "--publish")
        except InvalidConfig as error:
            raise Refused(f"docker: invalid publish opts format: {error.message}") from None
    if found and call.on("detach"):
        raise Refused("docker: ROCK does not support --publish with --detach: no process forwards the port",
                      hint="start it without -p, then: rock port-forward CONTAINER LOCAL:REMOTE")
    return found


def _cidfile(call: Call) -> Path | None:
    text = call.text("cidfile")
    if text is None:
        return None
    path = Path(text)
    if path.exists():
        raise Refused(f"docker: container ID file found, make sure the other container isn't running or delete {text}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise Refused(f"docker: failed to create the container ID file: {text} is not writable")
    return path


def _check_platform(sandbox: Sandbox, wanted: str | None) -> None:
    """Refused where the machine of the sandbox is not of the platform."""
    if wanted is None:
        return
    system, _, machine = wanted.partition("/")
    machine = machine.partition("/")[0]
    try:
        found = sandbox.exec(["uname", "-m"], timeout=30, check=True).stdout.strip()
    except RockError:
        found = "unknown"
    if system != "linux" or MACHINES.get(machine, machine) != MACHINES.get(found, found):
        raise Refused(f"docker: ROCK does not support --platform {wanted}: the worker is linux/"
                      f"{MACHINES.get(found, found)}", hint="leave --platform out, or use a worker of that platform")


# ---- errors


def failed_start(error: RockError, argv: list[str], prefix: str) -> Refused:
    """An error of `run` and `exec` in Docker's form: 127 for a missing program, 126 for one that is not executable."""
    message = error.message or type(error).__name__
    program = argv[0] if argv else ""
    about = message.startswith(("no such program", "program "))
    where = "Error response from daemon: failed to create task for container" if prefix else "OCI runtime exec failed"
    start = f'{prefix}{where}: unable to start container process: exec: "{program}"'
    if about and isinstance(error, NotFound):
        return Refused(f"{start}: executable file not found in $PATH", 127)
    if about and isinstance(error, PermissionDenied | InvalidConfig):
        return Refused(f"{start}: permission denied", 126)
    if "neither ENTRYPOINT nor CMD" in message:
        return Refused(f"{prefix}Error response from daemon: no command specified", 125)
    return Refused(f"{prefix}{refusal(error)}", 125, hint=error.hint or "")
