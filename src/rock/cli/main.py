"""The `rock` command: parses arguments, calls the SDK, prints. Commands import heavy modules on demand."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from rock import __version__, settings
from rock.cli.commands import doctor, env, image, key, sandbox, workers
from rock.cli.commands.admin import app as admin_app
from rock.cli.output import OPTIONS, complain, fail
from rock.errors import InvalidConfig, RockError

app = typer.Typer(
    name="rock",
    help="ROCK: isolated environments for agentic reinforcement learning.",
    epilog="Start a server with `rock admin start`, then try: rock run host -- uname -a",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: Rich markup would take longer than the rest of the command
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rock {__version__}")
        raise typer.Exit


@app.callback()
def options(
    base_url: Annotated[str | None, typer.Option(help="The server; ROCK_BASE_URL, or http://127.0.0.1:8080.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key; ROCK_API_KEY.")] = None,
    auth_token: Annotated[str | None, typer.Option(help="The same as --api-key, by ROCK's name.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="ROCK's client configuration: base_url and extra_headers.")
    ] = None,
    extra_header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header of each request; several times.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Sent as the header X-Cluster, as by ROCK.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    OPTIONS.base_url, OPTIONS.api_key, OPTIONS.verbose = base_url, api_key or auth_token, verbose
    if api_key and auth_token and api_key != auth_token:
        raise InvalidConfig("--api-key and --auth-token are two names of one key, and differ", hint="give one of them")
    if config or extra_header or cluster:
        _headers(config, extra_header or [], cluster)


def _headers(config: str | None, pairs: list[str], cluster: str | None) -> None:
    """The headers of these options, for every client of the command."""
    try:
        given = settings.client_file(config) if config else {}
        settings.give(**given)
        headers = settings.extra_headers()
    except ValueError as error:
        raise InvalidConfig(str(error)) from None
    for pair in [*pairs, *([f"X-Cluster={cluster}"] if cluster else [])]:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InvalidConfig(f"--extra-header {pair!r} is not NAME=VALUE")
        headers[name] = value
    settings.give(ROCK_EXTRA_HEADERS=json.dumps(headers))


sandbox.add_commands(app)
app.add_typer(doctor.app, name="doctor")
app.add_typer(image.app, name="image")
app.add_typer(env.app, name="env")
app.add_typer(key.app, name="key")
app.add_typer(workers.app, name="worker")
app.add_typer(admin_app, name="admin")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """Measure this machine: figures next to their floors."""
    from rock.cli.bench.bench import (
        app as bench_app,  # imports the SDK and more, which other commands do not need
    )

    bench_app(context.args, prog_name="rock bench")


def main() -> None:
    """Run a command. Exit status: 0, 1 for an error, 2 for a wrong call, 130 for Ctrl-C, or that of the command run."""
    try:
        app(prog_name="rock")
    except RockError as error:
        _trace(error)
        status = fail(error)
    except BrokenPipeError:
        # The reader of the output has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        _trace(error)
        status = complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        _trace(error)
        status = _unexpected(error)
    else:
        status = 0
    sys.exit(status)


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
