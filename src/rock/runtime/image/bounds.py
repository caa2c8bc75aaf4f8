"""How much may be unpacked: a few kilobytes of an archive can stand for more than any disk holds."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from rock.errors import ImageError, RockError, StorageFull

MOST_BYTES, MOST_ENTRIES = 64 << 30, 2_000_000
_SHARE = 0.8  # of what is free on the disk, at most


class Bounds:
    """What is left of it. Shared by all layers of an image and by the threads that unpack them; None is no bound.

    disk: that of this folder has less free than the settings allow.
    """

    def __init__(
        self, most_bytes: int | None = None, most_entries: int | None = None, disk: Path | None = None
    ) -> None:
        self.most_bytes = most_bytes
        self.most_entries = most_entries
        self._disk = disk
        self._lock = threading.Lock()
        self._bytes = self._entries = 0

    def take(self, size: int = 0, entries: int = 0) -> None:
        """Count plain bytes of an archive and files to be made. ImageError when there are too many, StorageFull when
        the disk would hold no more."""
        with self._lock:
            self._bytes += size
            self._entries += entries
            too_large = self.most_bytes is not None and self._bytes > self.most_bytes
            too_many = self.most_entries is not None and self._entries > self.most_entries
        if too_large:
            raise self._refusal(f"more than {self.most_bytes} bytes", "ROCK_IMAGE_MAX_BYTES")
        if too_many:
            raise self._refusal(f"more than {self.most_entries} files", "ROCK_IMAGE_MAX_ENTRIES")

    def refuse(self, size: int) -> None:
        """The same for bytes that somebody says will come, before any has."""
        if self.most_bytes is not None and size > self.most_bytes:
            raise self._refusal(f"{size} bytes, more than {self.most_bytes},", "ROCK_IMAGE_MAX_BYTES")

    def _refusal(self, what: str, setting: str) -> RockError:
        if self._disk is not None:
            return StorageFull(f"the image has {what} unpacked, which is {_SHARE:.0%} of what {self._disk} has free; "
                               "nothing half-made was kept")
        return ImageError(f"the image has {what} unpacked: it is refused", hint=f"the server's {setting} is the bound")


@dataclass(frozen=True)
class Allowance:
    """What each image may have, beside what the disk allows."""

    most_bytes: int = MOST_BYTES
    most_entries: int = MOST_ENTRIES

    def on(self, folder: Path) -> Bounds:
        """For one image that is unpacked into `folder` now."""
        disk = os.statvfs(folder)
        free = int(disk.f_bavail * disk.f_frsize * _SHARE)
        files = int(disk.f_favail * _SHARE) if disk.f_files else self.most_entries  # btrfs, for one, tells none
        scarce = free < self.most_bytes or files < self.most_entries
        return Bounds(min(self.most_bytes, free), min(self.most_entries, files), folder if scarce else None)


USUAL = Allowance()
