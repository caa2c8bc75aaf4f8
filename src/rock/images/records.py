"""What each name of an image stands for: one small JSON file a name."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rock.errors import Conflict, ImageError, StorageFull
from rock.host.atomic_file import FULL
from rock.images.registry.reference import parse

# ---- locks ----
#
# Locks between processes and small atomic files: what makes the store safe for any number of processes.
#
# A lock is flock(2) on an open file or folder, so the kernel drops it with its last descriptor: there are no stale
# locks.

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `path`, waiting for it. The file stays: removing it would split the lock in two."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or folder if nobody is in the way."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` at once, and on the disk: it is there whole, or not at all."""
    fd, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put a folder's entries (a rename, for one) on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(fd: int) -> None:
    """Put on the disk all that was written to the file system of `fd`: one syncfs(2) for many thousand files."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turn the errors of a disk into ours: full is StorageFull, anything else an ImageError, both naming `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(f"no space left while {what}", hint="free some disk space, `rock image rm` for one, "
                              "and try again; nothing half-made was kept") from error
        raise ImageError(f"{what}: {error.strerror or error}: {error.filename or ''}".rstrip(": ")) from error


# ---- rootfs ----
#
# What an image is to a runtime: folders of this machine that are stacked, and a few settings.
#
# top layer  ──┐
# ...          ├── overlay lowerdir="top:...:bottom"   +   binds on top of it, in order   +   env, cwd, user
# bottom layer ┘

@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is shown at `target` (absolute, inside).

    writable: the sandbox may write at `target`, and its writes must never reach `source`: a runtime that can, puts an
        overlay over `source`; one that cannot, mounts it read-only.
        With an id mapping too, only what everybody may read of `source` is shown.
    idmap: mount it with the sandbox's user mapping. False (always so for the folders of the host) keeps the host's
        owners, which inside are nobody: a file of the host that only its owner can read stays unreadable.
    """

    source: str
    target: str
    writable: bool = False
    idmap: bool = False


