"""`rock log` and `rock replay`: recordings of sandboxes."""

from __future__ import annotations

import time
from base64 import b64decode
from typing import Any

import click
import orjson

from rock.cli.connection import OPTIONS, connected, find
from rock.cli.output import as_json, busy, table
from rock.cli.parsing import command, complete_id, json_option
from rock.protocol.recordings import RecordedEntry
from rock.sdk.sandbox.options import ConnectOptions
from rock.sync import Sandbox

_WIDTH = 60  # characters of a request or a response


@command(example="rock log 3f2a9c81d0b4")
@click.argument("sandbox", shell_complete=complete_id)
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def log(sandbox: str, json_: bool, no_trunc: bool) -> None:
    """Show the recording of a sandbox.

    Lists each command, file operation and environment step with its result. The sandbox was created with --record; it
    may have ended.
    """
    found = connected(sandbox).log()
    if json_:
        as_json([entry.model_dump(mode="json") for entry in found])
        return
    rows = [[entry.number, time.strftime("%H:%M:%S", time.localtime(entry.at)), entry.route, _asked(entry, no_trunc),
             _answered(entry, no_trunc)] for entry in found]  # fmt: skip
    table(["NUMBER", "TIME", "OPERATION", "REQUEST", "RESULT"], rows, "nothing is recorded yet", whole=no_trunc)


@command(example="rock replay 3f2a9c81d0b4")
@click.argument("sandbox")
@click.option("--repeat", is_flag=True, help="Answer equal requests of clients with the recorded responses.")
@json_option
def replay(sandbox: str, repeat: bool, json_: bool) -> None:
    """Start a sandbox with the state of a recorded one.

    Prints its id, and on standard error where the replay differs from the recording.
    """
    whole = find(sandbox).sandbox_id
    where: ConnectOptions = {}
    if OPTIONS.base_url is not None:
        where["base_url"] = OPTIONS.base_url
    if OPTIONS.api_key is not None:
        where["api_key"] = OPTIONS.api_key
    with busy(f"replaying {sandbox}"):
        made = Sandbox.replay(whole, repeat=repeat, **where)
    report = made.replayed
    assert report is not None
    if json_:
        as_json({"sandbox_id": made.sandbox_id, "snapshot": report.snapshot, "replayed": report.replayed,
                 "diverged_at": report.diverged_at, "left_out": report.left_out})  # fmt: skip
        return
    print(made.sandbox_id)
    for line in report.left_out:
        click.echo(f"not replayed: {line}", err=True)
    if report.diverged_at is not None:
        click.echo(f"diverged at entry {report.diverged_at}: its outcome is not the recorded one", err=True)


def _asked(entry: RecordedEntry, whole: bool) -> str:
    if entry.snapshot is not None:
        return entry.snapshot
    if entry.request is None:
        return f"{entry.request_bytes} bytes" if entry.request_bytes else entry.target.partition("?")[0]
    body = _parsed(entry.request)
    text = body.get("command") if isinstance(body, dict) else None
    if isinstance(text, list):
        text = " ".join(str(part) for part in text)
    if not isinstance(text, str):
        text = entry.target.rpartition("/")[2]
    return text if whole else text[:_WIDTH]


def _answered(entry: RecordedEntry, whole: bool) -> str:
    if entry.finished_at is None:
        return "in progress, or lost with its worker"
    body = _parsed(entry.response) if entry.response else None
    if isinstance(body, dict) and "exit_code" in body:
        text = f"{body['exit_code']}: {body.get('output', body.get('stdout', ''))}".replace("\n", " ").strip()
    else:
        text = f"{entry.status}, {entry.response_bytes} bytes"
    return text if whole else text[:_WIDTH]


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(b64decode(text))
    except ValueError:
        return None
