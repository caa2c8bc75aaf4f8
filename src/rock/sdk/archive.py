"""Local files and folders on their way in and out: bodies of requests, and the safe unpacking of a tar."""

from __future__ import annotations

import os
import secrets
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from rock.errors import InvalidConfig, ServerError
from rock.protocol.formats import tar

CHUNK = 1 << 20
_PORTION = 256 << 10
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

Progress = Callable[[int], object]


class FileSource:
    """The bytes of a local file. `progress` is called with the number of bytes of each portion."""

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        self._path = Path(path)
        self._progress = progress
        self._size = self._path.stat().st_size

    @property
    def size(self) -> int | None:
        return self._size

    def chunks(self) -> Iterator[bytes]:
        with open(self._path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                if self._progress:
                    self._progress(len(chunk))
                yield chunk


class StreamSource:
    """The bytes of a binary file or a pipe, of unknown length."""

    def __init__(self, file: BinaryIO, progress: Progress | None = None) -> None:
        self._file = file
        self._progress = progress

    @property
    def size(self) -> int | None:
        return None

    def chunks(self) -> Iterator[bytes]:
        read = getattr(self._file, "read1", self._file.read)
        while chunk := read(CHUNK):
            if self._progress:
                self._progress(len(chunk))
            yield chunk


class FolderSource:
    """A local folder as a tar of what is in it, made while it is sent. Sockets, FIFOs and devices are left out."""

    def __init__(self, folder: str | os.PathLike[str], progress: Progress | None = None) -> None:
        self._folder = Path(folder)
        self._progress = progress
        if not self._folder.is_dir():
            raise InvalidConfig(f"{self._folder} is not a folder", hint="pass a folder of this machine")

    @property
    def size(self) -> int | None:
        return None

    def chunks(self) -> Iterator[bytes]:
        """Portions of at most CHUNK bytes: many small files are one of about _PORTION."""
        return tar.portions(self._parts(), _PORTION)

    def _parts(self) -> Iterator[bytes]:
        yield from self._walk(str(self._folder), "")
        yield tar.END

    def _walk(self, folder: str, prefix: str) -> Iterator[bytes]:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield header(name + "/", status, tar.FOLDER)
                yield from self._walk(entry.path, name + "/")
            elif stat.S_ISLNK(status.st_mode):
                yield header(name, status, tar.LINK, os.readlink(entry.path))
            elif stat.S_ISREG(status.st_mode):
                yield from self._file(entry.path, name, status)

    def _file(self, path: str, name: str, status: os.stat_result) -> Iterator[bytes]:
        left = status.st_size
        with open(path, "rb", buffering=0) as file:
            yield header(name, status, tar.FILE)
            while left:
                chunk = file.read(min(CHUNK, left))
                chunk = chunk or bytes(min(CHUNK, left))  # it shrank meanwhile: the header promised more
                left -= len(chunk)
                if self._progress:
                    self._progress(len(chunk))
                yield chunk
        if status.st_size % tar.BLOCK:
            yield tar.padding(status.st_size)


def header(name: str, status: os.stat_result, kind: bytes, target: str = "") -> bytes:
    """The head of an entry of a tar; a file's content follows."""
    size = status.st_size if kind == tar.FILE else 0
    return tar.header(name, kind, status.st_mode, status.st_mtime, size, target)


class Incoming:
    """A file that replaces `target` at once when it is complete, and leaves nothing when it is not."""

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = Path(target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.target.with_name(f".{self.target.name[:200]}.{secrets.token_hex(4)}.part")
        self._file: IO[bytes] = open(self._part, "xb", buffering=0)  # noqa: SIM115 - closed by keep and drop

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def keep(self) -> None:
        self._file.close()
        os.replace(self._part, self.target)

    def drop(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


def unpack(file: IO[bytes], target: str | os.PathLike[str]) -> list[str]:
    """Unpack a tar into a folder, and never outside it.

    Members whose name is absolute or climbs up are an error. Symbolic links that lead out of the folder, and FIFOs,
    sockets and devices, are left out; their names are returned. Owners and set-id bits are not carried over.
    """
    root = Path(target)
    root.mkdir(parents=True, exist_ok=True)
    unpacker = _Unpacker(root.resolve())
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                unpacker.add(archive, member)
    except tarfile.TarError as error:
        raise ServerError(f"the archive is broken: {error}") from None
    unpacker.finish()
    return unpacker.left_out


class _Unpacker:
    """Links come last, so that nothing of the archive is ever written through one of its links."""

    def __init__(self, root: Path) -> None:
        self.left_out: list[str] = []
        self._root = root
        self._placed: set[str] = set()  # folders that exist inside the root
        self._files: dict[str, str] = {}
        self._links: list[tuple[str, str]] = []
        self._folders: list[tuple[str, tarfile.TarInfo]] = []

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = _inside(member.name)
        path = os.path.join(self._root, name)
        if member.isdir():
            self._place(path)
            if os.path.islink(path) or not os.path.isdir(path):
                Path(path).unlink(missing_ok=True)
                self._placed.clear()  # folders below the link
                os.mkdir(path)
            self._folders.append((path, member))
        elif not name:
            raise ServerError("the archive is unsafe: its root is not a folder")
        elif member.isreg():
            self._place(os.path.dirname(path))
            self._write(archive, member, path)
            self._files[name] = path
        elif member.issym():
            if _stays_inside(PurePosixPath(name), member.linkname):
                self._links.append((path, member.linkname))
            else:
                self.left_out.append(name)
        elif member.islnk() and (source := self._files.get(_inside(member.linkname))):
            self._place(os.path.dirname(path))
            _clear(path)
            os.link(source, path)
            self._files[name] = path
        else:
            self.left_out.append(name)

    def finish(self) -> None:
        for path, target in self._links:
            self._place(os.path.dirname(path))
            _clear(path)
            os.symlink(target, path)
            self._placed.clear()
        for path, member in reversed(self._folders):
            if not os.path.islink(path):
                os.chmod(path, member.mode & 0o777 | 0o700)
                os.utime(path, (member.mtime, member.mtime))

    def _place(self, path: str) -> None:
        """Make a folder, unless a link on the way leads out of the root."""
        if path in self._placed:
            return
        folder = Path(path)
        if not folder.parent.resolve().is_relative_to(self._root) or not folder.resolve().is_relative_to(self._root):
            if folder != self._root:
                raise ServerError(f"the archive is unsafe: {folder} leads out of {self._root}")
        elif not folder.exists():
            folder.mkdir(parents=True)
        self._placed.add(path)

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        content = archive.extractfile(member)
        assert content is not None
        try:
            handle = os.open(path, _NEW, 0o600)
        except FileExistsError:
            _clear(path)
            handle = os.open(path, _NEW, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as out:
            while chunk := content.read(CHUNK):
                view = memoryview(chunk)
                while view:
                    view = view[out.write(view) or 0 :]
        os.chmod(path, member.mode & 0o777 | 0o600)
        os.utime(path, (member.mtime, member.mtime))


def _clear(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        raise InvalidConfig(f"{path} is a folder here and a file in the archive", hint="choose another local folder")
    Path(path).unlink(missing_ok=True)


def _inside(name: str) -> str:
    found = tar.inside(name)
    if found is None or (os.name == "nt" and any(c in name for c in ":\\")):
        raise ServerError(f"the archive is unsafe: it has a member named {name!r}")
    return found


def _stays_inside(name: PurePosixPath, target: str) -> bool:
    """Climbing is allowed at the beginning of a target only: after a name it would start from where that one leads."""
    parts = PurePosixPath(target).parts
    climbs = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    absolute = target.startswith("/") or (os.name == "nt" and any(c in target for c in ":\\"))
    return bool(target) and not absolute and ".." not in parts[climbs:] and climbs <= len(name.parts) - 1
