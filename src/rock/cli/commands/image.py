"""`rock image`: the images of this machine. They are in ROCK_HOME; only `rock image build` needs a server."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from rock.cli.connection import client, variables
from rock.cli.output import age, as_json, busy, complain, fail, size, table
from rock.cli.parsing import Group, complete_image, json_option
from rock.errors import InvalidConfig, RockError
from rock.protocol.sandbox import parse_size
from rock.settings import Settings

if TYPE_CHECKING:  # the client runs on machines that cannot store images
    from rock.images.registry.logins import Login
    from rock.images.store import ImageStore

_TAR_MAGIC = slice(257, 262)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")

_username = click.option("--username", help="User of the registry; the password is prompted for.")
_name = click.argument("name", shell_complete=complete_image)
_names = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_image)


@click.group(cls=Group)
def image() -> None:
    """Pull, build, import, list and remove images.

    They are the images of this machine, in ROCK_HOME; `build` runs on the server.
    """


def open_store() -> ImageStore:
    from rock.images.store import ImageStore

    return ImageStore.of(Settings.read())


def records(steps: bool = False) -> list[Any]:
    """The images of this machine, each an ImageRecord. steps: the cached steps of builds too."""
    from rock.images.gc import is_step

    return [record for record in open_store().list() if steps or not is_step(record)]


def _login(username: str | None) -> Login | None:
    from rock.images.registry.logins import Login

    return None if username is None else Login(username, _password())


def _password() -> str:
    return str(click.prompt("Password", hide_input=True, err=True))


@image.command("ls", example="rock image ls")
@json_option
@click.option("--steps", is_flag=True, help="Include the cached steps of builds.")
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_images(json_: bool, steps: bool, no_trunc: bool) -> None:
    """List images."""
    store, found = open_store(), records(steps)
    if json_:
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
    table(["NAME", "KIND", "DIGEST", "LAYERS", "SIZE", "AGE", "USED", ""], rows, "no images", whole=no_trunc)


@image.command("pull", example="rock image pull python:3.11")
@click.argument("name")
@_username
def pull_image(name: str, username: str | None) -> None:
    """Pull an image from its registry."""
    login = _login(username)
    with busy(f"pulling {name}") as update:
        record = open_store().pull(name, login, update)
    print(f"{record.name}  {record.digest}")


@image.command("build", example="rock image build -t team/tool:1 .\nrock image build -t team/tool:1 - < Dockerfile")
@click.argument("path", type=click.Path(), metavar="FOLDER")
@click.option("--tag", "-t", metavar="NAME", required=True, help="Name of the image.")
@click.option("--file", "-f", metavar="FILE", help="Dockerfile; by default FOLDER/Dockerfile.")
@click.option("--target", metavar="STAGE", help="Stage to build; by default the last one.")
@click.option("--build-arg", metavar="K=V", multiple=True, help="Value of an ARG. Repeatable.")
@click.option("--label", metavar="K=V", multiple=True, help="Label of the image. Repeatable.")
@click.option("--network", type=click.Choice(["none", "nat", "host"]), default="none", show_default=True,
              help="Network of RUN.")  # fmt: skip
@click.option("--memory", "-m", default="2g", show_default=True, metavar="SIZE", help="Memory limit of each RUN.")
@click.option("--cpus", "-c", type=float, default=2.0, show_default=True, help="CPU limit of each RUN.")
@click.option("--no-cache", is_flag=True, help="Do not use the build cache.")
@click.option("--pull", is_flag=True, help="Pull newer images of FROM.")
@_username
def build_image(
    path: str, tag: str, file: str | None, target: str | None, build_arg: tuple[str, ...], label: tuple[str, ...],
    network: str, memory: str, cpus: float, no_cache: bool, pull: bool, username: str | None,
) -> None:  # fmt: skip
    """Build an image of a Dockerfile, on the server.

    With `-` the standard input is a Dockerfile without other files, or a tar of a folder, plain or compressed.
    """
    login = _login(username)
    fields: dict[str, Any] = {
        "target": target, "build_args": variables(build_arg, "--build-arg"), "labels": variables(label, "--label"),
        "network": network, "memory": memory, "cpus": cpus, "use_cache": not no_cache,
        "pull": "always" if pull else "missing", "registry_username": login.username if login else None,
        "registry_password": login.password if login else None,
    }  # fmt: skip
    with TemporaryDirectory(prefix="rock-context-") as folder:
        if path == "-":
            receive_context(Path(folder))
            path = folder
            file = None if file is None else os.path.join(folder, file)
        made = client().build_image(path, tag, dockerfile=file, progress=_show, **fields)
    print(f"{made.name}  {made.digest}")
    print(f"{made.layers} layers, {size(made.size)}; {made.cached} steps from the cache, {made.ran} run",
          file=sys.stderr)  # fmt: skip


def receive_context(folder: Path) -> None:
    """Write the standard input into a folder: a tar is unpacked, any other text is the Dockerfile. InvalidConfig."""
    with TemporaryFile() as received:
        shutil.copyfileobj(sys.stdin.buffer, received)
        received.seek(0)
        begin = received.read(_TAR_MAGIC.stop)
        received.seek(0)
        if not begin:
            raise InvalidConfig("the standard input is empty", hint="rock image build -t NAME - < Dockerfile")
        if not begin.startswith(_COMPRESSED) and begin[_TAR_MAGIC] != b"ustar":
            with open(folder / "Dockerfile", "wb") as dockerfile:
                shutil.copyfileobj(received, dockerfile)
            return
        try:
            with tarfile.open(fileobj=received) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InvalidConfig(f"the standard input is not a tar of a build context: {error}",
                                hint="tar --create . | rock image build -t NAME -") from None  # fmt: skip


def _show(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


@image.command("push", example="rock image push localhost:5000/team/tool:1.0")
@_name
@_username
def push_image(name: str, username: str | None) -> None:
    """Push an image to the registry in its name."""
    login = _login(username)
    with busy(f"pushing {name}") as update:
        digest = open_store().push(name, login, update)
    print(f"{name}  {digest}")


@image.command("export", example="rock image export team/tool:1 tool.tar")
@_name
@click.argument("path", metavar="FILE")
def export_image(name: str, path: str) -> None:
    """Write an image to a new file.

    The file is the tar of an OCI layout, for `rock image import` and other tools.
    """
    with busy(f"writing {path}") as update:
        digest = open_store().export(name, path, update)
    print(f"{name}  {digest}")


@image.command("import", example="rock image import ./rootfs team/base:1")
@click.argument("path")
@click.argument("name", required=False)
def import_image(path: str, name: str | None) -> None:
    """Import an image from a folder or a file.

    PATH is a root folder, a tar of one, an archive of `docker save` or an OCI layout; archives have names of their own.
    """
    with busy(f"importing {path}") as update:
        records = open_store().import_any(path, name, update)
    for record in records:
        print(f"{record.name}  {record.digest}")


@image.command("from-host", example="rock image from-host python:3.11")
@click.argument("name")
def from_host(name: str) -> None:
    """Create an image of this machine's root file system.

    It refers to the file system of the host, read-only and without private files: nothing is copied. It has the
    programs of the host, whatever NAME says.
    """
    with busy("reading the root file system"):
        record = open_store().from_host(name)
    print(f"{record.name}  {record.digest}")


@image.command("login", example="rock image login ghcr.io --username me")
@click.argument("registry")
@click.option("--username", prompt=True, help="User of the registry.")
@click.option("--password-stdin", is_flag=True, help="Read the password from the standard input.")
def log_in(registry: str, username: str, password_stdin: bool) -> None:
    """Log in to a registry.

    Checks the login, and stores it in ROCK_HOME/registries.json, which only you can read. REGISTRY is like
    localhost:5000, ghcr.io or docker.io.
    """
    from rock.images.registry.client import Registry
    from rock.images.registry.logins import Login, any_of, domain_of

    domain = domain_of(registry)
    password = sys.stdin.readline().rstrip("\r\n") if password_stdin else _password()
    login = Login(username, password)
    with closing(Registry(any_of(domain), login)) as there:
        there.log_in()
    open_store().logins.save(domain, login)
    print(f"{domain}  {username}")


@image.command("logout", example="rock image logout ghcr.io")
@click.argument("registry")
def log_out(registry: str) -> None:
    """Remove the stored login of a registry."""
    from rock.images.registry.logins import domain_of

    open_store().logins.forget(domain_of(registry))


@image.command("logins", example="rock image logins")
def list_logins() -> None:
    """List the stored logins."""
    table(["REGISTRY", "USERNAME"], [list(row) for row in open_store().logins.domains().items()], "no logins")


@image.command("prefetch", example="rock image prefetch --pin python:3.11 python:3.12")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--pin", is_flag=True, help="Exempt the images from garbage collection.")
def prefetch(names: tuple[str, ...], pin: bool) -> int:
    """Pull images that are not on this machine yet."""
    store = open_store()

    def one(name: str) -> str:
        present = store.has(name)
        if not present:
            with busy(f"pulling {name}") as update:
                store.pull(name, progress=update)
        if pin:
            store.pin(name)
        return f"{name}  {'present' if present else 'pulled'}"

    return _each(names, one)


def _each(names: tuple[str, ...], act: Callable[[str], str]) -> int:
    """Print the result for each image; 1 when one failed."""
    failed = 0
    for name in names:
        try:
            print(act(name))
        except RockError as error:
            failed = fail(error)
    return failed


@image.command("pin", example="rock image pin python:3.11")
@_names
def pin(names: tuple[str, ...]) -> None:
    """Exempt images from garbage collection."""
    for name in names:
        open_store().pin(name)


@image.command("unpin", example="rock image unpin python:3.11")
@_names
def unpin(names: tuple[str, ...]) -> None:
    """Allow images to be evicted again."""
    for name in names:
        open_store().pin(name, False)


@image.command("prune", example="rock image prune\nrock image prune --to 20g")
@click.option("--all", "everything", is_flag=True, help="Also every image that is neither pinned nor in use.")
@click.option("--to", "most", metavar="SIZE", help="Also the least recently used images, until this size remains.")
def prune(everything: bool, most: str | None) -> int:
    """Remove unused layers and the build cache."""
    try:
        limit = None if most is None else parse_size(most, "image store")
    except ValueError as error:
        raise InvalidConfig(f"--to is not a size: {error}", hint="write a number and a unit, like 20g") from None
    with busy("removing unused layers"):
        pruned = open_store().prune(steps=limit is None, everything=everything, most=limit)
    if pruned.busy:
        return complain("an image is being added now, and nothing was removed", "try again in a moment")
    for name in pruned.names:
        print(name)
    print(f"{size(pruned.freed)} freed")
    return 0


@image.command("rm", example="rock image rm team/tool:1")
@_names
def remove(names: tuple[str, ...]) -> int:
    """Remove images, and layers that no other image needs."""
    store = open_store()
    return _each(names, lambda name: f"{name}  {size(store.remove(name))} freed")


@image.command("inspect", example="rock image inspect python:3.11")
@_name
def inspect(name: str) -> None:
    """Show all fields of an image as JSON."""
    as_json(asdict(open_store().inspect(name)))
