"""File transfer into and out of a sandbox as streams: no file is held in memory completely."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator

from rock.errors import Conflict, InvalidConfig, RockError, StorageFull, Unsupported
from rock.http.asgi import Disconnected
from rock.protocol.action import FileInfo
from rock.runtime.base import Files, FileStat, Handle, Runtime

CHUNK = 1 << 20
_SMALL = 256 << 10


def of(runtime: Runtime) -> Files:
    """The runtime's file operations; Unsupported when it has none."""
    if not isinstance(runtime, Files):
        raise Unsupported(f"runtime {runtime.name!r} has no file operations",
                          hint="use another runtime; `rock doctor` lists those of this machine")
    return runtime


def inside(path: str) -> str:
    """An absolute, normalized path; InvalidConfig for any other."""
    if not path.startswith("/"):
        raise InvalidConfig(f"the path {path!r} is not absolute", hint="paths inside begin with /")
    if "\0" in path:
        raise InvalidConfig("the path has a NUL character", hint="remove it; no path of Linux can contain one")
    return path


def describe(path: str, found: FileStat) -> FileInfo:
    return FileInfo(
        name=found.name,
        path=path,
        kind=found.kind,
        size=found.size,
        mode=found.mode,
        uid=found.uid,
        gid=found.gid,
        mtime=found.mtime,
        target=found.target,
    )


class Reading:
    """A file opened for reading, as a stream of chunks."""

    def __init__(self, fd: int, offset: int, length: int | None) -> None:
        self._fd = fd
        size = os.fstat(fd).st_size
        self.offset = min(offset, size)
        self.length = min(size - self.offset, size if length is None else length)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Exactly `length` bytes. A file that shrinks during the read is an error, because the length was announced."""
        left, at = self.length, self.offset
        try:
            while left > 0:
                size = min(left, CHUNK)
                data = (
                    os.pread(self._fd, size, at)
                    if size <= _SMALL
                    else await asyncio.to_thread(os.pread, self._fd, size, at)
                )
                if not data:
                    raise OSError(errno.EIO, "the file became shorter while it was read")
                yield data
                left -= len(data)
                at += len(data)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


async def write_stream(
    runtime: Runtime,
    handle: Handle,
    path: str,
    chunks: AsyncIterator[bytes],
    *,
    append: bool,
    mode: int | None,
    user: str | None,
) -> None:
    """Write a file from a stream. Without `append` the old file is replaced atomically at the end, or stays unchanged.
    Conflict for an append that was interrupted."""
    files = of(runtime)
    fd, token = await files.open_write(handle, path, append=append, mode=mode, user=user)
    try:
        try:
            await _pump(fd, chunks)
        finally:
            written = append and os.lseek(fd, 0, os.SEEK_CUR) > 0
            os.close(fd)
    except BaseException as error:
        if token:
            await asyncio.shield(files.abort_write(handle, token))
        if isinstance(error, OSError):
            raise full_or(error, path) from error
        if written and isinstance(error, Disconnected):  # a retry with the same key must not start again
            raise Conflict(f"the connection ended in the middle of an append to {path}, a part of which may be written",
                           hint="look at its end") from error  # fmt: skip
        raise
    if token:
        await files.commit_write(handle, token)


def full_or(error: OSError, path: str) -> RockError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            f"no space left for {path}; the old file, if any, is unchanged",
            hint="free some space on the server, or in the sandbox",
        )
    return InvalidConfig(f"{path} cannot be written: {error.strerror}",
                         hint="check that its folder exists and is writable for the user")


async def _pump(fd: int, chunks: AsyncIterator[bytes]) -> None:
    parts: list[bytes] = []
    size = 0
    async for part in chunks:
        parts.append(part)
        size += len(part)
        if size >= CHUNK:
            await asyncio.to_thread(_write_parts, fd, parts)
            parts, size = [], 0
    if size > _SMALL:
        await asyncio.to_thread(_write_parts, fd, parts)
    elif parts:
        _write_parts(fd, parts)


def _write_parts(fd: int, parts: list[bytes]) -> None:
    data = memoryview(b"".join(parts))
    while data:
        data = data[os.write(fd, data) :]
