"""The run folder of a sandbox, made and removed in a few system calls. Standard library only.

Few files, as some disks are slow with them: `s` is pid 1's socket, `upper` and `work` are the overlay's.
"""

from __future__ import annotations

import contextlib
import os

# What is in it when nothing was written inside; `work` is the kernel's, out of a sandbox's reach.
_FILES = ("s", "record.json", "work/work/incompat/volatile/dirty")
_FOLDERS = ("work/work/incompat/volatile", "work/work/incompat", "work/work", "work", "upper")


def make(folder: str) -> None:
    """Fill a new run folder."""
    os.mkdir(f"{folder}/upper", 0o755)
    os.mkdir(f"{folder}/work")


def remove(folder: str) -> bool:
    """Remove it without looking what is in it; False when there is more, or it cannot be removed."""
    try:
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{folder}/{name}")
        for name in _FOLDERS:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(f"{folder}/{name}")
        os.rmdir(folder)
    except OSError:
        return False
    return True
