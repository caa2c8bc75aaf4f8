"""Adds images to the store and exports them: pull, push, import of archives, export to files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rock.errors import ImageError, InvalidConfig
from rock.images.layers.blobs import Archive, Blob, Plain, compression
from rock.images.layers.importer import Archived, LayerBlob, read_docker, read_oci, this_architecture
from rock.images.layers.store import LayerInfo, LayerStore, PackedLayer
from rock.images.layers.writer import LayerWriter
from rock.images.records import ImageRecord, Records, locked, storing
from rock.images.registry.logins import Login, Logins
from rock.images.registry.pull import Progress, Pull
from rock.images.registry.push import GZIP_LAYER, Push, ToLayout, ToRegistry, refuse_by_reference
from rock.images.registry.reference import Reference, free_name, parse
from rock.settings import registry_mirrors

if TYPE_CHECKING:
    from rock.images.registry.client import Registry


# ---- import: layers unpacked into the store, and records saved ----

EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"  # digest of an empty layer
_PLAIN_LAYER = GZIP_LAYER.removesuffix("+gzip")
_MEDIA_TYPES = {"none": _PLAIN_LAYER, "gzip": GZIP_LAYER, "zstd": f"{_PLAIN_LAYER}+zstd"}
_UNPACKED_AT_ONCE = 2


class ImageImports:
    """gate: the store's lock, held shared while an image is added."""

    def __init__(self, layers: LayerStore, records: Records, gate: Path) -> None:
        self._layers = layers
        self._records = records
        self._gate = gate

    def archive(self, path: Path, name: str | None, progress: Progress | None, kind: str) -> Sequence[ImageRecord]:
        """Import the images of an archive or layout, under their own names or that of the only one. kind: docker, oci,
        or archive for either."""
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
        """Add an image whose blobs are on this machine; the caller holds the gate. wait: for the blob of a digest,
        which may still be downloading. repository: its source."""

        bounds = self._layers.bounds()

        def unpacked(number: int, layer: LayerBlob) -> LayerInfo:
            wait(layer.digest)
            if progress is not None:
                progress(f"layer {number} of {len(image.layers)}, {layer.blob.size / 1e6:.1f} MB")
            fresh = not self._layers.has(layer.diff_id)
            info = self._layers.add(f"unpacking layer {number}", _filler(layer), layer.diff_id, bounds=bounds)
            if fresh and layer.digest is not None and (kind := _MEDIA_TYPES.get(compression(layer.blob))):
                # Both digests have just been verified; a layer that was present already was not verified.
                known = PackedLayer(layer.diff_id, layer.digest, layer.blob.size, kind)
                self._layers.remember(layer.diff_id, known.seen_in(repository) if repository else known)
            return info

        # Two at a time: one is written while the other is synced to disk.
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
        """Add an image of one layer, without settings."""
        free_name(name)
        with locked(self._gate, shared=True):
            info = self._layers.add(what, fill)
            return self._records.save(ImageRecord(
                name=parse(name).familiar, kind="image", digest=info.diff_id, id=info.diff_id, layers=(info.diff_id,),
                size=info.size, created=time.time(), architecture=this_architecture(), note=_note([info]),
                made=True,
            ))  # fmt: skip


def unpack(blob: Blob, digest: str | None, writer: LayerWriter) -> str:
    """Unpack a tar, plain or compressed, as a layer; returns the digest of the plain tar. digest: the expected one of
    the blob."""
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
    """The images of an archive to add, and their names."""
    if not images:
        raise ImageError(f"{path} contains no image",
                         hint="make it with `docker save`, or import a root file system with a name")
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


# ---- transfers ----


class Transfers:
    """locks: the store's lock folder. `ImageStore` documents the methods."""

    def __init__(self, layers: LayerStore, records: Records, adding: ImageImports, logins: Logins, locks: Path) -> None:
        self._layers = layers
        self._records = records
        self._adding = adding
        self._logins = logins
        self._locks = locks
        self._gate = locks / "store"

    def pull(self, name: str, reference: Reference, login: Login | None, progress: Progress | None) -> ImageRecord:
        pulls = self._locks / f"pull-{hashlib.sha256(reference.full.encode()).hexdigest()[:16]}"
        with locked(pulls), locked(self._gate, shared=True), self._layers.scratch() as scratch:
            registries = self._registries(reference, login)
            with storing(f"pulling {name}"), Pull(
                reference, registries, scratch, self._layers.has, progress, self._layers.bounds()
            ) as pull:
                image = pull.begin()
                found = self._records.find(name)
                if found is None or found.digest != image.digest:
                    repository = f"{reference.domain}/{reference.repository}"
                    found = self._adding.add(image, [name], progress, pull.wait, repository)[0]
        return found

    def _registries(self, reference: Reference, login: Login | None) -> Sequence[Registry]:
        """The sources of an image: mirrors, each with its own login, and the registry itself last."""
        from rock.images.registry.client import Registry  # imports urllib3, not needed for local images

        mirrors = [Registry(reference, self._logins.of(mirror), mirror)
                   for mirror in registry_mirrors().get(reference.domain, ())]  # fmt: skip
        return [*mirrors, Registry(reference, login or self._logins.of(reference.domain))]

    def push(
        self, record: ImageRecord, login: Login | None, progress: Progress | None, ready: Mapping[str, Path],
        public_only: bool,
    ) -> str:  # fmt: skip
        refuse_by_reference(record)
        reference = replace(parse(record.name), public_only=public_only)
        target = ToRegistry(reference, login or self._logins.of(reference.domain))
        return self._send(record, target, progress, ready)

    def export(self, record: ImageRecord, path: Path | str, progress: Progress | None) -> str:
        refuse_by_reference(record)
        with storing(f"writing {path}"):
            target = ToLayout(Path(path), record.name if "/" in record.name else f"docker.io/library/{record.name}")
        try:
            return self._send(record, target, progress, {})
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def _send(
        self, record: ImageRecord, target: ToRegistry | ToLayout, progress: Progress | None, ready: Mapping[str, Path]
    ) -> str:
        with closing(target), storing(f"sending {record.name}"), locked(self._gate, shared=True):
            for diff in record.layers:  # the gate prevents their removal
                if not self._layers.has(diff):
                    raise ImageError(f"image {record.name} was removed while it was sent",
                                     hint="pull or import the image again, then push it")
            with self._layers.scratch() as scratch:
                return Push(record, self._layers, target, scratch, progress, ready).run()
