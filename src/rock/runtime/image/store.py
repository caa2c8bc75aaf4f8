"""The images on this machine, by name. No daemon: any number of processes share one folder.

    images/                      what a name stands for          records.py
    layers/ meta/ blobs/ tmp/    the layers on disk              layers.py
    use/                         what sandboxes have mounted     leases.py
    used/                        when images were last used      room.py
    locks/store                  shared while an image is added, alone while garbage is collected

Removing a name never pulls a layer from under a sandbox: a layer goes when no name and no lease is left for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rock.errors import ImageError, InvalidConfig, NotFound, RockError
from rock.protocol.sandbox import parse_size
from rock.runtime.image.blobs import Archive, Blob, Plain, compression
from rock.runtime.image.bounds import USUAL, Allowance
from rock.runtime.image.host import HostImage, system_folders
from rock.runtime.image.importer import Archived, LayerBlob, kind_of, read_docker, read_oci, this_architecture
from rock.runtime.image.layer import LayerWriter
from rock.runtime.image.layers import Fill, LayerInfo, LayerStore, PackedLayer
from rock.runtime.image.leases import Lease, Leases
from rock.runtime.image.locks import locked, storing
from rock.runtime.image.logins import Login, Logins
from rock.runtime.image.packing import HoledWriter
from rock.runtime.image.private import HostScan
from rock.runtime.image.pull import Pull
from rock.runtime.image.push import GZIP_LAYER, Push, ToLayout, ToRegistry, refuse_by_reference
from rock.runtime.image.records import ImageRecord, Records
from rock.runtime.image.reference import BUILD_STEPS, HOST, Reference, parse
from rock.runtime.image.room import Pruned, Room
from rock.runtime.image.rootfs import Bind, RootFS
from rock.runtime.image.tarstream import ByteStream, TarReader
from rock.runtime.image.tree import copy_tree
from rock.settings import Settings, docker_config, registry_mirrors

if TYPE_CHECKING:
    from rock.runtime.image.registry import Registry

__all__ = ["ImageRecord", "ImageStore", "Lease"]

log = logging.getLogger("rock.images")

Progress = Callable[[str], None]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"
_PLAIN_LAYER = GZIP_LAYER.removesuffix("+gzip")
_MEDIA_TYPES = {"none": _PLAIN_LAYER, "gzip": GZIP_LAYER, "zstd": f"{_PLAIN_LAYER}+zstd"}
_UNPACKED_AT_ONCE = 2
_GRACE = 60.0  # seconds since its last use in which a budget removes no image
_BY_REFERENCE = "shows this machine's own system: changes of the machine show in it"


class ImageStore:
    """The images below `folder`, which is made if missing. Cheap to open; every call may block on the disk.

    logins: for registries, where a call brings none. budget: bytes of layers, over which images that nobody used for
    longest are removed when another one comes; None is no limit. allowance: how much one image may come to, unpacked.
    """

    def __init__(self, folder: Path, logins: Logins | None = None, budget: int | None = None,
                 allowance: Allowance = USUAL) -> None:
        self.folder = folder
        self.logins = logins or Logins(None)
        self.budget = budget
        self.layers = LayerStore(folder, allowance)
        self._gate = folder / "locks" / "store"
        self._records = Records(folder / "images")
        self._leases = Leases(folder / "use", self._gate)
        self._host = HostImage(self.layers)
        self._scan = HostScan(folder, system_folders())
        self._room = Room(folder / "used", self._records, self.layers, self._leases, self._gate, self._host.diff_id)
        self._resolved: dict[str, tuple[tuple[int, int], RootFS]] = {}
        self.layers.sweep()

    @classmethod
    def of(cls, settings: Settings) -> ImageStore:
        """A server's. InvalidConfig for a budget or a bound that is no size."""
        try:
            budget = parse_size(settings.image_budget, "image budget") if settings.image_budget else None
        except ValueError as error:
            raise InvalidConfig(f"ROCK_IMAGE_BUDGET: {error}") from None
        try:
            allowance = Allowance(parse_size(settings.image_max_bytes, "image"), settings.image_max_entries)
        except ValueError as error:
            raise InvalidConfig(f"ROCK_IMAGE_MAX_BYTES: {error}") from None
        return cls(settings.image_dir, Logins(settings.registries, docker_config()), budget, allowance)

    # ---- asking

    def resolve(self, name: str) -> RootFS:
        """The image of that name, ready to be mounted. ImageError when it is not on this machine."""
        if name == HOST:
            return self._host_rootfs(HOST, writable=False)
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
            extra = [self.layers.path(diff) for diff in reversed(record.layers[1:])]
            rootfs = self._host_rootfs(record.name, writable=os.geteuid() == 0 and not extra)
            if not extra:
                return rootfs
            # Made here, of one that shows this machine: what its settings changed is its own.
            made = replace(
                rootfs, env={**rootfs.env, **record.env}, cwd=record.cwd, user=record.user, labels=record.labels,
                entrypoint=record.entrypoint, cmd=record.cmd, other=record.other,
            )  # fmt: skip
            said = (sorted(made.env.items()), made.cwd, made.user, made.entrypoint, made.cmd)
            return replace(made, digest=f"{rootfs.digest}-{hash_of(said)}").with_layers(extra)
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
        return [self._host_record(HOST, 0.0), *self._records.all()]

    def names(self) -> Sequence[str]:
        """Names of all images, the last used first, without a look at the machine that `host` is made of."""
        records = sorted(self._records.all(), key=self.last_used, reverse=True)
        return [*(record.name for record in records), HOST]

    def inspect(self, name: str) -> ImageRecord:
        """What is known of an image; NotFound when it is not on this machine."""
        if name == HOST:
            return self._host_record(HOST, 0.0)
        record = self._records.find(name)
        if record is None:
            raise NotFound(f"no image {name} on this machine", hint="`rock image ls` shows what there is")
        return record

    # ---- adding

    def import_any(self, path: Path | str, name: str | None = None,
                   progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import what `path` is: a root folder, a tar of one, a `docker save` archive or an OCI layout.

        Without `name` an archive's own names are taken, and a folder or tar is refused with InvalidConfig.
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
        """Import a folder that is the root of a system; it is copied."""
        path = Path(path)
        if not path.is_dir():
            raise ImageError(f"{path} is no folder")
        return self._single(name, f"copying {path}", lambda writer: copy_tree(path, writer))

    def import_tar(self, path: Path | str, name: str) -> ImageRecord:
        """Import a tar of the root of a system, plain or compressed with gzip or zstd."""
        path = Path(path)
        if not path.is_file():
            raise ImageError(f"{path} is no file")
        return self._single(name, f"unpacking {path}", lambda writer: _unpack(Blob.of(path), None, writer))

    def import_docker_archive(self, path: Path | str, name: str | None = None,
                              progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import the images of a `docker save` archive, or with a name that it has several of, the one so named."""
        return self._archive(Path(path), name, progress, "docker")

    def import_oci(self, path: Path | str, name: str | None = None,
                   progress: Progress | None = None) -> Sequence[ImageRecord]:
        """Import the images of an OCI layout: a folder or a tar of it."""
        return self._archive(Path(path), name, progress, "oci")

    def from_host(self, name: str) -> ImageRecord:
        """Give this machine's own system a name. As root, sandboxes of it may write anywhere, each for itself."""
        _free_name(name)
        if os.geteuid() == 0:
            self._scan.masks()  # now, when somebody waits for it
        with locked(self._gate, shared=True):
            return self._records.save(self._host_record(parse(name).familiar, time.time()))

    def host_with(self, name: str, what: str, fill: Fill, diff_id: str) -> ImageRecord:
        """Give this machine's own system a name, read-only, with one more layer on top, made by `fill` if missing."""
        _free_name(name)
        with locked(self._gate, shared=True):
            info = self.layers.add(what, fill, diff_id)
            record = self._host_record(parse(name).familiar, time.time())
            old = self._records.find(name)
            if old is not None and old.layers[1:] == (diff_id,):
                return old
            return self._records.save(replace(record, layers=(*record.layers, diff_id), size=info.size, env={}))

    def pull(self, name: str, login: Login | None = None, progress: Progress | None = None) -> ImageRecord:
        """Fetch an image from its registry, with the layers that are missing here; one that is there is fetched anew
        where its tag stands for another one by now. ImageError, StorageFull; nothing half-made is kept."""
        _free_name(name)
        reference = parse(name)
        pulls = self.folder / "locks" / f"pull-{hashlib.sha256(reference.full.encode()).hexdigest()[:16]}"
        with self._tidied(), locked(pulls), locked(self._gate, shared=True), self.layers.scratch() as scratch:
            registries = self._registries(reference, login)
            with storing(f"pulling {name}"), Pull(
                reference, registries, scratch, self._has, progress, self.layers.bounds()
            ) as pull:
                image = pull.begin()
                found = self._records.find(name)
                if found is None or found.digest != image.digest:
                    repository = f"{reference.domain}/{reference.repository}"
                    found = self._add(image, [name], progress, pull.wait, repository)[0]
        self._came(found.name)
        return found

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """On a failure, remove the layers that were whole before it and have no name; later, where others add some."""
        try:
            yield
        except BaseException:
            with suppress(OSError, RockError):
                self.gc()
            raise

    def _registries(self, reference: Reference, login: Login | None) -> Sequence[Registry]:
        """Where to ask for an image: mirrors, each with a login of its own, and the registry itself last."""
        from rock.runtime.image.registry import Registry  # urllib3, which images that are here do without

        mirrors = [Registry(reference, self.logins.of(mirror), mirror)
                   for mirror in registry_mirrors().get(reference.domain, ())]  # fmt: skip
        return [*mirrors, Registry(reference, login or self.logins.of(reference.domain))]

    def commit(self, name: str, base: RootFS, tar: Path, diff_id: str) -> ImageRecord:
        """Name what a sandbox wrote: the layers of its image with one more on top, made of a plain `tar`.

        base: the image as the sandbox has it mounted, so that its layers are held. Where that shows this machine's own
        system, so does the new one, read-only.
        """
        new_name(name)
        record = self._commit(name, base, tar, diff_id)
        self._came(name)
        return record

    def _commit(self, name: str, base: RootFS, tar: Path, diff_id: str) -> ImageRecord:
        with locked(self._gate, shared=True):
            made = self.layers.add(
                "unpacking what was written", lambda writer: _unpack(Blob.of(tar), None, writer), diff_id, HoledWriter)
            return self._over(name, base, made)

    def extend(self, name: str, base: RootFS, fill: Fill | None = None, what: str = "",
               diff_id: str | None = None) -> ImageRecord:  # fmt: skip
        """Name the layers of `base`, with its settings and one more layer on top where `fill` writes one. A base of no
        layers is an empty image. See `commit` for one that shows this machine's own system.

        diff_id: the layer's, where it is known; one that is there is not made again.
        """
        with locked(self._gate, shared=True):
            made: LayerInfo | None
            if fill is not None:
                made = self.layers.add(what, fill, diff_id)
            else:
                plain = len(base.layers) == bool(base.binds)  # of nothing, or of this machine and nothing else
                made = self.layers.add("making an empty layer", lambda _: _EMPTY, _EMPTY) if plain else None
            return self._over(name, base, made)

    def came(self, name: str) -> None:
        """An image was made of others, and is in use now: see `budget`."""
        self._came(parse(name).familiar)

    def _over(self, name: str, base: RootFS, made: LayerInfo | None) -> ImageRecord:
        host = bool(base.binds)
        infos = [self.layers.info_of(folder) for folder in reversed(base.layers[:-1] if host else base.layers)]
        infos += [made] if made is not None else []
        record = ImageRecord(
            name=parse(name).familiar, kind="image", digest="", id="", layers=tuple(info.diff_id for info in infos),
            size=sum(info.size for info in infos), created=time.time(), architecture=this_architecture(),
            env=dict(base.env), cwd=base.cwd, user=base.user, entrypoint=base.entrypoint, cmd=base.cmd,
            labels=dict(base.labels), other=dict(base.other),
        )  # fmt: skip
        if host:
            shown = self._host_record(record.name, record.created)
            record = replace(
                record, kind=HOST, layers=(*shown.layers, *record.layers), by_reference=True, note=shown.note)
        body = json.dumps([asdict(replace(record, name="", created=0.0))])
        digest = f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"
        return self._records.save(replace(record, digest=digest, id=digest))

    def push(
        self, name: str, login: Login | None = None, progress: Progress | None = None,
        ready: Mapping[str, Path] | None = None,
    ) -> str:  # fmt: skip
        """Send an image to the registry that its name tells; answers the digest of its manifest there.

        ready: plain tars that layers were made of, by their digest. Unsupported for an image that shows this machine;
        ImageError for what the registry says.
        """
        record = self.inspect(name)
        refuse_by_reference(record)
        reference = parse(record.name)
        target = ToRegistry(reference, login or self.logins.of(reference.domain))
        return self._send(record, target, progress, ready or {})

    def export(self, name: str, path: Path | str, progress: Progress | None = None) -> str:
        """Write an image to a new file, as the tar of an OCI layout; answers the digest of its manifest."""
        record = self.inspect(name)
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
            for diff in record.layers:  # with the gate held none of them goes
                if self.layers.info(diff) is None:
                    raise ImageError(f"image {record.name} was removed")
            with self.layers.scratch() as scratch:
                return Push(record, self.layers, target, scratch, progress, ready).run()

    def _has(self, diff_id: str) -> bool:
        return self.layers.info(diff_id) is not None

    # ---- removing and holding

    def remove(self, name: str, in_use: Iterable[str] = ()) -> int:
        """Forget a name and remove the layers that nobody needs any more; answers the bytes that were freed.

        in_use: layer folders to be kept in any case, beside those that are leased.
        """
        _free_name(name)
        self._records.forget(self.inspect(name))
        return self.gc(in_use)

    def gc(self, in_use: Iterable[str] = ()) -> int:
        """Remove layers without a name or a lease. Does nothing while a process adds an image: it is done later."""
        return self.prune(in_use).freed

    def prune(self, in_use: Iterable[str] = (), *, steps: bool = False, everything: bool = False,
              most: int | None = None) -> Pruned:  # fmt: skip
        """Remove what nobody needs: see `Room.prune`."""
        return self._room.prune(in_use, steps=steps, everything=everything, most=most)

    def pin(self, name: str, pinned: bool = True) -> ImageRecord:
        """Keep an image whatever the budget says, or no longer. NotFound."""
        _free_name(name)
        record = replace(self.inspect(name), pinned=pinned)
        return self._records.save(record, keep_pin=False)

    def last_used(self, record: ImageRecord) -> float:
        """When an image was last pulled, made or mounted: seconds since the epoch."""
        return self._room.last_used(record)

    def _came(self, *names: str) -> None:
        """These images are new: others make room for them."""
        for name in names:
            self._room.touch(name)
        if self.budget is None:
            return
        pruned = self._room.prune(most=self.budget, keep=names, grace=_GRACE)
        if pruned.names:
            log.info("images removed to keep to %d bytes: %s", self.budget, ", ".join(pruned.names))

    def lease(self, rootfs: RootFS) -> Lease:
        """Hold an image's layers for a sandbox, whose pid 1 should inherit `Lease.fd`."""
        lease = self._leases.take(rootfs)
        self._room.touch(rootfs.name)
        return lease

    # ---- inside

    def _archive(self, path: Path, name: str | None, progress: Progress | None, kind: str) -> Sequence[ImageRecord]:
        with self._tidied():
            found = self._archived(path, name, progress, kind)
        self._came(*(record.name for record in found))
        return found

    def _archived(self, path: Path, name: str | None, progress: Progress | None, kind: str) -> Sequence[ImageRecord]:
        with locked(self._gate, shared=True), self.layers.scratch() as scratch:
            with storing(f"reading {path}"):
                archive = Archive(path, scratch, self.layers.bounds())
                if kind == "archive":
                    kind = "docker" if archive.get("manifest.json") else "oci"
                images = read_docker(archive) if kind == "docker" else read_oci(archive)
            chosen = _chosen(path, images, name)
            return [record for image, names in chosen for record in self._add(image, names, progress)]

    def _add(
        self, image: Archived, names: Iterable[str], progress: Progress | None,
        wait: Callable[[str | None], None] = lambda _: None, repository: str = "",
    ) -> Sequence[ImageRecord]:  # fmt: skip
        """wait: for the blob of a digest, which may be on its way. repository: where it comes from."""

        bounds = self.layers.bounds()

        def unpacked(number: int, layer: LayerBlob) -> LayerInfo:
            wait(layer.digest)
            if progress is not None:
                progress(f"layer {number} of {len(image.layers)}, {layer.blob.size / 1e6:.1f} MB")
            fresh = not self._has(layer.diff_id)
            info = self.layers.add(f"unpacking layer {number}", _filler(layer), layer.diff_id, bounds=bounds)
            if fresh and layer.digest is not None and (kind := _MEDIA_TYPES.get(compression(layer.blob))):
                # Both digests have been checked just now; those of a layer that was there, nobody has looked at.
                known = PackedLayer(layer.diff_id, layer.digest, layer.blob.size, kind)
                self.layers.remember(layer.diff_id, known.seen_in(repository) if repository else known)
            return info

        # Two at a time: while one waits for the disk, which has to have it before it counts, the other is written.
        with ThreadPoolExecutor(_UNPACKED_AT_ONCE, thread_name_prefix="rock-unpack") as workers:
            infos = list(workers.map(unpacked, range(1, len(image.layers) + 1), image.layers))
        if not infos:
            infos.append(self.layers.add("making an empty layer", lambda _: _EMPTY, _EMPTY))
        config = image.config
        record = ImageRecord(
            name="", kind="image", digest=image.digest, id=image.id, layers=tuple(i.diff_id for i in infos),
            size=sum(i.size for i in infos), created=time.time(), architecture=config.architecture, env=config.env,
            cwd=config.cwd, user=config.user, entrypoint=config.entrypoint, cmd=config.cmd, labels=config.labels,
            note=_note(infos), other=config.other,
        )  # fmt: skip
        return [self._records.save(replace(record, name=parse(name).familiar)) for name in names]

    def _single(self, name: str, what: str, fill: Callable[[LayerWriter], str]) -> ImageRecord:
        _free_name(name)
        with locked(self._gate, shared=True):
            info = self.layers.add(what, fill)
            record = self._records.save(ImageRecord(
                name=parse(name).familiar, kind="image", digest=info.diff_id, id=info.diff_id, layers=(info.diff_id,),
                size=info.size, created=time.time(), architecture=this_architecture(), note=_note([info]),
            ))  # fmt: skip
        self._came(record.name)
        return record

    def _host_record(self, name: str, created: float) -> ImageRecord:
        host = self._host.current()
        return ImageRecord(
            name=name, kind=HOST, digest=host.diff_id, id=host.diff_id, layers=(host.diff_id,), size=0, created=created,
            by_reference=True, architecture=this_architecture(), env=host.env, note=_BY_REFERENCE,
        )  # fmt: skip

    def _host_rootfs(self, name: str, *, writable: bool) -> RootFS:
        host = self._host.current()
        binds: tuple[Bind, ...] = host.binds
        if writable and (masks := self._scan.masks()) is not None:
            binds = (*(_opened(bind) for bind in binds), *masks)
        digest = host.diff_id if binds is host.binds else f"{host.diff_id}-{hash_of(binds)}"
        return RootFS(digest=digest, layers=(self.layers.path(host.diff_id),), binds=binds, env=host.env, name=name)


def hash_of(value: object) -> str:
    """A short digest of a value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _opened(bind: Bind) -> Bind:
    """Of the machine's own folders; its Python may lie in somebody's home and stays as it is."""
    return replace(bind, writable=True, idmap=True) if bind.source == bind.target else bind


def _unpack(blob: Blob, digest: str | None, writer: LayerWriter) -> str:
    plain = Plain(blob, writer.bounds)
    chunks = plain.chunks()
    try:
        stream = ByteStream(chunks)
        writer.add_all(TarReader(stream))
        stream.drain()
    finally:
        chunks.close()
    if digest is not None and digest != plain.blob_digest:
        raise ImageError(f"layer {digest} has other content than its name says",
                         hint="the archive is damaged; fetch or save it again")
    return plain.diff_id


def _filler(layer: LayerBlob) -> Callable[[LayerWriter], str]:
    return lambda writer: _unpack(layer.blob, layer.digest, writer)


def _free_name(name: str) -> None:
    if name == HOST:
        raise InvalidConfig("the image `host` is built in", hint="take another name, like my/image:1.0")
    parse(name)


def new_name(name: str) -> Reference:
    """What an image that is about to be made may be called. InvalidConfig."""
    _free_name(name)
    reference = parse(name)
    if reference.digest is not None:
        raise InvalidConfig(f"{name} is named by a digest, which a new image cannot choose", hint="give it a tag")
    if reference.familiar.startswith(BUILD_STEPS):  # builds would take it over as what they made
        raise InvalidConfig(f"names that begin with {BUILD_STEPS} are those of build steps")
    return reference


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
    _free_name(name)
    if len(images) == 1:
        return [(images[0], (name,))]
    for image in images:
        if parse(name).full in (parse(n).full for n in image.names):
            return [(image, (name,))]
    raise ImageError(f"{path} has several images, and none is named {name}", hint=f"it has {', '.join(there)}")
