"""`rock image`: the images of this machine. They are in ROCK_HOME; only `rock image build` needs a server."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rock.cli.output import age, as_json, busy, complain, fail, size, table

if TYPE_CHECKING:
    from rock.images.registry.logins import Login
    from rock.images.store import ImageStore

app = typer.Typer(no_args_is_help=True, help="Pull, push, build, import, list and remove the images of this machine.")

Username = Annotated[str | None, typer.Option(help="For the registry; its password is asked for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _store() -> ImageStore:
    from rock.images.store import ImageStore
    from rock.settings import Settings

    return ImageStore.of(Settings.read())


def _login(username: str | None) -> Login | None:
    from rock.images.registry.logins import Login

    return None if username is None else Login(username, _asked())


def _asked() -> str:
    return str(typer.prompt("Password", hide_input=True, err=True))


@app.command("ls")
def list_images(
    json: Json = False,
    steps: Annotated[bool, typer.Option("--steps", help="The kept steps of builds, too.")] = False,
) -> None:
    """List the images."""
    from rock.images.gc import is_step

    store = _store()
    found = [record for record in store.list() if steps or not is_step(record)]
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
            age(store.last_used(record)) if record.created else "",
            "pinned" if record.pinned else "",
        ]
        for record in found
    ]
    table(["NAME", "KIND", "DIGEST", "LAYERS", "SIZE", "AGE", "USED", ""], rows, "no images")


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


@app.command("build")
def build_image(
    path: Annotated[str, typer.Argument(help="The context: a folder, with a Dockerfile unless -f names one.")],
    tag: Annotated[str, typer.Option("--tag", "-t", metavar="NAME", help="The name of the image.")],
    file: Annotated[str | None, typer.Option("--file", "-f", help="The Dockerfile.")] = None,
    target: Annotated[str | None, typer.Option(help="The stage to build; the last one unless told.")] = None,
    build_arg: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A value for an ARG.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label.")] = None,
    network: Annotated[str, typer.Option(help="Of RUN: none, nat or host.")] = "none",
    memory: Annotated[str, typer.Option("--memory", "-m", help="Limit of each RUN.")] = "2g",
    cpus: Annotated[float, typer.Option("--cpus", "-c", help="Limit of each RUN.")] = 2.0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Take no step over from former builds.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Look for newer images of FROM in their registries.")] = False,
    username: Username = None,
) -> None:
    """Build an image of a Dockerfile, on the server."""
    from rock.cli.commands.sandbox import client, variables

    login = _login(username)
    fields: dict[str, Any] = {
        "target": target, "build_args": variables(build_arg), "labels": variables(label), "network": network,
        "memory": memory, "cpus": cpus, "use_cache": not no_cache, "pull": "always" if pull else "missing",
        "registry_username": login.username if login else None, "registry_password": login.password if login else None,
    }  # fmt: skip

    def show(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    made = client().build_image(path, tag, dockerfile=file, progress=show, **fields)
    print(f"{made.name}  {made.digest}")
    print(f"{made.layers} layers, {size(made.size)}; {made.cached} steps taken over, {made.ran} run", file=sys.stderr)


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


@app.command("login")
def log_in(
    registry: Annotated[str, typer.Argument(help="Like localhost:5000, ghcr.io or docker.io.")],
    username: Annotated[str, typer.Option(prompt=True, help="Of the registry.")],
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from the standard input.")
    ] = False,
) -> None:
    """See that a registry takes a login, and keep it in ROCK_HOME/registries.json for you alone."""
    from contextlib import closing

    from rock.images.registry.client import Registry
    from rock.images.registry.logins import Login, any_of, domain_of

    domain = domain_of(registry)
    password = sys.stdin.readline().rstrip("\r\n") if password_stdin else _asked()
    login = Login(username, password)
    with closing(Registry(any_of(domain), login)) as there:
        there.log_in()
    _store().logins.save(domain, login)
    print(f"{domain}  {username}")


@app.command("logout")
def log_out(registry: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Forget the login of a registry."""
    from rock.images.registry.logins import domain_of

    _store().logins.forget(domain_of(registry))


@app.command("logins")
def list_logins() -> None:
    """List the registries that a login is kept for."""
    table(["REGISTRY", "USERNAME"], [list(row) for row in _store().logins.domains().items()], "no logins")


@app.command("prefetch")
def prefetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    pin: Annotated[bool, typer.Option("--pin", help="Keep them whatever the budget says.")] = False,
) -> None:
    """Pull those images that are not on this machine yet, ahead of the sandboxes that will need them."""
    from rock.errors import RockError

    store, failed = _store(), 0
    for name in names:
        try:
            there = store.has(name)
            if not there:
                with busy(f"pulling {name}") as tell:
                    store.pull(name, progress=tell)
            if pin:
                store.pin(name)
            print(f"{name}  {'was there' if there else 'pulled'}")
        except RockError as error:
            failed = fail(error)
    if failed:
        raise typer.Exit(failed)


@app.command("pin")
def pin(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Keep images whatever the budget says."""
    for name in names:
        _store().pin(name)


@app.command("unpin")
def unpin(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Let images go again when there is no room for them."""
    for name in names:
        _store().pin(name, False)


@app.command("prune")
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Every image that is neither pinned nor in use.")] = False,
    most: Annotated[
        str | None, typer.Option("--to", metavar="SIZE", help="The least recently used, until that much is left.")
    ] = None,
) -> None:
    """Remove layers that no image has, and the kept steps of builds."""
    from rock.errors import InvalidConfig
    from rock.protocol.sandbox import parse_size

    try:
        limit = None if most is None else parse_size(most, "image store")
    except ValueError as error:
        raise InvalidConfig(str(error)) from None
    pruned = _store().prune(steps=limit is None, everything=everything, most=limit)
    if pruned.busy:
        raise typer.Exit(complain("an image is being added now, and nothing was removed", "try again in a moment"))
    for name in pruned.names:
        print(name)
    print(f"{size(pruned.freed)} freed")


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
