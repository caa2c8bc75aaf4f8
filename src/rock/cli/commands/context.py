"""`rock login`, `context`, `version` and `completion`: the client itself."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module

import click
from click.shell_completion import get_completion_class

from rock import __version__, settings
from rock.cli.connection import OPTIONS
from rock.cli.contexts import Context, Contexts, name_of
from rock.cli.output import as_json, busy, table
from rock.cli.parsing import Group, command, json_option
from rock.errors import InvalidConfig, RockError, Unauthorized
from rock.sync import Client

_none = "no contexts; add one with: rock login URL"


@command(example="rock login https://rock.example.com\nrock login --api-key-stdin https://rock.example.com < key")
@click.argument("url")
@click.option("--name", help="Name of the context; by default the host and port of URL.")
@click.option("--api-key-stdin", is_flag=True, help="Read the API key from the standard input.")
def login(url: str, name: str | None, api_key_stdin: bool) -> None:
    """Log in to a server and use it from now on.

    Checks the server and the key, stores both as a context in ROCK_HOME/contexts.json (~/.rock by default), which only
    you can read, and makes it the current context.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"{url!r} is not a URL of a server", hint="write it like https://rock.example.com:8080")
    key = sys.stdin.readline().strip() if api_key_stdin else OPTIONS.api_key
    try:
        _check(url, key)
    except Unauthorized:
        if key is not None or not sys.stdin.isatty():
            raise
        key = str(click.prompt("API key", hide_input=True, err=True)).strip()
        _check(url, key)
    context = Context(name or name_of(url), url.rstrip("/"), key)
    Contexts(settings.home()).save(context)
    print(f"{context.name}  {context.url}")
    if settings.variable("ROCK_BASE_URL"):
        print("note: ROCK_BASE_URL is set and takes precedence over the context", file=sys.stderr)


def _check(url: str, key: str | None) -> None:
    with busy(f"connecting to {url}"), Client(url, key or "", reconnect_timeout=0) as client:
        client.list_sandboxes(limit=1)


@click.group(cls=Group)
def context() -> None:
    """Choose the server that commands use.

    A context is a URL and an API key under a name; `rock login` adds one. Commands use the first of: the option
    --base-url, the variable ROCK_BASE_URL, the current context, the server that runs with this ROCK_HOME,
    http://127.0.0.1:8080.
    """


@context.command("ls", example="rock context ls")
@json_option
def list_contexts(json_: bool) -> None:
    """List contexts; * marks the current one."""
    stored = Contexts(settings.home())
    current = stored.current
    found = stored.all()
    if json_:
        as_json([{"name": item.name, "url": item.url, "api_key": item.api_key is not None, "current": item == current}
                 for item in found])  # fmt: skip
        return
    rows = [["*" if item == current else "", item.name, item.url, "key" if item.api_key else ""] for item in found]
    table(["", "NAME", "URL", ""], rows, _none)


@context.command("show", example="rock context show")
def show_context() -> None:
    """Show the server that commands use now, and why."""
    print(f"{OPTIONS.base_url or settings.base_url()}  (from {OPTIONS.source})")


@context.command("use", example="rock context use rock.example.com\nrock context use --none")
@click.argument("name", required=False)
@click.option("--none", "none", is_flag=True, help="Use no context.")
def use_context(name: str | None, none: bool) -> None:
    """Make a context the current one."""
    if (name is None) == (not none):
        raise click.UsageError("give a name, or --none")
    Contexts(settings.home()).use(name)
    print(name or "no context")


@context.command("rm", example="rock context rm rock.example.com")
@click.argument("name")
def remove_context(name: str) -> None:
    """Remove a context and its stored key."""
    Contexts(settings.home()).remove(name)
    print(f"removed {name}")


@command(example="rock version")
@json_option
def version(json_: bool) -> None:
    """Show the version of the client and of the server."""
    url, server, reason = OPTIONS.base_url or settings.base_url(), None, None
    try:
        with Client(OPTIONS.base_url, OPTIONS.api_key, reconnect_timeout=0) as client:
            server = client.server_info().version
    except RockError as error:
        reason = error.message
    if json_:
        as_json({"client": __version__, "server": server, "url": url})
        return
    print(f"client  {__version__}")
    print(f"server  {server or f'not available: {reason}'}  ({url})")


@command(example='eval "$(rock completion bash)"\nrock completion fish > ~/.config/fish/completions/rock.fish')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    Load it in the start file of the shell. It completes commands, options, ids and names of sandboxes, and images.
    """
    main = import_module("rock.cli.main")  # its table of commands leads here
    found = get_completion_class(shell)
    assert found is not None
    with suppress(BrokenPipeError):
        print(found(main.app, {}, "rock", main.COMPLETION).source())
