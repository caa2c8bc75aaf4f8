"""COPY, ADD and WORKDIR: entries of a new layer over a stack of layers, from a context or another image.

The new layer must not hide existing content: an existing folder retains its mode and owner, and a symbolic link to a
folder is followed. Both sides are read by `Merged`, so no link of a context or an image leads out of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rock.errors import InvalidConfig, NotFound
from rock.images.layers.blobs import Blob, Bounds, Plain, compression
from rock.images.layers.tar_reader import BLOCK, ByteStream, Entry, Kind, TarReader
from rock.images.layers.views import Merged, Node, open_file
from rock.images.layers.writer import LayerWriter, parts_of

_CHUNK = 1 << 20
_DEEPEST = 256
_MOST = 1_000_000  # maximum files of one COPY


@dataclass(frozen=True)
class Owner:
    """The owner of copied files."""

    uid: int
    gid: int


def owner_of(text: str, image: Merged) -> Owner:
    """Resolve "user", "uid", "user:group" or "uid:gid" in an image. NotFound for unknown names.

    Without a group, the group id equals the user id, as in Dockerfiles.
    """
    user, colon, group = text.partition(":")
    uid = _number(user, image, b"/etc/passwd", "user")
    return Owner(uid, _number(group, image, b"/etc/group", "group") if colon else uid)


def _number(name: str, image: Merged, file: bytes, what: str) -> int:
    if _is_id(name):
        return int(name)
    with suppress(NotFound):
        for line in image.text(file).splitlines():
            fields = line.split(":")
            if len(fields) > 2 and fields[0] == name and _is_id(fields[2]):
                return int(fields[2])
    raise NotFound(f"the image has no {what} {name!r}", hint=f"give a number, or add the {what} first")


def _is_id(text: str) -> bool:
    return re.fullmatch(r"\d{1,10}", text, re.ASCII) is not None and int(text) < 0xFFFFFFFF


# ---- sources ----


@dataclass(frozen=True)
class Source:
    """A source of a copy. `base`: its name at the target, when the target is a folder."""

    tree: Merged
    node: Node
    base: bytes


def sources(tree: Merged, patterns: Sequence[str]) -> list[Source]:
    """Expand patterns in a tree; final links are followed. NotFound names a pattern without a match."""
    found: list[Source] = []
    for pattern in patterns:
        text = os.fsencode(pattern)
        if ".." in pattern.split("/"):
            parts = [part for part in os.path.normpath("/" + pattern).split("/") if part]
            text = os.fsencode("/".join(parts))
        if any(mark in pattern for mark in "*?["):
            nodes = list(_matching(tree, [part for part in text.split(b"/") if part not in (b"", b".")]))
        else:
            node = tree.find(text)
            nodes = [(node, node.name)] if node is not None else []
            name = os.path.basename(text.rstrip(b"/"))
            if nodes and name not in (b"", b"."):
                nodes = [(nodes[0][0], name)]  # a link has its own name, and its target's content
        if not nodes:
            raise NotFound(f"there is no {pattern!r} to copy", hint="paths are relative to the context; is it ignored?")
        found += [Source(tree, node, base) for node, base in nodes]
    return found


def _matching(tree: Merged, parts: list[bytes]) -> Iterator[tuple[Node, bytes]]:
    def descend(node: Node, left: list[bytes]) -> Iterator[tuple[Node, bytes]]:
        if not left:
            yield node, node.name
            return
        if not node.is_folder:
            return
        pattern = re.compile(fnmatch.translate(left[0].decode("utf-8", "surrogateescape")))
        for entry in tree.entries(node):
            if pattern.fullmatch(entry.name.decode("utf-8", "surrogateescape")):
                target = tree.find(b"/".join(entry.parts)) if entry.is_link else entry
                if target is None:
                    continue
                if len(left) == 1:
                    yield target, entry.name
                else:
                    yield from descend(target, left[1:])

    root = tree.find(b"")
    if root is not None:
        yield from descend(root, parts)


def digest_of(found: Iterable[Source]) -> str:
    """Digest of names, kinds, modes, owners and content; excludes times."""
    digest = hashlib.sha256()
    for source in found:
        for path, node in _walk(source.tree, source.node, (), 0):
            info = node.info
            content: bytes = b""
            if node.is_file:
                with open(open_file(node), "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            elif node.is_link:
                content = os.readlink(node.real)
            row = (source.base, path, stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)
            digest.update(repr((row, content)).encode())
    return digest.hexdigest()


def _walk(tree: Merged, node: Node, path: tuple[bytes, ...], count: int) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    """Depth first, a folder before its content."""
    todo = [(path, node)]
    while todo:
        path, node = todo.pop()
        count += 1
        if count > _MOST or len(path) > _DEEPEST:
            raise InvalidConfig(f"COPY has more than {_MOST} files, or folders more than {_DEEPEST} levels deep",
                                hint="copy fewer files, or leave some out with .dockerignore")
        yield path, node
        if node.is_folder:
            todo += [((*path, entry.name), entry) for entry in reversed(list(tree.entries(node)))]


# ---- target ----


class Copy:
    """Writes into a new layer over `below`. owner: of all copied files, None for the original one; mode: of files and
    folders.

    refused: called with each written path; raises where writes are not allowed.
    """

    def __init__(
        self, below: Merged, writer: LayerWriter, owner: Owner | None = None, mode: int | None = None,
        refused: Callable[[tuple[bytes, ...]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._below = below
        self._writer = writer
        self._owner = owner
        self._mode = mode
        self._refused = refused
        self._made: set[tuple[bytes, ...]] = set()
        self._known: dict[bytes, tuple[bytes, ...]] = {}
        self._digest = hashlib.sha256()
        self._now = time.time_ns()

    @property
    def digest(self) -> str:
        """Digest of all written entries."""
        return f"sha256:{self._digest.hexdigest()}"

    def folder(self, path: bytes) -> tuple[bytes, ...]:
        """Create a folder and its parents; returns its path without links. InvalidConfig when a file exists there."""
        if (known := self._known.get(path)) is not None:
            return known
        node, left = self._below.walk(path)
        if not node.is_folder:
            raise InvalidConfig(f"{os.fsdecode(path)!r} is not a folder in the image",
                                hint="choose a target below a folder, or remove the file first")
        if b".." in left:
            raise InvalidConfig(f"{os.fsdecode(path)!r} has a `..` behind a folder that does not exist in the image",
                                hint="write the path without `..`")
        self._keep(node)
        parts = node.parts
        for name in left:
            parts = (*parts, name)
            if parts not in self._made:
                self._made.add(parts)
                owner = self._owner or Owner(0, 0)
                self._add(Entry(b"/".join(parts), Kind.FOLDER, 0o755, owner.uid, owner.gid))
        self._known[path] = parts
        return parts

    def put(self, found: Sequence[Source], target: bytes) -> None:
        """Copy a source: a folder's content into `target`, a file into it or under its name. InvalidConfig."""
        if len(found) > 1 and not target.endswith(b"/"):
            raise InvalidConfig("several files are copied to a target that does not end with /",
                                hint="end the target with /, as in COPY a.txt b.txt /data/")
        there = self._below.find(target)
        into = target.endswith(b"/") or (there is not None and there.is_folder)
        for source in found:
            if source.node.is_folder:
                self._content(source, self.folder(target))
            else:
                parent, name = (target, source.base) if into else (os.path.dirname(target), os.path.basename(target))
                self._one(source.node, (*self.folder(parent), name))

    def text(self, content: bytes, target: bytes, name: bytes) -> None:
        """Write a here document."""
        there = self._below.find(target)
        if target.endswith(b"/") or (there is not None and there.is_folder):
            target = target.rstrip(b"/") + b"/" + name
        parts = (*self.folder(os.path.dirname(target)), os.path.basename(target))
        owner = self._owner or Owner(0, 0)
        entry = Entry(b"/".join(parts), Kind.FILE, self._mode or 0o644, owner.uid, owner.gid, size=len(content))
        self._add(entry, [content])

    def unpack(self, source: Source, target: bytes) -> None:
        """Unpack an archive below `target`. ImageError when it is damaged or leads out of the target."""
        top = self.folder(target)
        chunks = Plain(_blob(source.node), self._writer.bounds).chunks()
        try:
            reader = TarReader(ByteStream(chunks))
            while (entry := reader.next()) is not None:
                parts = parts_of(entry.path)
                if not parts or entry.kind is Kind.DEVICE:
                    continue
                if any(part.startswith(b".wh.") for part in parts):
                    raise InvalidConfig("the archive has a name that layers reserve for deleted files: "
                                        f"{os.fsdecode(entry.path)!r}",
                                        hint="rename the file; names that begin with .wh. mark deleted files")
                entry.path = b"/".join(self._through((*top, *parts)))
                if entry.kind is Kind.HARDLINK:
                    entry.target = b"/".join(self._through((*top, *parts_of(entry.target))))
                if self._owner is not None:
                    entry.uid, entry.gid = self._owner.uid, self._owner.gid
                self._add(entry, reader.data())
        finally:
            chunks.close()

    def _through(self, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The path with links of the layers below resolved in its folders, whose modes are preserved."""
        node, left = self._below.walk(b"/".join(parts[:-1]))
        if node.is_folder:
            self._keep(node)
            return (*node.parts, *left, parts[-1])
        return parts

    def _content(self, source: Source, top: tuple[bytes, ...]) -> None:
        for path, node in _walk(source.tree, source.node, (), 0):
            if not path:
                continue
            if not node.is_folder:
                self._one(node, (*self._below_folder(top, path[:-1]), path[-1]))
                continue
            self._below_folder(top, path[:-1])
            target = (*top, *path)
            there, left = self._below.walk(b"/".join(target))
            if left and target not in self._made:
                resolved = (*there.parts, *left)
                self._made.add(resolved)
                self._add(self._entry(node, resolved))

    def _below_folder(self, top: tuple[bytes, ...], path: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return self.folder(b"/".join((*top, *path)))

    def _one(self, node: Node, parts: tuple[bytes, ...]) -> None:
        there = self._below.find(b"/".join(parts), follow=False)
        if there is not None and there.is_folder:
            raise InvalidConfig(f"a file cannot replace the folder /{os.fsdecode(b'/'.join(parts))} of the image",
                                hint="choose another target, or remove the folder first")
        entry = self._entry(node, parts)
        if entry.kind is Kind.DEVICE:
            return
        self._add(entry, _content(node) if entry.kind is Kind.FILE else ())

    def _entry(self, node: Node, parts: tuple[bytes, ...]) -> Entry:
        entry = entry_of(node)
        entry.path = b"/".join(parts)
        if self._owner is not None:
            entry.uid, entry.gid = self._owner.uid, self._owner.gid
        if self._mode is not None and entry.kind in (Kind.FILE, Kind.FOLDER):
            entry.mode = self._mode
        return entry

    def _keep(self, node: Node) -> None:
        """Add existing folders to the layer unchanged: overlay uses mode and owner of the topmost."""
        for depth in range(len(node.parts) + 1):
            parts = node.parts[:depth]
            if parts in self._made:
                continue
            self._made.add(parts)
            found = self._below.find(b"/".join(parts)) if depth < len(node.parts) else node
            if found is not None:
                self._add(replace(entry_of(found), path=b"/".join(parts) or b"."))

    def _add(self, entry: Entry, data: Iterable[bytes | memoryview] = ()) -> None:
        parts = tuple(part for part in entry.path.split(b"/") if part not in (b"", b"."))
        if entry.kind is not Kind.FOLDER or parts not in self._made or self._below.find(entry.path) is None:
            self._refused(parts)
        row = (entry.path, entry.kind.value, entry.mode, entry.uid, entry.gid, entry.mtime, entry.size, entry.target)
        self._digest.update(repr((row, sorted(entry.xattrs.items()))).encode())
        entry.mtime = entry.mtime or self._now  # a fixed time for generated files: equal builds produce equal layers
        self._writer.add(entry, self._hashed(data))

    def _hashed(self, data: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for part in data:
            self._digest.update(part)
            yield part


def entry_of(node: Node) -> Entry:
    """A node as an entry of a layer."""
    info = node.info
    entry = Entry(b"", Kind.DEVICE, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns)
    if node.is_folder:
        entry.kind = Kind.FOLDER
    elif node.is_file:
        entry.kind, entry.size = Kind.FILE, info.st_size
    elif node.is_link:
        entry.kind, entry.target = Kind.SYMLINK, os.readlink(node.real)
    elif stat.S_ISFIFO(info.st_mode):
        entry.kind = Kind.FIFO
    if entry.kind in (Kind.FILE, Kind.FOLDER):
        with suppress(OSError):
            entry.xattrs = {name: os.getxattr(node.real, name) for name in os.listxattr(node.real)
                            if name.startswith("user.") and not name.startswith("user.overlay.")}  # fmt: skip
    return entry


def _content(node: Node) -> Iterator[bytes]:
    left = node.info.st_size
    with open(open_file(node), "rb") as file:
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise InvalidConfig(f"{os.fsdecode(node.name)!r} shrank while it was copied",
                                    hint="try again once no program changes the files of the build context")
            left -= len(chunk)
            yield chunk


def _blob(node: Node) -> Blob:
    return Blob(Path(os.fsdecode(node.real)), 0, node.info.st_size)


def is_archive(node: Node) -> bool:
    """Whether ADD unpacks it: a tar, plain or compressed, by its content."""
    if not node.is_file:
        return False
    blob = _blob(node)
    if compression(blob) == "none":
        return blob.start(BLOCK)[257:262] == b"ustar"
    if compression(blob) not in ("gzip", "zstd"):
        return False
    chunks = Plain(blob, Bounds()).chunks()
    try:
        first = next(chunks, b"")
        return first[257:262] == b"ustar"
    except Exception:  # damaged or no archive: copied unchanged
        return False
    finally:
        chunks.close()
