"""The disk under the run folders: ext4 directory placement, disk images of sandboxes with a limit, and measured usage.

launcher/furnish.py mounts the disk images. `python -I -S disk_layout.py` adds up the files of sandboxes for
disk_watch.py: it reads a list of [folder, limit, [[pid, cgroup], ...], volume, volumes], see `Held`, and writes a line
[folder, bytes, seconds] for each, all as JSON. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEEPEST = 2050  # folders in each other: more than a path of 4,096 bytes can name
_NAME = 512  # bytes that a name counts, beside what it names
_MOST_SEEN, _MOST_OPEN = 20_000, 200
_GET_FLAGS, _SET_FLAGS, _TOP_OF_TREE = 0x80086601, 0x40086602, 0x20000


def spread(folder: str) -> None:
    """Distribute the folders below over the block groups of an ext4 without a journal; no effect elsewhere.

    Such a file system does not reuse inodes that were freed in the last minutes, and examines each of them for every
    new file of the same block group. At a hundred sandboxes per second that takes a third of all time.
    """
    with contextlib.suppress(OSError):
        if not _lacks_journal(folder):
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = struct.unpack("i4x", fcntl.ioctl(fd, _GET_FLAGS, bytes(8)))[0]
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("i4x", flags | _TOP_OF_TREE))
        finally:
            os.close(fd)


def _lacks_journal(folder: str) -> bool:
    device = os.stat(folder).st_dev
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    return Path(f"/sys/fs/ext4/{name}/journal_task").read_text().strip() == "<none>"


def make_file(slot: str, size: int, inodes: int) -> None:
    """Create the file system in a sparse file. Blocking; some 20 ms. OSError on failure."""
    program = shutil.which("mke2fs", path=PATH)
    if program is None:
        raise OSError(errno.ENOENT, "mke2fs (of e2fsprogs) is not installed")
    path = f"{slot}/disk"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)
    done = subprocess.run(
        [program, "-q", "-F", "-t", "ext4", "-m", "0", "-N", str(inodes), "-O", "^has_journal,^resize_inode",
         "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", path],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, env={"PATH": PATH}, check=False)
    if done.returncode:
        raise OSError(errno.EINVAL, f"mke2fs: {done.stderr.strip()[-300:]}")


def written(folder: str) -> int | None:
    """Bytes on disk below a guest's folder; None when the scan would take long, or fails. Blocking.

    Hard links are counted once per name.
    """
    total, looked_at = 0, 0
    todo: list[int] = []
    try:
        todo.append(os.open(folder, _FOLDER))
        while todo:
            fd = todo.pop()
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        looked_at += 1
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                        if looked_at > _MOST_SEEN or len(todo) > _MOST_OPEN:
                            return None
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(os.open(entry.name, _FOLDER, dir_fd=fd))
            finally:
                os.close(fd)
    except OSError:
        return None
    finally:
        for fd in todo:
            os.close(fd)
    return total


def deleted(pids: Iterable[int], counts: Callable[[int, str], bool] = lambda pid, name: True) -> int:
    """Bytes of deleted files that these processes hold open. Blocking. counts: whether to count the descriptor of a
    process."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    path = os.readlink(f"{folder}/{name}")
                    gone = path.endswith(" (deleted)") and not path.startswith(("/memfd:", "/dev/shm/"))
                    if gone and counts(pid, name):
                        file = os.stat(f"{folder}/{name}")
                        found[file.st_dev, file.st_ino] = file.st_blocks * 512
    return sum(found.values())


def _mounts_of(pid: int, volumes: Sequence[str]) -> set[str]:
    """The ids of the mounts of these volumes in the mount namespace of a process. A path would not do: a guest may
    rename the folders above a mount."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            number, _, _, root, *_ = line.split(" ")
            if any(root.endswith(f"/{volume}/data") for volume in volumes):
                found.add(number)
    return found


def _mount_of(pid: int, name: str) -> str:
    """The id of the mount of an open file."""
    for line in Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return line.split()[1]
    return ""


def _deleted(processes: Sequence[tuple[int, str]], only: str, without: Sequence[str]) -> int:
    """Bytes of deleted files that are still open, see `Held`."""
    total = 0
    for pid, group in processes:
        if not only and not without:
            total += deleted(_tree(pid, group))
            continue
        mounts = _mounts_of(pid, [only] if only else without)
        inside = bool(only)
        total += deleted(_tree(pid, group), lambda pid, name: (_mount_of(pid, name) in mounts) is inside)  # noqa: B023
    return total


def _tree(pid: int, group: str) -> list[int]:
    """The processes of a sandbox: those of its cgroup, or otherwise those below its pid 1."""
    if group:
        with contextlib.suppress(OSError):
            return [int(line) for line in Path(f"{group}/cgroup.procs").read_text().split()]
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        with contextlib.suppress(OSError):
            todo += [int(child) for child in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
    return found


def _whole(folder: str, limit: int) -> int:
    """Bytes below a folder, each file once plus a constant per name; stops above the limit. Follows no link."""
    total, linked = 0, set()
    todo: list[tuple[int, list[str]]] = [(os.open(folder, _FOLDER), [])]
    todo[0][1].extend(_names(todo[0][0]))
    while todo and total <= limit:
        fd, names = todo[-1]
        if not names:
            os.close(todo.pop()[0])
            continue
        name = names.pop()
        with contextlib.suppress(OSError):
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            total += _NAME
            if info.st_nlink < 2 or stat.S_ISDIR(info.st_mode) or info.st_ino not in linked:
                total += info.st_blocks * 512
            if len(todo) > _DEEPEST:  # no path reaches it, so it could hide its content
                total = limit + 1
            elif stat.S_ISDIR(info.st_mode):
                below = os.open(name, _FOLDER, dir_fd=fd)
                todo.append((below, _names(below)))
            elif info.st_nlink > 1:
                linked.add(info.st_ino)
    for fd, _ in todo:
        os.close(fd)
    return total


def _names(fd: int) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(fd)
    return []


def _see_all() -> None:
    """As an ordinary user: become root over one's own files, so that no mode of a folder hides its content."""
    uid, gid = os.geteuid(), os.getegid()
    if uid and ctypes.CDLL(None).unshare(0x10000000) == 0:  # CLONE_NEWUSER
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)


def main() -> None:
    os.nice(19)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Processes first: a sibling user namespace cannot access those of a sandbox.
    specs = [(folder, limit, _deleted(processes, only, without))
             for folder, limit, processes, only, without in json.load(sys.stdin)]
    with contextlib.suppress(OSError):
        _see_all()
    for folder, limit, removed in specs:
        started = time.monotonic()
        with contextlib.suppress(OSError):  # the folder is gone
            size = _whole(folder, limit) + removed
            sys.stdout.write(json.dumps([folder, size, time.monotonic() - started]) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
