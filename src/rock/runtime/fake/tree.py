"""Files in memory: a tree with links, modes and the errors of a real file system; a few kilobytes."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Literal

from rock import errors
from rock.runtime.base import FileStat
from rock.runtime.refusals import is_a_folder, no_such_path, not_a_folder, not_absolute, not_regular

Kind = Literal["file", "directory", "symlink", "device"]
MOST_BYTES = 256 << 20  # of all files of one sandbox
SMALLER = "remove some files, or use the namespace runtime"  # hints of errors
TAKEN = "remove it first, or choose another path"
_MOST_LINKS = 40
_FOLDERS = ("bin", "dev", "etc", "home", "opt", "root", "tmp", "usr", "usr/bin", "var", "work")
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"


class Node:
    """A file, folder or link."""

    __slots__ = ("children", "data", "gid", "kind", "mode", "mtime", "target", "uid")

    def __init__(self, kind: Kind, mode: int, data: bytes = b"", target: str | None = None) -> None:
        self.kind: Kind = kind
        self.mode = mode
        self.data = data
        self.target = target
        self.children: dict[str, Node] = {}
        self.uid = self.gid = 0
        self.mtime = time.time()

    def stat(self, name: str) -> FileStat:
        size = len(self.target or "") if self.kind == "symlink" else len(self.data)
        return FileStat(name, self.kind, size, self.mode, self.uid, self.gid, self.mtime, self.target)




class Tree:
    """The files of one sandbox. Paths are absolute; errors are those of `runtime.base.Files`."""

    __slots__ = ("root", "used")

    def __init__(self) -> None:
        self.root = Node("directory", 0o755)
        self.used = 0
        for name in _FOLDERS:
            self.make_dir(f"/{name}")
        self.find("/tmp").mode = 0o1777
        self.write("/bin/sh", b"#!fake\n", 0o755)
        self.write("/etc/passwd", _PASSWD)
        self.find("/dev").children["null"] = Node("device", 0o666)

    def copy(self) -> Tree:
        """An independent copy; names of one file remain names of one file."""
        other = Tree.__new__(Tree)
        other.root, other.used = deepcopy(self.root), self.used
        return other

    # ---- lookup ----

    def _parts(self, path: str) -> list[str]:
        if not path.startswith("/") or "\0" in path:
            raise not_absolute(path)
        return [part for part in path.split("/") if part not in ("", ".")]

    def _walk(self, path: str, follow: bool) -> tuple[list[tuple[str, Node]], str | None]:
        """(the parent folders and the last node, its name when it is missing). NotFound when a parent folder is
        missing."""
        todo = self._parts(path)
        way: list[tuple[str, Node]] = [("/", self.root)]
        links = 0
        while todo:
            part = todo.pop(0)
            at = way[-1][1]
            if at.kind != "directory":
                raise not_a_folder(way[-1][0], path)
            if part == "..":
                way = way[:-1] or way
                continue
            found = at.children.get(part)
            if found is None:
                if todo:
                    raise no_such_path(path)
                return way, part
            if found.kind == "symlink" and (todo or follow):
                links += 1
                if links > _MOST_LINKS:
                    raise errors.InvalidConfig(f"more than {_MOST_LINKS} symbolic links in {path!r}",
                                               hint="check the links for a loop with readlink")
                target = found.target or ""
                if target.startswith("/"):
                    way = [("/", self.root)]
                todo = [p for p in target.split("/") if p not in ("", ".")] + todo
                continue
            way.append((part, found))
        return way, None

    def find(self, path: str, *, follow: bool = True) -> Node:
        """The node at a path. NotFound."""
        way, missing = self._walk(path, follow)
        if missing is not None:
            raise no_such_path(path)
        return way[-1][1]

    def get(self, path: str, *, follow: bool = True) -> Node | None:
        """The node at a path, or None."""
        try:
            return self.find(path, follow=follow)
        except (errors.NotFound, errors.Conflict, errors.InvalidConfig):
            return None

    def real(self, path: str) -> str:
        """The path of a node, without links. NotFound."""
        way, missing = self._walk(path, True)
        if missing is not None:
            raise no_such_path(path)
        return "/" + "/".join(name for name, _ in way[1:])

    def folder(self, path: str) -> Node:
        found = self.find(path)
        if found.kind != "directory":
            raise not_a_folder(path)
        return found

    def read(self, path: str) -> bytes:
        """The bytes of a regular file."""
        found = self.find(path)
        if found.kind == "directory":
            raise is_a_folder(path)
        if found.kind != "file":
            raise not_regular(path)
        return found.data

    def stat(self, path: str, *, follow: bool = True) -> FileStat:
        return self.find(path, follow=follow).stat(posixpath.basename(path.rstrip("/")) or "/")

    def list(self, path: str) -> list[FileStat]:
        return [node.stat(name) for name, node in sorted(self.folder(path).children.items())]

    # ---- changes ----

    def _room(self, more: int) -> None:
        if self.used + more > MOST_BYTES:
            raise errors.StorageFull(f"the files of a fake sandbox exceed its limit of {MOST_BYTES} bytes",
                                     hint=SMALLER)
        self.used += more

    def place(self, path: str, *, parents: bool = False) -> tuple[Node, str, Node | None]:
        """(folder, name, node) of a file to be written, its links followed."""
        if parents:
            self.make_dir(posixpath.dirname(path))
        way, missing = self._walk(path, True)
        if missing is not None:
            if way[-1][1].kind != "directory":
                raise not_a_folder(posixpath.dirname(path))
            return way[-1][1], missing, None
        if len(way) == 1 or way[-1][1].kind == "directory":
            raise is_a_folder(path)
        if way[-1][1].kind != "file":
            raise not_regular(path)
        return way[-2][1], way[-1][0], way[-1][1]

    def write(self, path: str, data: bytes, mode: int | None = None, *, append: bool = False,
              parents: bool = False) -> None:
        """Replace or create a file, or append to it. `mode` None keeps the old file's mode, else 0644."""
        folder, name, old = self.place(path, parents=parents)
        if old is None:
            self._room(len(data))
            folder.children[name] = Node("file", 0o644 if mode is None else mode, data)
            return
        self._room(len(data) - (0 if append else len(old.data)))
        old.data = old.data + data if append else data
        old.mtime = time.time()
        if mode is not None:
            old.mode = mode

    def grow(self, node: Node, data: bytes) -> None:
        """Append to an open file, which may have been removed meanwhile."""
        self._room(len(data))
        node.data += data
        node.mtime = time.time()

    def make_dir(self, path: str, *, parents: bool = True, mode: int = 0o755) -> None:
        parts, at = self._parts(path), "/"
        for index, part in enumerate(parts):
            at = posixpath.join(at, part)
            last = index == len(parts) - 1
            found = self.get(at)
            if found is None:
                if not last and not parents:
                    raise no_such_path(at)
                way, missing = self._walk(at, True)
                if missing is not None:
                    way[-1][1].children[missing] = Node("directory", mode if last else 0o755)
            elif found.kind != "directory" or (last and not parents):
                raise errors.Conflict(f"the path exists already: {at!r}", hint=TAKEN)

    def _entry(self, path: str) -> tuple[Node, str, Node]:
        """(folder, name, node) of an entry; the last link is not followed."""
        way, missing = self._walk(path, False)
        if missing is not None:
            raise no_such_path(path)
        if len(way) == 1:
            raise errors.InvalidConfig("the folder / cannot be removed or moved", hint="name an entry below it")
        return way[-2][1], way[-1][0], way[-1][1]

    def remove(self, path: str, *, recursive: bool = False) -> None:
        folder, name, found = self._entry(path)
        if found.children and not recursive:
            raise errors.Conflict(f"the folder is not empty: {path!r}",
                                  hint="remove its entries first, or set recursive")
        del folder.children[name]
        self.used -= sum(len(node.data) for node in self.under(found))

    def symlink(self, target: str, path: str) -> None:
        way, missing = self._walk(path, False)
        if missing is None:
            raise errors.Conflict(f"the path exists already: {path!r}", hint=TAKEN)
        way[-1][1].children[missing] = Node("symlink", 0o777, target=target)

    def move(self, source: str, target: str) -> None:
        folder, name, found = self._entry(source)
        way, missing = self._walk(target, False)
        if any(node is found for _, node in way[:-1]) or (missing is not None and way[-1][1] is found):
            raise errors.InvalidConfig(f"a folder cannot be moved into itself: {target!r}",
                                       hint="choose a target outside of the folder")
        if missing is None:
            old = way[-1][1]
            if old.kind == "directory" and (found.kind != "directory" or old.children):
                raise errors.Conflict(f"the target exists already: {target!r}", hint=TAKEN)
            if old is not found:
                self.used -= len(old.data)
            place, missing = way[-2][1], way[-1][0]
        else:
            place = way[-1][1]
        del folder.children[name]
        place.children[missing] = found

    def under(self, node: Node) -> Iterator[Node]:
        """A node and everything below it."""
        todo = [node]
        while todo:
            at = todo.pop()
            yield at
            todo.extend(at.children.values())

    def chmod(self, path: str, mode: int, *, recursive: bool = False) -> None:
        found = self.find(path)
        for node in self.under(found) if recursive else (found,):
            if node.kind != "symlink":
                node.mode = mode

    def chown(self, path: str, uid: int, gid: int, *, recursive: bool = False) -> None:
        found = self.find(path)
        for node in self.under(found) if recursive else (found,):
            node.uid, node.gid = uid, gid