@dataclass(frozen=True)
class RootFS:
    """An image on disk, ready to be mounted.

    digest: of the whole: equal digests are equal contents, so it is the key of a warm pool.
    layers: host folders, the top layer first, in the order of overlay's `lowerdir`. Never written to.
    binds: mounted after the overlay, in order; their mount points exist in the layers.
    env: the image's environment, PATH included. cwd: absolute. user: "name", "uid", "name:group" or "uid:gid".
    entrypoint, cmd: what the image would run; ROCK runs neither by itself. other: see ImageRecord.
    """

    digest: str
    layers: tuple[str, ...]
    binds: tuple[Bind, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    name: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    def with_layers(self, extra: Sequence[str]) -> RootFS:
        """The same with further read-only folders on top, the topmost first."""
        if not extra:
            return self
        return replace(self, digest="+".join((self.digest, *extra)), layers=(*extra, *self.layers))


# ---- records ----
#


@dataclass(frozen=True)
class ImageRecord:
    """An image as it is listed and inspected.

    name: as people write it. kind: "image", or "host" where it shows the machine's own system: such an image is kept by
    reference (`by_reference`), so changes of the machine show in it. digest: of its manifest, id: of its config.
    layers: digests, bottom first. size: bytes of their files. created: seconds since the epoch, when it came here.
    pinned: it goes only when somebody removes it by name. other: what its config says beside that, as registries have
    it (ExposedPorts, for one): kept, and not acted on. owner: the tenant who made it; "" is the server's owner. made:
    on this machine, so that no registry has what its name stands for.
    """

    name: str
    kind: str
    digest: str
    id: str
    layers: tuple[str, ...]
    size: int
    created: float
    by_reference: bool = False
    architecture: str = ""
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    note: str = ""
    pinned: bool = False
    other: dict[str, Any] = field(default_factory=dict)
    owner: str = ""
    made: bool = False


class Records:
    """The records below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def stamp(self, full: str) -> tuple[int, int] | None:
        """Changes whenever the name's record does; None where there is none."""
        try:
            info = os.stat(self._file(full))
        except FileNotFoundError:
            return None
        return info.st_mtime_ns, info.st_ino

    def find(self, name: str) -> ImageRecord | None:
        """The record of a name; one with a digest also finds an image of the same repository that has this digest."""
        wanted = parse(name)
        record = self._read(self._file(wanted.full))
        if record is not None or wanted.digest is None:
            return record
        for other in self.all():
            have = parse(other.name)
            if (have.domain, have.repository) == (wanted.domain, wanted.repository) \
                    and wanted.digest in (other.digest, other.id):
                return other
        return None

    def all(self) -> list[ImageRecord]:
        """Every record, by name."""
        found = [record for file in self._folder.glob("*.json") if (record := self._read(file))]
        return sorted(found, key=lambda record: record.name)

    def save(self, record: ImageRecord, *, keep_pin: bool = True) -> ImageRecord:
        """Give a name its image. keep_pin: what was pinned stays so. Conflict where the image has an owner, and the
        name stands for an image of somebody else."""
        if not record.owner:
            return self._save(record, keep_pin)
        with locked(self._folder / "names.lock"):  # two tenants may ask for one name
            old = self._read(self._file(parse(record.name).full))
            if old is not None and old.owner != record.owner:
                raise Conflict(f"the image {record.name} is not yours, and others may use it",
                               hint=f"choose a name of your own, such as {record.owner}/{record.name}")
            return self._save(record, keep_pin)

    def _save(self, record: ImageRecord, keep_pin: bool) -> ImageRecord:
        if keep_pin and not record.pinned and (old := self.find(record.name)) is not None and old.pinned:
            record = replace(record, pinned=True)
        with storing(f"saving image {record.name}"):
            write_atomic(self._file(parse(record.name).full), json.dumps(asdict(record), indent=1).encode())
        return record

    def forget(self, record: ImageRecord) -> None:
        self._file(parse(record.name).full).unlink(missing_ok=True)

    @staticmethod
    def file_name(full: str) -> str:
        """Of what belongs to a whole name."""
        return hashlib.sha256(full.encode()).hexdigest()[:32]

    def _file(self, full: str) -> Path:
        return self._folder / f"{self.file_name(full)}.json"

    def _read(self, file: Path) -> ImageRecord | None:
        try:
            body = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        try:
            for key in ("layers", "entrypoint", "cmd"):
                body[key] = tuple(body[key])
            return ImageRecord(**body)
        except (TypeError, KeyError) as error:
            raise ImageError(f"the image record {file} is of another version: {error}",
                             hint="remove that file and import the image again") from None


# ---- leases ----
#
# What running sandboxes have mounted.
#
#     use/<hash>.json   the layer folders of one image; locked (shared) by every sandbox that has it mounted
#
# The lock is a descriptor that the sandbox's pid 1 inherits, so it holds as long as the sandbox lives, whatever happens
# to the rocklet, and is gone with it; after a restart of the machine nothing is held.

class Lease:
    """Keeps an image's layers on disk while `fd` or a copy of it, inherited for one, is open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close our copy. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Leases:
    """The leases below `folder`; `gate` is the lock that collecting garbage takes alone."""

    def __init__(self, folder: Path, gate: Path) -> None:
        self._folder = folder
        self._gate = gate
        folder.mkdir(exist_ok=True)

    def take(self, rootfs: RootFS) -> Lease:
        """Hold the layers of an image; ImageError when one of them has been removed since it was resolved."""
        body = json.dumps(list(rootfs.layers)).encode()
        path = self._folder / f"{hashlib.sha256(body).hexdigest()[:32]}.json"
        with storing("taking an image into use"), locked(self._gate, shared=True):
            for layer in rootfs.layers:
                if not os.path.isdir(layer):
                    raise ImageError(f"image {rootfs.name} was removed while it was about to be used")
            if not path.exists():
                write_atomic(path, body)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
        return Lease(fd)

    def folders(self) -> set[str]:
        """Layer folders that are held. Forgets files that nobody holds, so the caller has the gate for itself."""
        held: set[str] = set()
        for path in self._folder.glob("*.json"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if try_lock(fd):
                    path.unlink()
                else:
                    held.update(json.loads(path.read_bytes()))
            finally:
                os.close(fd)
        return held
