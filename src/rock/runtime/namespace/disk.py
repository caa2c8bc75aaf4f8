"""The disk under the run folders: what makes thousands of short-lived small files cheap on it, the files that hold the
disks of sandboxes with a limit (quota.py mounts them), and what was written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_SEEN, _MOST_OPEN = 20_000, 200
_GET_FLAGS, _SET_FLAGS, _TOP_OF_TREE = 0x80086601, 0x40086602, 0x20000


def spread(folder: str) -> None:
    """Have the folders below put all over an ext4 without a journal; nothing elsewhere.

    Such a file system does not use the inodes again that were given up in the last minutes, and looks at each of them
    for every new file of the same block group: at a hundred sandboxes a second that takes a third of all time.
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
    """The file system in a file, sparse. Blocking; some 20 ms. OSError when it cannot be made."""
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
    """Bytes on disk of all below a guest's folder; None where that would take long, or cannot be read. Blocking.

    Hard links count as often as they are found.
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
