"""File transfer into and out of a sandbox, and folders as tar, as streams: no file is held in memory completely."""

from __future__ import annotations

import asyncio
import errno
import os
import posixpath
import stat as modes
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from rock.errors import Conflict, InvalidConfig, NotFound, RockError, StorageFull, Unsupported
from rock.http.asgi import Disconnected
from rock.protocol.action import FileInfo
from rock.rocklet.commands.output import write_all
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


# ---- folders as tar ----


async def pack(runtime: Runtime, handle: Handle, path: str) -> AsyncGenerator[bytes]:
    """A file or folder as an uncompressed tar; names in it are relative to `path`. Links are stored as links; FIFOs,
    sockets and devices are omitted."""
    files = of(runtime)
    top = await files.stat(handle, path)
    if top.kind != "directory":
        async for part in _pack_one(files, handle, path, posixpath.basename(path), top):
            yield part
    else:
        pending = [(path, ".", top)]
        while pending:
            at, name, found = pending.pop()
            async for part in _pack_one(files, handle, at, name, found):
                yield part
            if found.kind == "directory":
                children = [child async for child in _children(files, handle, at)]
                pending += [(posixpath.join(at, c.name), posixpath.join(name, c.name), c) for c in reversed(children)]
    yield b"\0" * 1024


async def _children(files: Files, handle: Handle, path: str) -> AsyncIterator[FileStat]:
    offset = 0
    while True:
        page = await files.list(handle, path, offset=offset)
        for entry in page:
            yield entry
        offset += len(page)
        if not page:
            return


async def _pack_one(files: Files, handle: Handle, path: str, name: str, found: FileStat) -> AsyncIterator[bytes]:
    kinds = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE}
    if found.kind not in kinds:
        return
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.uid, info.gid = (
        kinds[found.kind],
        found.mode,
        int(found.mtime),
        found.uid,
        found.gid,
    )
    if found.kind == "symlink":
        info.linkname = found.target or ""
    if found.kind != "file":
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        return
    reading = Reading(await files.open_read(handle, path), 0, None)
    try:
        info.size = reading.length
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        async for part in reading.chunks():
            yield part
    finally:
        reading.close()
    if info.size % 512:
        yield b"\0" * (512 - info.size % 512)


async def unpack(runtime: Runtime, handle: Handle, path: str, chunks: AsyncIterator[bytes]) -> None:
    """Unpack a tar stream into a folder inside, which is created when missing. Names outside of it are rejected, as are
    device nodes and hard links to files outside; each file is replaced atomically."""
    files = of(runtime)
    await files.make_dir(handle, path)
    loop = asyncio.get_running_loop()
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    # A dedicated thread: it blocks for as long as the sender wants, and the shared threads are needed for other work.
    thread = ThreadPoolExecutor(1, thread_name_prefix="rock-unpack")
    work = loop.run_in_executor(thread, _unpack_thread, read_fd, loop, files, handle, path)
    feed = asyncio.create_task(_feed_pipe(write_fd, chunks))
    try:
        await asyncio.wait({work, feed}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
        await work
        if not feed.cancelled() and feed.exception() is not None:
            raise feed.exception()  # type: ignore[misc]
    finally:
        feed.cancel()
        await asyncio.gather(feed, work, return_exceptions=True)
        thread.shutdown(wait=False)


async def _feed_pipe(fd: int, chunks: AsyncIterator[bytes]) -> None:
    try:
        async for part in chunks:
            await write_all(fd, part)
    finally:
        os.close(fd)


def _unpack_thread(fd: int, loop: asyncio.AbstractEventLoop, files: Files, handle: Handle, base: str) -> None:
    """Runs in a thread because tarfile reads block; each file operation inside runs on the event loop."""

    def do(work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result()  # type: ignore[arg-type]

    with open(fd, "rb", buffering=CHUNK) as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r|*") as archive:
                for member in archive:
                    target = posixpath.join(base, _safe_name(member.name))
                    _unpack_one(archive, member, target, base, files, handle, do)
        except tarfile.TarError as error:
            raise InvalidConfig(f"the archive cannot be unpacked: {error}",
                                hint="send an uncompressed or gzip tar, and send it whole") from error
        finally:
            while raw.read(CHUNK):  # drain the stream, so that the sender is not blocked by a full pipe
                pass


def _safe_name(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidConfig(f"the archive has an entry outside of its root: {name!r}",
                            hint="make the archive with relative names and without `..`")
    return posixpath.normpath(name)


def _unpack_one(
    archive: tarfile.TarFile, member: tarfile.TarInfo, target: str, base: str, files: Files, handle: Handle, do: object
) -> None:
    assert callable(do)
    if member.isdir():
        do(files.make_dir(handle, target, mode=modes.S_IMODE(member.mode) | 0o700))
    elif member.issym():
        try:
            do(files.remove(handle, target))
        except NotFound:
            pass
        do(files.symlink(handle, member.linkname, target))
    elif member.isfile() or member.islnk():
        source = archive.extractfile(member) if member.isfile() else None
        if source is None:
            raise InvalidConfig(
                f"the archive has a hard link, {member.name!r}, which is not taken", hint="pack with --hard-dereference"
            )
        fd, token = do(files.open_write(handle, target, mode=modes.S_IMODE(member.mode)))
        try:
            with open(fd, "wb") as out:
                while data := source.read(CHUNK):
                    out.write(data)
        except BaseException as error:
            do(files.abort_write(handle, token))
            if isinstance(error, OSError):
                raise full_or(error, target) from error
            raise
        do(files.commit_write(handle, token))
    else:
        raise InvalidConfig(f"the archive has a special file: {member.name!r}", hint="pack without devices and FIFOs")
