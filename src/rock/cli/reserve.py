"""Disk space that is set aside, so that a server on a full disk can start, and end sandboxes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger("rock.server")

SIZE = 4 << 20  # bytes of the file
_ENOUGH = 4 * SIZE  # free bytes from which on it is made again
_LITTLE = 1 << 20  # free bytes below which a start releases it
_EVERY = 5.0  # seconds


class Reserve:
    """The file `reserve` in ROCK_HOME, of 4 MiB.

    It is emptied when a start finds less than 1 MiB free, or when the store cannot write, and made again when 16 MiB
    are free. While it is empty no sandbox is created (StorageFull). Commands, sessions, lists, stops
    and deletes go on.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "reserve"
        self.released = False

    def prepare(self) -> None:
        """Before anything is written by a start."""
        self.released = self._size() == 0
        if self._free() < _LITTLE:
            self.release()
        elif self._free() >= _ENOUGH and self.released:
            self._make()

    def release(self) -> bool:
        """Give the space back to the disk; whether there was any."""
        if not self._size():
            return False
        try:
            os.truncate(self._file, 0)
        except OSError:
            return False
        self.released = True
        log.error("the disk of %s is full: the reserve of %d MiB was released, and no sandbox is created until 16 MiB "
                  "are free", self._file.parent, SIZE >> 20)  # fmt: skip
        return True

    async def keep(self) -> None:
        """Make it again when there is space. Runs until it is cancelled."""
        import asyncio  # which the commands of a client do not need

        while True:
            if not self._size() and self._free() >= _ENOUGH:
                await asyncio.to_thread(self._make)
            await asyncio.sleep(_EVERY)

    def _size(self) -> int | None:
        """Bytes of the file; None when there is none."""
        try:
            return self._file.stat().st_size
        except OSError:
            return None

    def _free(self) -> int:
        try:
            found = os.statvfs(self._file.parent)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize

    def _make(self) -> None:
        try:
            fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, SIZE)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("no space can be reserved in %s: %s", self._file.parent, error.strerror)
            self._file.unlink(missing_ok=True)
            return
        if self.released:
            log.info("there is space on the disk again: sandboxes are created")
        self.released = False
