"""The files of an image without mounting it: what overlay would show of a stack of layer folders.

Symbolic links are followed within the image, as a process inside would follow them; the folders of this machine are
reached only by names that were looked at one by one, none of them a link. Layers are never written to, so what was
looked at stays so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rock.errors import ImageError, NotFound

_MOST_LINKS = 40
_OPAQUE = ("user.overlay.opaque", "trusted.overlay.opaque")


@dataclass(frozen=True)
class Node:
    """Something in the image. parts: its path without links. real: where it lies on this machine; of a folder, the
    topmost one. folders: of a folder all that are merged, the topmost first."""

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
        """What is at `path`, relative or absolute; None when there is nothing. follow: a link at its end, too.
        ImageError for links that go round."""
        node, left = self.walk(path, follow=follow)
        return None if left else node

    def walk(self, path: bytes, *, follow: bool = True) -> tuple[Node, list[bytes]]:
        """As far as `path` leads, links followed: the last thing that is there, and the names that are not."""
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
                    raise ImageError(f"{os.fsdecode(path)[:200]!r} in the image leads round in links")
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
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
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
        """What is in a folder, by name."""
        names = sorted({name for above in folder.folders for name in os.listdir(above)})
        for name in names:
            node = self._child(folder, name)
            if node is not None:
                yield node

    def text(self, path: bytes, limit: int = 1 << 20) -> str:
        """The first bytes of a file as text. NotFound when it is no file."""
        node = self.find(path)
        if node is None or not node.is_file:
            raise NotFound(f"the image has no file {os.fsdecode(path)}")
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
