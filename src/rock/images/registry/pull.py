"""Pulls an image's manifest, config and missing layers from its registry, as an OCI layout in a scratch folder for
import.

Several layers download concurrently, and the first is unpacked during the download of the next. Layers that the store
has are not fetched.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rock.errors import ImageError
from rock.images.layers.blobs import Archive, Bounds
from rock.images.layers.importer import Archived, choose, read_oci
from rock.images.registry.reference import Reference
from rock.telemetry.metrics import REGISTRY

if TYPE_CHECKING:
    from rock.images.registry.client import Registry

Progress = Callable[[str], None]
T = TypeVar("T")

_AT_ONCE = 4
_LARGEST_CONFIG = 16 << 20
_MOST_LAYERS = 512
_DEEPEST = 4
INVALID_IMAGE = "check the image's name; if it is right, push the image to the registry again"
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
        self._done = self._reported = self._total = 0

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
            if self._done - self._reported < _STEP or not self._total:
                return
            self._reported = self._done
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
