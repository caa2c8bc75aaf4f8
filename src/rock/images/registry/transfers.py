"""Adds images to the store and exports them: pull, push, import of archives, export to files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rock.errors import ImageError, InvalidConfig
from rock.images.layers.blobs import Archive, Blob, Bounds, Plain, compression
from rock.images.layers.importer import Archived, LayerBlob, choose, read_docker, read_oci, this_architecture
from rock.images.layers.store import LayerInfo, LayerStore, PackedLayer
from rock.images.layers.writer import LayerWriter
from rock.images.records import ImageRecord, Records, locked, storing, try_lock
from rock.images.registry.logins import Login, Logins
from rock.images.registry.push import GZIP_LAYER, Push, ToLayout, ToRegistry, refuse_by_reference
from rock.images.registry.reference import Reference, free_name, parse
from rock.images.registry.rules import mirrors_of
from rock.telemetry.metrics import REGISTRY

INVALID_IMAGE = "check the image's name; if it is right, push the image to the registry again"

if TYPE_CHECKING:
    from rock.images.registry.client import Registry


# ---- import: layers unpacked into the store, and records saved ----

EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"  # digest of an empty layer
_PLAIN_LAYER = GZIP_LAYER.removesuffix("+gzip")
_MEDIA_TYPES = {"none": _PLAIN_LAYER, "gzip": GZIP_LAYER, "zstd": f"{_PLAIN_LAYER}+zstd"}
_UNPACKED_AT_ONCE = 2
_LONGEST_WORDS = 200  # bytes of progress that processes share
_LOOK = 0.2  # seconds between two attempts to acquire the lock of a pull


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


@contextmanager
def shared_pull(path: Path, progress: Progress | None) -> Iterator[Progress | None]:
    """Acquire the lock of a pull: one process of this machine pulls an image, and others wait for it. The lock file has
    the progress of that pull, which the others report. A waiting `progress` that raises ends the wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not try_lock(fd):
            if progress is not None:
                words = os.pread(fd, _LONGEST_WORDS, 0).decode(errors="replace").strip()
                progress(words or "another process pulls it")
            time.sleep(_LOOK)

        def share(words: str) -> None:
            with suppress(OSError):  # on a full disk the pull itself reports the error
                os.pwrite(fd, words.encode()[:_LONGEST_WORDS].ljust(_LONGEST_WORDS), 0)

        def report(words: str) -> None:
            share(words)
            if progress is not None:
                progress(words)

        share("")  # of an earlier pull
        yield report
    finally:
        os.close(fd)


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
        with shared_pull(pulls, progress) as progress, locked(self._gate, shared=True), \
                self._layers.scratch() as scratch:  # fmt: skip
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
                   for mirror in mirrors_of(reference.domain)]  # fmt: skip
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


# ---- pull ----
#
# Pulls an image's manifest, config and missing layers from its registry, as an OCI layout in a scratch folder for
# import.
#
# Several layers download concurrently, and the first is unpacked during the download of the next. Layers that the store
# has are not fetched.

Progress = Callable[[str], None]
T = TypeVar("T")

_AT_ONCE = 4
_LARGEST_CONFIG = 16 << 20
_MOST_LAYERS = 512
_DEEPEST = 4
_STEP = 16 << 20  # bytes between two progress messages
PULLS = REGISTRY.counter("rock_image_pulls_total", "Pulls of images from registries: done or failed", "outcome")
PULLED = REGISTRY.counter("rock_image_pulled_bytes_total", "Bytes of layers that came from registries")


