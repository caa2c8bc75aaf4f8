"""`rock cp`: files and folders into and out of a sandbox."""

from __future__ import annotations

import os
import posixpath
import sys
from pathlib import Path

import click

from rock.cli.connection import connected
from rock.cli.output import transfer
from rock.cli.parsing import command, complete_path
from rock.errors import InvalidConfig, NotFound
from rock.sync import Sandbox


@command(example="rock cp model.bin web:/srv/\nrock cp web:/var/log ./logs")
@click.argument("source", metavar="SOURCE", shell_complete=complete_path)
@click.argument("target", metavar="TARGET", shell_complete=complete_path)
def cp(source: str, target: str) -> None:
    """Copy files to, from and between sandboxes.

    One side is SANDBOX:PATH. As with `cp -r`, what is copied to an existing folder is put into it.
    """
    there, here = _remote(source), _remote(target)
    if (there is None) == (here is None):
        raise click.UsageError("one of the two sides is SANDBOX:PATH, and the other a local path")
    if there is not None:
        _download(connected(there[0]), there[1], Path(target), target.endswith(("/", os.sep)))
    elif here is not None:
        _upload(connected(here[0]), Path(source), here[1])


def _remote(text: str) -> tuple[str, str] | None:
    """(id, path) of "id:path"; None for a local path, with a drive letter or a separator before the colon."""
    name, colon, path = text.partition(":")
    if not colon or len(name) < 2 or "/" in name or "\\" in name:
        return None
    if not path.startswith("/"):
        raise InvalidConfig(f"{text}: the path inside has to be absolute, like {name}:/tmp/file")
    return name, path


def _upload(sandbox: Sandbox, source: Path, target: str) -> None:
    if not source.exists():
        raise NotFound(f"{source} does not exist here")
    if target.endswith("/") or _kind(sandbox, target) == "directory":
        target = posixpath.join(target, source.resolve().name)
    folder = source.is_dir()
    total = _size_of(source) if folder else source.stat().st_size
    with transfer(f"{source.name} ->", total) as advance:
        if folder:
            sandbox.fs.upload_dir(source, target, merge=True, check="raise", progress=advance)
        else:
            sandbox.fs.upload_file(source, target, progress=advance)


def _download(sandbox: Sandbox, source: str, target: Path, into: bool) -> None:
    info = sandbox.fs.stat(source)
    name = posixpath.basename(source.rstrip("/"))
    if (into or target.is_dir()) and name:
        target = target / name
    if info.kind == "directory":
        with transfer(f"{name} ->", None) as advance:
            left_out = sandbox.fs.download_dir(source, target, progress=advance)
        for member in left_out:
            print(f"left out: {member} (a link that leads out, or no file)", file=sys.stderr)
        return
    with transfer(f"{name} ->", info.size) as advance:
        sandbox.fs.download_file(source, target, progress=advance)


def _kind(sandbox: Sandbox, path: str) -> str | None:
    try:
        return sandbox.fs.stat(path).kind
    except NotFound:
        return None


def _size_of(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink())
