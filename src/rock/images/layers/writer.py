"""Writes one layer into a folder from untrusted entries.

- The kernel resolves every name with the layer's folder as its root (openat2, RESOLVE_IN_ROOT): no `..`, absolute name
  or symbolic link leads out of it, and a hard link can only refer to a file of the same layer.
- Deleted files (`.wh.NAME`) become overlay's whiteouts, character devices 0:0, which ordinary users may create too;
  opaque folders (`.wh..wh..opq`) get overlay's attribute, in its `user.` form and as root also in its `trusted.` form.
- Device nodes are omitted and counted: a sandbox has its own /dev.
- As root, owner, mode, times and `user.` attributes are preserved (file capabilities are not). As an ordinary user, all
  files belong to that user, who is root inside; modes are widened so that the owner can read files, and enter and empty
  folders.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from rock.errors import ImageError
from rock.images.layers.blobs import Bounds
from rock.images.layers.tar_reader import DAMAGED, Entry, Kind, TarReader

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_OPEN_FOLDERS = 128
_DEEPEST = 256
_LAST_SECOND = (1 << 34) - 1  # the latest time of ext4
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _How(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_inside(root: int, path: bytes, flags: int) -> int:
    """Open `path` with the folder `root` as the root directory; OSError as of open(2)."""
    how = _How(flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _ in range(16):
        fd = _syscall(_SYS_OPENAT2, ctypes.c_int(root), ctypes.c_char_p(path), ctypes.byref(how),
                      ctypes.c_size_t(ctypes.sizeof(how)))
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number != errno.EAGAIN:  # the kernel lost a race with a rename elsewhere: retry
            break
    raise OSError(number, os.strerror(number), os.fsdecode(path))


def parts_of(path: bytes) -> list[bytes]:
    """A name's components below the root of a layer; ImageError when one of them is `..`."""
    parts = [p for p in path.split(b"/") if p not in (b"", b".")]
    if b".." in parts or b"\0" in path:
        raise ImageError(f"the archive has an entry outside of its root: {os.fsdecode(path)!r}",
                         hint="make the archive with relative names and without `..`")
    if len(parts) > _DEEPEST or any(len(p) > 255 for p in parts):
        raise ImageError(f"the archive has a name that is too long or too deep: {os.fsdecode(path)[:80]!r}...",
                         hint=f"use names of at most 255 bytes, and at most {_DEEPEST} folders deep")
    return parts


