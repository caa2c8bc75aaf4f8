"""Images that come from outside: their layers unpacked into the store, and their records saved."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rock.errors import ImageError, InvalidConfig
from rock.runtime.image.blobs import Archive, Blob, Plain, compression
from rock.runtime.image.importer import Archived, LayerBlob, read_docker, read_oci, this_architecture
from rock.runtime.image.layer import LayerWriter
from rock.runtime.image.layers import LayerInfo, LayerStore, PackedLayer
from rock.runtime.image.locks import locked, storing
from rock.runtime.image.pull import Progress
from rock.runtime.image.push import GZIP_LAYER
from rock.runtime.image.records import ImageRecord, Records
from rock.runtime.image.reference import free_name, parse

EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"  # digest of a layer without anything
_PLAIN_LAYER = GZIP_LAYER.removesuffix("+gzip")
_MEDIA_TYPES = {"none": _PLAIN_LAYER, "gzip": GZIP_LAYER, "zstd": f"{_PLAIN_LAYER}+zstd"}
_UNPACKED_AT_ONCE = 2


class Adding:
    """gate: the store's lock, shared while an image is added."""

    def __init__(self, layers: LayerStore, records: Records, gate: Path) -> None:
        self._layers = layers
        self._records = records
        self._gate = gate

    def archive(self, path: Path, name: str | None, progress: Progress | None, kind: str) -> Sequence[ImageRecord]:
        """The images of an archive or layout, under their own names or that of the only one. kind: docker, oci, or
        archive, which is either."""
        with locked(self._gate, shared=True), self._layers.scratch() as scratch:
            with storing(f"reading {path}"):
                archive = Archive(path, scratch, self._layers.bounds())
                if kind == "archive":
                    kind = "docker" if archive.get("manifest.json") else "oci"
                images = read_docker(archive) if kind == "docker" else read_oci(archive)
            chosen = _chosen(path, images, name)
            return [record for image, names in chosen for record in self.add(image, names, progress)]

    def add(
        self, image: Archived, names: Iterable[str], progress: Progress | None,
        wait: Callable[[str | None], None] = lambda _: None, repository: str = "",
    ) -> Sequence[ImageRecord]:  # fmt: skip
        """An image whose blobs are on this machine, with the gate held. wait: for the blob of a digest, which may be on
        its way. repository: where it comes from."""

        bounds = self._layers.bounds()

        def unpacked(number: int, layer: LayerBlob) -> LayerInfo:
            wait(layer.digest)
            if progress is not None:
                progress(f"layer {number} of {len(image.layers)}, {layer.blob.size / 1e6:.1f} MB")
            fresh = not self._layers.has(layer.diff_id)
            info = self._layers.add(f"unpacking layer {number}", _filler(layer), layer.diff_id, bounds=bounds)
            if fresh and layer.digest is not None and (kind := _MEDIA_TYPES.get(compression(layer.blob))):
                # Both digests have been checked just now; those of a layer that was there, nobody has looked at.
                known = PackedLayer(layer.diff_id, layer.digest, layer.blob.size, kind)
                self._layers.remember(layer.diff_id, known.seen_in(repository) if repository else known)
            return info

        # Two at a time: while one waits for the disk, which has to have it before it counts, the other is written.
        with ThreadPoolExecutor(_UNPACKED_AT_ONCE, thread_name_prefix="rock-unpack") as workers:
            infos = list(workers.map(unpacked, range(1, len(image.layers) + 1), image.layers))
        if not infos:
            infos.append(self._layers.add("making an empty layer", lambda _: EMPTY, EMPTY))
        config = image.config
        record = ImageRecord(
            name="", kind="image", digest=image.digest, id=image.id, layers=tuple(i.diff_id for i in infos),
            size=sum(i.size for i in infos), created=time.time(), architecture=config.architecture, env=config.env,
            cwd=config.cwd, user=config.user, entrypoint=config.entrypoint, cmd=config.cmd, labels=config.labels,
            note=_note(infos), other=config.other, made=not repository,
        )  # fmt: skip
        return [self._records.save(replace(record, name=parse(name).familiar)) for name in names]

    def single(self, name: str, what: str, fill: Callable[[LayerWriter], str]) -> ImageRecord:
        """An image of one layer, without settings."""
        free_name(name)
        with locked(self._gate, shared=True):
            info = self._layers.add(what, fill)
            return self._records.save(ImageRecord(
                name=parse(name).familiar, kind="image", digest=info.diff_id, id=info.diff_id, layers=(info.diff_id,),
                size=info.size, created=time.time(), architecture=this_architecture(), note=_note([info]),
                made=True,
            ))  # fmt: skip


def unpack(blob: Blob, digest: str | None, writer: LayerWriter) -> str:
    """Write a tar, plain or compressed, as a layer: the digest of the plain tar. digest: what the blob's has to be."""
    plain = Plain(blob, writer.bounds)
    plain.unpack_into(writer)
    if digest is not None and digest != plain.blob_digest:
        raise ImageError(f"layer {digest} has other content than its name says",
                         hint="the archive is damaged; fetch or save it again")
    return plain.diff_id


def _filler(layer: LayerBlob) -> Callable[[LayerWriter], str]:
    return lambda writer: unpack(layer.blob, layer.digest, writer)


def _note(infos: list[LayerInfo]) -> str:
    skipped = sum(info.skipped for info in infos)
    return f"{skipped} device nodes left out" if skipped else ""


def _chosen(path: Path, images: list[Archived], name: str | None) -> list[tuple[Archived, tuple[str, ...]]]:
    """Which images of an archive to add, and under which names."""
    if not images:
        raise ImageError(f"{path} has no image")
    there = [n for image in images for n in image.names]
    if name is None:
        unnamed = any(not image.names for image in images)
        if unnamed:
            raise InvalidConfig(f"{path} has an image without a name", hint="give it one, like my/image:1.0")
        return [(image, image.names) for image in images]
    free_name(name)
    if len(images) == 1:
        return [(images[0], (name,))]
    for image in images:
        if parse(name).full in (parse(n).full for n in image.names):
            return [(image, (name,))]
    raise ImageError(f"{path} has several images, and none is named {name}", hint=f"it has {', '.join(there)}")
