"""`rock image`: the images of this machine. They are in ROCK_HOME; no server is needed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from rock.cli.output import age, as_json, busy, fail, size, table

if TYPE_CHECKING:
    from rock.runtime.image.registry import Login
    from rock.runtime.image.store import ImageStore

app = typer.Typer(no_args_is_help=True, help="Pull, push, import, list and remove the images of this machine.")

Username = Annotated[str | None, typer.Option(help="For the registry; its password is asked for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _store() -> ImageStore:
    from rock.runtime.image.store import ImageStore
    from rock.settings import Settings

    return ImageStore(Settings.read().image_dir)


def _login(username: str | None) -> Login | None:
    from rock.runtime.image.registry import Login

    return None if username is None else Login(username, typer.prompt("Password", hide_input=True, err=True))


@app.command("ls")
def list_images(json: Json = False) -> None:
    """List the images."""
    found = _store().list()
    if json:
        as_json([asdict(record) for record in found])
        return
    rows = [
        [
            record.name,
            record.kind,
            record.digest.removeprefix("sha256:")[:12],
            len(record.layers),
            "" if record.by_reference else size(record.size),
            age(record.created),
        ]
        for record in found
    ]
    table(["NAME", "KIND", "DIGEST", "LAYERS", "SIZE", "AGE"], rows, "no images")


@app.command("pull")
def pull_image(
    name: Annotated[str, typer.Argument(help="Its name, like python:3.11 or localhost:5000/team/tool:1.0.")],
    username: Username = None,
) -> None:
    """Fetch an image from its registry."""
    login = _login(username)
    with busy(f"pulling {name}") as tell:
        record = _store().pull(name, login, tell)
    print(f"{record.name}  {record.digest}")


@app.command("push")
def push_image(
    name: Annotated[str, typer.Argument(help="Its name, which tells the registry, like localhost:5000/team/tool:1.0.")],
    username: Username = None,
) -> None:
    """Send an image to its registry."""
    login = _login(username)
    with busy(f"pushing {name}") as tell:
        digest = _store().push(name, login, tell)
    print(f"{name}  {digest}")


@app.command("export")
def export_image(
    name: Annotated[str, typer.Argument(help="Its name.")],
    path: Annotated[str, typer.Argument(help="A file that is not there yet: the tar of an OCI layout.")],
) -> None:
    """Write an image to a file, for `rock image import` and other tools."""
    with busy(f"writing {path}") as tell:
        digest = _store().export(name, path, tell)
    print(f"{name}  {digest}")


@app.command("import")
def import_image(
    path: Annotated[str, typer.Argument(help="A root folder, a tar of one, a `docker save` archive or an OCI layout.")],
    name: Annotated[
        str | None, typer.Argument(help="Its name, like my/image:1.0; archives have names of their own.")
    ] = None,
) -> None:
    """Import an image from a folder or a file."""
    with busy(f"importing {path}") as tell:
        records = _store().import_any(path, name, tell)
    for record in records:
        print(f"{record.name}  {record.digest}")


@app.command("from-host")
def from_host(name: Annotated[str, typer.Argument(help="A name, like python:3.11.")]) -> None:
    """Give this machine's own system, read-only and without its secrets, the name of an image."""
    with busy("looking through this system"):
        record = _store().from_host(name)
    print(f"{record.name}  {record.digest}")


@app.command("rm")
def remove(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Remove images; layers that nothing else needs go with them."""
    from rock.errors import RockError

    store, failed = _store(), 0
    for name in names:
        try:
            print(f"{name}  {size(store.remove(name))} freed")
        except RockError as error:
            failed = fail(error)
    if failed:
        raise typer.Exit(failed)


@app.command()
def inspect(name: Annotated[str, typer.Argument()]) -> None:
    """Show what is known of an image, as JSON."""
    as_json(asdict(_store().inspect(name)))
