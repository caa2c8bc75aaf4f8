"""Merges layers of snapshots into one that looks the same above the layers below it. Run by its path, with JSON as its
argument (merges.py).

Files of the merged layer are hard links, so that its cost depends on the number of files and not on their size. Folders
are made anew. A deleted name stays a whiteout where a layer below has that name.

The layers are untrusted, and no process changes them meanwhile: each folder is opened relative to the descriptor of the
one above, and never through a link. As an ordinary user it creates a user namespace in which it is root, so it can read
folders that the guest, who has the same user id, made unreadable. Standard library only.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import errno
import json
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rock.host import folders
from rock.images.layers.writer import is_whiteout
from rock.runtime.namespace.launcher import userns

MOST_ENTRIES = 1_000_000
DEEPEST = 256
_MEMORY = 1 << 30
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PARAMETERS = "/sys/module/overlay/parameters"


class Refused(Exception):
    """The layers have something that cannot be merged, or are over a limit."""


@dataclass
class _Level:
    """A folder of the merged layer. sources: those of the layers, the newest first. opaque: it hides the folders of the
    layers below. todo: its names, each with the sources that have it."""

    sources: list[int]
    target: int
    path: str
    opaque: bool
    todo: Iterator[tuple[str, list[int]]]
    below: list[int] | None = None  # the same folder in the layers below


class Merger:
    """below: folders (O_PATH) of the layers below the merged ones. overlay: the prefix of overlay's attributes."""

    def __init__(self, below: Sequence[int], overlay: str) -> None:
        self._tops = below
        self._overlay = overlay
        self._entries = 0

    def merge(self, sources: Sequence[int], target: int) -> None:
        """Fill the empty folder `target` from `sources`, the newest first. OSError, Refused."""
        stack = [self._level([os.dup(one) for one in sources], os.dup(target), "", opaque=False)]
        try:
            while stack:
                level = stack[-1]
                found = next(level.todo, None)
                if found is None:
                    self._dress(level)
                    _close(stack.pop())
                elif (child := self._entry(level, *found)) is not None:
                    stack.append(child)
                    if len(stack) > DEEPEST:
                        raise Refused(f"a folder is more than {DEEPEST} deep")
        finally:
            for level in stack:
                _close(level)

    def _level(self, sources: list[int], target: int, path: str, *, opaque: bool) -> _Level:
        return _Level(sources, target, path, opaque, self._names(sources))

    def _names(self, sources: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        names: dict[str, list[int]] = {}
        for fd in sources:
            with os.scandir(fd) as entries:
                for entry in entries:
                    names.setdefault(entry.name, []).append(fd)
                    self._entries += 1
                    if self._entries > MOST_ENTRIES:
                        raise Refused(f"there are more than {MOST_ENTRIES} files")
        yield from names.items()

    def _entry(self, level: _Level, name: str, holders: Sequence[int]) -> _Level | None:
        """Merge a name; returns the level of a folder."""
        info = os.stat(name, dir_fd=holders[0], follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            return self._folder(level, name, holders)
        if is_whiteout(info) and (level.opaque or not self._is_below(level, name)):
            return None
        try:
            os.link(name, name, src_dir_fd=holders[0], dst_dir_fd=level.target, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK or not is_whiteout(info):  # overlay shares one inode between whiteouts
                raise
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=level.target)
        return None

    def _folder(self, level: _Level, name: str, holders: Sequence[int]) -> _Level:
        sources, opaque = list[int](), False
        try:
            for holder in holders:
                try:
                    fd = os.open(name, _FOLDER, dir_fd=holder)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    opaque = True  # a file or a whiteout, which hides what is below it
                    break
                sources.append(fd)
                if self._is_opaque(fd):
                    opaque = True
                    break
            os.mkdir(name, 0o700, dir_fd=level.target)
            target = os.open(name, _FOLDER, dir_fd=level.target)
        except BaseException:
            for fd in sources:
                os.close(fd)
            raise
        path = f"{level.path}/{name}" if level.path else name
        return self._level(sources, target, path, opaque=opaque or level.opaque)

    def _is_opaque(self, fd: int) -> bool:
        try:
            return os.getxattr(fd, f"{self._overlay}opaque") == b"y"
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
            return False

    def _is_below(self, level: _Level, name: str) -> bool:
        """Whether a layer below may have this name in this folder."""
        if level.below is None:
            level.below = []
            for top in self._tops:
                try:
                    found = folders.open_under(top, level.path, folders.NO_SYMLINKS | folders.BENEATH)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    continue  # a file or a link there hides no name of a folder
                level.below.append(found)
        for fd in level.below:
            with suppress(FileNotFoundError):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                return True
        return False

    def _dress(self, level: _Level) -> None:
        """Give a folder the owner, mode, attributes and times of the newest one, after its content."""
        source, target = level.sources[0], level.target
        info, own = os.fstat(source), os.fstat(target)
        if (info.st_uid, info.st_gid) != (own.st_uid, own.st_gid):
            os.fchown(target, info.st_uid, info.st_gid)
        os.fchmod(target, stat.S_IMODE(info.st_mode))
        for name in os.listxattr(source):
            if not name.startswith(self._overlay):
                raw = os.fsencode(name)
                os.setxattr(target, raw, os.getxattr(source, raw))
        if level.opaque and level.path:
            os.setxattr(target, f"{self._overlay}opaque", b"y")
        os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _close(level: _Level) -> None:
    for fd in (*level.sources, level.target, *(level.below or ())):
        os.close(fd)


def _refuse_other_formats() -> None:
    """Refused where overlay stores renames and attributes of files apart from them."""
    for name in ("redirect_dir", "metacopy"):
        with suppress(FileNotFoundError), open(f"{_PARAMETERS}/{name}", encoding="ascii") as file:
            if file.read().strip() != "N":
                raise Refused(f"the kernel's overlay has {name} enabled")


def main() -> None:
    options = json.loads(sys.argv[1])
    try:
        os.nice(10)
        if options["enter"]:
            userns.become_root()
        if options["overlay"].startswith("trusted."):
            _refuse_other_formats()  # a mount with `userxattr` has neither
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.umask(0)
        for part in options["parts"]:
            below = [os.open(one, _PLACE) for one in part["below"]]
            sources = [os.open(one, _FOLDER) for one in part["sources"]]
            os.mkdir(part["target"], 0o755)
            target = os.open(part["target"], _FOLDER)
            Merger(below, options["overlay"]).merge(sources, target)
            for fd in (*below, *sources, target):
                os.close(fd)
    except (OSError, Refused) as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit("there are too many files")


if __name__ == "__main__":
    main()
