"""The storage of archives: large blobs by name, in a folder, or in a bucket (s3.py)."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rock.errors import InvalidConfig, NotFound, StorageFull, Unavailable

NO_ARCHIVE = "the sandbox cannot be restored; create a new one"  # hint of errors
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
CHUNK = 1 << 20


class Blobs(Protocol):
    """Blobs by name. Every method raises Unavailable or StorageFull when the storage fails."""

    async def put(self, name: str, data: AsyncIterator[bytes]) -> None:
        """Store data under a name and replace an existing blob; a failed call leaves the existing blob unchanged."""
        ...

    def get(self, name: str) -> AsyncGenerator[bytes]:
        """The blob of a name, in pieces. NotFound."""
        ...

    async def delete(self, name: str) -> None:
        """Delete a blob. No effect when there is none."""
        ...

    async def list(self) -> list[str]:
        """All names."""
        ...

    async def close(self) -> None: ...


def check_name(name: str) -> str:
    """InvalidConfig for a name that is not a single file name."""
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"invalid name of an archive: {name!r}",
                            hint="use a single file name of letters, digits, `.`, `_` and `-`")
    return name


class FolderBlobs:
    """Blobs as files in a folder with private permissions. A file is written under a temporary name, synced, then
    renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, name: str, data: AsyncIterator[bytes]) -> None:
        place = self._folder / check_name(name)
        beside = self._folder / f".new-{name}-{os.urandom(4).hex()}"
        try:
            fd = await asyncio.to_thread(self._create, beside)
            try:
                async for part in data:
                    await asyncio.to_thread(_write, fd, part)
                await asyncio.to_thread(os.fsync, fd)
            finally:
                os.close(fd)
            await asyncio.to_thread(self._move, beside, place)
        except OSError as error:
            raise self._error_of(error) from error
        finally:
            with suppress(OSError):
                os.unlink(beside)

    def _create(self, path: Path) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _move(self, beside: Path, place: Path) -> None:
        os.rename(beside, place)
        self._sync()

    def _sync(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def get(self, name: str) -> AsyncGenerator[bytes]:
        try:
            fd = os.open(self._folder / check_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"there is no archive {name}, or it was removed", hint=NO_ARCHIVE) from None
        except OSError as error:
            raise self._error_of(error) from error
        try:
            while part := await asyncio.to_thread(self._read, fd):
                yield part
        finally:
            os.close(fd)

    def _read(self, fd: int) -> bytes:
        try:
            return os.read(fd, CHUNK)
        except OSError as error:
            raise self._error_of(error) from error

    async def delete(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._delete, self._folder / check_name(name))
        except OSError as error:
            raise self._error_of(error) from error

    def _delete(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)
            self._sync()

    async def list(self) -> list[str]:
        try:
            return sorted(name for name in await asyncio.to_thread(os.listdir, self._folder) if name[0] != ".")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error_of(error) from error

    async def sweep(self) -> None:
        """Remove the temporary files that a crash left. An unreadable folder is reported by later operations."""
        with suppress(OSError):
            for name in await asyncio.to_thread(os.listdir, self._folder):
                if name.startswith(".new-"):
                    await asyncio.to_thread(os.unlink, self._folder / name)

    async def close(self) -> None:
        return

    def _error_of(self, error: OSError) -> Unavailable | StorageFull:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageFull(f"the archive {self._folder} is full: {error}", hint="free some space on the server")
        return Unavailable(f"the archive {self._folder} cannot be accessed: {error}",
                           hint="check the folder of ROCK_ARCHIVE and its permissions, then try again")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
