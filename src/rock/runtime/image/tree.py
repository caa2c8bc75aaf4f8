"""A folder of this machine as entries of a layer."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from rock.errors import ImageError
from rock.runtime.image.layer import LayerWriter
from rock.runtime.image.tarstream import Entry, Kind

_CHUNK = 1 << 20


def copy_tree(source: Path, writer: LayerWriter) -> str:
    """Write all of `source` to a layer; answers a digest of what was written.

    Other file systems mounted in it (a /proc, for one), sockets and device nodes are left out. The digest is over a
    canonical description of the entries, their owners, modes, times and content.
    """
    digest = sha256()
    device = source.stat().st_dev
    seen: dict[tuple[int, int], bytes] = {}
    for path, info in _walk(os.fsencode(source), b"", device):
        entry = _entry(os.fsencode(source), path, info)
        if entry is None:
            continue
        if entry.kind is Kind.FILE and info.st_nlink > 1:
            first = seen.setdefault((info.st_dev, info.st_ino), path)
            if first != path:
                entry.kind, entry.target, entry.size = Kind.HARDLINK, first, 0
        digest.update(repr((entry.path, entry.kind.value, entry.mode, entry.uid, entry.gid, entry.mtime, entry.size,
                            entry.target, sorted(entry.xattrs.items()))).encode())
        if entry.kind is not Kind.FILE:
            writer.add(entry)
            continue
        writer.add(entry, _content(os.path.join(os.fsencode(source), path), entry, digest.update))
    return f"sha256:{digest.hexdigest()}"


def _walk(root: bytes, path: bytes, device: int) -> Iterator[tuple[bytes, os.stat_result]]:
    full = os.path.join(root, path) if path else root
    info = os.lstat(full)
    yield path, info
    if stat.S_ISDIR(info.st_mode) and info.st_dev == device:
        for name in sorted(os.listdir(full)):
            yield from _walk(root, os.path.join(path, name), device)


def _entry(root: bytes, path: bytes, info: os.stat_result) -> Entry | None:
    full = os.path.join(root, path) if path else root
    entry = Entry(path=path or b".", kind=Kind.FILE, mode=stat.S_IMODE(info.st_mode), uid=info.st_uid,
                  gid=info.st_gid, mtime=info.st_mtime_ns)  # fmt: skip
    if stat.S_ISREG(info.st_mode):
        entry.size = info.st_size
    elif stat.S_ISDIR(info.st_mode):
        entry.kind = Kind.FOLDER
    elif stat.S_ISLNK(info.st_mode):
        entry.kind, entry.target = Kind.SYMLINK, os.readlink(full)
    elif stat.S_ISFIFO(info.st_mode):
        entry.kind = Kind.FIFO
    else:
        return None
    if entry.kind in (Kind.FILE, Kind.FOLDER):
        with suppress(OSError):
            entry.xattrs = {n: os.getxattr(full, n) for n in os.listxattr(full) if n.startswith("user.")}
    return entry


def _content(full: bytes, entry: Entry, told: Callable[[bytes], None]) -> Iterator[bytes]:
    left = entry.size
    with open(os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ImageError(f"{os.fsdecode(full)} shrank while it was read",
                                 hint="import a folder that is not in use")
            left -= len(chunk)
            told(chunk)
            yield chunk
