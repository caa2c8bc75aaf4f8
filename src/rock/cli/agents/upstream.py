"""`rock upstream ls|set|rm`: the model servers of the gateway, and their keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from rock import settings
from rock.cli.connection import client
from rock.cli.output import age, as_json, for_each, table
from rock.cli.parsing import Group, json_option
from rock.errors import InvalidConfig

_MOST_KEY = 16 << 10


@click.group(cls=Group)
def upstream() -> None:
    """List, define and delete upstreams: model servers.

    The key of an upstream stays on the server. No command prints it, and none takes it as an argument.
    """


@upstream.command("ls", example="rock upstream ls")
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_upstreams(json_: bool, no_trunc: bool) -> None:
    """List upstreams, without keys."""
    found = client().upstreams.list()
    if json_:
        as_json([item.model_dump(mode="json") for item in found])
        return
    rows = [[item.name, item.dialect, ",".join(item.urls), "yes" if item.has_key else "no", item.token_fields,
             age(item.created_at), item.tenant] for item in found]  # fmt: skip
    table(["NAME", "DIALECT", "URL", "KEY", "TOKENS", "AGE", "TENANT"], rows,
          "no upstreams; define one with: rock upstream set NAME URL", whole=no_trunc)  # fmt: skip


@upstream.command("set", example="rock upstream set policy http://127.0.0.1:8000 --token-fields vllm --key-stdin")
@click.argument("name")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option("--dialect", type=click.Choice(["openai-chat", "openai-responses", "anthropic", "gemini"]),
              default="openai-chat", show_default=True, help="Dialect that the server speaks.")  # fmt: skip
@click.option("--key-stdin", is_flag=True, help="Read the key from the standard input.")
@click.option("--key-file", type=click.Path(dir_okay=False, path_type=Path), help="Read the key from a file.")
@click.option("--key-env", metavar="NAME", help="Read the key from an environment variable.")
@click.option("--no-key", is_flag=True, help="Remove the key of an existing upstream.")
@click.option("--model", "models", multiple=True, metavar="NAME=NAME",
              help="Name of agents and name at the server; '*' is all others; repeatable.")  # fmt: skip
@click.option("--token-fields", type=click.Choice(["none", "vllm", "sglang"]), default="none", show_default=True,
              help="Request token ids and log probabilities.")  # fmt: skip
@click.option("--retries", type=click.IntRange(0, 20), help="Attempts after the first one.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds without a byte of a response.")
@click.option("--connections", type=click.IntRange(1), help="Concurrent calls.")
@json_option
def set_upstream(
    name: str, urls: tuple[str, ...], dialect: str, key_stdin: bool, key_file: Path | None, key_env: str | None,
    no_key: bool, models: tuple[str, ...], token_fields: str, retries: int | None, timeout: float | None,
    connections: int | None, json_: bool,
) -> None:  # fmt: skip
    """Define or replace an upstream.

    Without an option for the key, an existing upstream keeps its key.
    """
    key = _key(key_stdin, key_file, key_env, no_key)
    fields: dict[str, Any] = {"dialect": dialect, "token_fields": token_fields, "models": dict(map(_pair, models))}
    given = {"retries": retries, "timeout": timeout, "connections": connections}
    fields |= {option: value for option, value in given.items() if value is not None}
    made = client().upstreams.put(name, list(urls), key=key, **fields)
    if json_:
        as_json(made.model_dump(mode="json"))
    else:
        print(made.name)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise InvalidConfig(f"--model {text!r} is not NAME=NAME", hint="write it like --model policy=Qwen/Qwen3-8B")
    return name, value


def _key(stdin: bool, file: Path | None, variable: str | None, none: bool) -> str | None:
    """The key of the one option that is given; None keeps an existing one."""
    if sum((stdin, file is not None, variable is not None, none)) > 1:
        raise InvalidConfig("several options name a key",
                            hint="give one of --key-stdin, --key-file, --key-env and --no-key")
    if none:
        return ""
    if stdin:
        found = sys.stdin.read(_MOST_KEY)
    elif file is not None:
        found = file.read_text(encoding="utf-8")
    elif variable is not None:
        found = settings.variable(variable) or ""
    else:
        return None
    if not found.strip():
        raise InvalidConfig("the key is empty", hint="use --no-key for an upstream without a key")
    return found.strip()


@upstream.command(example="rock upstream rm policy")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> int:
    """Delete upstreams. Later calls of their runs fail."""
    return for_each(names, client().upstreams.delete)
