"""`rock inspect`, `stats`, `events` and `connections`: what sandboxes are, use and do."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import click

from rock.cli.connection import client, connected, find
from rock.cli.output import age, as_json, lines_of, printable, short, size, table
from rock.cli.parsing import command, complete_id, json_option, sandbox_argument, sandboxes_argument
from rock.errors import NotFound
from rock.protocol.sandbox import SandboxInfo, Usage
from rock.sync import Client
from rock.sync.primitives import gather

_CLEAR_SCREEN = "\x1b[H\x1b[J"
_COLUMNS = ["ID", "NAME", "CPU %", "MEMORY", "LIMIT", "PEAK", "PIDS", "DISK"]


@command(example="rock inspect web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
def inspect(sandboxes: tuple[str, ...]) -> None:
    """Show all fields of sandboxes as JSON.

    The list has one object for each sandbox, with its state history, and with its usage if it runs.
    """
    server = client()
    found = [_measured(server, find(text, server)) for text in sandboxes]
    as_json([info.model_dump(mode="json") for info in found])


def _measured(server: Client, info: SandboxInfo) -> SandboxInfo:
    """The same sandbox with its usage, where it runs."""
    return server.get_sandbox(info.sandbox_id, usage=info.state.value == "running")


@command(example="rock stats\nrock stats --no-stream --json web")
@sandboxes_argument
@click.option("--no-stream", is_flag=True, help="Print one measurement and exit. It is the default without a terminal.")
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, metavar="SECONDS",
              help="Time between two measurements.")  # fmt: skip
@json_option
def stats(sandboxes: tuple[str, ...], no_stream: bool, interval: float, json_: bool) -> None:
    """Show the resource usage of sandboxes.

    Without SANDBOX it shows all running ones. The table is redrawn until Ctrl-C. CPU % is of one CPU, over the time
    between two measurements.
    """
    server = client()
    once = no_stream or json_ or not sys.stdout.isatty()
    ids = [find(text, server).sandbox_id for text in sandboxes]
    before: dict[str, tuple[float, float]] = {}
    if once:
        _measure(server, ids, before)
        time.sleep(0.5)
    while True:
        found = _measure(server, ids, before)
        if json_:
            as_json([{"sandbox_id": info.sandbox_id, "name": info.name, "cpu_percent": cpu,
                      **(info.usage or Usage()).model_dump()} for info, cpu in found])  # fmt: skip
            return
        rows = [_row(info, cpu) for info, cpu in found]
        if once:
            table(_COLUMNS, rows, "no running sandboxes")
            return
        room = shutil.get_terminal_size()
        lines = lines_of(_COLUMNS, rows, room.columns)[: room.lines - 1]
        print(_CLEAR_SCREEN + "\n".join(lines), flush=True)
        time.sleep(interval)


def _row(info: SandboxInfo, cpu: float | None) -> list[object]:
    usage = info.usage or Usage()
    return [short(info.sandbox_id), info.name, "" if cpu is None else f"{cpu:.1f}", size(usage.memory_bytes),
            info.memory, size(usage.memory_peak_bytes), usage.pids, size(usage.disk_bytes)]  # fmt: skip


def _measure(
    server: Client, ids: list[str], before: dict[str, tuple[float, float]]
) -> list[tuple[SandboxInfo, float | None]]:
    """(sandbox with usage, CPU percent since the last measurement)."""
    wanted = ids or [info.sandbox_id for info in server.list_sandboxes("running")]
    found: list[tuple[SandboxInfo, float | None]] = []
    for outcome in gather([partial(server.get_sandbox, one, usage=True) for one in wanted], 16):
        if isinstance(outcome, NotFound):
            continue  # it was deleted meanwhile
        if isinstance(outcome, BaseException):
            raise outcome
        now, percent = time.monotonic(), None
        cpu = None if outcome.usage is None else outcome.usage.cpu_seconds
        if cpu is not None:
            then = before.get(outcome.sandbox_id)
            if then is not None and now > then[0]:
                percent = max(0.0, 100 * (cpu - then[1]) / (now - then[0]))
            before[outcome.sandbox_id] = now, cpu
        found.append((outcome, percent))
    return found


@command(example="rock events -f\nrock events --since 3600 web")
@sandboxes_argument
@click.option("--follow", "-f", is_flag=True, help="Continue with new state changes until Ctrl-C.")
@click.option("--since", type=float, metavar="SECONDS", help="Show the changes of this time; all by default.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS",
              help="Time between two requests with --follow.")  # fmt: skip
@json_option
def events(
    sandboxes: tuple[str, ...], follow: bool, since: float | None, interval: float, json_: bool
) -> None:
    """Show state changes of sandboxes.

    One line for each change: time, sandbox, event, old and new state. With --json each line is an object.
    """
    server = client()
    ids = {find(text, server).sandbox_id for text in sandboxes}
    seen: dict[str, tuple[str, float]] = {}
    start = None if since is None else time.time() - since
    if follow and since is None:
        start = time.time()
    while True:
        for at, info, event, old, new in sorted(_changes(server, ids, seen), key=lambda change: change[0]):
            if start is not None and at < start:
                continue
            stamp = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
            if json_:
                print(json.dumps({"time": stamp, "sandbox_id": info.sandbox_id, "name": info.name, "event": event,
                             "from": old, "to": new, "reason": info.reason}))  # fmt: skip
            else:
                reason = f"  ({printable(info.reason)})" if info.reason and new in ("stopping", "stopped") else ""
                name = printable(info.name or "-")
                print(f"{stamp}  {short(info.sandbox_id)}  {name}  {event}  {old} -> {new}{reason}")
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(interval)


def _changes(
    server: Client, ids: set[str], seen: dict[str, tuple[str, float]]
) -> Iterator[tuple[float, SandboxInfo, str, str, str]]:
    """State changes since the last call. seen: what the state depends on and the last change of each sandbox, which are
    updated."""
    first = not seen
    for item in server.list_sandboxes(history="1") if first else server.list_sandboxes():
        marks = f"{item.state} {item.created_at} {item.started_at} {item.stopped_at} {item.archived_at}"
        known, last = seen.get(item.sandbox_id, ("", 0.0))
        if (ids and item.sandbox_id not in ids) or marks == known:
            continue
        with contextlib.suppress(NotFound):  # it was deleted meanwhile
            info = item if first else server.get_sandbox(item.sandbox_id)
            fresh = [change for change in info.state_history if change.timestamp > last]
            seen[item.sandbox_id] = marks, max([last, *(change.timestamp for change in fresh)])
            for change in fresh:
                yield change.timestamp, info, change.event, change.from_state.value, change.to_state.value


@command(example="rock connections --rejected web")
@sandbox_argument
@click.option("--rejected", "--refused", "rejected", is_flag=True, help="Show rejected connections only.")
@json_option
def connections(sandbox: str, rejected: bool, json_: bool) -> None:
    """List the network connections of a sandbox.

    They are those over network nat, allowed or rejected; also of a stopped sandbox.
    """
    found = connected(sandbox).egress_log()
    items = [item for item in found.items if not (rejected and item.allowed)]
    if json_:
        as_json([item.model_dump(mode="json") for item in items])
        return
    rows = [
        [
            item.number,
            age(item.at, item.ended_at),
            "allowed" if item.allowed else "rejected",
            item.protocol,
            item.host,
            f"{item.address}:{item.port}" if ":" not in item.address else f"[{item.address}]:{item.port}",
            item.sent,
            item.received,
            item.reason,
        ]
        for item in items
    ]
    table(["#", "TIME", "", "PROTOCOL", "HOST", "ADDRESS", "SENT", "RECEIVED", "REASON"], rows, "no connections")
    if found.dropped:
        print(f"{found.dropped} older connections are not listed")
