"""`rock key create|ls|revoke`: API keys of a server, managed with the server's own key."""

from __future__ import annotations

from typing import Annotated

import typer

from rock.cli.output import OPTIONS, age, as_json, table

app = typer.Typer(no_args_is_help=True, help="API keys: who may use the server, for what, and how much of it.")

AsJson = Annotated[bool, typer.Option("--json", help="JSON.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What to call it, for people.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose sandboxes it is for: [a-z][a-z0-9]*; a new tenant unless given.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, run, create, images, admin; again for each. Read, run and create unless given."),
    ] = None,
    sandboxes: Annotated[int | None, typer.Option(help="Most sandboxes at once.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Most CPUs of them together.")] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory of them together, like 64g.")] = None,
    creates_per_minute: Annotated[int | None, typer.Option(help="Most starts within 60 seconds.")] = None,
    json: AsJson = False,
) -> None:
    """Make a key, and show it this once: the server keeps its digest alone."""
    from rock.protocol.keys import CreateKey, Quota
    from rock.sync import Client

    quota = Quota(sandboxes=sandboxes, cpus=cpus, memory=memory, creates_per_minute=creates_per_minute)
    given = {"scopes": scope} if scope else {}
    spec = CreateKey.model_validate({"name": name, "tenant": tenant, "quota": quota, **given})
    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        made = client.create_key(spec)
    if json:
        as_json(made.model_dump(mode="json"))
        return
    typer.echo(f"key {made.id} of tenant {made.tenant}: {', '.join(made.scopes)}", err=True)
    typer.echo(made.key)


@app.command("ls")
def list_keys(
    all_keys: Annotated[bool, typer.Option("--all", "-a", help="Revoked ones too.")] = False, json: AsJson = False
) -> None:
    """List keys."""
    from rock.sync import Client

    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        keys = [key for key in client.list_keys() if all_keys or key.revoked_at is None]
    if json:
        as_json([key.model_dump(mode="json") for key in keys])
        return
    rows = []
    for key in keys:
        limits = key.quota.model_dump(exclude_none=True)
        quota = ", ".join(f"{value} {name}" for name, value in limits.items())
        state = "revoked" if key.revoked_at else ""
        rows.append((key.id, key.name, key.tenant, ",".join(key.scopes), quota, age(key.created_at), state))
    table(("ID", "NAME", "TENANT", "SCOPES", "QUOTA", "AGE", ""), rows, "no keys; make one with: rock key create NAME")


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Its ID, as rock key ls shows it.")]) -> None:
    """End a key at once. The sandboxes of its tenant stay."""
    from rock.sync import Client

    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        client.revoke_key(key_id)
    typer.echo(f"revoked {key_id}")
