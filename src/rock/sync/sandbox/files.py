# GENERATED from src/rock/sdk/sandbox/files.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Files in a sandbox: `sandbox.files`."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TypeVar

from rock import errors
from rock.protocol.action import (
    BashObservation,
    Check,
    ChmodRequest,
    ChmodResponse,
    ChownRequest,
    ChownResponse,
    DownloadFileResponse,
    FileInfo,
)
from rock.protocol.node import FileList
from rock.sync import primitives
from rock.sdk.archive import CHUNK, FileSource, FolderSource, Incoming, Progress, StreamSource, unpack
from rock.sdk.http import Source
from rock.sync.sandbox.link import Link, parse
from rock.sync.transport import Download

BINARY = "application/octet-stream"
TAR = "application/x-tar"
TRANSFER_TIMEOUT = 300.0  # seconds of silence
CLEAN_UP = 15.0

R = TypeVar("R", ChmodResponse, ChownResponse)


class Files:
    """Files and folders inside, by absolute paths.

    Errors: NotFound, PermissionDenied, Conflict (a file of another kind exists), InvalidConfig (the path is invalid, or
    is a folder where a file is required). ROCK's name of this object is `sandbox.fs`.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    # ---- content

    def read(self, path: str, offset: int = 0, length: int | None = None, user: str | None = None) -> bytes:
        """Bytes of a file, from an offset on, at most `length`."""
        target = self._link._path("read_file", path=path, offset=offset or None, length=length, user=user)
        return self._link._transport.call("GET", target, timeout=TRANSFER_TIMEOUT)

    def read_text(self, path: str, encoding: str = "utf-8", errors: str = "strict") -> str:
        """A text file. UnicodeDecodeError when it is not in that encoding."""
        return (self.read(path)).decode(encoding, errors)

    def write(
        self,
        path: str,
        data: bytes | str | Source,
        *,
        append: bool = False,
        mode: int | None = None,
        user: str | None = None,
    ) -> FileInfo:
        """Write a file: missing parent folders are made, and an old file is replaced at once. `mode`: like 0o755."""
        body = data.encode() if isinstance(data, str) else data
        octal = None if mode is None else f"{mode:o}"
        target = self._link._path("write_file", path=path, append=append or None, mode=octal, user=user)
        return self._put(target, body, BINARY)

    def append(self, path: str, data: bytes | str) -> FileInfo:
        """Add to the end of a file, which is made when it is missing."""
        return self.write(path, data, append=True)

    # ---- names

    def list(self, path: str) -> list[FileInfo]:
        """What is in a folder, by name."""
        found: list[FileInfo] = []
        offset: int | None = None
        while True:
            target = self._link._path("list_files", path=path, offset=offset)
            page = parse(FileList, self._link._call("list_files", target))
            found += page.items
            offset = page.next
            if offset is None:
                return found

    def stat(self, path: str, follow: bool = True) -> FileInfo:
        """One file; with `follow`, what a symbolic link leads to."""
        target = self._link._path("stat_file", path=path, follow=follow)
        return parse(FileInfo, self._link._call("stat_file", target))

    def exists(self, path: str) -> bool:
        try:
            self.stat(path, follow=False)
        except errors.NotFound:
            return False
        return True

    def remove(self, path: str, recursive: bool = False) -> None:
        """Remove a file, or a folder: with all that is in it when `recursive`."""
        self._link._call("remove_file", self._link._path("remove_file", path=path, recursive=recursive or None))

    def mkdir(self, path: str, parents: bool = True, mode: int = 0o755) -> FileInfo:
        """Make a folder; with `parents`, one that exists is no error."""
        body = {"path": path, "parents": parents, "mode": f"{mode:o}"}
        return parse(FileInfo, self._link._call("make_dir", self._link._path("make_dir"), body))

    def move(self, source: str, target: str) -> FileInfo:
        """Rename; what is at the target is replaced."""
        body = {"source": source, "target": target}
        return parse(FileInfo, self._link._call("move_file", self._link._path("move_file"), body))

    def chmod(
        self, request: ChmodRequest | str | Sequence[str], mode: str | int = "755", recursive: bool = False
    ) -> ChmodResponse:
        """Change modes: of a request, or of a path or paths; `mode` is octal text or a number like 0o644.

        What cannot be done to the paths of a request is told (`success` is False), as ROCK does; else it is raised.
        """
        if isinstance(request, ChmodRequest):
            return self._told("chmod", request, ChmodResponse)
        octal = f"{mode:o}" if isinstance(mode, int) else mode
        return self._done(
            "chmod", ChmodRequest(paths=_paths(request), mode=octal, recursive=recursive), ChmodResponse
        )

    def chown(
        self, request: ChownRequest | str | Sequence[str], user: str = "root", recursive: bool = False
    ) -> ChownResponse:
        """Change owners, and groups to the owner's own: of a request, or of a path or paths. Failures as of `chmod`."""
        if isinstance(request, ChownRequest):
            return self._told("chown", request, ChownResponse)
        return self._done(
            "chown", ChownRequest(remote_user=user, paths=_paths(request), recursive=recursive), ChownResponse
        )

    def _done(self, name: str, request: ChownRequest | ChmodRequest, kind: type[R]) -> R:
        return parse(kind, self._link._call(name, self._link._path(name), request.model_dump()) or {})

    def _told(self, name: str, request: ChownRequest | ChmodRequest, kind: type[R]) -> R:
        if not request.paths:
            raise errors.InvalidConfig("the request has no paths", hint="add at least one")
        try:
            return self._done(name, request, kind)
        except errors.ClientError as error:
            return kind(success=False, message=str(error))

    # ---- transfers

    def upload(
        self, local_path: str | os.PathLike[str], remote_path: str, *, progress: Progress | None = None
    ) -> None:
        """Copy a local file or folder to `remote_path`. A folder is merged into an existing folder of that path.
        FileNotFoundError. progress: called with the number of bytes of each piece."""
        if primitives.in_thread(os.path.isdir, local_path):
            self.upload_dir(local_path, remote_path, merge=True, check="raise", progress=progress)
        else:
            self.upload_file(local_path, remote_path, progress=progress)

    def download(
        self, remote_path: str, local_path: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> None:
        """Copy a file or folder of the sandbox to `local_path`. progress: called with the number of bytes of each
        piece."""
        if (self.stat(remote_path)).kind == "directory":
            self.download_dir(remote_path, local_path, progress=progress)
        else:
            self.download_file(remote_path, local_path, progress=progress)

    def upload_file(
        self,
        local_path: str | os.PathLike[str],
        remote_path: str,
        *,
        mode: int | None = None,
        progress: Progress | None = None,
    ) -> FileInfo:
        """Copy a local file in, of any size, with its mode unless another is given. FileNotFoundError."""
        source = FileSource(local_path, progress)
        if mode is None:
            mode = os.stat(local_path).st_mode & 0o777
        return self.write(remote_path, source, mode=mode)

    def download_file(
        self, remote_path: str, local_path: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> DownloadFileResponse:
        """Copy a file out, of any size. The local file is replaced at once, when all has come."""
        place = Path(local_path)
        if primitives.in_thread(place.is_dir):
            place = place / PurePosixPath(remote_path).name
        target = self._link._path("read_file", path=remote_path)
        with self._link._transport.open("GET", target, timeout=TRANSFER_TIMEOUT) as answer:
            incoming = primitives.in_thread(Incoming, place)
            try:
                _pump(answer, incoming.write, progress)
                primitives.in_thread(incoming.keep)
            except BaseException:
                incoming.drop()
                raise
        return DownloadFileResponse(message=str(place))

    def upload_dir(
        self,
        source_dir: str | os.PathLike[str],
        target_dir: str,
        extract_timeout: float = 600,
        *,
        merge: bool = False,
        check: Check = "silent",
        progress: Progress | None = None,
    ) -> BashObservation:
        """Copy a local folder in, in place of what is at `target_dir`, which goes when all has come.

        merge: what is at `target_dir` stays, but for files of the same names. extract_timeout: seconds that the server
        may be silent. What cannot be done is told by `exit_code` 1 and `failure_reason`, as ROCK does, or raised when
        `check` is "raise".
        """
        try:
            if not target_dir.startswith("/"):
                raise errors.InvalidConfig(f"target_dir must be absolute path: {target_dir}", hint="begin it with /")
            source = primitives.in_thread(_folder, source_dir, progress)
            if merge:
                self._put(self._link._path("upload_dir", path=target_dir), source, TAR, extract_timeout)
            else:
                self._replace_dir(source, posixpath.normpath(target_dir), extract_timeout)
        except (errors.ClientError, OSError) as error:
            if check == "raise":
                raise
            reason = error.message if isinstance(error, errors.RockError) else str(error)
            return BashObservation(exit_code=1, failure_reason=reason)
        return BashObservation(output=f"uploaded {source_dir} -> {target_dir}", exit_code=0)

    def _replace_dir(self, source: Source, target: str, timeout: float) -> None:
        """Unpack beside the target, then put it in its place: an upload that fails leaves the old one."""
        if not target.strip("/"):
            raise errors.InvalidConfig("the whole file system cannot be replaced", hint="merge=True adds to a folder")
        fresh = f"{posixpath.dirname(target).rstrip('/')}/.rock-upload-{os.urandom(8).hex()}"
        try:
            self._put(self._link._path("upload_dir", path=fresh), source, TAR, timeout)
            if self.exists(target):
                self.remove(target, recursive=True)
            self.move(fresh, target)
        except BaseException:
            primitives.settle(partial(self.remove, fresh, recursive=True), CLEAN_UP)
            raise

    def download_dir(
        self, remote_path: str, local_dir: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> Sequence[str]:
        """Copy what is in a folder inside into a local folder, and give the names of what was left out.

        Nothing is ever written outside the local folder: names that climb out are a ServerError; links that lead out,
        and FIFOs, sockets and devices, are left out.
        """
        target = self._link._path("download_dir", path=remote_path)
        with self._link._transport.open("GET", target, timeout=TRANSFER_TIMEOUT) as answer:
            file: IO[bytes]
            with tempfile.TemporaryFile() as file:
                _pump(answer, file.write, progress)
                file.seek(0)
                return primitives.in_thread(unpack, file, local_dir)

    def pack(self, path: str) -> Iterator[bytes]:
        """A folder as a tar, in pieces while they arrive. The names are relative to the folder. NotFound, Conflict."""
        target = self._link._path("download_dir", path=path)
        with self._link._transport.open("GET", target, timeout=TRANSFER_TIMEOUT) as answer:
            for part in answer:
                yield part

    def unpack(self, source: BinaryIO, path: str, *, progress: Progress | None = None) -> None:
        """Unpack a tar, read from a binary file, into a folder, which is created. InvalidConfig: it is no tar.
        progress: called with the number of bytes of each piece."""
        self._put(self._link._path("upload_dir", path=path), StreamSource(source, progress), TAR)

    def chunks(self, path: str) -> Iterator[bytes]:
        """The bytes of a file while they come."""
        target = self._link._path("read_file", path=path)
        with self._link._transport.open("GET", target, timeout=TRANSFER_TIMEOUT) as answer:
            for part in answer:
                yield part

    def _put(self, target: str, body: bytes | Source, kind: str, timeout: float = TRANSFER_TIMEOUT) -> FileInfo:
        return parse(
            FileInfo, self._link._transport.json_raw("PUT", target, body, timeout=timeout, content_type=kind)
        )


def _pump(answer: Download, write: Any, progress: Progress | None) -> None:
    """Carry a body to a file, in portions that are worth a thread's turn."""
    parts: list[bytes] = []
    size = 0
    for part in answer:
        parts.append(part)
        size += len(part)
        if size >= CHUNK:
            primitives.in_thread(write, b"".join(parts) if len(parts) > 1 else parts[0])
            if progress:
                progress(size)
            parts, size = [], 0
    if parts:
        primitives.in_thread(write, b"".join(parts))
        if progress:
            progress(size)


def _folder(path: str | os.PathLike[str], progress: Progress | None) -> FolderSource:
    """A local folder to send. FileNotFoundError, NotADirectoryError."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"source_dir not found: {path}")
    if not os.path.isdir(path):
        raise NotADirectoryError(f"source_dir must be a directory: {path}")
    return FolderSource(path, progress)


def _paths(paths: str | Sequence[str]) -> Any:
    return [paths] if isinstance(paths, str) else [*paths]
