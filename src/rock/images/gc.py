"""Garbage collection of images and layers.

    used/<hash>    time at which an image was last pulled, created, or mounted for a sandbox; hash as in images/

A layer without names and leases is removed. A name is removed automatically only when a budget is exceeded: the least
recently used one that is neither pinned nor mounted nor this machine's own system, build steps first. The small layer
of `host` itself does not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rock.images.layers.store import LayerStore, layer_id
from rock.images.records import ImageRecord, Leases, Records, try_lock
from rock.images.registry.reference import BUILD_STEPS, HOST, parse

_STAMP_EVERY = 60.0  # seconds between two updates of one image's use time


@dataclass(frozen=True)
class Pruned:
    """The removed names, and the freed bytes of files. `busy`: skipped, because an image is being added."""

    names: tuple[str, ...] = ()
    freed: int = 0
    busy: bool = False


class GarbageCollector:
    """Garbage collector of the records and layers of one store. `skeleton`: the digest of `host`'s own layer."""

    def __init__(
        self, folder: Path, records: Records, layers: LayerStore, leases: Leases, gate: Path,
        skeleton: Callable[[], str],
    ) -> None:  # fmt: skip
        self._folder = folder
        self._folder.mkdir(exist_ok=True)
        self._records = records
        self._layers = layers
        self._leases = leases
        self._gate = gate
        self._skeleton = skeleton
        self._stamped: dict[str, float] = {}

    def touch(self, name: str) -> None:
        """Record the use of an image, at most once a minute; ignores a disk error."""
        now = time.monotonic()
        if name == HOST or not name or now - self._stamped.get(name, -_STAMP_EVERY) < _STAMP_EVERY:
            return
        self._stamped[name] = now
        with suppress(OSError):
            path = self._stamp(name)
            path.touch(mode=0o600)
            os.utime(path)

    def last_used(self, record: ImageRecord) -> float:
        """The time of the last use, in seconds since the epoch."""
        try:
            return max(record.created, self._stamp(record.name).stat().st_mtime)
        except OSError:
            return record.created

    def prune(
        self, in_use: Iterable[str] = (), *, steps: bool = False, everything: bool = False, most: int | None = None,
        keep: Iterable[str] = (), grace: float = 0.0,
    ) -> Pruned:  # fmt: skip
        """Remove unneeded layers, after removing names.

        steps: removes build steps; everything: removes all removable names; most: removes the least recently used until
        the layers have at most so many bytes. in_use: layer folders to retain beside the leased ones; keep: names to
        retain. grace: seconds since its last use for which a name is retained.
        """
        fd = os.open(self._gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(fd):
                return Pruned(busy=True)
            held = {os.path.basename(folder) for folder in (*in_use, *self._leases.folders())}
            held.add(layer_id(self._skeleton()))
            records = self._records.all()
            gone = self._chosen(records, held, steps, everything, most, set(keep), grace)
            for record in gone:
                self._records.forget(record)
                self._stamp(record.name).unlink(missing_ok=True)
            names = {record.name for record in gone}
            kept = held.union(*(_layers(record) for record in records if record.name not in names))
            freed = sum(self._layers.remove(id) for id in self._layers.ids() if id not in kept)
            return Pruned(tuple(record.name for record in gone), freed)
        finally:
            os.close(fd)

    def _chosen(
        self, records: list[ImageRecord], held: set[str], steps: bool, everything: bool, most: int | None,
        keep: set[str], grace: float,
    ) -> list[ImageRecord]:  # fmt: skip
        """The records to remove."""
        latest = time.time() - grace
        may_go = sorted(
            (record for record in records
             if not record.pinned and record.name not in keep and (record.kind != HOST or is_step(record))
             and layer_id(record.layers[-1]) not in held and self.last_used(record) <= latest),
            key=lambda record: (not is_step(record), self.last_used(record)),
        )  # fmt: skip
        gone = [record for record in may_go if everything or (steps and is_step(record))]
        if most is None:
            return gone
        left = {record.name: record for record in records if record not in gone}
        skeleton = layer_id(self._skeleton())
        sizes = {id: self._layers.size(id) for id in self._layers.ids() if id != skeleton}
        for record in may_go:
            if record.name not in left:
                continue
            needed = held.union(*map(_layers, left.values()))
            if sum(size for id, size in sizes.items() if id in needed) <= most:
                break
            gone.append(left.pop(record.name))
        return gone

    def _stamp(self, name: str) -> Path:
        return self._folder / self._records.file_name(parse(name).full)


def is_step(record: ImageRecord) -> bool:
    """Whether it is a build step, retained as a cache for the next build."""
    return record.name.startswith(BUILD_STEPS)


def _layers(record: ImageRecord) -> set[str]:
    """Folder names; excludes the first layer of a host image, an old skeleton that is rebuilt on demand."""
    return {layer_id(diff) for diff in record.layers[record.kind == HOST :]}
