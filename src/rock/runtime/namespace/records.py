"""Per-sandbox records on disk, from which a restarted server or a sweep recovers, and the allocation of uid ranges.

    <run_dir>/<slot>/record.json   sandbox id, pid 1 and its start time, first uid, cgroups
                    /s             pid 1's socket
                    /upper /work   files that the sandbox writes
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from rock.errors import NoCapacity
from rock.host import atomic_file
from rock.images.records import Bind, RootFS
from rock.runtime.namespace.launcher import userns

SLOT_PREFIX = "n-"
BASE = "base"  # the layer on top of every image
SPARE = "spare"  # folder of prepared run folders
SNAPSHOTS = "snapshots"  # folder of the layers of snapshots
_SPAN = 20_000


def layer(run_dir: Path, id: str) -> str:
    """The folder of a snapshot's layer."""
    return f"{run_dir}/{SNAPSHOTS}/{id}"


def written(rootfs: RootFS) -> list[tuple[str, Bind | None]]:
    """The names of the folders with written files in a run folder or a layer: of those below /, and at each writable
    bind of the image."""
    return [("upper", None), *((f"upper{index}", bind) for index, bind in enumerate(rootfs.binds) if bind.writable)]


def new_slot() -> str:
    """A new unique name."""
    return SLOT_PREFIX + secrets.token_hex(5)


def write(run_dir: Path, slot: str, record: dict[str, Any]) -> None:
    """Replace a sandbox's record atomically."""
    atomic_file.replace(f"{run_dir}/{slot}/record.json", atomic_file.summed(json.dumps(record)))


def create(run_dir: Path, slot: str, record: dict[str, Any]) -> None:
    """Write the first record of a new sandbox. After a crash in between, the sandbox has no valid record, which is an
    incomplete sandbox."""
    fd = os.open(f"{run_dir}/{slot}/record.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        data = memoryview(atomic_file.summed(json.dumps(record)).encode())
        while data:
            data = data[os.write(fd, data):]
    finally:
        os.close(fd)


def read(run_dir: Path, slot: str) -> dict[str, Any]:
    """A sandbox's record; empty when there is none, as for an incomplete one."""
    try:
        with open(f"{run_dir}/{slot}/record.json", "rb", buffering=0) as file:  # a Path costs as much as the read
            return atomic_file.parsed(file.readall())
    except (OSError, ValueError):
        return {}


def slots(run_dir: Path) -> list[str]:
    """All slots with a folder."""
    return sorted(name for name in os.listdir(run_dir) if name.startswith(SLOT_PREFIX))


class UidRanges:
    """First ids of uid ranges: last in, first out, because a recent range still has its user namespace."""

    def __init__(self, run_dir: Path) -> None:
        digest = hashlib.sha256(str(run_dir).encode()).digest()
        spread = userns.IDS.most - _SPAN  # servers of one machine use different ranges, where there are many
        self._first = int.from_bytes(digest[:4], "big") % spread if spread > 0 else 0
        self.limited = False  # a range is only a number until the isolation level is known
        self._next = 0
        self._free: list[int] = []
        self._used: dict[int, str] = {}

    def take(self, slot: str) -> int:
        if self._free:
            base = self._free.pop()
        else:
            while (base := self._base(self._next)) in self._used:
                self._next += 1
            if self.limited and self._first + self._next >= userns.IDS.most:
                raise NoCapacity(f"all {userns.IDS.most} ranges of user ids of this container are in use",
                                 hint="stop some sandboxes, or give pods more ids (userNamespaces.idsPerPod)")
            self._next += 1
        self._used[base] = slot
        return base

    def coming(self, count: int) -> list[int]:
        """The ranges that will be allocated next."""
        fresh = [self._base(self._next + index) for index in range(count)]
        return [*reversed(self._free[-count:]), *(base for base in fresh if base not in self._used)][:count]

    def reserve(self, base: int, slot: str) -> None:
        """Mark the range of a recovered sandbox as used."""
        self._used[base] = slot
        if base in self._free:
            self._free.remove(base)

    def give_back(self, base: int, slot: str) -> None:
        """Free a range, if this sandbox still owns it."""
        if self._used.get(base) == slot:
            del self._used[base]
            self._free.append(base)

    def _base(self, number: int) -> int:
        return userns.IDS.first + userns.IDS.size * (self._first + number)
