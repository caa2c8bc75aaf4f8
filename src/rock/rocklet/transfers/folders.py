"""Folders of a sandbox as tars, as streams.

Small files pass in batches where the runtime has `FileBatches`: one request to pid 1 for each batch, instead of two for
each file. A larger file passes by a descriptor.
"""

from __future__ import annotations

import asyncio
import base64
import os
import posixpath
import stat as modes
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from rock.errors import InvalidConfig, NotFound, Unsupported
from rock.guest.init.files import BATCH, BATCH_ENTRIES
from rock.protocol.formats import tar
from rock.rocklet.commands.output import write_all
from rock.rocklet.transfers import files as transfers
from rock.rocklet.transfers.files import CHUNK, Reading, full_or, write_stream
from rock.runtime.base import Capability, Files, FileStat, Handle, Runtime

_PORTION = 256 << 10  # bytes of a tar that are sent at once, unless the next part is larger
_NAMES = 8_000  # bytes of all paths and targets in a batch
_KINDS = {"file": tar.FILE, "directory": tar.FOLDER, "symlink": tar.LINK}

_Found = tuple[str, str, FileStat]  # path inside, name in the tar, and what is there


@runtime_checkable
class FileBatches(Protocol, metaclass=Capability):
    """Optional access to many small files by one request. At most BATCH_ENTRIES, and BATCH bytes of contents."""

    async def write_entries(self, handle: Handle, entries: Sequence[Mapping[str, Any]]) -> None:
        """Create entries in order. kind: directory, symlink or file; path; mode, of folders and files; target, of a
        link; data, of a file, in base64. Errors as of Files; the entries before the one that fails stay. Unsupported
        for a sandbox of an earlier version."""
        ...

    async def read_files(self, handle: Handle, paths: Sequence[str]) -> list[bytes | None]:
        """Contents; None for a file that is too large for the rest of BATCH, or cannot be read. Unsupported for a
        sandbox of an earlier version."""
        ...


# ---- out of a sandbox ----


async def pack(runtime: Runtime, handle: Handle, path: str) -> AsyncGenerator[bytes]:
    """A file or folder as an uncompressed tar; names in it are relative to `path`. Links are stored as links; FIFOs,
    sockets and devices are omitted."""
    packer = _Packer(runtime, handle)
    top = await packer.files.stat(handle, path)
    parts: list[bytes] = []
    size = 0
    async for part in packer.parts(path, top):
        parts.append(part)
        size += len(part)
        if size >= _PORTION:
            yield b"".join(parts) if len(parts) > 1 else part
            parts, size = [], 0
    yield b"".join([*parts, tar.END])


class _Packer:
    def __init__(self, runtime: Runtime, handle: Handle) -> None:
        self.files = transfers.of(runtime)
        self._handle = handle
        self._batches = runtime if isinstance(runtime, FileBatches) else None

    async def parts(self, path: str, top: FileStat) -> AsyncGenerator[bytes]:
        """All entries, each folder before its content."""
        pending: list[_Found] = [(path, "." if top.kind == "directory" else posixpath.basename(path), top)]
        batch: list[_Found] = []
        size = 0
        while pending:
            at, name, found = one = pending.pop()
            if found.kind == "file" and self._batches is not None and found.size <= BATCH:
                if len(batch) >= BATCH_ENTRIES or size + found.size > BATCH:
                    async for part in self._small(batch):
                        yield part
                    batch, size = [], 0
                batch.append(one)
                size += found.size
                continue
            async for part in self._small(batch):
                yield part
            batch, size = [], 0
            async for part in self._one(one):
                yield part
            if found.kind == "directory":
                children = [child async for child in self._children(at)]
                pending += [(posixpath.join(at, c.name), posixpath.join(name, c.name), c) for c in reversed(children)]
        async for part in self._small(batch):
            yield part

    async def _children(self, path: str) -> AsyncIterator[FileStat]:
        offset = 0
        while True:
            page = await self.files.list(self._handle, path, offset=offset)
            for entry in page:
                yield entry
            offset += len(page)
            if not page:
                return

    async def _small(self, batch: list[_Found]) -> AsyncIterator[bytes]:
        """Small files, by one request."""
        contents: list[bytes | None] = [None] * len(batch)
        if batch and self._batches is not None:
            try:
                contents = await self._batches.read_files(self._handle, [path for path, _, _ in batch])
            except Unsupported:  # the sandbox has a pid 1 of an earlier version
                self._batches = None
        for one, content in zip(batch, contents, strict=True):
            if content is None:  # it has changed, or cannot be read: then this raises
                async for part in self._one(one):
                    yield part
            else:
                yield b"%s%s%s" % (_header(one, len(content)), content, tar.padding(len(content)))

    async def _one(self, one: _Found) -> AsyncIterator[bytes]:
        path, _, found = one
        if found.kind not in _KINDS:
            return
        if found.kind != "file":
            yield _header(one, 0)
            return
        reading = Reading(await self.files.open_read(self._handle, path), 0, None)
        try:
            yield _header(one, reading.length)
            async for part in reading.chunks():
                yield part
        finally:
            reading.close()
        yield tar.padding(reading.length)


def _header(one: _Found, size: int) -> bytes:
    _, name, found = one
    target = found.target or "" if found.kind == "symlink" else ""
    return tar.header(name, _KINDS[found.kind], found.mode, found.mtime, size, target, found.uid, found.gid)


# ---- into a sandbox ----


