"""Derived images: layers of an image plus one more, under a new name; and unpacking of build contexts and RUN
results."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from rock.errors import InvalidConfig
from rock.images.host import HostImages
from rock.images.layers.blobs import Blob, Bounds, Plain
from rock.images.layers.importer import this_architecture
from rock.images.layers.store import Fill, LayerInfo, LayerStore
from rock.images.layers.tar_reader import Entry, Kind, TarReader
from rock.images.layers.tar_writer import HoledWriter
from rock.images.layers.writer import LayerWriter, parts_of
from rock.images.records import ImageRecord, Records, RootFS, locked
from rock.images.registry.reference import HOST, free_name, parse
from rock.images.registry.transfers import EMPTY, unpack

_NOT_CONTENT = ("owner", "made")


class DerivedImages:
    """gate: the store's lock, held shared while an image is added. `ImageStore` documents the methods."""

    def __init__(self, layers: LayerStore, records: Records, own: HostImages, gate: Path) -> None:
        self._layers = layers
        self._records = records
        self._own = own
        self._gate = gate

    def commit(self, name: str, base: RootFS, tar: Path, diff_id: str, owner: str) -> ImageRecord:
        with locked(self._gate, shared=True):
            made = self._layers.add(
                "unpacking what was written", lambda writer: unpack(Blob.of(tar), None, writer), diff_id, HoledWriter)
            return self._over(name, base, made, owner)

    def extend(
        self, name: str, base: RootFS, fill: Fill | None, what: str, diff_id: str | None, owner: str
    ) -> ImageRecord:
        with locked(self._gate, shared=True):
            made: LayerInfo | None
            if fill is not None:
                made = self._layers.add(what, fill, diff_id)
            else:
                plain = len(base.layers) == bool(base.binds)  # empty, or this machine's system without changes
                made = self._layers.add("making an empty layer", lambda _: EMPTY, EMPTY) if plain else None
            return self._over(name, base, made, owner)

    def from_host(self, name: str) -> ImageRecord:
        free_name(name)
        with locked(self._gate, shared=True):
            return self._records.save(self._own.record(parse(name).familiar, time.time()))

    def host_with(self, name: str, what: str, fill: Fill, diff_id: str) -> ImageRecord:
        free_name(name)
        with locked(self._gate, shared=True):
            info = self._layers.add(what, fill, diff_id)
            record = self._own.record(parse(name).familiar, time.time())
            old = self._records.find(name)
            if old is not None and old.layers[1:] == (diff_id,):
                return old
            return self._records.save(replace(record, layers=(*record.layers, diff_id), size=info.size, env={}))

    def _over(self, name: str, base: RootFS, made: LayerInfo | None, owner: str) -> ImageRecord:
        host = bool(base.binds)
        infos = [self._layers.info_of(folder) for folder in reversed(base.layers[:-1] if host else base.layers)]
        infos += [made] if made is not None else []
        record = ImageRecord(
            name=parse(name).familiar, kind="image", digest="", id="", layers=tuple(info.diff_id for info in infos),
            size=sum(info.size for info in infos), created=time.time(), architecture=this_architecture(),
            env=dict(base.env), cwd=base.cwd, user=base.user, entrypoint=base.entrypoint, cmd=base.cmd,
            labels=dict(base.labels), other=dict(base.other),
        )  # fmt: skip
        if host:
            shown = self._own.record(record.name, record.created)
            record = replace(
                record, kind=HOST, layers=(*shown.layers, *record.layers), by_reference=True, note=shown.note)
        body = json.dumps([{key: value for key, value in asdict(replace(record, name="", created=0.0)).items()
                            if key not in _NOT_CONTENT}])
        digest = f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"
        return self._records.save(replace(record, digest=digest, id=digest, owner=owner, made=True))


# ---- build steps: unpacking of untrusted contexts and of files written by RUN ----

MOST_BYTES = 16 << 30  # maximum bytes of a context
_MOST_FILES = 1_000_000
# Files that a runtime adds to every sandbox with a network; they do not belong to an image
_NOT_OURS = (b"etc/resolv.conf",)


class _ContextWriter(HoledWriter):
    """Writes a context: without owners, and without names that are whiteouts in a layer."""

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
        Plain(Blob.of(tar), Bounds(2 * MOST_BYTES)).unpack_into(writer)  # includes bytes that belong to no entry
        writer.finish()


class _OwnFiles:
    """Filters the files that a RUN wrote for a layer."""

    def __init__(self, writer: LayerWriter) -> None:
        self._writer = writer

    def add_all(self, reader: TarReader) -> None:
        while (entry := reader.next()) is not None:
            if b"/".join(parts_of(entry.path)) not in _NOT_OURS:
                self._writer.add(entry, reader.data())


def unpack_written(tar: Path, writer: LayerWriter, digest: str) -> str:
    """Write the tar of a RUN's files into a layer; returns the layer's digest. digest: of the tar."""
    Plain(Blob.of(tar), writer.bounds).unpack_into(_OwnFiles(writer))
    return f"sha256:{hashlib.sha256(f'run {digest}'.encode()).hexdigest()}"
