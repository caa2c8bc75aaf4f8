"""Removes an untrusted tree: never follows a link, and uses few descriptors at any depth. Standard library only."""

from __future__ import annotations

import errno
import os
import stat

_DEEPEST = 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str, *, keep_top: bool = False) -> None:
    """Remove the folder at `path` and everything below it; a missing one is no error. Finally raises the last OSError.

    keep_top: leave the folder itself, empty.
    """
    try:
        top = _open(path, None)
    except FileNotFoundError:
        return
    failures: list[OSError] = []
    try:
        _empty(top, failures)
    finally:
        os.close(top)
    if not keep_top:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise (failures[-1] if failures else error) from None
    elif failures:
        raise failures[-1]


def _open(name: str, parent: int | None) -> int:
    """Open a folder, after adding permissions that its owner removed."""
    try:
        fd = os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        _allow(name, parent)
        return os.open(name, _FOLDER, dir_fd=parent)
    if os.geteuid() != 0 and os.fstat(fd).st_mode & 0o700 != 0o700:
        try:
            os.fchmod(fd, 0o700)
        except OSError:
            pass
    return fd


def _allow(name: str, parent: int | None) -> None:
    """chmod 700 of an unreadable folder, by a descriptor that never refers to a link's target."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def _empty(top: int, failures: list[OSError]) -> None:
    """Depth first. Beyond `_DEEPEST` levels a folder is moved to the top, which bounds the number of descriptors."""
    stack: list[tuple[int, str, list[str]]] = [(top, "", _clear_files(top, failures))]
    moved = 0
    while stack:
        fd, name, folders = stack[-1]
        if not folders:
            stack.pop()
            if fd != top:
                os.close(fd)
                try:
                    os.rmdir(name, dir_fd=stack[-1][0])
                except OSError as error:
                    failures.append(error)
            continue
        child = folders.pop()
        if len(stack) >= _DEEPEST:
            moved += 1
            target = f".rock-removed-{moved}"
            try:
                os.rename(child, target, src_dir_fd=fd, dst_dir_fd=top)
                stack[0][2].append(target)
                continue
            except OSError:  # a folder of a lower overlay layer cannot be moved: descend into it
                pass
        try:
            inner = _open(child, fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(error)
            continue
        stack.append((inner, child, _clear_files(inner, failures)))


def _clear_files(fd: int, failures: list[OSError]) -> list[str]:
    """Unlink everything that is not a folder; returns the names of the folders."""
    folders = []
    with os.scandir(fd) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in names:
        if is_folder:
            folders.append(name)
            continue
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.EPERM) and _is_folder(name, fd):
                folders.append(name)
            else:
                failures.append(error)
    return folders


def _is_folder(name: str, fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except OSError:
        return False
