"""The disk under the run folders: what makes thousands of short-lived small files cheap on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

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
