"""`rock docker`: the commands of Docker's command line that agents and evaluation harnesses use, over sandboxes.

The program `rock` behaves as `rock docker` when its name is `docker`: `rock docker install-link` creates such a link.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click

from rock import __version__
from rock.cli.connection import client
from rock.cli.docker.containers import refusal
from rock.cli.docker.flags import REFUSED, Call, Flag, Refused, Spec, help_of, parse, usage
from rock.cli.docker.templates import compiled, expanded
from rock.cli.output import printable
from rock.cli.parsing import OWN_OPTIONS_FIRST, ProgramCommand, command
from rock.errors import RockError

SWITCH = "bool"
_PLAN = "ROCK has no equivalent"


def _refused(reason: str, *names: str, kind: str = "text") -> tuple[Flag, ...]:
    return tuple(Flag(name.partition("/")[0], name.partition("/")[2], kind, reason=reason) for name in names)


_PROGRAM = (
    Flag("detach", "d", SWITCH, "Run in the background"),
    Flag("env", "e", "list", "Set environment variables"),
    Flag("env-file", "", "list", "Read environment variables from a file"),
    Flag("interactive", "i", SWITCH, "Stream the standard input"),
    Flag("tty", "t", SWITCH, "Connect a terminal"),
    Flag("user", "u", "text", "User inside the container"),
    Flag("workdir", "w", "text", "Working directory inside the container"),
    *_refused("ROCK does not give a sandbox rights on the host", "privileged", kind=SWITCH),
    *_refused("ROCK ends a terminal with its program", "detach-keys"),
)  # fmt: skip
_RUN = (
    *_PROGRAM,
    Flag("cidfile", "", "text", "Write the id of the container to a file"),
    Flag("cpus", "", "text", "Number of CPUs"),
    Flag("entrypoint", "", "text", "Replace the ENTRYPOINT of the image"),
    Flag("gpus", "", "text", "Number of GPUs"),
    Flag("init", "", SWITCH, "Run an init process (always so)"),
    Flag("label", "l", "list", "Set labels"),
    Flag("memory", "m", "text", "Memory limit"),
    Flag("name", "", "text", "Name of the container"),
    Flag("network", "", "text", "none (the default), bridge: public addresses over TCP, host"),
    Flag("net", "", "text", "The same as --network"),
    Flag("pids-limit", "", "text", "Maximum number of processes"),
    Flag("platform", "", "text", "Require this platform of the worker"),
    Flag("publish", "p", "list", "Forward a port while the program runs; not with -d"),
    Flag("pull", "", "text", "always, missing, never"),
    Flag("quiet", "q", SWITCH, "Show no progress (always so)"),
    Flag("restart", "", "text", "no"),
    Flag("rm", "", SWITCH, "Delete the container after its end"),
    Flag("shm-size", "", "text", "Size of /dev/shm"),
    Flag("ulimit", "", "list", "nofile=NUMBER"),
    Flag("volume", "v", "list", "NAME:PATH[:ro], or /FOLDER:PATH:ro of the server's machine"),
    *_refused("set -i, -t or -d instead", "attach/a", kind="list"),
    *_refused("a sandbox has a fixed set of rights; docs/security.md describes it",
              "cap-add", "cap-drop", "security-opt", "device", "device-cgroup-rule", "group-add", kind="list"),
    *_refused("a sandbox has namespaces of its own", "cgroupns", "ipc", "pid", "userns", "uts", "cgroup-parent"),
    *_refused("use --network; a sandbox has no addresses of its own", "add-host", "dns", "dns-option", "dns-search",
              "expose", "link", "network-alias", kind="list"),
    *_refused("use --network; a sandbox has no addresses of its own", "hostname/h", "domainname", "ip", "ip6",
              "mac-address"),
    *_refused("use --publish", "publish-all/P", kind=SWITCH),
    *_refused("use --volume", "mount", "tmpfs", "volumes-from", kind="list"),
    *_refused("use --volume", "volume-driver"),
    *_refused("use --cpus", "cpu-period", "cpu-quota", "cpu-rt-period", "cpu-rt-runtime", "cpu-shares/c",
              "cpuset-cpus", "cpuset-mems"),
    *_refused("use --memory", "kernel-memory", "memory-reservation", "memory-swap", "memory-swappiness",
              "oom-score-adj"),
    *_refused("use --memory", "oom-kill-disable", kind=SWITCH),
    *_refused(_PLAN, "blkio-weight", "isolation", "log-driver", "health-cmd", "health-interval", "health-retries",
              "health-start-period", "health-start-interval", "health-timeout", "stop-signal", "stop-timeout",
              "runtime"),
    *_refused(_PLAN, "annotation", "blkio-weight-device", "device-read-bps", "device-read-iops", "device-write-bps",
              "device-write-iops", "label-file", "link-local-ip", "log-opt", "storage-opt", "sysctl", kind="list"),
    *_refused(_PLAN, "no-healthcheck", "read-only", "disable-content-trust", "use-api-socket", kind=SWITCH),
    *_refused("ROCK always passes signals on", "sig-proxy", kind=SWITCH),
)  # fmt: skip
_FORMAT = Flag("format", "f", "text", "Go template, or json")
_SIZE = _refused(_PLAN, "size/s", kind=SWITCH)

COMMANDS: dict[str, tuple[Spec, str]] = {
    "run": (Spec("run", "[OPTIONS] IMAGE [COMMAND] [ARG...]", _RUN, 1, None, False,
                 "Create and run a new container from an image"), "run:run"),
    "exec": (Spec("exec", "[OPTIONS] CONTAINER COMMAND [ARG...]", _PROGRAM, 2, None, False,
                  "Execute a command in a running container"), "run:execute"),
    "ps": (Spec("ps", "[OPTIONS]", (
        Flag("all", "a", SWITCH, "Show all containers"), Flag("filter", "f", "list", "Filter by KEY=VALUE"),
        Flag("format", "", "text", "table, json, or a Go template"), Flag("last", "n", "text", "Show the last N"),
        Flag("latest", "l", SWITCH, "Show the newest"), Flag("no-trunc", "", SWITCH, "Do not cut values"),
        Flag("quiet", "q", SWITCH, "Show ids only"), *_SIZE), 0, 0, True, "List containers"), "lifecycle:ps"),
    "inspect": (Spec("inspect", "[OPTIONS] NAME|ID [NAME|ID...]", (
        _FORMAT, Flag("type", "", "text", "container or image"), *_SIZE), 1, None, True,
        "Show containers and images as JSON"), "lifecycle:inspect"),
    "stop": (Spec("stop", "[OPTIONS] CONTAINER [CONTAINER...]", (
        Flag("time", "t", "text", "Seconds before SIGKILL"), Flag("timeout", "", "text", "The same as --time"),
        *_refused("the main program gets SIGTERM; use `docker kill -s`", "signal/s")), 1, None, True,
        "Stop containers"), "lifecycle:stop"),
    "kill": (Spec("kill", "[OPTIONS] CONTAINER [CONTAINER...]", (Flag("signal", "s", "text", "Signal to send"),), 1,
                  None, True, "Send a signal to containers"), "lifecycle:kill"),
    "rm": (Spec("rm", "[OPTIONS] CONTAINER [CONTAINER...]", (
        Flag("force", "f", SWITCH, "Stop running containers first"),
        Flag("volumes", "v", SWITCH, "Delete anonymous volumes (there are none)"),
        *_refused(_PLAN, "link/l", kind=SWITCH)), 1, None, True, "Delete containers"), "lifecycle:rm"),
    "wait": (Spec("wait", "CONTAINER [CONTAINER...]", (), 1, None, True,
                  "Wait for containers to end, and print their exit codes"), "lifecycle:wait"),
    "logs": (Spec("logs", "[OPTIONS] CONTAINER", (
        Flag("follow", "f", SWITCH, "Continue until the end"), Flag("tail", "n", "text", "Number of last lines"),
        *_refused("output has no timestamps", "since", "until"),
        *_refused("output has no timestamps", "timestamps/t", "details", kind=SWITCH)), 1, 1, True,
        "Show the output of a container"), "lifecycle:logs"),
    "cp": (Spec("cp", "[OPTIONS] CONTAINER:SRC_PATH DEST_PATH|- | SRC_PATH|- CONTAINER:DEST_PATH", (
        Flag("quiet", "q", SWITCH, "Show no progress"),
        *_refused("owners are not copied", "archive/a", kind=SWITCH),
        *_refused("links are copied as links", "follow-link/L", kind=SWITCH)), 2, 2, True,
        "Copy files between a container and this machine"), "lifecycle:cp"),
    "build": (Spec("build", "[OPTIONS] PATH | -", (
        Flag("tag", "t", "list", "Name of the image"), Flag("file", "f", "text", "Dockerfile"),
        Flag("target", "", "text", "Stage to build"), Flag("build-arg", "", "list", "Value of an ARG"),
        Flag("label", "", "list", "Label of the image"), Flag("memory", "m", "text", "Memory limit of each RUN"),
        Flag("network", "", "text", "Network of RUN: none (the default), bridge, host"),
        Flag("no-cache", "", SWITCH, "Do not use the cache"), Flag("pull", "", SWITCH, "Pull newer images of FROM"),
        Flag("quiet", "q", SWITCH, "Print the name only"), Flag("rm", "", SWITCH, "Accepted: always so"),
        Flag("force-rm", "", SWITCH, "Accepted: always so"), Flag("progress", "", "text", "Accepted: always plain"),
        Flag("load", "", SWITCH, "Accepted: images are always in the store of the server"),
        *_refused(_PLAN, "platform", "output/o", "cpu-shares/c", "cpuset-cpus", "iidfile", "isolation", "builder",
                  "cgroup-parent", "memory-swap", "shm-size", "metadata-file", "attest", "sbom", "provenance"),
        *_refused(_PLAN, "add-host", "cache-from", "cache-to", "secret", "ssh", "build-context", "ulimit",
                  "security-opt", "annotation", "allow", kind="list"),
        *_refused(_PLAN, "compress", "squash", "push", "check", kind=SWITCH)), 1, 1, True,
        "Build an image from a Dockerfile"), "images:build"),
    "pull": (Spec("pull", "[OPTIONS] NAME[:TAG|@DIGEST]", (
        Flag("quiet", "q", SWITCH, "Print the name only"), *_refused(_PLAN, "platform"),
        *_refused("name one tag", "all-tags/a", kind=SWITCH),
        *_refused(_PLAN, "disable-content-trust", kind=SWITCH)), 1, 1, True,
        "Download an image from a registry"), "images:pull"),
    "images": (Spec("images", "[OPTIONS] [REPOSITORY[:TAG]]", (
        Flag("all", "a", SWITCH, "Accepted: there are no other images"),
        Flag("format", "", "text", "table, json, or a Go template"), Flag("no-trunc", "", SWITCH, "Do not cut ids"),
        Flag("quiet", "q", SWITCH, "Show ids only"), *_refused(_PLAN, "filter/f", kind="list"),
        *_refused(_PLAN, "digests", "tree", kind=SWITCH)), 0, 1, True, "List images"), "images:images"),
}  # fmt: skip
GROUPS = {
    "container": {"ls": "ps", "list": "ps", **{name: name for name in COMMANDS if name not in (
        "build", "pull", "images")}},
    "image": {"ls": "images", "list": "images", "build": "build", "pull": "pull", "inspect": "inspect"},
}  # fmt: skip
KNOWN = ("attach", "builder", "buildx", "commit", "compose", "config", "context", "cp", "create", "diff", "events",
         "export", "history", "import", "info", "load", "login", "logout", "manifest", "network", "pause", "plugin",
         "port", "push", "rename", "restart", "rmi", "save", "search", "secret", "service", "stack", "start", "stats",
         "swarm", "system", "tag", "top", "unpause", "update", "volume")  # fmt: skip


@command(
    kind=ProgramCommand,
    context_settings={**OWN_OPTIONS_FIRST, "ignore_unknown_options": True, "help_option_names": []},
    example="rock docker run --rm -e NAME=value python:3.11 python3 -c 'print(6 * 7)'\n"
            "rock docker ps --format '{{.ID}} {{.Names}}'\n"
            "rock docker install-link ~/.local/bin",
)  # fmt: skip
@click.argument("words", metavar="COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED)
def docker(words: tuple[str, ...]) -> int:
    """Run sandboxes by commands of Docker's command line.

    COMMAND is run, exec, ps, inspect, stop, kill, rm, wait, logs, cp, build, pull, images, version, or `install-link
    [FOLDER]`, which creates a link `docker` to this program. Options that ROCK does not support are rejected with
    exit code 125 before anything starts.
    """
    try:
        return _dispatch(list(words))
    except Refused as error:
        return _complain(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("help", "--help", "-h"):
        print(_overview())
        return 0
    name, rest = words[0], words[1:]
    if name in ("--version", "-v", "version"):
        return _version(name, rest)
    if name == "install-link":
        return _install(rest)
    group = GROUPS.get(name)
    if group is not None:
        inner = group.get(rest[0]) if rest else None
        if inner is None:
            raise Refused(f"docker: ROCK does not support `docker {' '.join([name, *rest[:1]])}`",
                          hint=f"the commands are {', '.join(sorted(group))}")
        given = rest[1:]
        rest = ["--type", name, *given] if inner == "inspect" else given
        name = inner
    if name not in COMMANDS:
        if name in KNOWN:
            raise Refused(f"docker: ROCK does not support `docker {name}`", hint="`rock --help` lists its commands")
        if name.startswith("-"):
            raise Refused(f"docker: ROCK does not support the global option {name}", hint="ROCK_BASE_URL is the server")
        raise Refused(f"docker: unknown command: docker {name}\n\nRun 'docker --help' for more information", 1)
    return _run(name, rest)


def _run(name: str, rest: Sequence[str]) -> int:
    spec, target = COMMANDS[name]
    try:
        call = parse(spec, rest)
    except Refused as error:
        if error.usage and not error.code and not error.args[0]:
            print(help_of(spec))
            return 0
        if error.usage:
            raise _with_usage(error, spec) from None
        raise
    _same(call)
    module, _, attribute = target.partition(":")
    home = import_module(f"rock.cli.docker.{module}")
    act: Callable[[Call], int] = getattr(home, attribute)
    programs = name in ("run", "exec")
    try:
        if programs:
            home.check_terminal(call)
        return act(call)
    except Refused as error:
        raise (_with_usage(error, spec) if error.usage else error) from None
    except RockError as error:
        if not programs:
            raise Refused(refusal(error), 1, hint=error.hint or "") from None
        refused: Refused = home.failed_start(error, call.words[1:], "docker: " if name == "run" else "")
        if name == "exec" and refused.code == REFUSED:
            refused.code = 1
        raise refused from None


def _same(call: Call) -> None:
    """Two names of one option."""
    if "net" in call.texts:
        call.texts["network"] = call.texts.pop("net")


def _with_usage(error: Refused, spec: Spec) -> Refused:
    text = f"{error}\n\n{usage(spec)}\n\nRun 'docker {spec.name} --help' for more information"
    return Refused(text, error.code, hint=error.hint)


def _complain(error: Refused) -> int:
    print("\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)
    return error.code


def _overview() -> str:
    lines = ["Usage:  docker COMMAND", "", "Sandboxes of a ROCK server by commands of Docker's command line", "",
             "Commands:"]  # fmt: skip
    lines += [f"  {name.ljust(12)}{spec.summary}" for name, (spec, _) in COMMANDS.items()]
    lines += [f"  {'version'.ljust(12)}Show the version",
              f"  {'install-link'.ljust(12)}Create a link `docker` to this program"]  # fmt: skip
    return "\n".join([*lines, "", "Run 'docker COMMAND --help' for more information on a command."])


def _version(name: str, rest: list[str]) -> int:
    """The version of this program; for `version` that of the server too."""
    if name != "version":
        print(f"Docker commands of ROCK version {__version__}")
        return 0
    spec = Spec("version", "[OPTIONS]", (replace(_FORMAT),), 0, 0)
    call = parse(spec, rest)
    fields = {"Client": {"Version": __version__, "Platform": {"Name": "ROCK"}},
              "Server": {"Version": "", "Platform": {"Name": "ROCK"}}}  # fmt: skip
    try:
        fields["Server"]["Version"] = client().server_info().version
    except RockError as error:
        raise Refused(f"Cannot connect to the Docker daemon: {error.message}", 1, hint=error.hint or "") from None
    template = call.text("format")
    text = "Client: ROCK\n Version: {{.Client.Version}}\n\nServer: ROCK\n Version: {{.Server.Version}}"
    print(compiled(expanded("{{json .}}" if template == "json" else template or text))(fields))
    return 0


def _install(rest: list[str]) -> int:
    """Create a link with the name `docker` to this program in a folder of PATH. An existing file is not replaced."""
    if len(rest) > 1 or (rest and rest[0].startswith("-")):
        raise Refused("docker: 'docker install-link' accepts one argument: a folder", 1)
    program = shutil.which("rock") or str(Path(sys.executable).with_name("rock"))
    if not os.access(program, os.X_OK):
        raise Refused("docker: the program `rock` is not installed", 1, hint="install ROCK with pip, and try again")
    folder = Path(rest[0]).expanduser() if rest else Path(program).parent
    link = folder / "docker"
    try:
        if link.is_symlink() and os.readlink(link) == program:
            print(link)
            return 0
        link.symlink_to(program)
    except FileExistsError:
        raise Refused(f"docker: {link} exists, and is not replaced", 1, hint="choose another folder") from None
    except OSError as error:
        raise Refused(f"docker: cannot create {link}: {error.strerror}", 1, hint="choose another folder") from None
    print(link)
    first = shutil.which("docker")
    if first != str(link):
        print(f"hint: {folder} is not the first folder of PATH with a program `docker`"
              f"{f'; {first} is' if first else ''}", file=sys.stderr)  # fmt: skip
    return 0