async def unpack(runtime: Runtime, handle: Handle, path: str, chunks: AsyncIterator[bytes]) -> None:
    """Unpack a tar stream into a folder inside, which is created when missing. Names outside of it are rejected, as are
    device nodes and hard links to files outside; each file is replaced atomically."""
    await transfers.of(runtime).make_dir(handle, path)
    loop = asyncio.get_running_loop()
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    # A dedicated thread: it blocks for as long as the sender wants, and the shared threads are needed for other work.
    thread = ThreadPoolExecutor(1, thread_name_prefix="rock-unpack")
    unpacker = _Unpacker(runtime, handle, path, loop)
    work = loop.run_in_executor(thread, unpacker.run, read_fd)
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


class _Unpacker:
    """Runs in a thread because tarfile reads block; each file operation inside runs on the event loop."""

    def __init__(self, runtime: Runtime, handle: Handle, base: str, loop: asyncio.AbstractEventLoop) -> None:
        self._runtime = runtime
        self._files: Files = transfers.of(runtime)
        self._handle = handle
        self._base = base
        self._loop = loop
        self._batches = runtime if isinstance(runtime, FileBatches) else None
        self._batch: list[dict[str, Any]] = []
        self._size = 0  # bytes of the contents in the batch
        self._names = 0  # bytes of its paths
        self._sent: tuple[Future[None], list[dict[str, Any]]] | None = None  # a batch that is being written

    def run(self, fd: int) -> None:
        with open(fd, "rb", buffering=CHUNK) as raw:
            try:
                with tarfile.open(fileobj=raw, mode="r|*") as archive:
                    for member in archive:
                        self._add(archive, member)
                self._send()
                self._settle()
            except tarfile.TarError as error:
                raise InvalidConfig(f"the archive cannot be unpacked: {error}",
                                    hint="send an uncompressed or gzip tar, and send it whole") from error
            finally:
                if self._sent is not None:
                    self._sent[0].cancel()
                while raw.read(CHUNK):  # drain the stream, so that the sender is not blocked by a full pipe
                    pass

    def _do(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """A file operation, after the batch before it."""
        self._send()
        self._settle()
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        target = posixpath.normpath(posixpath.join(self._base, _safe_name(member.name)))
        mode = modes.S_IMODE(member.mode)
        if member.isdir():
            self._queue({"kind": "directory", "path": target, "mode": mode | 0o700})
        elif member.issym():
            self._queue({"kind": "symlink", "path": target, "target": member.linkname})
        elif member.isfile():
            source = archive.extractfile(member)
            assert source is not None
            if member.size <= BATCH and self._batches is not None:
                data = source.read()
                self._queue({"kind": "file", "path": target, "mode": mode, "data": base64.b64encode(data).decode()},
                            len(data))  # fmt: skip
            else:
                self._write(source, target, mode)
        elif member.islnk():
            raise InvalidConfig(f"the archive has a hard link, {member.name!r}, which is not taken",
                                hint="pack with --hard-dereference")  # fmt: skip
        else:
            raise InvalidConfig(f"the archive has a special file: {member.name!r}",
                                hint="pack without devices and FIFOs")  # fmt: skip

    # ---- batches ----

    def _queue(self, entry: dict[str, Any], size: int = 0) -> None:
        names = len(entry["path"].encode("utf-8", "surrogateescape")) + len(entry.get("target", ""))
        full = len(self._batch) >= BATCH_ENTRIES or self._size + size > BATCH or self._names + names > _NAMES
        if self._batch and full:
            self._send()
        self._batch.append(entry)
        self._size += size
        self._names += names
        if self._batches is None:
            self._send()

    def _send(self) -> None:
        """Send the batch, once the one before it is written."""
        self._settle()
        if not self._batch:
            return
        batch, self._batch, self._size, self._names = self._batch, [], 0, 0
        work = self._one_by_one(batch) if self._batches is None else self._batches.write_entries(self._handle, batch)
        self._sent = asyncio.run_coroutine_threadsafe(work, self._loop), batch

    def _settle(self) -> None:
        """Wait until the batch that was sent is written."""
        if self._sent is None:
            return
        (future, batch), self._sent = self._sent, None
        try:
            future.result()
        except Unsupported:
            if self._batches is None:
                raise
            self._batches = None  # the sandbox has a pid 1 of an earlier version
            asyncio.run_coroutine_threadsafe(self._one_by_one(batch), self._loop).result()

    async def _one_by_one(self, batch: list[dict[str, Any]]) -> None:
        files, handle = self._files, self._handle
        for entry in batch:
            path = entry["path"]
            if entry["kind"] == "directory":
                await files.make_dir(handle, path, mode=entry["mode"])
            elif entry["kind"] == "symlink":
                try:
                    await files.remove(handle, path)
                except NotFound:
                    pass
                await files.symlink(handle, entry["target"], path)
            else:
                content = _one_part(base64.b64decode(entry["data"]))
                await write_stream(self._runtime, handle, path, content, append=False, mode=entry["mode"], user=None)

    # ---- large files ----

    def _write(self, source: Any, target: str, mode: int) -> None:
        files, handle = self._files, self._handle
        fd, token = self._do(lambda: files.open_write(handle, target, mode=mode))
        try:
            with open(fd, "wb") as out:
                while data := source.read(CHUNK):
                    out.write(data)
        except BaseException as error:
            self._do(lambda: files.abort_write(handle, token))
            if isinstance(error, OSError):
                raise full_or(error, target) from error
            raise
        self._do(lambda: files.commit_write(handle, token))


async def _one_part(data: bytes) -> AsyncGenerator[bytes]:
    yield data


def _safe_name(name: str) -> str:
    found = tar.inside(name)
    if found is None:
        raise InvalidConfig(f"the archive has an entry outside of its root: {name!r}",
                            hint="make the archive with relative names and without `..`")
    return found
