"""Unpacking for builds: a context that somebody sent, and what a RUN wrote. Both are hostile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rock.errors import InvalidConfig
from rock.runtime.image.blobs import Blob, Plain
from rock.runtime.image.bounds import Bounds
from rock.runtime.image.layer import LayerWriter, parts_of
from rock.runtime.image.packing import HoledWriter
from rock.runtime.image.tarstream import Entry, Kind, TarReader

MOST_BYTES = 16 << 30  # of a context
_MOST_FILES = 1_000_000
# What a runtime puts into every sandbox with a network: it belongs to this machine and not to an image
_NOT_OURS = (b"etc/resolv.conf",)


class _ContextWriter(HoledWriter):
    """A context: it has no owners, and no names that are whiteouts in a layer."""

    entries = 0

    def add(self, entry: Entry, data: Iterable[bytes | memoryview] = ()) -> None:
        self.entries += 1
        if self.entries > _MOST_FILES or self.size + entry.size > MOST_BYTES:
            raise InvalidConfig(f"the context has more than {_MOST_FILES} files or {MOST_BYTES >> 30} GiB",
                                hint="leave out what is not needed with .dockerignore")  # fmt: skip
        parts = parts_of(entry.path)
        if any(part.startswith(b".wh.") for part in parts):
            raise InvalidConfig(f"the context has a name that no layer can have: {os.fsdecode(entry.path)!r}",
                                hint="leave it out with .dockerignore")  # fmt: skip
        if entry.kind in (Kind.DEVICE, Kind.FIFO):
            return
        entry.uid = entry.gid = os.geteuid()
        super().add(entry, data)


def unpack_context(tar: Path, folder: Path) -> None:
    """Unpack the tar of a context into a new folder. InvalidConfig, ImageError."""
    folder.mkdir(mode=0o700)
    with _ContextWriter(str(folder)) as writer:
        Plain(Blob.of(tar), Bounds(2 * MOST_BYTES)).unpack_into(writer)  # what is of no entry is read too
        writer.finish()


class _OwnFiles:
    """What a RUN wrote, on its way into a layer."""

    def __init__(self, writer: LayerWriter) -> None:
        self._writer = writer

    def add_all(self, reader: TarReader) -> None:
        while (entry := reader.next()) is not None:
            if b"/".join(parts_of(entry.path)) not in _NOT_OURS:
                self._writer.add(entry, reader.data())


def unpack_written(tar: Path, writer: LayerWriter, digest: str) -> str:
    """Write the tar of what a RUN wrote into a layer; answers the layer's digest. digest: of the tar."""
    Plain(Blob.of(tar), writer.bounds).unpack_into(_OwnFiles(writer))
    return f"sha256:{hashlib.sha256(f'run {digest}'.encode()).hexdigest()}"
