"""`rock cp`: files and folders to, from and between sandboxes, and tar streams."""

from __future__ import annotations

import os
import posixpath
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rock.cli.commands.run import standard_input
from rock.cli.connection import connected
from rock.cli.output import printable, transfer
from rock.cli.parsing import command, complete_path
from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.action import FileInfo
from rock.sdk.archive import StreamSource
from rock.sync import Sandbox

_PARENTS = "create it first, or use --parents"


@dataclass
class Place:
    """A side of a copy. sandbox: None is this machine. path: absolute in a sandbox. into: it ends in a slash, so it is
    a folder. content: it ends in /., which is the content of a folder."""

    sandbox: Sandbox | None
    path: str
    into: bool
    content: bool
    text: str

    @property
    def name(self) -> str:
        """The last part of the path; that of the resolved one for a local . and .."""
        if self.sandbox is None:
            return Path(self.path).resolve().name
        return posixpath.basename(posixpath.normpath(self.path))


@command(example="rock cp model.bin web:/srv/\nrock cp web:/var/log ./logs\nrock cp web:/srv other:/srv\n"
                 "tar c src | rock cp - web:/work\nrock cp web:/work - | tar t")  # fmt: skip
@click.argument("source", metavar="SOURCE", shell_complete=complete_path)
@click.argument("target", metavar="TARGET", shell_complete=complete_path)
@click.option("--parents", is_flag=True, help="Create missing parent folders of TARGET.")
@click.option("--recursive", "-r", "-R", is_flag=True, help="Accepted as in scp: folders are always copied completely.")
@click.option("--archive", "-a", is_flag=True, help="Accepted as in docker cp: modes are always kept, owners never.")
@click.option("--preserve", "-p", is_flag=True, help="Accepted as in scp: modes are always kept.")
def cp(source: str, target: str, parents: bool, recursive: bool, archive: bool, preserve: bool) -> None:
    """Copy files to, from and between sandboxes.

    A side is SANDBOX:PATH, a local PATH, or - for a tar on the standard input or output. A relative path in a sandbox
    starts at its working directory. What is copied to an existing folder is put into it; SOURCE/. is the content of a
    folder. The parent folder of TARGET must exist.
    """
    from_, to = _place(source), _place(target)
    if source == "-" and target != "-" and to.sandbox is not None:
        _unpack(to.sandbox, to, parents)
    elif target == "-" and from_.sandbox is not None:
        _pack(from_.sandbox, from_)
    elif from_.sandbox is None and to.sandbox is None:
        raise click.UsageError("one side must be SANDBOX:PATH; a local file named - is ./-")
    elif from_.sandbox is None:
        _upload(from_, to, parents)
    elif to.sandbox is None:
        _download(from_.sandbox, from_, to, parents)
    else:
        _across(from_.sandbox, from_, to, parents)


def _place(text: str) -> Place:
    name, colon, path = text.partition(":")
    local = not colon or len(name) < 2 or "/" in name or "\\" in name  # one letter is a drive of Windows
    given = text if local else path
    into, content = given.endswith(("/", os.sep) if local else "/"), given == "." or given.endswith("/.")
    if local:
        return Place(None, text, into, content, text)
    sandbox = connected(name)
    if not path.startswith("/"):
        folder = sandbox.exec("pwd", timeout=30, check=True).stdout.removesuffix("\n")
        path = posixpath.join(folder, path or ".")
    return Place(sandbox, posixpath.normpath(path), into, content, text)


def _stat(sandbox: Sandbox, path: str) -> FileInfo | None:
    try:
        return sandbox.files.stat(path)
    except NotFound:
        return None


def _inside(to: Place, name: str, folder: bool, content: bool, parents: bool) -> str:
    """The path of the copy in a sandbox. NotFound when a folder is missing, Conflict for a folder onto a file."""
    sandbox = to.sandbox
    assert sandbox is not None
    found = _stat(sandbox, to.path)
    if found is not None and found.kind == "directory":
        return to.path if folder and content else posixpath.join(to.path, name)
    if found is not None:
        if folder or to.into:
            raise Conflict(f"{to.text} is a file, not a folder", hint="choose another target, or remove the file")
        return to.path
    into = to.into and not folder
    missing = to.path if into else posixpath.dirname(to.path)
    if into or _stat(sandbox, missing) is None:
        if not parents:
            raise NotFound(f"there is no folder {missing} in the sandbox", hint=_PARENTS)
        sandbox.files.mkdir(missing)
    return posixpath.join(to.path, name) if into else to.path


def _local(to: Place, name: str, folder: bool, content: bool, parents: bool) -> Path:
    """The path of the copy on this machine; errors as of `_inside`."""
    path = Path(to.path)
    if path.is_dir():
        return path if folder and content else path / name
    if path.exists():
        if folder or to.into:
            raise Conflict(f"{to.text} is a file, not a folder", hint="choose another target, or remove the file")
        return path
    into = to.into and not folder
    missing = path if into else path.parent
    if not missing.is_dir():
        if not parents:
            raise NotFound(f"there is no local folder {missing}", hint=_PARENTS)
        missing.mkdir(parents=True)
    return path / name if into else path