class LayerWriter:
    """Writes entries below `folder`, which is empty and private. bounds: limits their number; the bytes of an archive
    are counted where they are unpacked.

    After `finish`, `size` is the sum of the files' bytes, `whiteouts` is true if the layer deletes files of the layers
    below, and `skipped` counts device nodes.
    """

    def __init__(self, folder: str, bounds: Bounds | None = None) -> None:
        self.folder = folder
        self.bounds = bounds or Bounds()
        self.size = 0
        self.whiteouts = False
        self.skipped = 0
        self._root_user = os.geteuid() == 0
        self._open: dict[bytes, int] = {}
        self._folders: dict[bytes, Entry] = {}
        self._root = os.open(folder, _FOLDER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._forget()
        os.close(self._root)

    def add_all(self, tar: TarReader) -> None:
        """Write every entry of a tar stream."""
        while (entry := tar.next()) is not None:
            self.add(entry, tar.data())

    def add(self, entry: Entry, data: Iterable[bytes | memoryview] = ()) -> None:
        """Write one entry; `data` is a file's content, of exactly `entry.size` bytes."""
        self.bounds.take(entries=1)
        parts = parts_of(entry.path)
        if not 0 <= entry.uid < 0xFFFFFFFF or not 0 <= entry.gid < 0xFFFFFFFF:
            raise ImageError(f"the archive has an invalid owner {entry.uid}:{entry.gid} of {os.fsdecode(entry.path)!r}",
                             hint="make the archive with user and group ids from 0 to 4294967294")
        entry.mtime = min(max(entry.mtime, 0), _LAST_SECOND * 10**9)
        if not parts:
            if entry.kind is Kind.FOLDER:
                self._folders[b""] = entry
            return
        parent, name = self._parent(parts[:-1], entry), parts[-1]
        if name.startswith(_WHITEOUT):
            self._whiteout(parent, name, entry)
        elif entry.kind is Kind.FOLDER:
            self._folder(parent, name, b"/".join(parts), entry)
        elif entry.kind is Kind.DEVICE:
            self.skipped += 1
        else:
            try:
                self._make(parent, name, entry, data)
            except FileExistsError:
                self._clear(parent, name)
                self._make(parent, name, entry, data)

    def finish(self) -> None:
        """Apply owner, mode and time of folders, which must be last, the innermost first."""
        self._forget()
        for path, entry in sorted(self._folders.items(), key=lambda item: -item[0].count(b"/") - bool(item[0])):
            try:
                fd = open_inside(self._root, path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue  # a later entry replaced it
                raise
            try:
                self._dress(fd, entry, entry.mode if self._root_user else entry.mode | 0o700)
            finally:
                os.close(fd)

    # ---- paths ----

    def _parent(self, parts: list[bytes], entry: Entry) -> int:
        path = b"/".join(parts)
        fd = self._open.get(path)
        if fd is not None:
            return fd
        if not parts:
            return self._root
        if len(self._open) >= _OPEN_FOLDERS:
            self._forget()
        try:
            fd = open_inside(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            above = self._parent(parts[:-1], entry)
            self.bounds.take(entries=1)
            try:
                os.mkdir(parts[-1], 0o755, dir_fd=above)
            except FileExistsError:
                raise _no_parent(entry) from None  # a symbolic link without a target
            os.chmod(parts[-1], 0o755, dir_fd=above)
            fd = open_inside(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                raise _no_parent(entry) from None
            raise
        self._open[path] = fd
        return fd

    def _forget(self, but: int = -1) -> None:
        for fd in self._open.values():
            if fd != but:
                os.close(fd)
        self._open = {path: fd for path, fd in self._open.items() if fd == but}

    def _clear(self, parent: int, name: bytes) -> None:
        """Remove the existing entry at `name`: a later entry of an archive wins."""
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            self._forget(but=parent)  # some of them may be below the removed entry
            shutil.rmtree(os.fsdecode(name), dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)

    # ---- entries ----

    def _folder(self, parent: int, name: bytes, path: bytes, entry: Entry) -> None:
        self._folders[path] = entry
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                return
            self._clear(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
            if is_whiteout(info):
                self._opaque(parent, name)

    def _make(self, parent: int, name: bytes, entry: Entry, data: Iterable[bytes | memoryview]) -> None:
        if entry.kind is Kind.FILE:
            self._file(parent, name, entry, data)
            return
        if entry.kind is Kind.HARDLINK:
            self._hardlink(parent, name, entry)
            return
        if entry.kind is Kind.SYMLINK:
            os.symlink(entry.target, name, dir_fd=parent)
        else:
            os.mkfifo(name, 0o600, dir_fd=parent)
            os.chmod(name, entry.mode & 0o777, dir_fd=parent)
        if self._root_user:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)

    def _file(self, parent: int, name: bytes, entry: Entry, data: Iterable[bytes | memoryview]) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            for part in data:
                while part:
                    part = part[os.write(fd, part) :]
            self._dress(fd, entry, entry.mode if self._root_user else entry.mode | 0o400)
        finally:
            os.close(fd)
        self.size += entry.size

    def _hardlink(self, parent: int, name: bytes, entry: Entry) -> None:
        *above, last = parts_of(entry.target) or [b""]
        try:
            folder = open_inside(self._root, b"/".join(above) or b".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            raise _no_target(entry) from None
        try:
            os.link(last, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise _no_target(entry) from None
        finally:
            os.close(folder)

    def _whiteout(self, parent: int, name: bytes, entry: Entry) -> None:
        if name == _OPAQUE:
            self._opaque(parent, None)
            return
        if name.startswith(_WHITEOUT + _WHITEOUT):
            return  # bookkeeping of aufs
        name = name.removeprefix(_WHITEOUT)
        if name in (b"", b".", b".."):
            raise ImageError(f"the archive has a deletion mark without a name: {os.fsdecode(entry.path)!r}",
                             hint=DAMAGED)
        self.whiteouts = True
        try:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
        except FileExistsError:  # replaced in the same layer
            if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                self._opaque(parent, name)
        except PermissionError:
            raise ImageError("this host does not let an ordinary user make whiteouts (character device 0:0), which "
                             "images with deleted files need", hint="start the server as root") from None

    def _opaque(self, parent: int, name: bytes | None) -> None:
        fd = os.open(name if name is not None else b".", _FOLDER, dir_fd=parent)
        try:
            os.setxattr(fd, "user.overlay.opaque", b"y")
            if self._root_user:
                with suppress(PermissionError):  # root of a container may lack the right
                    os.setxattr(fd, "trusted.overlay.opaque", b"y")
        finally:
            os.close(fd)
        self.whiteouts = True

    def _dress(self, fd: int, entry: Entry, mode: int) -> None:
        if self._root_user:
            os.fchown(fd, entry.uid, entry.gid)
        for name, value in entry.xattrs.items():
            # user.overlay.* would control overlay itself; security.* and trusted.* would grant rights
            if name.startswith("user.") and not name.startswith("user.overlay."):
                os.setxattr(fd, os.fsencode(name), value)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(entry.mtime, entry.mtime))


def is_whiteout(info: os.stat_result) -> bool:
    """Whether a file is overlay's mark of a deleted name."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _no_parent(entry: Entry) -> ImageError:
    return ImageError(f"the archive puts {os.fsdecode(entry.path)!r} below an entry that is not a folder", hint=DAMAGED)


def _no_target(entry: Entry) -> ImageError:
    return ImageError(f"the archive has a hard link {os.fsdecode(entry.path)!r} to {os.fsdecode(entry.target)!r}, "
                      "which is not a file of the same layer", hint=DAMAGED)
