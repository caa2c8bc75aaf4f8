"""The image store of this machine, by name. No daemon: any number of processes share one folder.

    images/                      records of names                records.py
    layers/ meta/ blobs/ tmp/    the layers on disk              images/layers/store.py
    use/                         leases of sandboxes             records.py
    used/                        times of last use               gc.py
    locks/store                  shared while an image is added, exclusive for garbage collection

A removed name never removes a layer of a running sandbox: a layer is removed when no name and no lease refers to it.
`Images` is the interface of the store for runtimes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from rock.errors import ImageError, InvalidConfig, NotFound, RockError
from rock.images.derive import DerivedImages
from rock.images.gc import GarbageCollector, Pruned
from rock.images.host import HostImages
from rock.images.layers.blobs import USUAL, Allowance, Blob
from rock.images.layers.importer import kind_of
from rock.images.layers.store import Fill, LayerStore
from rock.images.layers.views import copy_tree
from rock.images.records import ImageRecord, Lease, Leases, Records, RootFS, storing
from rock.images.registry.logins import Login, Logins
from rock.images.registry.reference import BUILD_STEPS, HOST, free_name, new_name, parse
from rock.images.registry.transfers import ImageImports, Progress, Transfers, unpack
from rock.protocol.sandbox import parse_size
from rock.settings import Settings, docker_config

__all__ = ["ImageRecord", "ImageStore", "Lease"]

log = logging.getLogger("rock.images")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRACE = 60.0  # seconds since its last use during which a budget does not remove an image


class ImageStore:
    """The images below `folder`, which is created if missing. Cheap to open; every call may block on the disk.

    logins: for registries, where a call passes none. budget: bytes of layers, above which the least recently used
    images are removed when another one is added; None is no limit. allowance: the maximum unpacked size of one image.
    """

    def __init__(self, folder: Path, logins: Logins | None = None, budget: int | None = None,
                 allowance: Allowance = USUAL) -> None:
        self.folder = folder
        self.logins = logins or Logins(None)
        self.budget = budget
        self.layers = LayerStore(folder, allowance)
        gate = folder / "locks" / "store"
        self._records = Records(folder / "images")
        self._leases = Leases(folder / "use", gate)
        self._own = HostImages(self.layers)
        self._room = GarbageCollector(
            folder / "used", self._records, self.layers, self._leases, gate, self._own.diff_id
        )
        self._adding = ImageImports(self.layers, self._records, gate)
        self._deriving = DerivedImages(self.layers, self._records, self._own, gate)
        self._transfers = Transfers(self.layers, self._records, self._adding, self.logins, gate.parent)
        self._resolved: dict[str, tuple[tuple[int, int], RootFS]] = {}
        self.layers.sweep()

    @classmethod
    def of(cls, settings: Settings) -> ImageStore:
        """A server's store. InvalidConfig for an invalid budget or bound."""
        try:
            budget = parse_size(settings.image_budget, "image budget") if settings.image_budget else None
        except ValueError as error:
            raise InvalidConfig(f"ROCK_IMAGE_BUDGET has an invalid size: {error}",
                                hint="set a size, as in ROCK_IMAGE_BUDGET=100g") from None
        try:
            allowance = Allowance(parse_size(settings.image_max_bytes, "image"), settings.image_max_entries)
        except ValueError as error:
            raise InvalidConfig(f"ROCK_IMAGE_MAX_BYTES has an invalid size: {error}",
                                hint="set a size, as in ROCK_IMAGE_MAX_BYTES=50g") from None
        return cls(settings.image_dir, Logins(settings.registries, docker_config()), budget, allowance)

    # ---- lookup ----

    def resolve(self, name: str) -> RootFS:
        """The root file system of that image. ImageError when it is not on this machine."""
        if name == HOST:
            return self._own.rootfs()
        full = parse(name).full
        stamp = self._records.stamp(full)
        known = self._resolved.get(full)
        if known is not None and known[0] == stamp:
            return known[1]
        record = self._records.find(name)
        if record is None:
            raise ImageError(
                f"image {name} is not on this machine",
                hint=f"`rock image pull {name}` fetches it from its registry, `rock image import PATH {name}` takes an "
                f"archive or a folder, `rock image from-host {name}` gives this machine's own system that name; image "
                "`host` is always there",
            )
        if record.kind == HOST:
            return self._own.named(record)
        rootfs = RootFS(
            digest=record.digest, layers=tuple(self.layers.path(diff) for diff in reversed(record.layers)),
            env={"PATH": PATH, **record.env}, cwd=record.cwd, user=record.user, name=record.name,
            entrypoint=record.entrypoint, cmd=record.cmd, labels=record.labels, other=record.other,
        )  # fmt: skip
        if stamp is not None:
            self._resolved[full] = (stamp, rootfs)
        return rootfs

    def has(self, name: str) -> bool:
        """Whether an image of that name is on this machine."""
        return name == HOST or self._records.stamp(parse(name).full) is not None or self._records.find(name) is not None

    def list(self) -> Sequence[ImageRecord]:
        """All images by name, the built-in `host` first."""
        return [self._own.record(HOST, 0.0), *self._records.all()]

    def names(self) -> Sequence[str]:
        """Names of all images, the most recently used first, without inspecting the machine for `host`."""
        records = sorted(self._records.all(), key=self.last_used, reverse=True)
        return [*(record.name for record in records), HOST]

    def inspect(self, name: str) -> ImageRecord:
        """The record of an image; NotFound when it is not on this machine."""
        if name == HOST:
            return self._own.record(HOST, 0.0)
        record = self._records.find(name)
        if record is None:
            raise NotFound(f"no image {name} on this machine", hint="`rock image ls` shows what there is")
        return record

    # ---- adding ----

    def import_any(self, path: Path | str, name: str | None = None,
                   progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import `path` by its type: a root folder, a tar of one, a `docker save` archive or an OCI layout.

        Without `name`, an archive's own names are used, and a folder or tar is rejected with InvalidConfig.
        """
        path = Path(path)
        with storing(f"reading {path}"):
            kind = kind_of(path, self.layers.bounds())
        if kind in ("docker", "oci", "archive"):
            return self._archive(path, name, progress, kind)
        if name is None:
            raise InvalidConfig(f"{path} is a {kind} and has no image name", hint="give it one, like my/image:1.0")
        return [self.import_folder(path, name) if kind == "folder" else self.import_tar(path, name)]

    def import_folder(self, path: Path | str, name: str) -> ImageRecord:
        """Import a copy of a folder as a root file system."""
        path = Path(path)
        if not path.is_dir():
            raise ImageError(f"{path} is not a folder", hint="give the folder with the root file system")
        return self._single(name, f"copying {path}", lambda writer: copy_tree(path, writer))

    def import_tar(self, path: Path | str, name: str) -> ImageRecord:
        """Import a tar of a root file system, plain or compressed with gzip or zstd."""
        path = Path(path)
        if not path.is_file():
            raise ImageError(f"{path} is not a file",
                             hint="give a tar file of a root file system, plain or compressed with gzip or zstd")
        return self._single(name, f"unpacking {path}", lambda writer: unpack(Blob.of(path), None, writer))

    def import_docker_archive(self, path: Path | str, name: str | None = None,
                              progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import the images of a `docker save` archive, or with one of its names only that image."""
        return self._archive(Path(path), name, progress, "docker")

    def import_oci(self, path: Path | str, name: str | None = None,
                   progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import the images of an OCI layout: a folder or a tar of it."""
        return self._archive(Path(path), name, progress, "oci")

    def from_host(self, name: str) -> ImageRecord:
        """Create an alias for this machine's own system. As root, each sandbox may write anywhere, in its own
        overlay."""
        return self._deriving.from_host(name)

    def host_with(self, name: str, what: str, fill: Fill, diff_id: str) -> ImageRecord:
        """Create an alias for this machine's own system, read-only, with one more layer on top, created by `fill` if
        missing."""
        return self._deriving.host_with(name, what, fill, diff_id)

    def pull(
        self, name: str, login: Login | None = None, progress: Progress | None = None, *, public_only: bool = False
    ) -> ImageRecord:
        """Fetch an image from its registry, with the missing layers; a present image is fetched again when its tag has
        changed. public_only: see Reference. ImageError, StorageFull; a failure retains nothing incomplete."""
        free_name(name)
        reference = replace(parse(name), public_only=public_only)
        try:
            with self._tidied():
                found = self._transfers.pull(name, reference, login, progress)
        except ImageError as error:
            near = self._near(reference.familiar)
            if near is None:
                raise
            raise ImageError(error.message, hint=f"did you mean {near}, an image of this machine? Otherwise: "
                             f"{error.hint}") from error  # fmt: skip
        self._came(found.name)
        return found

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """On a failure, remove completed layers without a name; deferred while others add images."""
        try:
            yield
        except BaseException:
            with suppress(OSError, RockError):
                self.gc()
            raise

    def commit(self, name: str, base: RootFS, tar: Path, diff_id: str, owner: str = "") -> ImageRecord:
        """Create an image from a sandbox's files: the layers of its image with one more on top, created from a plain
        `tar`.

        base: the image as the sandbox has it mounted, so that its layers are leased. When it includes this machine's
        own system, so does the new one, read-only. owner: the tenant of the image. Conflict when the name belongs to
        another tenant; the server's owner may replace any.
        """
        new_name(name)
        record = self._deriving.commit(name, base, tar, diff_id, owner)
        self._came(name)
        return record

    def extend(self, name: str, base: RootFS, fill: Fill | None = None, what: str = "",
               diff_id: str | None = None, owner: str = "") -> ImageRecord:  # fmt: skip
        """Create an image from the layers and settings of `base`, with one more layer on top if `fill` writes one. A
        base without layers is an empty image. `commit` describes a base that includes this machine's own system.

        diff_id: the layer's digest, if known; an existing layer is not created again. owner: see `commit`.
        """
        return self._deriving.extend(name, base, fill, what, diff_id, owner)

    def came(self, name: str) -> None:
        """Record the use of a derived image: see `budget`."""
        self._came(parse(name).familiar)

    def _near(self, name: str) -> str | None:
        """The image with the most similar name, among those that have no owner."""
        names = [record.name for record in self._records.all()
                 if not record.owner and not record.name.startswith(BUILD_STEPS)]
        return next(iter(get_close_matches(name, names, n=1, cutoff=0.8)), None)

    def push(
        self, name: str, login: Login | None = None, progress: Progress | None = None,
        ready: Mapping[str, Path] | None = None, *, public_only: bool = False,
    ) -> str:  # fmt: skip
        """Push an image to the registry of its name; returns the digest of its manifest there.

        public_only: see Reference. ready: original tars of layers, by their digest. Unsupported for an image that
        includes this machine's system; ImageError with the registry's error.
        """
        return self._transfers.push(self.inspect(name), login, progress, ready or {}, public_only)

    def export(self, name: str, path: Path | str, progress: Progress | None = None) -> str:
        """Write an image to a new file, as the tar of an OCI layout; returns the digest of its manifest."""
        return self._transfers.export(self.inspect(name), path, progress)

    # ---- removal and leases ----

    def remove(self, name: str, in_use: Iterable[str] = ()) -> int:
        """Remove a name and the unneeded layers; returns the freed bytes.

        in_use: layer folders to retain in any case, beside those that are leased.
        """
        free_name(name)
        self._records.forget(self.inspect(name))
        return self.gc(in_use)

    def gc(self, in_use: Iterable[str] = ()) -> int:
        """Remove layers without a name or a lease. Skipped while a process adds an image; a later call removes them."""
        return self.prune(in_use).freed

    def prune(self, in_use: Iterable[str] = (), *, steps: bool = False, everything: bool = False,
              most: int | None = None) -> Pruned:  # fmt: skip
        """Remove unneeded images and layers: see `GarbageCollector.prune`."""
        return self._room.prune(in_use, steps=steps, everything=everything, most=most)

    def pin(self, name: str, pinned: bool = True) -> ImageRecord:
        """Pin an image against the budget, or unpin it. NotFound."""
        free_name(name)
        record = replace(self.inspect(name), pinned=pinned)
        return self._records.save(record, keep_pin=False)

    def last_used(self, record: ImageRecord) -> float:
        """The time when an image was last pulled, created or mounted: seconds since the epoch."""
        return self._room.last_used(record)

    def _came(self, *names: str) -> None:
        """Apply the budget after these images were added."""
        for name in names:
            self._room.touch(name)
        if self.budget is None:
            return
        pruned = self._room.prune(most=self.budget, keep=names, grace=_GRACE)
        if pruned.names:
            log.info("images removed to keep to %d bytes: %s", self.budget, ", ".join(pruned.names))

    def lease(self, rootfs: RootFS) -> Lease:
        """Lease an image's layers for a sandbox, whose pid 1 should inherit `Lease.fd`."""
        lease = self._leases.take(rootfs)
        self._room.touch(rootfs.name)
        return lease

    # ---- internal ----

    def _archive(self, path: Path, name: str | None, progress: Progress | None, kind: str) -> Sequence[ImageRecord]:
        with self._tidied():
            found = self._adding.archive(path, name, progress, kind)
        self._came(*(record.name for record in found))
        return found

    def _single(self, name: str, what: str, fill: Fill) -> ImageRecord:
        record = self._adding.single(name, what, fill)
        self._came(record.name)
        return record


# ---- interface for runtimes ----

class Images(Protocol):
    """The source of root file systems."""

    def resolve(self, name: str) -> RootFS:
        """The root file system of an image. ImageError when it is not on this machine."""
        ...

    def lease(self, rootfs: RootFS) -> Lease | None:
        """Retain its layers on disk while a copy of the lease's descriptor is open; None if no lease is needed.
        ImageError when they were removed meanwhile."""
        ...
