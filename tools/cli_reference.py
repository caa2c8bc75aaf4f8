"""Writes docs/reference/cli.md from the tree of commands; `--check` only compares, and fails when it differs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from rock.cli.main import ENTRIES, app
from rock.cli.parsing import Command

TARGET = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"

HEAD = """# Command line

`python tools/cli_reference.py` generates this page from the commands.

A SANDBOX is an id, the unique beginning of an id, or a name. Options of `run` and `exec` precede the image or sandbox:
the words after it belong to the program.

## Server and API key

The server is the first of: the option `--base-url`, the variable `ROCK_BASE_URL`, the current context (`rock login`,
`rock context use`), the server that runs with this `ROCK_HOME`, `http://127.0.0.1:8080`. `rock context show` prints it.
The API key is the option `--api-key`, the key of the context that is used, or `ROCK_API_KEY`.

## Exit codes

| code | meaning |
|---|---|
| 0 | success |
| 1 | the command failed; `doctor` and `doctor store` found a fault |
| 2 | wrong call: an unknown option, a missing argument |
| 3 | `admin status`: no server runs |
| 124 | a timeout of `run`, `exec` or `wait` |
| 125 | `run`, `exec`, `shell`: an error of rock, so that no program ran to its end |
| 126 | `run`, `exec`: the program cannot be executed |
| 127 | `run`, `exec`: there is no such program |
| 130 | Ctrl-C |
| 141 | the reader of the output closed it |
| other | `run`, `exec`, `shell`: the exit code of the program |

Errors are printed to the standard error as `error: ...`, often followed by `hint: ...`. Progress is shown on a
terminal only, on the standard error.

## Completion

`eval "$(rock completion bash)"` in `~/.bashrc`, `eval "$(rock completion zsh)"` in `~/.zshrc`, or
`rock completion fish > ~/.config/fish/completions/rock.fish`.
"""


def page() -> str:
    """The whole page."""
    root = click.Context(app, info_name="rock")
    parts = [HEAD, "## Global options\n\nThey precede the command.\n", _options(app, root)]
    section = ""
    for entry in ENTRIES:
        if entry.hidden:
            continue
        if entry.section != section:
            section = entry.section
            parts.append(f"## {section}\n")
        command = app.get_command(root, entry.name)
        assert command is not None
        parts += _described(command, click.Context(command, info_name=entry.name, parent=root))
    return "\n".join(parts).rstrip() + "\n"


def _described(command: click.Command, ctx: click.Context) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(ctx))
    yield f"### {ctx.command_path}\n\n```text\n{ctx.command_path} {pieces}\n```\n"
    yield "\n\n".join(textwrap.fill(" ".join(part.split()), 120) for part in (command.help or "").split("\n\n")) + "\n"
    yield _options(command, ctx)
    if isinstance(command, Command) and command.example:
        yield f"```text\n{command.example}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from _described(child, click.Context(child, info_name=name, parent=ctx))


def _options(command: click.Command, ctx: click.Context) -> str:
    """The options as a table; "" when there are none but --help."""
    rows = []
    for param in command.get_params(ctx):
        record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
        if record is not None and "--help" not in param.opts:
            rows.append(f"| `{record[0].replace('|', ', ')}` | {record[1].replace('|', ', ')} |")
    return "| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if TARGET.exists() and TARGET.read_text() == text:
            return 0
        print("docs/reference/cli.md differs from the commands: run `python tools/cli_reference.py`", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
