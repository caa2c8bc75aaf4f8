"""Sources of archive bytes: a file or a part of a file, decompressed and verified, within bounds on the unpacked size.

A few kilobytes of an archive can expand to more than any disk holds, so `Bounds` limits every unpack."""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rock.errors import ImageError, RockError, StorageFull
from rock.images.layers.tar_reader import DAMAGED, ByteStream, FileStream, Kind, TarReader

CHUNK = 1 << 20
_GZIP, _ZSTD, _XZ, _BZIP2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh"


@dataclass(frozen=True)
class Blob:
    """`size` bytes of `path`, from `offset`."""

    path: Path
    offset: int = 0
    size: int = -1

    @classmethod
    def of(cls, path: Path) -> Blob:
        return cls(path, 0, path.stat().st_size)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes; ImageError when the file is shorter."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.size
            while left:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    raise ImageError(f"{self.path} is cut short", hint="fetch or save it again")
                left -= len(chunk)
                yield chunk

    def start(self, count: int) -> bytes:
        """Its first bytes, at most `count`."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(min(count, self.size))

    def read(self, limit: int = 64 << 20) -> bytes:
        """The whole content; ImageError when it is larger than `limit` bytes."""
        if self.size > limit:
            raise ImageError(f"{self.path} has a description of {self.size} bytes, more than the limit of {limit}",
                             hint=DAMAGED)
        return b"".join(self.chunks())


def compression(blob: Blob) -> str:
    """ "none", "gzip", "zstd", "xz" or "bzip2", by the first bytes."""
    first = blob.start(6)
    for magic, name in ((_GZIP, "gzip"), (_ZSTD, "zstd"), (_XZ, "xz"), (_BZIP2, "bzip2")):
        if first.startswith(magic):
            return name
    return "none"


class TarConsumer(Protocol):
    """Receives the entries of a tar."""

    def add_all(self, reader: TarReader) -> None: ...


class Plain:
    """The uncompressed bytes of a blob, with the digests of both sides once `chunks` is exhausted.

    bounds: limits the whole size, whatever part of it is used.
    """

    def __init__(self, blob: Blob, bounds: Bounds) -> None:
        self._blob = blob
        self._bounds = bounds
        self._outer = hashlib.sha256()
        self._inner = hashlib.sha256()
        self._kind = compression(blob)

    @property
    def blob_digest(self) -> str:
        return f"sha256:{(self._inner if self._kind == 'none' else self._outer).hexdigest()}"

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._inner.hexdigest()}"

    def chunks(self) -> Generator[bytes, None, None]:
        """Pieces of at most a few MB. A thread produces them ahead of the consumer."""
        return _ahead(self._plain())

    def unpack_into(self, writer: TarConsumer) -> None:
        """Pass the tar to a writer, to the last byte."""
        chunks = self.chunks()
        try:
            stream = ByteStream(chunks)
            writer.add_all(TarReader(stream))
            stream.drain()
        finally:
            chunks.close()

    def _plain(self) -> Generator[bytes, None, None]:
        raw: Iterator[bytes] = self._blob.chunks()
        if self._kind != "none":
            raw = _hashed(raw, self._outer)
        if self._kind == "gzip":
            raw = _gunzip(raw, str(self._blob.path))
        elif self._kind == "zstd":
            raw = _unzstd(raw)
        elif self._kind != "none":
            raise ImageError(f"{self._blob.path} is compressed with {self._kind}, which is not supported",
                             hint="decompress it first")
        return _hashed(self._bounded(raw), self._inner)

    def _bounded(self, chunks: Iterator[bytes]) -> Generator[bytes, None, None]:
        for chunk in chunks:
            self._bounds.take(len(chunk))
            yield chunk


def _hashed(chunks: Iterator[bytes], digest: hashlib._Hash) -> Generator[bytes, None, None]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _gunzip(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    inflate = zlib.decompressobj(wbits=31)
    started = False
    try:
        for chunk in chunks:
            while chunk:
                if inflate.eof:
                    if not chunk.strip(b"\0"):
                        break  # padding
                    inflate = zlib.decompressobj(wbits=31)
                started = True
                plain = inflate.decompress(chunk, CHUNK)
                chunk = inflate.unconsumed_tail or inflate.unused_data
                if plain:
                    yield plain
        while not inflate.eof and (plain := inflate.decompress(b"", CHUNK)):
            yield plain
    except zlib.error as error:
        raise ImageError(f"{name} is damaged: {error}", hint="fetch or save it again") from None
    if started and not inflate.eof:
        raise ImageError(f"{name} is cut short", hint="fetch or save it again")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    program = shutil.which("zstd")
    if program is None:
        raise ImageError("this layer is compressed with zstd, and the program zstd is not on this machine",
                         hint="install zstd, or convert the image to gzip layers")
    with tempfile.TemporaryFile() as packed, tempfile.TemporaryFile() as stderr:
        for chunk in chunks:
            packed.write(chunk)
        packed.seek(0)
        command = [program, "-dc", "--long=31"]
        with subprocess.Popen(command, stdin=packed, stdout=subprocess.PIPE, stderr=stderr) as child:
            assert child.stdout is not None
            try:
                while chunk := child.stdout.read(CHUNK):
                    yield chunk
            finally:
                child.stdout.close()
                if child.wait() not in (0, -13):
                    stderr.seek(0)
                    raise ImageError("zstd failed to decompress a layer: "
                                     f"{stderr.read(500).decode(errors='replace').strip()}", hint=DAMAGED)


def _ahead(chunks: Generator[bytes, None, None], depth: int = 8) -> Generator[bytes, None, None]:
    """The same items, produced by a thread up to `depth` ahead: decompression and digests run in parallel with
    writes."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with closing(chunks):
                for chunk in chunks:
                    if not put(chunk):
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="rock-layer", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


