"""The `rock` command: its options, the table of its commands, and how errors end it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from rock import __version__, settings
from rock.cli import parsing
from rock.cli.connection import OPTIONS, connect_options
from rock.cli.output import complain, fail
from rock.cli.parsing import Entry, LazyGroup
from rock.errors import InvalidConfig, RockError

COMPLETION = "_ROCK_COMPLETE"  # the variable with which the completion of a shell calls `rock`

ENTRIES = [
    Entry("run", "Sandboxes", "commands.run:run", "Run a program in a new sandbox."),
    Entry("exec", "Sandboxes", "commands.run:exec_", "Run a program in a sandbox."),
    Entry("shell", "Sandboxes", "commands.run:shell", "Open a terminal in a sandbox."),
    Entry("ps", "Sandboxes", "commands.sandbox:ps", "List sandboxes."),
    Entry("stop", "Sandboxes", "commands.sandbox:stop", "Stop sandboxes."),
    Entry("pause", "Sandboxes", "commands.sandbox:pause", "Stop all processes of sandboxes for a while."),
    Entry("checkpoint", "Sandboxes", "forks.snapshot:checkpoint", "Take a snapshot of a running sandbox."),
    Entry("rollback", "Sandboxes", "forks.snapshot:rollback", "Return a running sandbox to a snapshot."),
    Entry("fork", "Sandboxes", "forks.snapshot:fork", "Take a snapshot, and start sandboxes from it."),
    Entry("forkable", "Sandboxes", "forks.snapshot:forkable", "Show what a checkpoint of a sandbox would take."),
    Entry("snapshot", "Sandboxes", "forks.snapshot:snapshot", "List, show, delete, export and import snapshots."),
    Entry("replay", "Sandboxes", "forks.recording:replay", "Start a sandbox with the state of a recorded one."),
    Entry("pool", "Sandboxes", "forks.pool:pool", "Define, list and delete warm pools."),
    Entry("resume", "Sandboxes", "commands.sandbox:resume", "Continue paused sandboxes."),
    Entry("unpause", "Sandboxes", "commands.sandbox:resume", "Continue paused sandboxes.", hidden=True),
    Entry("restart", "Sandboxes", "commands.sandbox:restart", "Restart stopped or archived sandboxes."),
    Entry("rm", "Sandboxes", "commands.sandbox:rm", "Delete stopped sandboxes and their retained files."),
    Entry("rename", "Sandboxes", "commands.sandbox:rename", "Change the name of a sandbox."),
    Entry("commit", "Sandboxes", "commands.sandbox:commit", "Create an image of a sandbox."),
    Entry("archive", "Sandboxes", "commands.sandbox:archive", "Move the retained files of sandboxes to the archive."),
    Entry("wait", "Sandboxes", "commands.sandbox:wait", "Wait until sandboxes end, and print the causes."),
    Entry("logs", "Inspection", "commands.logs:logs", "Show the output of background processes."),
    Entry("log", "Inspection", "forks.recording:log", "Show the recording of a sandbox."),
    Entry("processes", "Inspection", "commands.logs:processes", "List the background processes of a sandbox."),
    Entry("inspect", "Inspection", "commands.observe:inspect", "Show all fields of sandboxes as JSON."),
    Entry("stats", "Inspection", "commands.observe:stats", "Show the resource usage of sandboxes."),
    Entry("top", "Inspection", "commands.observe:stats", "Show the resource usage of sandboxes.", hidden=True),
    Entry("events", "Inspection", "commands.observe:events", "Show state changes of sandboxes."),
    Entry("connections", "Inspection", "commands.observe:connections", "List the network connections of a sandbox."),
    Entry("cp", "Files and ports", "commands.copy:cp", "Copy files to, from and between sandboxes."),
    Entry("port-forward", "Files and ports", "commands.forward:port_forward", "Forward local ports to a sandbox."),
    Entry("volume", "Files and ports", "commands.volume:volume", "Create, list and delete volumes."),
    Entry("image", "Images", "commands.image:image", "Pull, build, import, list and remove images."),
    Entry("env", "Environments", "commands.env:env", "List, show, add, build and play environments."),
    Entry("job", "Jobs", "jobs.job:job", "Run, list, show, cancel, resume and compare jobs."),
    Entry("dataset", "Jobs", "jobs.dataset:dataset", "List, show, upload and download data sets."),
    Entry("agent", "Agents", "agents.agent:agent", "List, install and run agents."),
    Entry("model-service", "Agents", "agents.model_service:model_service", "Answer the model calls of an agent."),
    Entry("runs", "Agents", "agents.runs:runs", "List runs of agents, and read, export and end them."),
    Entry("upstream", "Agents", "agents.upstream:upstream", "List, define and delete upstreams: model servers."),
    Entry("mcp", "Agents", "commands.mcp:mcp", "Serve the tools of sandboxes to an MCP client."),
    Entry("admin", "Server", "commands.admin:admin", "Start, stop, back up and restore the server of this machine."),
    Entry("login", "Server", "commands.context:login", "Log in to a server and use it from now on."),
    Entry("context", "Server", "commands.context:context", "Choose the server that commands use."),
    Entry("config", "Server", "commands.config:config", "Show and change the live configuration of a server."),
    Entry("key", "Server", "commands.key:key", "Create, list and revoke API keys."),
    Entry("ui", "Server", "commands.page:ui", "Open the web page of the server, signed in."),
    Entry("audit", "Server", "commands.page:audit", "Show which key performed which action, newest first."),
    Entry("worker", "Server", "commands.workers:worker", "List, drain and remove workers."),
    Entry("doctor", "Server", "commands.doctor:doctor", "Check this machine, or the files of its server."),
    Entry("bench", "Server", "bench.bench:bench", "Measure this machine: results against a baseline."),
    Entry("completion", "Other", "commands.context:completion", "Print the completion script of a shell."),
    Entry("docker", "Other", "docker.docker:docker", "Run sandboxes by commands of Docker's command line."),
    Entry("version", "Other", "commands.context:version", "Show the version of the client and of the server."),
]


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        print(f"rock {__version__}")
        ctx.exit()


@click.command(
    "rock",
    cls=LazyGroup,
    entries=ENTRIES,
    help="ROCK: isolated environments for agentic reinforcement learning.",
    epilog="Start a server with `rock admin start`, then try: rock run host -- uname -a",
)
@click.option("--base-url", metavar="URL", help="Server to use. `rock context --help` has the order of the defaults.")
@click.option("--api-key", metavar="KEY", help="API key of the server; by default ROCK_API_KEY.")
@click.option("--auth-token", metavar="KEY", help="The same as --api-key, with ROCK's name.")
@click.option("--config", metavar="FILE", help="ROCK's client configuration: base_url and extra_headers.")
@click.option("--extra-header", metavar="NAME=VALUE", multiple=True, help="Header of each request; repeatable.")
@click.option("--cluster", help="Value of the header X-Cluster of each request.")
@click.option("--verbose", "-v", is_flag=True, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, callback=_version, is_eager=True, expose_value=False,
              help="Show the version and exit.")  # fmt: skip
def app(
    base_url: str | None, api_key: str | None, auth_token: str | None, config: str | None,
    extra_header: tuple[str, ...], cluster: str | None, verbose: bool,
) -> None:  # fmt: skip
    OPTIONS.verbose = verbose
    if api_key and auth_token and api_key != auth_token:
        raise InvalidConfig("--api-key and --auth-token are two names of one key, and differ", hint="give one of them")
    if config or extra_header or cluster:
        _headers(config, extra_header, cluster)
    connect_options(base_url, api_key or auth_token)


def _headers(config: str | None, pairs: tuple[str, ...], cluster: str | None) -> None:
    """Set the headers of these options for every client of the command."""
    try:
        given = settings.client_file(config) if config else {}
        settings.give(**given)
        headers = settings.extra_headers()
    except ValueError as error:
        raise InvalidConfig(str(error), hint="correct the file or ROCK_EXTRA_HEADERS") from None
    for pair in [*pairs, *([f"X-Cluster={cluster}"] if cluster else [])]:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InvalidConfig(f"--extra-header {pair!r} is not NAME=VALUE", hint="write it like X-Team=blue")
        headers[name] = value
    settings.give(ROCK_EXTRA_HEADERS=json.dumps(headers))


def main() -> None:
    """Run a command.

    Exit code: 0, or that of the program; 1 for a failed command, 2 for a wrong call; of run, exec and shell 124 for a
    timeout, 125 for an error of rock, 126 for a program that cannot be executed, 127 for one that does not exist; 130
    for Ctrl-C.
    """
    if Path(sys.argv[0]).name == "docker":  # a link of `rock docker install-link`
        sys.argv[1:1] = ["docker"]
    try:
        status = app.main(prog_name="rock", complete_var=COMPLETION, standalone_mode=False) or 0
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        status = 0
    except click.ClickException as error:
        status = parsing.wrong_call(error)
    except RockError as error:
        _trace(error)
        fail(error)
        status = parsing.code_of(error)
    except BrokenPipeError:
        # The reader of the output has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = parsing.CLOSED_PIPE
    except (KeyboardInterrupt, click.Abort):
        status = parsing.INTERRUPTED
    except OSError as error:
        _trace(error)
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", _home_hint(error))
        status = parsing.NOT_RUN if OPTIONS.passes_codes else parsing.FAILED
    except Exception as error:
        _trace(error)
        _unexpected(error)
        status = parsing.NOT_RUN if OPTIONS.passes_codes else parsing.FAILED
    sys.exit(status)


def _home_hint(error: OSError) -> str | None:
    inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(settings.home())
    return "set ROCK_HOME to a folder that you may write" if inside else None


def _trace(error: Exception) -> None:
    if OPTIONS.verbose:
        import traceback

        traceback.print_exception(error)


def _unexpected(error: Exception) -> int:
    from pydantic import ValidationError

    from rock.cli import installation

    if isinstance(error, ModuleNotFoundError) and error.name in installation.SERVER:
        return fail(installation.no_server(error.name))
    if isinstance(error, ValidationError):
        wrong = (
            f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        return complain("; ".join(wrong))
    return complain(f"unexpected: {type(error).__name__}: {error}", None if OPTIONS.verbose else "rock -v shows where")


if __name__ == "__main__":
    main()
