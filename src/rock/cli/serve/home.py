"""The server's home folder: exclusive lock, permissions, notes of address and key, and the disk reserve.

The reserve is disk space that is set aside, so that a server on a full disk can start and end sandboxes."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from rock.errors import Conflict, InvalidConfig, StorageFull
from rock.host import atomic_file
from rock.settings import NOTE, OWNER_KEY


def _lock(fd: int) -> None:
    """Lock a file. BlockingIOError when another process holds the lock."""
    import fcntl  # the command-line client also runs on machines without it

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_private(folder: Path) -> None:
    """Create a folder that only this user can access, or repair its mode and those of its direct entries. InvalidConfig
    for a folder of another user, who could replace its content."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not hasattr(os, "geteuid"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise InvalidConfig(
                f"ROCK_HOME={folder} belongs to user {found.st_uid}, and this server runs as user {os.geteuid()}",
                hint="set ROCK_HOME to a folder of this user, or change the owner of that one",
            )
        os.fchmod(fd, 0o700)
        with os.scandir(fd) as entries:
            for entry in entries:  # a process that opened the folder earlier could still reach them
                held = entry.stat(follow_symlinks=False)
                kept = stat.S_ISREG(held.st_mode) or stat.S_ISDIR(held.st_mode)
                if kept and held.st_mode & 0o077 and held.st_uid == found.st_uid:
                    os.chmod(entry.name, held.st_mode & 0o700, dir_fd=fd)
    finally:
        os.close(fd)


class Home:
    """The home folder of a server, locked while it runs, with the listening address and the owner's key. Each run has a
    new key, so a leaked key is useless after the server has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner_key = secrets.token_urlsafe(32)
        self.reserve = Reserve(folder)
        self._lock: int | None = None

    @property
    def note(self) -> Path:
        return self.folder / NOTE

    def take(self) -> None:
        """Lock it unless it is locked already, and restrict its permissions. Conflict when another server holds it;
        InvalidConfig."""
        if self._lock is None:
            self.lock()
        self.reserve.prepare()

    def lock(self) -> None:
        """Lock it, without the disk reserve. Conflict, InvalidConfig."""
        make_private(self.folder)
        lock = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(lock)
        except OSError:
            os.close(lock)
            raise Conflict(
                f"a server is running already with ROCK_HOME={self.folder} ({self.read()})",
                hint="stop it with: rock admin stop, or set another ROCK_HOME",
            ) from None
        self._lock = lock

    def write(self, host: str, port: int, tls_cert: str = "", joins: bool = False) -> None:
        """joins: it is a rocklet that joins a server, which SIGUSR1 drains, and SIGUSR2 with archives."""
        note = {"pid": os.getpid(), "host": host, "port": port, "tls_cert": tls_cert, "joins": joins,
                "evacuates": joins}  # fmt: skip
        try:
            atomic_file.replace(self.folder / OWNER_KEY, self.owner_key + "\n")
            atomic_file.replace(self.note, json.dumps(note))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFull(f"the server does not start: the disk of ROCK_HOME={self.folder} is full",
                              hint="free 1 MiB; sandboxes that run stay") from None  # fmt: skip

    def read(self) -> dict[str, Any] | None:
        """The listening address of this folder's server, if one is running."""
        try:
            with open(self.folder / "server.lock", "a+") as lock:
                _lock(lock.fileno())
                return None
        except BlockingIOError:
            pass
        except OSError:
            return None
        try:
            note = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def release(self) -> None:
        if self._lock is not None:
            self.note.unlink(missing_ok=True)
            (self.folder / OWNER_KEY).unlink(missing_ok=True)
            self.unlock()

    def unlock(self) -> None:
        """Release the lock only. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# ---- disk reserve ----

log = logging.getLogger("rock.server")

SIZE = 4 << 20  # bytes of the reserve
_ENOUGH = 4 * SIZE  # free bytes above which it is created again
_LITTLE = 1 << 20  # free bytes below which a start releases it
_EVERY = 5.0  # seconds


class Reserve:
    """The file `reserve` in ROCK_HOME, of 4 MiB.

    It is truncated when a start finds less than 1 MiB free, or when the store cannot write, and created again when 16
    MiB are free. While it is empty, creates fail with StorageFull. Commands, sessions, lists, stops and deletes
    continue to work.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "reserve"
        self.released = False

    def prepare(self) -> None:
        """Call before a start writes anything."""
        self.released = self._size() == 0
        if self._free() < _LITTLE:
            self.release()
        elif self._free() >= _ENOUGH and self.released:
            self._make()

    def release(self) -> bool:
        """Release the space; returns whether there was any."""
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
        """Create it again when there is space. Runs until it is cancelled."""
        import asyncio  # the commands of a client do not need it

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
