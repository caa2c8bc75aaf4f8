"""`rock volume create|ls|inspect|rm`: folders that outlive sandboxes, which `rock run --volume` mounts."""

from __future__ import annotations

from typing import Any

import click

from rock.cli.connection import client
from rock.cli.output import age, as_json, busy, for_each, size, table
from rock.cli.parsing import Group, json_option

_name = click.argument("name")
_tenant = click.option("--tenant", help="Tenant of the volume, for the owner of the server.")


@click.group(cls=Group)
def volume() -> None:
    """Create, list and delete volumes.

    A volume is a folder on a worker that outlives sandboxes. `rock run --volume NAME:PATH[:ro]` mounts it.
    """


def _client() -> Any:
    return client()


@volume.command(example="rock volume create data --size 20g")
@_name
@click.option("--size", "limit", default="10g", show_default=True, metavar="SIZE", help="Limit of the files.")
@click.option("--worker", help="Worker that has the volume; by default the server chooses.")
@json_option
def create(name: str, limit: str, worker: str | None, json_: bool) -> None:
    """Create a volume."""
    with busy(f"creating the volume {name}"):
        made = _client().create_volume(name, size=limit, worker=worker)
    if json_:
        as_json(made.model_dump(mode="json"))
    else:
        print(made.name)


@volume.command("ls", example="rock volume ls")
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_volumes(json_: bool, no_trunc: bool) -> None:
    """List volumes."""
    found = _client().list_volumes()
    if json_:
        as_json([item.model_dump(mode="json") for item in found])
        return
    rows = [[item.name, size(item.size), item.state, item.worker, age(item.created_at), item.tenant] for item in found]
    table(["NAME", "SIZE", "STATE", "WORKER", "AGE", "TENANT"], rows,
          "no volumes; create one with: rock volume create NAME", whole=no_trunc)  # fmt: skip


@volume.command(example="rock volume inspect data")
@_name
@_tenant
def inspect(name: str, tenant: str | None) -> None:
    """Show all fields of a volume as JSON."""
    as_json(_client().get_volume(name, tenant=tenant).model_dump(mode="json"))


@volume.command(example="rock volume rm data")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_tenant
def rm(names: tuple[str, ...], tenant: str | None) -> int:
    """Delete volumes and their files.

    A volume that a sandbox uses is not deleted.
    """
    server = _client()
    return for_each(names, lambda name: server.delete_volume(name, tenant=tenant), "deleting the volume")
