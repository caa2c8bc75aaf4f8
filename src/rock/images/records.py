"""Records of image names, root file systems, layer leases, and the file locks and atomic writes below them.

    <folder>/<hash>.json   the record of one name
    use/<hash>.json        the layer folders of one image; locked (shared) by every sandbox that has it mounted

Locks make the store safe for any number of processes. A lock is flock(2) on an open file or folder, so the kernel
releases it with its last descriptor: there are no stale locks. The lock of a lease is a descriptor that the sandbox's
pid 1 inherits. It is held for the sandbox's lifetime, whatever happens to the rocklet; after a restart of the machine
no lease is held."""

from __future__ import annotations

import ctypes
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

with suppress(ImportError):  # Windows, where only the fake runtime runs
    import fcntl

# ---- locks and atomic files ----

_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Acquire the lock of `path`, waiting for it. The file stays: its removal would split the lock in two."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Acquire the lock of an open file or folder without waiting; returns whether it succeeded."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably: after a crash the file is complete or unchanged."""
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
    """Sync a folder's entries (such as a rename) to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(fd: int) -> None:
    """Sync all writes to the file system of `fd`: one syncfs(2) for many thousand files."""
    if _libc is not None and _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Convert disk errors: a full disk raises StorageFull, others ImageError, both naming `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(f"no space left while {what}", hint="free some disk space, `rock image rm` for one, "
                              "and try again; nothing half-made was kept") from error
        raise ImageError(f"{what}: {error.strerror or error}: {error.filename or ''}".rstrip(": "),
                         hint="check the permissions and the disk of the image store below ROCK_HOME") from error


# ---- root file system: stacked folders of this machine, and settings ----
#
#   top layer  ──┐
#   ...          ├── overlay lowerdir="top:...:bottom"   +   binds on top of it, in order   +   env, cwd, user
#   bottom layer ┘

@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is mounted at `target` (absolute, inside).

    writable: the sandbox may write at `target`, and its writes must never reach `source`: a runtime uses an overlay
        over `source`, or otherwise mounts it read-only. With an id mapping too, only the publicly readable part of
        `source` is visible.
    idmap: mount it with the sandbox's user mapping. False (always so for the folders of the host) keeps the host's
        owners, which are unmapped inside: a file of the host that only its owner can read stays unreadable.
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
    entrypoint, cmd: the image's program; ROCK runs neither by itself. other: see ImageRecord.
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
        """A copy with further read-only folders on top, the topmost first."""
        if not extra:
            return self
        return replace(self, digest="+".join((self.digest, *extra)), layers=(*extra, *self.layers))


# ---- records ----


@dataclass(frozen=True)
class ImageRecord:
    """An image as it is listed and inspected.

    name: in its familiar form.
    kind: "image", or "host" for one that includes the machine's own system by reference (`by_reference`), so that
        changes of the machine appear in it.
    digest: of its manifest, id: of its config.
    layers: digests, bottom first.
    size: bytes of their files.
    created: seconds since the epoch, of its arrival here.
    pinned: it is removed only by name.
    other: further fields of its config in the registry form (such as ExposedPorts): preserved, without effect here.
    owner: the tenant who created it; "" is the server's owner.
    made: created on this machine, so no registry has it under its name.
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
        """Changes whenever the name's record does; None without a record."""
        try:
            info = os.stat(self._file(full))
        except FileNotFoundError:
            return None
        return info.st_mtime_ns, info.st_ino

    def find(self, name: str) -> ImageRecord | None:
        """The record of a name; a name with a digest also finds an image of the same repository with this digest."""
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
        """Assign an image to a name. keep_pin: preserve the pin. Conflict when the image has an owner, and the name
        belongs to an image of another one."""
        if not record.owner:
            return self._save(record, keep_pin)
        with locked(self._folder / "names.lock"):  # two tenants may request one name
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
        """The file name for a full image name."""
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

class Lease:
    """Retains an image's layers on disk while `fd` or an inherited copy of it is open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close this copy. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Leases:
    """The leases below `folder`; `gate` is the lock that garbage collection takes exclusively."""

    def __init__(self, folder: Path, gate: Path) -> None:
        self._folder = folder
        self._gate = gate
        folder.mkdir(exist_ok=True)

    def take(self, rootfs: RootFS) -> Lease:
        """Take a lease of an image's layers; ImageError when one of them has been removed since it was resolved."""
        body = json.dumps(list(rootfs.layers)).encode()
        path = self._folder / f"{hashlib.sha256(body).hexdigest()[:32]}.json"
        with storing("taking an image into use"), locked(self._gate, shared=True):
            for layer in rootfs.layers:
                if not os.path.isdir(layer):
                    raise ImageError(f"image {rootfs.name} was removed before the sandbox started",
                                     hint="pull or import the image again")
            if not path.exists():
                write_atomic(path, body)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
        return Lease(fd)

    def folders(self) -> set[str]:
        """Leased layer folders. Deletes unleased files, so the caller must hold the gate exclusively."""
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
