"""`rock checkpoint`, `rollback`, `fork`, `forkable`, and `rock snapshot ls|show|rm|export|import|tree`."""

from __future__ import annotations

from typing import Any

import click

from rock.cli.connection import client, connected
from rock.cli.output import age, as_json, busy, for_each, short, size, table
from rock.cli.parsing import Group, command, complete_id, json_option
from rock.protocol.snapshots import SnapshotInfo

_sandbox = click.argument("sandbox", shell_complete=complete_id)
_tenant = click.option("--tenant", help="Tenant of the snapshot, for the owner of the server.")
_memory = click.option("--memory", type=click.Choice(["auto", "files", "session", "processes"]), default="auto",
                       show_default=True, help="What is taken beside the files.")  # fmt: skip
_files = click.option("--files", type=click.Choice(["auto", "switch", "copy"]), default="auto", show_default=True,
                      help="How the files are taken.")  # fmt: skip
_wait = click.option("--wait", type=click.FloatRange(0, 600), default=5.0, show_default=True, metavar="SECONDS",
                     help="How long to wait for running commands.")  # fmt: skip
_ttl = click.option("--ttl", "ttl_seconds", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                    help="Retention after the last use.")  # fmt: skip
_name = click.option("--name", help="A name, unique among your snapshots.")


@command(example="rock checkpoint web --name before")
@_sandbox
@_name
@_memory
@_files
@_wait
@_ttl
@json_option
def checkpoint(sandbox: str, json_: bool, **options: Any) -> None:
    """Take a snapshot of a running sandbox.

    Prints the id of the snapshot, and on standard error what is not in it.
    """
    with busy("taking a snapshot"):
        taken = connected(sandbox).checkpoint(**options)
    _report(taken, json_)


def _report(taken: SnapshotInfo, json_: bool) -> None:
    if json_:
        as_json(taken.model_dump(mode="json"))
        return
    print(taken.snapshot_id)
    for line in taken.left_out:
        click.echo(f"not taken: {line}", err=True)


@command(example="rock rollback web before")
@_sandbox
@click.argument("snapshot")
def rollback(sandbox: str, snapshot: str) -> None:
    """Return a running sandbox to a snapshot.

    Its processes end, and its sessions are opened again.
    """
    with busy("rolling back"):
        connected(sandbox).rollback(snapshot)


@command(example="rock forkable web")
@_sandbox
@json_option
def forkable(sandbox: str, json_: bool) -> None:
    """Show what a checkpoint of a sandbox would take.

    Prints the level, and on standard error the reasons against a better one. Takes nothing.
    """
    found = connected(sandbox).forkable()
    if json_:
        as_json(found.model_dump(mode="json"))
        return
    print(found.memory)
    for reason in found.reasons:
        click.echo(reason, err=True)


@command(example="rock fork web -n 8")
@_sandbox
@click.option("-n", "count", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many sandboxes.")
@click.option("--best-effort", is_flag=True, help="As many as fit, instead of all or none.")
@_name
@_memory
@_files
@_wait
@_ttl
@json_option
def fork(sandbox: str, count: int, json_: bool, **options: Any) -> None:
    """Take a snapshot, and start sandboxes from it.

    Prints the ids of the new sandboxes.
    """
    with busy(f"starting {count} sandboxes"):
        children = connected(sandbox).fork(count, **options)
    if json_:
        as_json([{"sandbox_id": one.sandbox_id, "snapshot": one.config.snapshot} for one in children])
        return
    for one in children:
        print(one.sandbox_id)


@click.group(cls=Group)
def snapshot() -> None:
    """List, show, delete, export and import snapshots.

    `rock checkpoint` takes one, `rock run --snapshot` and `rock fork` start sandboxes from one.
    """


def _client() -> Any:
    return client()


@snapshot.command("ls", example="rock snapshot ls")
@click.option("--sandbox", help="Those of one sandbox.")
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_snapshots(sandbox: str | None, json_: bool, no_trunc: bool) -> None:
    """List snapshots."""
    found = _client().list_snapshots(sandbox)
    if json_:
        as_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        [one.snapshot_id if no_trunc else short(one.snapshot_id), one.name, short(one.sandbox_id), one.image,
         one.memory, size(one.bytes) if one.bytes is not None else None, one.layers, one.state, age(one.created_at)]
        for one in found
    ]  # fmt: skip
    table(["ID", "NAME", "SANDBOX", "IMAGE", "MEMORY", "SIZE", "LAYERS", "STATE", "AGE"], rows,
          "no snapshots; take one with: rock checkpoint SANDBOX", whole=no_trunc)  # fmt: skip


@snapshot.command(example="rock snapshot show before")
@click.argument("name", metavar="SNAPSHOT")
@_tenant
def show(name: str, tenant: str | None) -> None:
    """Show all fields of a snapshot as JSON."""
    as_json(_client().get_snapshot(name, tenant=tenant).model_dump(mode="json"))


@snapshot.command(example="rock snapshot rm before")
@click.argument("names", metavar="SNAPSHOT...", nargs=-1, required=True)
@_tenant
def rm(names: tuple[str, ...], tenant: str | None) -> int:
    """Delete snapshots.

    Files that sandboxes or other snapshots use stay until these are gone.
    """
    server = _client()
    return for_each(names, lambda name: server.delete_snapshot(name, tenant=tenant), "deleting the snapshot")


@snapshot.command(example="rock snapshot export before before.tar")
@click.argument("name", metavar="SNAPSHOT")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False))
@_tenant
def export(name: str, path: str, tenant: str | None) -> None:
    """Write a snapshot to a tar.

    It has the files and the state of the shells, without the memory of processes.
    """
    with busy(f"exporting the snapshot {name}"):
        _client().export_snapshot(name, path, tenant=tenant)


@snapshot.command("import", example="rock snapshot import before.tar --name before")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@_name
@click.option("--worker", help="Worker that gets the snapshot; by default the server chooses.")
@_ttl
@json_option
def import_(path: str, json_: bool, **options: Any) -> None:
    """Create a snapshot from an exported one.

    Its image has to be on the worker.
    """
    with busy(f"importing {path}"):
        made = _client().import_snapshot(path, **options)
    _report(made, json_)


@snapshot.command(example="rock snapshot tree")
@click.option("--sandbox", help="Those of one sandbox.")
def tree(sandbox: str | None) -> None:
    """Print snapshots as trees, each below the one on which its sandbox ran."""
    found = _client().list_snapshots(sandbox)
    known = {one.snapshot_id for one in found}
    below: dict[str | None, list[SnapshotInfo]] = {}
    for one in found:
        below.setdefault(one.parent if one.parent in known else None, []).append(one)
    todo = [(one, "", True, True) for one in reversed(below.get(None, []))]
    while todo:
        one, indent, last, top = todo.pop()
        mark = "" if top else ("`- " if last else "|- ")
        label = f"{one.name} " if one.name else ""
        click.echo(f"{indent}{mark}{label}{short(one.snapshot_id)} {short(one.sandbox_id)} {age(one.created_at)}")
        inner = indent if top else indent + ("   " if last else "|  ")
        children = below.get(one.snapshot_id, [])
        todo += [(child, inner, index == len(children) - 1, False) for index, child in
                 reversed(list(enumerate(children)))]  # fmt: skip