class Archive:
    """The files of an archive, folder or tar, by name. A compressed tar is first decompressed into `scratch`.

    bounds: limits the decompressed size and the number of files.
    """

    def __init__(self, path: Path, scratch: Path, bounds: Bounds) -> None:
        self.path = path
        self._bounds = bounds
        self._files: dict[str, Blob] = {}
        self._links: dict[str, str] = {}
        if path.is_dir():
            self._walk()
            return
        blob = Blob.of(path)
        if compression(blob) != "none":
            blob = _spool(blob, scratch, bounds)
        self._index(blob)

    def get(self, name: str) -> Blob | None:
        """The file of that name; links inside the archive are followed."""
        for _ in range(8):
            name = _normal(name)
            if name in self._files:
                return self._files[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def __getitem__(self, name: str) -> Blob:
        blob = self.get(name)
        if blob is None:
            raise ImageError(f"{self.path} has no {name!r}", hint="the archive is incomplete; save it again")
        return blob

    def _walk(self) -> None:
        root = self.path.resolve()
        for base, _, names in os.walk(root):
            for name in names:
                file = Path(base, name)
                if file.is_file() and file.resolve().is_relative_to(root):
                    self._files[str(file.relative_to(root))] = Blob.of(file)

    def _index(self, blob: Blob) -> None:
        with open(blob.path, "rb") as file:
            reader = TarReader(FileStream(file, blob.size))
            while (entry := reader.next()) is not None:
                self._bounds.take(entries=1)
                name, target = _normal(os.fsdecode(entry.path)), os.fsdecode(entry.target)
                if entry.kind is Kind.FILE:
                    self._files[name] = Blob(blob.path, reader.offset, entry.size)
                elif entry.kind is Kind.SYMLINK:
                    self._links[name] = os.path.join(os.path.dirname(name), target)
                elif entry.kind is Kind.HARDLINK:
                    self._links[name] = target


def _normal(name: str) -> str:
    return os.path.normpath("/" + name)[1:].lstrip("/")


def _spool(blob: Blob, scratch: Path, bounds: Bounds) -> Blob:
    target = scratch / "archive.tar"
    with open(target, "wb") as file:
        for chunk in Plain(blob, bounds).chunks():
            file.write(chunk)
    return Blob.of(target)


def first_name(path: Path, bounds: Bounds) -> str:
    """The name of a tar's first entry other than its root; "" of an empty one."""
    chunks = Plain(Blob.of(path), bounds).chunks()
    reader = TarReader(ByteStream(chunks))
    try:
        while (entry := reader.next()) is not None:
            if name := _normal(os.fsdecode(entry.path)):
                return name
        return ""
    finally:
        chunks.close()


# ---- bounds ----

MOST_BYTES, MOST_ENTRIES = 64 << 30, 2_000_000
_SHARE = 0.8  # maximum share of the free disk space


class Bounds:
    """The remaining allowance. Shared by all layers of an image and by the threads that unpack them; None is no bound.

    disk: the limit comes from the free space of this folder, which is below the configured limit.
    """

    def __init__(
        self, most_bytes: int | None = None, most_entries: int | None = None, disk: Path | None = None
    ) -> None:
        self.most_bytes = most_bytes
        self.most_entries = most_entries
        self._disk = disk
        self._lock = threading.Lock()
        self._bytes = self._entries = 0

    def take(self, size: int = 0, entries: int = 0) -> None:
        """Count unpacked bytes and files. ImageError when the bound is exceeded, StorageFull when the disk is too
        small."""
        with self._lock:
            self._bytes += size
            self._entries += entries
            too_large = self.most_bytes is not None and self._bytes > self.most_bytes
            too_many = self.most_entries is not None and self._entries > self.most_entries
        if too_large:
            raise self._refusal(f"more than {self.most_bytes} bytes", "ROCK_IMAGE_MAX_BYTES")
        if too_many:
            raise self._refusal(f"more than {self.most_entries} files", "ROCK_IMAGE_MAX_ENTRIES")

    def refuse(self, size: int) -> None:
        """The same check for an announced size, before any data arrives."""
        if self.most_bytes is not None and size > self.most_bytes:
            raise self._refusal(f"{size} bytes, more than {self.most_bytes},", "ROCK_IMAGE_MAX_BYTES")

    def _refusal(self, what: str, setting: str) -> RockError:
        if self._disk is not None:
            return StorageFull(f"the image has {what} unpacked, which is {_SHARE:.0%} of what {self._disk} has free; "
                               "nothing half-made was kept",
                               hint="free some disk space, for example with `rock image prune`, or use a smaller image")
        return ImageError(f"the image has {what} unpacked: it is refused", hint=f"the server's {setting} is the bound")


@dataclass(frozen=True)
class Allowance:
    """The configured limits of one image, beside those of the disk."""

    most_bytes: int = MOST_BYTES
    most_entries: int = MOST_ENTRIES

    def on(self, folder: Path) -> Bounds:
        """The bounds of one image that is unpacked into `folder` now."""
        disk = os.statvfs(folder)
        free = int(disk.f_bavail * disk.f_frsize * _SHARE)
        files = int(disk.f_favail * _SHARE) if disk.f_files else self.most_entries  # btrfs, for example, reports none
        scarce = free < self.most_bytes or files < self.most_entries
        return Bounds(min(self.most_bytes, free), min(self.most_entries, files), folder if scarce else None)


USUAL = Allowance()
