"""`rock key create|ls|revoke`: API keys of a server, managed with the server's own key."""

from __future__ import annotations

import sys

import click

from rock.cli.connection import client
from rock.cli.output import age, as_json, table
from rock.cli.parsing import Group, json_option
from rock.protocol.keys import CreateKey, Quota


@click.group(cls=Group)
def key() -> None:
    """Create, list and revoke API keys.

    A key belongs to a tenant, and has scopes and a quota. These commands need the key of the server's owner.
    """


@key.command(example="rock key create ci --sandboxes 20 --memory 64g")
@click.argument("name")
@click.option("--tenant", help="Tenant of the key, lowercase letters and digits; by default a new one.")
@click.option("--scope", multiple=True,
              help="read, run, create, images or admin; repeatable. Default: read, run and create.")  # fmt: skip
@click.option("--sandboxes", type=int, help="Maximum number of sandboxes at once.")
@click.option("--cpus", type=float, help="Maximum number of CPUs of all sandboxes.")
@click.option("--memory", metavar="SIZE", help="Maximum memory of all sandboxes, like 64g.")
@click.option("--creates-per-minute", type=int, help="Maximum number of starts within 60 seconds.")
@json_option
def create(
    name: str, tenant: str | None, scope: tuple[str, ...], sandboxes: int | None, cpus: float | None,
    memory: str | None, creates_per_minute: int | None, json_: bool,
) -> None:  # fmt: skip
    """Create a key, and print it.

    The key is shown only once: the server stores its digest. NAME is a description for people.
    """
    quota = Quota(sandboxes=sandboxes, cpus=cpus, memory=memory, creates_per_minute=creates_per_minute)
    given = {"scopes": list(scope)} if scope else {}
    spec = CreateKey.model_validate({"name": name, "tenant": tenant, "quota": quota, **given})
    with client() as server:
        made = server.create_key(spec)
    if json_:
        as_json(made.model_dump(mode="json"))
        return
    print(f"key {made.id} of tenant {made.tenant}: {', '.join(made.scopes)}", file=sys.stderr)
    print(made.key)


@key.command("ls", example="rock key ls -a")
@click.option("--all", "-a", "everything", is_flag=True, help="Include revoked keys.")
@json_option
def list_keys(everything: bool, json_: bool) -> None:
    """List keys."""
    with client() as server:
        keys = [item for item in server.list_keys() if everything or item.revoked_at is None]
    if json_:
        as_json([item.model_dump(mode="json") for item in keys])
        return
    rows = []
    for item in keys:
        limits = item.quota.model_dump(exclude_none=True)
        quota = ", ".join(f"{value} {name}" for name, value in limits.items())
        state = "revoked" if item.revoked_at else ""
        rows.append((item.id, item.name, item.tenant, ",".join(item.scopes), quota, age(item.created_at), state))
    table(("ID", "NAME", "TENANT", "SCOPES", "QUOTA", "AGE", ""), rows,
          "no keys; create one with: rock key create NAME")  # fmt: skip


@key.command(example="rock key revoke k3f2a")
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Revoke a key at once.

    The sandboxes of its tenant continue. `rock key ls` shows the ids.
    """
    with client() as server:
        server.revoke_key(key_id)
    print(f"revoked {key_id}")