def _upload(from_: Place, to: Place, parents: bool) -> None:
    source, sandbox = Path(from_.path), to.sandbox
    assert sandbox is not None
    if not source.exists():
        raise NotFound(f"there is no local file {source}", hint="check the path; a sandbox's is SANDBOX:PATH")
    folder = source.is_dir()
    target = _inside(to, from_.name, folder, from_.content, parents)
    total = _size_of(source) if folder else source.stat().st_size
    with transfer(f"{source} -> {to.text}", total) as advance:
        sandbox.files.upload(source, target, progress=advance)


def _download(sandbox: Sandbox, from_: Place, to: Place, parents: bool) -> None:
    info = sandbox.files.stat(from_.path)
    folder = info.kind == "directory"
    target = _local(to, from_.name, folder, from_.content, parents)
    with transfer(f"{from_.text} -> {target}", None if folder else info.size) as advance:
        if not folder:
            sandbox.files.download_file(from_.path, target, progress=advance)
            return
        left_out = sandbox.files.download_dir(from_.path, target, progress=advance)
    for member in left_out:
        print(f"left out: {printable(member)} (a link that leads out of the folder, or no regular file)",
              file=sys.stderr)  # fmt: skip


def _across(sandbox: Sandbox, from_: Place, to: Place, parents: bool) -> None:
    """From one sandbox to another, through a temporary file."""
    info = sandbox.files.stat(from_.path)
    folder = info.kind == "directory"
    target = _inside(to, from_.name, folder, from_.content, parents)
    assert to.sandbox is not None
    with tempfile.TemporaryFile() as file, transfer(f"{from_.text} -> {to.text}", None) as advance:
        for chunk in sandbox.files.pack(from_.path) if folder else sandbox.files.chunks(from_.path):
            file.write(chunk)
            advance(len(chunk))
        file.seek(0)
        if folder:
            to.sandbox.files.unpack(file, target)
        else:
            to.sandbox.files.write(target, StreamSource(file), mode=info.mode & 0o777)


def _unpack(sandbox: Sandbox, to: Place, parents: bool) -> None:
    """A tar of the standard input into an existing folder."""
    if sys.stdin.isatty():
        raise InvalidConfig("the standard input is a terminal, not a tar", hint="tar c FOLDER | rock cp - SANDBOX:PATH")
    found = _stat(sandbox, to.path)
    if found is None and not parents:
        raise NotFound(f"there is no folder {to.path} in the sandbox", hint=_PARENTS)
    if found is not None and found.kind != "directory":
        raise Conflict(f"{to.text} is a file, not a folder", hint="a tar is unpacked into a folder")
    with transfer(f"tar -> {to.text}", None) as advance:
        sandbox.files.unpack(standard_input(), to.path, progress=advance)


def _pack(sandbox: Sandbox, from_: Place) -> None:
    """A tar of a file or folder to the standard output, with names that begin with its own, as `docker cp` gives."""
    if sys.stdout.isatty():
        raise InvalidConfig("the standard output is a terminal, and a tar is binary",
                            hint="rock cp SANDBOX:PATH - | tar t")
    info = sandbox.files.stat(from_.path)
    prefix = "" if from_.content else from_.name
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as out:
        if info.kind != "directory":
            head = tarfile.TarInfo(from_.name)
            head.size, head.mode, head.mtime = info.size, info.mode & 0o7777, int(info.mtime)
            out.addfile(head, _reader(sandbox.files.chunks(from_.path)))
            return
        if prefix:
            head = tarfile.TarInfo(prefix)
            head.type, head.mode, head.mtime = tarfile.DIRTYPE, info.mode & 0o7777, int(info.mtime)
            out.addfile(head)
        with tarfile.open(fileobj=_reader(sandbox.files.pack(from_.path)), mode="r|") as members:
            for member in members:
                content = members.extractfile(member) if member.isreg() else None
                member.name = posixpath.normpath(posixpath.join(prefix, member.name))
                if member.name == prefix:
                    continue  # the folder itself
                if member.islnk():
                    member.linkname = posixpath.normpath(posixpath.join(prefix, member.linkname))
                member.pax_headers = {}  # they would repeat the name without its prefix
                out.addfile(member, content)


def _reader(chunks: Iterator[bytes]) -> Any:
    """Chunks as a file for tarfile, which calls `read` only."""
    return _Reader(chunks)


class _Reader:
    """Chunks as a file to read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        parts, missing = [], size
        while missing:
            piece = self._rest or next(self._chunks, b"")
            if not piece:
                self._rest = b""
                break
            taken = piece if missing < 0 else piece[:missing]
            self._rest = piece[len(taken) :]
            parts.append(taken)
            missing -= len(taken) if missing > 0 else 0
        return b"".join(parts)


def _size_of(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink())
