"""`rock config show|diff|history|set`: the live configuration of a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import orjson
from pydantic import ValidationError

from rock.cli.connection import client
from rock.cli.output import age, as_json, table
from rock.cli.parsing import Group, json_option
from rock.errors import InvalidConfig, NotFound
from rock.protocol.configuration import Configuration, ConfigurationVersion
from rock.protocol.wire import explain
from rock.sync import Client

_LARGEST = 1 << 20


@click.group(cls=Group)
def config() -> None:
    """Show and change the live configuration of a server.

    It applies to all processes of the server without a restart: quotas, image rewrite rules and mirrors, the warm pool,
    allowed networks, the log level and feature switches. These commands need the key of the server's owner.
    """


@config.command(example="rock config show")
@click.option("--version", type=int, help="An earlier version.")
@json_option
def show(version: int | None, json_: bool) -> None:
    """Show the configuration, its source, and the version that each worker applies."""
    with client() as server:
        if version is not None:
            _print(_version(server, version).configuration)
            return
        status = server.get_configuration()
    if json_:
        as_json(status.model_dump(mode="json"))
        return
    print(f"version {status.version}, from {status.source}", file=sys.stderr)
    if status.error:
        print(f"not applied: {status.error}", file=sys.stderr)
    for worker in status.workers:
        if worker.version != status.version:
            print(f"worker {worker.worker}: {worker.error or 'it has not confirmed this version yet'}", file=sys.stderr)
    _print(status.configuration)


@config.command(example="rock config history")
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="Number of versions.")
@json_option
def history(limit: int, json_: bool) -> None:
    """List the versions, newest first."""
    with client() as server:
        items = server.list_configurations(limit)
    if json_:
        as_json([item.model_dump(mode="json") for item in items])
        return
    rows = [(str(item.version), age(item.at), item.source, item.author) for item in items]
    table(("VERSION", "AGE", "SOURCE", "AUTHOR"), rows, "no versions; change one with: rock config set PATH=VALUE")


@config.command(example="rock config diff 1 2")
@click.argument("first", type=int, required=False)
@click.argument("second", type=int, required=False)
def diff(first: int | None, second: int | None) -> None:
    """Show what changed between two versions.

    By default the last change. With one version: the change from it to the current one.
    """
    with client() as server:
        status = server.get_configuration()
        new = status.configuration if second is None else _version(server, second).configuration
        base = status.version - 1 if first is None else first
        old = Configuration() if base <= 0 else _version(server, base).configuration
    before, after = _leaves(old.document()), _leaves(new.document())
    for path in sorted(before.keys() | after.keys()):
        if path in before and before[path] != after.get(path):
            print(f"- {path}={json.dumps(before[path])}")
        if path in after and before.get(path) != after[path]:
            print(f"+ {path}={json.dumps(after[path])}")


@config.command("set", example="rock config set pools.size=8 features.snapshots=false")
@click.argument("changes", metavar="PATH=VALUE", nargs=-1)
@click.option("--file", "-f", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A JSON file with the whole configuration, in place of the current one.")  # fmt: skip
@click.option("--check", is_flag=True, help="Only validate the change.")
def set_(changes: tuple[str, ...], file: Path | None, check: bool) -> None:
    """Change values of the configuration.

    A VALUE is JSON, or a text. `null` restores the default. The server validates the result as a whole. Concurrent
    changes are a conflict, and change nothing.
    """
    if not changes and file is None:
        raise click.UsageError("there is nothing to set: write PATH=VALUE, or --file FILE")
    with client() as server:
        status = server.get_configuration()
        document = status.configuration.document() if file is None else _document(file)
        for change in changes:
            _assign(document, change)
        try:
            wanted = Configuration.model_validate(document)
        except ValidationError as error:
            raise explain(error, Configuration) from None
        done = server.set_configuration(wanted, expected=status.version, check=check)
    print("valid" if check else f"version {done.version}")


def _document(file: Path) -> dict[str, Any]:
    data = file.read_bytes()[: _LARGEST + 1]
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidConfig(f"{file} is not JSON: {error}", hint="rock config show prints a configuration") from None
    if not isinstance(document, dict):
        raise InvalidConfig(f"{file} holds no JSON object", hint="rock config show prints a configuration")
    return document


def _assign(document: dict[str, Any], change: str) -> None:
    path, separator, text = change.partition("=")
    names = path.split(".", 2) if path.startswith("images.mirrors.") else path.split(".")  # registries have dots
    if not separator or not all(names):
        raise InvalidConfig(f"{change!r} is no change", hint="write PATH=VALUE, as pools.size=8")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text
    for name in names[:-1]:
        inner = document.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InvalidConfig(f"{path}: {name} is a value, not a group of values", hint="rock config show prints all")
        document = inner
    if value is None:
        document.pop(names[-1], None)
    else:
        document[names[-1]] = value


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found |= _leaves(part, f"{path}.{name}" if path else str(name))
    return found


def _version(server: Client, number: int) -> ConfigurationVersion:
    for item in server.list_configurations(200):
        if item.version == number:
            return item
    raise NotFound(f"there is no version {number} of the configuration", hint="rock config history lists them")


def _print(configuration: Configuration) -> None:
    print(json.dumps(configuration.document(), indent=2))
