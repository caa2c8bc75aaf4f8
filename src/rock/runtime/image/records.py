"""What each name of an image stands for: one small JSON file a name."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rock.errors import Conflict, ImageError
from rock.runtime.image.locks import locked, storing, write_atomic
from rock.runtime.image.reference import parse


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
