"""The merged files of an image without a mount: the overlay view of a stack of layer folders, and trees as layer
entries.

Symbolic links are followed within the image, as for a process inside. Folders of this machine are reached only by names
that were checked one by one, none of them a link. Layers are never written to, so a check stays valid.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rock.errors import ImageError, NotFound
from rock.images.layers.tar_reader import Entry, Kind
from rock.images.layers.writer import LayerWriter, is_whiteout

_MOST_LINKS = 40
_OPAQUE = ("user.overlay.opaque", "trusted.overlay.opaque")


@dataclass(frozen=True)
class Node:
    """A file or folder of the image. parts: its path without links. real: its path on this machine, for a folder the
    topmost one. folders: for a folder all merged ones, the topmost first."""

    parts: tuple[bytes, ...]
    real: bytes
    info: os.stat_result
    folders: tuple[bytes, ...] = ()

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.info.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.info.st_mode)

    @property
    def name(self) -> bytes:
        return self.parts[-1] if self.parts else b""


class Merged:
    """The files in `layers`, the top layer first."""

    def __init__(self, layers: Sequence[str]) -> None:
        tops = tuple(os.fsencode(layer) for layer in layers)
        self._root = Node((), tops[0], os.lstat(tops[0]), tops)

    def find(self, path: bytes, *, follow: bool = True) -> Node | None:
        """The node at `path`, relative or absolute; None when it is missing. follow: also a final link. ImageError for
        link loops."""
        node, left = self.walk(path, follow=follow)
        return None if left else node

    def walk(self, path: bytes, *, follow: bool = True) -> tuple[Node, list[bytes]]:
        """Resolve `path` with links: the last existing node, and the missing names."""
        todo = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        trail = [self._root]
        links = 0
        while todo:
            part = todo.pop()
            here = trail[-1]
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            if not here.is_folder:
                return here, [part, *reversed(todo)]
            node = self._child(here, part)
            if node is None:
                return here, [part, *reversed(todo)]
            if node.is_link and (todo or follow):
                links += 1
                if links > _MOST_LINKS:
                    raise ImageError(f"the symbolic links of {os.fsdecode(path)[:200]!r} in the image form a loop",
                                     hint="correct the symbolic link in the image")
                target = os.readlink(node.real)
                if target.startswith(b"/"):
                    trail = [self._root]
                todo += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
                continue
            trail.append(node)
        return trail[-1], []

    def _child(self, folder: Node, name: bytes) -> Node | None:
        found: Node | None = None
        folders: list[bytes] = []
        for above in folder.folders:
            real = above + b"/" + name
            try:
                info = os.lstat(real)
            except FileNotFoundError:
                continue
            if is_whiteout(info):
                break
            if not stat.S_ISDIR(info.st_mode):
                if found is None:
                    return Node((*folder.parts, name), real, info)
                break
            found = found or Node((*folder.parts, name), real, info)
            folders.append(real)
            if _is_opaque(real):
                break
        return None if found is None else Node(found.parts, found.real, found.info, tuple(folders))

    def entries(self, folder: Node) -> Iterator[Node]:
        """The content of a folder, by name."""
        names = sorted({name for above in folder.folders for name in os.listdir(above)})
        for name in names:
            node = self._child(folder, name)
            if node is not None:
                yield node

    def text(self, path: bytes, limit: int = 1 << 20) -> str:
        """The first bytes of a file as text. NotFound when it is not a file."""
        node = self.find(path)
        if node is None or not node.is_file:
            raise NotFound(f"the image has no file {os.fsdecode(path)!r}",
                           hint="check the path in a sandbox of the image, for example with `ls`")
        with open(open_file(node), "rb") as file:
            return file.read(limit).decode("utf-8", "replace")


def open_file(node: Node) -> int:
    """A descriptor for a file's content."""
    return os.open(node.real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _is_opaque(folder: bytes) -> bool:
    for name in _OPAQUE:
        with suppress(OSError):
            if os.getxattr(folder, name) == b"y":
                return True
    return False


# ---- a folder of this machine as entries of a layer ----

_CHUNK = 1 << 20


def copy_tree(source: Path, writer: LayerWriter) -> str:
    """Write all of `source` to a layer; returns a digest of the written entries.

    Other file systems mounted in it (such as a /proc), sockets and device nodes are omitted. The digest covers a
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


def _content(full: bytes, entry: Entry, on_chunk: Callable[[bytes], None]) -> Iterator[bytes]:
    left = entry.size
    with open(os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ImageError(f"{os.fsdecode(full)} shrank while it was read",
                                 hint="import a folder that is not in use")
            left -= len(chunk)
            on_chunk(chunk)
            yield chunk
