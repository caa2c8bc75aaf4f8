"""Commands and groups on click: lazy loading, help with sections and examples, one style of errors, completion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from rock.cli.connection import OPTIONS, connect_options
from rock.cli.output import complain
from rock.errors import InvalidConfig, NotFound, PermissionDenied, RockError

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
OWN_OPTIONS_FIRST = {**SETTINGS, "allow_interspersed_args": False}  # words after the first argument belong to a program

# Exit codes beside 0 and those of programs; as Docker's.
FAILED = 1  # a command failed
WRONG_CALL = 2
TIMED_OUT = 124
NOT_RUN = 125  # run, exec, shell: an error of rock, so that no program ran to its end
NOT_EXECUTABLE = 126
NO_PROGRAM = 127
INTERRUPTED = 130
CLOSED_PIPE = 141

COMPLETION_TIMEOUT = 1.0  # seconds for a request of the shell completion


class Command(click.Command):
    """A command with an example at the end of its help."""

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        settings["context_settings"] = {**SETTINGS, **(settings.get("context_settings") or {})}
        super().__init__(*args, **settings)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"  {line}\n")


class ProgramCommand(Command):
    """A command whose exit code is that of a program, so that errors of rock itself have other codes."""

    def invoke(self, ctx: click.Context) -> Any:
        OPTIONS.passes_codes = True
        return super().invoke(ctx)


def code_of(error: RockError) -> int:
    """The exit code of an error."""
    if not OPTIONS.passes_codes:
        return FAILED
    about_program = error.message.startswith(("no such program", "program "))
    if isinstance(error, NotFound) and about_program:
        return NO_PROGRAM
    if isinstance(error, PermissionDenied | InvalidConfig) and about_program:
        return NOT_EXECUTABLE
    return NOT_RUN


class Group(click.Group):
    """A group of commands of one noun, such as `rock image`."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("no_args_is_help", True)
        settings["context_settings"] = {**SETTINGS, **(settings.get("context_settings") or {})}
        super().__init__(*args, **settings)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            close = get_close_matches(name, self.list_commands(ctx), n=1)
            error = click.UsageError(f"there is no command {ctx.command_path} {name}", ctx)
            hint = f"did you mean {ctx.command_path} {close[0]}?" if close else f"{ctx.command_path} --help lists them"
            raise Hinted(error, hint)
        return super().resolve_command(ctx, args)


class Hinted(click.UsageError):
    """A usage error with a hint of its own."""

    def __init__(self, error: click.UsageError, hint: str | None) -> None:
        super().__init__(error.message, error.ctx)
        self.hint = hint


@dataclass(frozen=True)
class Entry:
    """A command of the lazy group. target: "module:attribute" in rock.cli.commands. hidden: an alias."""

    name: str
    section: str
    target: str
    summary: str
    hidden: bool = False


class LazyGroup(Group):
    """The top-level group: a command's module is imported when the command is used. The help shows sections."""

    def __init__(self, *args: Any, entries: Sequence[Entry], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.entries = {entry.name: entry for entry in entries}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, entry in self.entries.items() if not entry.hidden]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        found: click.Command = getattr(import_module(f"rock.cli.{module}"), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for entry in self.entries.values():
            if not entry.hidden:
                sections.setdefault(entry.section, []).append((entry.name, entry.summary))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        shown = (entry for entry in self.entries.values() if not entry.hidden and entry.name.startswith(incomplete))
        return [CompletionItem(entry.name, help=entry.summary) for entry in shown]


def command(
    name: str | None = None, *, example: str = "", kind: type[Command] = Command, **settings: Any
) -> Callable[[Callable[..., Any]], Command]:
    """`click.command` with an example in its help."""
    return click.command(name, cls=kind, example=example, **settings)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of the help."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


json_option = click.option("--json", "json_", is_flag=True, help="Print JSON.")


def wrong_call(error: click.ClickException) -> int:
    """Print an error of click in the style of all errors; returns the exit code."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "rock"
    hint = getattr(error, "hint", None)
    possible = getattr(error, "possibilities", None)
    if possible:
        hint = f"did you mean {possible[0]}?"
        message = error.message
    else:
        message = error.format_message()
    message = message[:1].lower() + message[1:].strip().removesuffix(".")
    usage = f"`{where} --help` describes the call"
    if context is not None and not hint:
        line = " ".join(context.command.collect_usage_pieces(context))
        usage = f"usage: {where} {line}"
    complain(message, hint or usage)
    return WRONG_CALL if isinstance(error, click.UsageError) else error.exit_code


# ---- completion: candidates from the server, never an error


def _candidates(ctx: click.Context, read: Callable[[Any], Iterable[tuple[str, str]]]) -> Iterator[CompletionItem]:
    """read: (value, description) pairs of a client."""
    from rock.sync import Client

    given = ctx.find_root().params
    connect_options(given.get("base_url"), given.get("api_key") or given.get("auth_token"))
    with Client(OPTIONS.base_url, OPTIONS.api_key, reconnect_timeout=0) as client:
        for value, about in read(client.transport):
            yield CompletionItem(value, help=about)


def _sandboxes(transport: Any) -> Iterator[tuple[str, str]]:
    page = transport.json("GET", "/v1/sandboxes?limit=200", timeout=COMPLETION_TIMEOUT)
    for item in page["items"]:
        about = f"{item['image']}, {item['state']}"
        if item.get("name"):
            yield item["name"], about
        yield item["sandbox_id"], about


def complete_id(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids and names of sandboxes."""
    found: list[CompletionItem] = []
    with contextlib.suppress(Exception):
        found += (item for item in _candidates(ctx, _sandboxes) if item.value.startswith(incomplete))
    return found


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Images of this machine, and of the sandboxes of the server."""
    names: set[str] = {"host"}
    with contextlib.suppress(Exception):
        from rock.images.store import ImageStore
        from rock.settings import Settings

        names |= {record.name for record in ImageStore.of(Settings.read()).list()}
    with contextlib.suppress(Exception):
        names |= {item.help.rpartition(", ")[0] for item in _candidates(ctx, _sandboxes) if item.help}
    # bash treats a colon as the end of a word: it receives what follows the last one
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """SANDBOX: or a local path."""
    found = [CompletionItem(f"{item.value}:") for item in complete_id(ctx, param, incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


sandbox_argument = click.argument("sandbox", metavar="SANDBOX", shell_complete=complete_id)
sandboxes_argument = click.argument("sandboxes", metavar="[SANDBOX]...", nargs=-1, shell_complete=complete_id)
