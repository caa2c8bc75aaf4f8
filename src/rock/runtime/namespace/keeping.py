"""The files of a sandbox that does not run: what stays of its run folder, and what it needs to be used again.

    <run_dir>/<slot>/record.json     sandbox id, "resting"
                    /upper, /upperN  what it wrote: below /, and at the image's writable binds
                    /work, /workN    empty

A guest wrote `upper`, so nothing below it is opened by a path.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.remove import remove_tree
from rock.runtime.image.rootfs import Bind, RootFS
from rock.runtime.namespace import cgroups, records

_libc = ctypes.CDLL(None, use_errno=True)
_MOUNT_POINTS = ("proc", "sys", "dev")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN, _MOST_SEEN = 200, 100_000  # more than this of folders without a file is not what programs leave


def note(rootfs: RootFS) -> dict[str, Any]:
    """An image as plain data, for a handle: a sandbox is woken over the very layers that it was made over."""
    return {**asdict(rootfs), "env": dict(rootfs.env), "labels": dict(rootfs.labels),
            "other": dict(rootfs.other)}


def noted(data: Mapping[str, Any]) -> RootFS:
    """What `note` wrote."""
    words = ("layers", "entrypoint", "cmd")
    fields: dict[str, Any] = {name: tuple(value) if name in words else value for name, value in data.items()}
    fields["binds"] = tuple(Bind(**bind) for bind in data["binds"])
    return RootFS(**fields)


def record(id: str, slot: str) -> dict[str, Any]:
    """The record of a sandbox at rest."""
    return {"id": id, "slot": slot, "resting": True}


def make_empty(run_dir: Path, slot: str, id: str, rootfs: RootFS) -> None:
    """A run folder in which nothing was written yet, for files from elsewhere. Blocking."""
    folder = run_dir / slot
    folder.mkdir(mode=0o700)
    records.write(run_dir, slot, record(id, slot))
    for suffix in ("", *(str(index) for index, bind in enumerate(rootfs.binds) if bind.writable)):
        (folder / f"upper{suffix}").mkdir(mode=0o755)


def strip(run_dir: Path, slot: str, id: str, groups: list[str]) -> None:
    """Remove all but the files of a sandbox without processes, and bring these to the disk. Blocking, idempotent.

    Lost when there are no files; Unavailable when something stays that must not.
    """
    folder = run_dir / slot
    left = cgroups.remove(groups)
    if left:
        raise errors.Unavailable(f"cgroups of a stopped sandbox could not be removed: {', '.join(left)}", hint="retry")
    if not _is_folder(folder / "upper"):
        raise errors.Lost("its files are gone from its worker", sandbox_id=id)
    for name in ("s", "stopped"):
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    try:
        for name in sorted(os.listdir(folder)):
            if name.startswith("upper"):
                work = folder / f"work{name.removeprefix('upper')}"
                remove_tree(str(work))  # the kernel's notes on the mount that was; with them it takes no new one
                os.mkdir(work)
        records.write(run_dir, slot, record(id, slot))
        _sync(folder)
    except OSError as error:
        raise errors.Unavailable(f"the files of a stopped sandbox could not be put away: {error}",
                                 hint=f"look at {folder}; asking again tries again") from None


def refuse_unusable(folder: Path, id: str) -> None:
    """Lost when there are no files. StartFailed when the guest put something else where its file systems are mounted:
    the launcher would follow it."""
    if not _is_folder(folder / "upper"):
        raise errors.Lost("its files are gone from its worker", sandbox_id=id)
    for name in _MOUNT_POINTS:
        path = folder / "upper" / name
        if os.path.lexists(path) and not _is_folder(path):
            raise errors.StartFailed(f"its /{name} is no folder any more, so it cannot be started again", sandbox_id=id)


def refuse_written(places: Sequence[Mapping[str, str]]) -> None:
    """Unsupported when there is a file in one of these folders, which are for what was written below `target`. Folders
    and the caches of Python are passed over. Blocking."""
    for place in places:
        found = _first_file(os.open(place["folder"], _FOLDER))
        if found is not None:
            raise errors.Unsupported(
                f"{place['target']} is this machine's own, and what was written there cannot be part of an image: "
                f"{place['target']}/{ascii(found[-200:])[1:-1]}",
                hint=f"write elsewhere than below {place['target']}, or use an image that was imported or pulled")


def _first_file(top: int) -> str | None:
    """The name of something below a guest's folder, whose descriptor is closed."""
    todo, looked_at = [(top, "")], 0
    try:
        while todo:
            fd, path = todo.pop()
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        looked_at += 1
                        inner = f"{path}/{entry.name}" if path else entry.name
                        if not entry.is_dir(follow_symlinks=False) or len(todo) > _MOST_OPEN or looked_at > _MOST_SEEN:
                            return inner
                        if entry.name != "__pycache__":
                            todo.append((os.open(entry.name, _FOLDER, dir_fd=fd), inner))
            finally:
                os.close(fd)
    finally:
        for fd, _ in todo:
            os.close(fd)
    return None


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Overlay was told not to (`volatile`): what is at rest should survive the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) < 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(fd)
