"""A dedicated disk for a sandbox with a disk limit: an ext4 image on a loop device, or a tmpfs.

    loop   <slot>/disk, made by mke2fs in the server (disk_layout.py); the launcher mounts it. Requires root and a loop
           device.
    tmpfs  in memory, and part of the memory limit. Requires nothing, also as an ordinary user.

It is mounted in the sandbox's mount namespace only and disappears with it, however the sandbox ends. No process inside
can access the image or the device, so only the kernel has written the file system that it reads. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

from rock.runtime.namespace.launcher import kernel

_SAFE = kernel.ATTR_NOSUID | kernel.ATTR_NODEV
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_AUTOCLEAR = 4
_TRIES = 16


def mount(slot: str, disk: dict[str, Any]) -> int:
    """The disk as a detached mount. Runs in the launcher. disk: mechanism, bytes, inodes."""
    if disk["way"] == "tmpfs":
        options = {"size": str(disk["bytes"]), "nr_inodes": str(disk["inodes"]), "mode": "755"}
        return kernel.new_mount("tmpfs", options, _SAFE)
    device, name = _attach(f"{slot}/disk")
    try:
        return kernel.new_mount("ext4", {"source": name, "errors": "remount-ro"}, _SAFE)
    finally:
        os.close(device)


def _attach(path: str) -> tuple[int, str]:
    """A loop device over a file, detached after its last use: its descriptor and its name."""
    backing = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    control = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _GET_FREE)
            name = f"/dev/loop{number}"
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            spec = struct.pack("=II", backing, 0) + struct.pack("=5Q4I", 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR)
            try:
                fcntl.ioctl(device, _CONFIGURE, spec.ljust(304, b"\0"))
                return device, name
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process took it in between
                    raise
        raise OSError(errno.EBUSY, "no loop device is free")
    finally:
        os.close(backing)
        if control >= 0:
            os.close(control)
