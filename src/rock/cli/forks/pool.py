"""`rock pool set|ls|rm`: sandboxes that are created before they are requested."""

from __future__ import annotations

from typing import Any

import click

from rock.cli.connection import client
from rock.cli.output import as_json, for_each, short, table
from rock.cli.parsing import Group, json_option

_tenant = click.option("--tenant", help="Tenant of the pool, for the owner of the server.")


@click.group(cls=Group)
def pool() -> None:
    """Define, list and delete warm pools.

    A pool has sandboxes of an image or a snapshot that are created before they are requested.
    """


def _client() -> Any:
    return client()


@pool.command("set", example="rock pool set web --image python:3.11 --min 2 --max 16")
@click.argument("name")
@click.option("--image", help="Image of the sandboxes.")
@click.option("--snapshot", help="Snapshot of the sandboxes, by id or name.")
@click.option("--memory", default="8g", show_default=True, metavar="SIZE",
              help="Memory of the sandboxes that will use it: it determines the size of /dev/shm.")  # fmt: skip
@click.option("--network", type=click.Choice(["none", "nat"]), default="none", show_default=True, help="Their network.")
@click.option("--min", "minimum", type=click.IntRange(0, 1000), default=1, show_default=True,
              help="Fewest unclaimed sandboxes on each worker.")  # fmt: skip
@click.option("--max", "maximum", type=click.IntRange(1, 1000), default=8, show_default=True,
              help="Most unclaimed sandboxes on each worker.")  # fmt: skip
@_tenant
@json_option
def set_(name: str, json_: bool, **options: Any) -> None:
    """Define a pool, or replace its definition.

    Its size follows the demand of the last minutes, between --min and --max.
    """
    made = _client().set_pool(name, **options)
    if json_:
        as_json(made.model_dump(mode="json"))
    else:
        print(made.name)


@pool.command("ls", example="rock pool ls")
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_pools(json_: bool, no_trunc: bool) -> None:
    """List pools with their hit rates."""
    found = _client().list_pools()
    if json_:
        as_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        [one.name, one.image, short(one.snapshot) if one.snapshot else None, one.network, one.minimum, one.maximum,
         one.target, one.ready, one.hits, one.misses, None if one.hit_rate is None else f"{one.hit_rate:.0%}",
         "; ".join(f"{worker}: {error}" for worker, error in one.errors.items()), one.tenant]
        for one in found
    ]  # fmt: skip
    table(["NAME", "IMAGE", "SNAPSHOT", "NETWORK", "MIN", "MAX", "TARGET", "READY", "HITS", "MISSES", "RATE", "ERROR",
           "TENANT"], rows, "no pools; define one with: rock pool set NAME --image IMAGE", whole=no_trunc)  # fmt: skip


@pool.command(example="rock pool rm web")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_tenant
def rm(names: tuple[str, ...], tenant: str | None) -> int:
    """Delete pools.

    Their unclaimed sandboxes end.
    """
    server = _client()
    return for_each(names, lambda name: server.delete_pool(name, tenant=tenant), "deleting the pool")