class Pull:
    """One pull of `reference` into `scratch`. registries: the sources, in order. has: whether the store has the layer
    with a digest of its plain tar. bounds: limits the unpacked size."""

    def __init__(
        self, reference: Reference, registries: Sequence[Registry], scratch: Path, has: Callable[[str], bool],
        progress: Progress | None, bounds: Bounds,
    ) -> None:  # fmt: skip
        self._registries = registries
        self._reference = reference
        self._has = has
        self._bounds = bounds
        self._tell = progress or (lambda _: None)
        self._folder = scratch / "layout"
        self._blobs = self._folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._workers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="rock-pull")
        self._coming: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._done = self._told = self._total = 0

    def __enter__(self) -> Pull:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        PULLS.of("done" if kind is None else "failed").add()
        self._workers.shutdown(wait=True, cancel_futures=True)
        for registry in self._registries:
            registry.close()

    def _ask(self, work: Callable[[Registry], T]) -> T:
        """The result of the first registry that has it: mirrors, then the registry of the image's name."""
        *mirrors, last = self._registries
        for mirror in mirrors:
            try:
                return work(mirror)
            except ImageError as error:
                self._tell(f"mirror {mirror.domain}: {error.message}")
        return work(last)

    def begin(self) -> Archived:
        """The image's metadata, while its layers download. Before reading a layer, `wait` for its digest."""
        what = self._reference.digest or self._reference.tag or "latest"
        body, digest = self._ask(lambda registry: registry.manifest(what))
        for _ in range(_DEEPEST):
            manifest = _object(body)
            if "manifests" not in manifest:
                break
            chosen = choose(str(self._reference.familiar), manifest["manifests"])
            body, digest = self._manifest(chosen)
        else:
            raise ImageError(f"{self._reference.familiar}: the indexes are nested more than {_DEEPEST} levels deep",
                             hint="pull the manifest of this platform by its digest, as in NAME@sha256:...")
        self._keep(digest, body)
        config = _row(manifest.get("config"))
        if config["size"] > _LARGEST_CONFIG:
            raise ImageError(f"{self._reference.familiar}: the config has {config['size']} bytes, more than the limit "
                             f"of {_LARGEST_CONFIG}", hint=INVALID_IMAGE)
        self._fetch(config)
        layers = manifest.get("layers")
        if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
            raise ImageError(f"{self._reference.familiar}: the manifest has no list of layers, or more than "
                             f"{_MOST_LAYERS}", hint=INVALID_IMAGE)
        self._layers([_row(layer) for layer in layers], self._diff_ids(config["digest"]))
        name = {"org.opencontainers.image.ref.name": self._reference.familiar}
        row = {"mediaType": manifest.get("mediaType", ""), "digest": digest, "size": len(body), "annotations": name}
        (self._folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
        return read_oci(Archive(self._folder, self._folder, self._bounds))[0]

    def wait(self, digest: str | None) -> None:
        """Wait until the blob is complete; raises its error."""
        coming = self._coming.get(digest or "")
        if coming is not None:
            coming.result()

    def _diff_ids(self, digest: str) -> list[str]:
        rootfs = _object(self._path(digest).read_bytes()).get("rootfs")
        found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        return [str(diff) for diff in found] if isinstance(found, list) else []

    def _layers(self, rows: list[dict[str, Any]], diff_ids: list[str]) -> None:
        """Start the downloads of missing layers. An empty file stands for a present layer and is never read."""
        missing: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            path = self._path(row["digest"])
            if number < len(diff_ids) and self._has(diff_ids[number]):
                path.touch()
            elif row["digest"] not in {other["digest"] for other in missing}:
                missing.append(row)
        self._total = sum(row["size"] for row in missing)
        self._bounds.refuse(self._total)
        self._tell(f"{len(missing)} of {len(rows)} layers to fetch, {self._total / 1e6:.1f} MB")
        for row in missing:
            with open(self._path(row["digest"]), "wb") as file:
                file.truncate(row["size"])  # an import checks sizes before data arrives
            self._coming[row["digest"]] = self._workers.submit(self._fetch, row)

    def _fetch(self, row: Mapping[str, Any]) -> None:
        path = self._path(row["digest"])
        self._ask(lambda registry: registry.fetch(row["digest"], row["size"], path, self._came))

    def _manifest(self, digest: str) -> tuple[bytes, str]:
        return self._ask(lambda registry: registry.manifest(digest))

    def _came(self, count: int) -> None:
        with self._lock:
            self._done += count
            PULLED.of().add(count)
            if self._done - self._told < _STEP or not self._total:
                return
            self._told = self._done
            text = f"{self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB fetched"
        self._tell(text)

    def _keep(self, digest: str, body: bytes) -> None:
        self._path(digest).write_bytes(body)

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ImageError("the registry returned a manifest that is not a JSON object", hint=INVALID_IMAGE)
    return found


def _row(value: Any) -> dict[str, Any]:
    """A descriptor with valid digest and size, whose content is in the registry."""
    if not isinstance(value, dict):
        raise ImageError("a descriptor in the image's manifest is not a JSON object", hint=INVALID_IMAGE)
    digest, size = value.get("digest"), value.get("size")
    if not isinstance(digest, str) or len(digest) != 71 or not digest.startswith("sha256:") or not digest[7:].isalnum():
        raise ImageError("the image's manifest has a digest that is not sha256", hint=INVALID_IMAGE)
    if type(size) is not int or not 0 <= size < 1 << 44:
        raise ImageError("the image's manifest has a blob without a valid size", hint=INVALID_IMAGE)
    return {"digest": digest, "size": size}
