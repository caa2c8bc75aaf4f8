"""The layers on disk: one folder each, named by the digest of its content.

    layers/<id>/      the files, ready to be overlay's lowerdir; never written to again
    meta/<id>.json    digest and size; the layer exists when this file does
    blobs/<id>.json   its packed forms in registries: digests and sizes
    tmp/<random>/     a layer under construction or removal, locked by its process
    locks/<id>        held during construction: a second process waits, and finds the layer complete

`<id>` is the first 16 hexadecimal digits of the digest: short, because overlay's options share one page. The rest of
the digest is compared, so a collision is an error and never the wrong layer. The whole store is closed to other users
(0700): a layer may contain setuid programs, which must not be usable outside a sandbox.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rock.errors import ImageError
from rock.images.layers.blobs import USUAL, Allowance, Bounds
from rock.images.layers.writer import LayerWriter
from rock.images.records import locked, storing, sync_folder, sync_tree, try_lock, write_atomic

Fill = Callable[[LayerWriter], str]
_MOST_REPOSITORIES = 8
_MOST_PACKED = 4


@dataclass(frozen=True)
class LayerInfo:
    """A layer: digest of the plain archive, bytes of its files, whether it deletes files of the layers below, number of
    omitted device nodes."""

    diff_id: str
    size: int
    whiteouts: bool = False
    skipped: int = 0


@dataclass(frozen=True)
class PackedLayer:
    """A layer as a registry stores it. diff_id: of the plain tar in it, which is the layer's own digest if it was
    imported from this blob, and a different one if it was packed here. repositories: known locations,
    "domain/repository"."""

    diff_id: str
    digest: str
    size: int
    media_type: str
    repositories: tuple[str, ...] = ()

    def seen_in(self, repository: str) -> PackedLayer:
        others = (name for name in self.repositories if name != repository)
        return replace(self, repositories=(repository, *others)[:_MOST_REPOSITORIES])


def layer_id(diff_id: str) -> str:
    """The folder name of a digest."""
    return diff_id.removeprefix("sha256:")[:16]


class LayerStore:
    """The layers below `folder`. Safe for any number of processes and threads. allowance: of an image."""

    def __init__(self, folder: Path, allowance: Allowance = USUAL) -> None:
        self.folder = folder
        self.allowance = allowance
        with storing(f"opening the image store {folder}"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("layers", "meta", "blobs", "tmp", "locks"):
                (folder / name).mkdir(exist_ok=True)

    def path(self, diff_id: str) -> str:
        return f"{self.folder}/layers/{layer_id(diff_id)}"

    def info(self, diff_id: str) -> LayerInfo | None:
        """The layer with that digest, if present."""
        try:
            body = json.loads(self._meta(layer_id(diff_id)).read_bytes())
        except FileNotFoundError:
            return None
        info = LayerInfo(**body)
        if info.diff_id != diff_id:
            raise ImageError(f"two layers have digests with the same first digits: {info.diff_id} and {diff_id}",
                             hint="remove the image with the other layer, then import this one again")
        return info

    def has(self, diff_id: str) -> bool:
        """Whether the layer with that digest is present."""
        return self.info(diff_id) is not None

    def info_of(self, folder: str) -> LayerInfo:
        """The layer of one of `path`'s folders. ImageError when it was removed."""
        try:
            return LayerInfo(**json.loads(self._meta(os.path.basename(folder)).read_bytes()))
        except FileNotFoundError:
            raise ImageError(f"layer {os.path.basename(folder)} was removed while it was in use",
                             hint="pull or import the image again") from None

    def packed(self, diff_id: str) -> list[PackedLayer]:
        """The known packed forms of a layer, the latest first."""
        try:
            rows = json.loads(self._blobs(layer_id(diff_id)).read_bytes())
            return [PackedLayer(**{**row, "repositories": tuple(row["repositories"])}) for row in rows]
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # the layer is packed again
            return []

    def remember(self, diff_id: str, packed: PackedLayer) -> None:
        """Record a packed form of a layer. The caller has verified it."""
        known = self.packed(diff_id)
        rows = [packed, *(row for row in known if row.digest != packed.digest)][:_MOST_PACKED]
        if rows != known:
            with storing("remembering a layer"):
                write_atomic(self._blobs(layer_id(diff_id)), json.dumps([asdict(row) for row in rows]).encode())

    def add(
        self, what: str, fill: Fill, diff_id: str | None = None, kind: type[LayerWriter] = LayerWriter,
        bounds: Bounds | None = None,
    ) -> LayerInfo:  # fmt: skip
        """Create a layer: `fill` writes it and returns its digest. An existing `diff_id` is not created again.

        Of several callers with the same `diff_id`, one creates the layer and the others wait. ImageError for a
        different digest and beyond `bounds`, by default those of a whole image; StorageFull for a full disk. A failure
        leaves nothing behind.
        """
        bounds = bounds or self.bounds()
        with storing(what):
            if diff_id is None:
                return self._make(what, fill, None, kind, bounds)
            if found := self.info(diff_id):
                return found
            with locked(self._lock(layer_id(diff_id))):
                return self.info(diff_id) or self._make(what, fill, diff_id, kind, bounds)

    def bounds(self) -> Bounds:
        """The bounds of an image that is unpacked now."""
        return self.allowance.on(self.folder)

    def _make(
        self, what: str, fill: Fill, expected: str | None, kind: type[LayerWriter], bounds: Bounds
    ) -> LayerInfo:
        with self.scratch() as folder:
            new = folder / "layer"
            new.mkdir(mode=0o755)
            new.chmod(0o755)
            with kind(str(new), bounds) as writer:
                actual = fill(writer)
                if expected not in (None, actual):
                    raise ImageError(f"{what}: its content has digest {actual}, not {expected}",
                                     hint="the archive is damaged; fetch or save it again")
                writer.finish()
            info = LayerInfo(actual, writer.size, writer.whiteouts, writer.skipped)
            if expected is not None:
                self._publish(new, info)
                return info
            with locked(self._lock(layer_id(actual))):
                found = self.info(actual)
                if found is None:
                    self._publish(new, info)
            return found or info

    def _publish(self, new: Path, info: LayerInfo) -> None:
        fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_tree(fd)  # once for all files: a published layer must be complete after a power failure
        finally:
            os.close(fd)
        target = Path(self.path(info.diff_id))
        if target.exists():
            self._discard(target)  # left by a crash between the next two steps
        os.rename(new, target)
        sync_folder(target.parent)
        write_atomic(self._meta(target.name), json.dumps(asdict(info)).encode())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder that is removed at the end; after a crash the next `sweep` removes it."""
        with locked(self.folder / "locks" / "tmp", shared=True):
            folder = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try_lock(fd)
        try:
            yield folder
        finally:
            remove_tree(folder)
            os.close(fd)

    def sweep(self) -> None:
        """Remove incomplete layers of crashed processes."""
        with locked(self.folder / "locks" / "tmp"):
            for folder in (self.folder / "tmp").iterdir():
                with suppress(OSError):
                    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    try:
                        if try_lock(fd):
                            remove_tree(folder)
                    finally:
                        os.close(fd)
        for folder in (self.folder / "layers").iterdir():
            if not self._meta(folder.name).exists():
                with self._if_free(folder.name) as free:
                    if free and not self._meta(folder.name).exists():
                        self._discard(folder)

    def size(self, id: str) -> int:
        """Bytes of the files of a layer by its folder's name; 0 when it is gone."""
        try:
            return LayerInfo(**json.loads(self._meta(id).read_bytes())).size
        except FileNotFoundError:
            return 0

    def ids(self) -> list[str]:
        return [p.stem for p in (self.folder / "meta").glob("*.json")]

    def remove(self, id: str) -> int:
        """Remove a layer; returns the bytes of its files. The caller guarantees that it is unused."""
        with self._if_free(id) as free:
            meta = self._meta(id)
            if not free or not meta.exists():
                return 0
            size = LayerInfo(**json.loads(meta.read_bytes())).size
            meta.unlink()
            self._blobs(id).unlink(missing_ok=True)
            self._discard(self.folder / "layers" / id)
            return size

    def _discard(self, folder: Path) -> None:
        with self.scratch() as grave:
            with suppress(FileNotFoundError):
                os.rename(folder, grave / "layer")

    @contextmanager
    def _if_free(self, id: str) -> Iterator[bool]:
        fd = os.open(self._lock(id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield try_lock(fd)
        finally:
            os.close(fd)

    def _meta(self, id: str) -> Path:
        return self.folder / "meta" / f"{id}.json"

    def _blobs(self, id: str) -> Path:
        return self.folder / "blobs" / f"{id}.json"

    def _lock(self, id: str) -> Path:
        return self.folder / "locks" / id


def remove_tree(folder: Path) -> None:
    """Remove a folder and its content, whatever the modes of its folders; missing entries are no error."""

    def widen(function: Callable[..., object], path: str, _: object) -> None:
        with suppress(OSError):
            os.chmod(os.path.dirname(path), 0o700)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)

    shutil.rmtree(folder, onerror=widen)
