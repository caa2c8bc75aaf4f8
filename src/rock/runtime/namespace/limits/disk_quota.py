"""A disk of its own for a sandbox that has a limit: an ext4 in a file, by a loop device, or a tmpfs.

    loop   <slot>/disk, made by mke2fs in the server (disk_layout.py); the launcher mounts it. Takes root and a loop
    device. tmpfs  in memory, and so part of the memory limit. Takes nothing, as an ordinary user neither.

It is mounted in the sandbox's mount namespace alone and goes with that, however the sandbox ends. Nobody inside reaches
the file or the device, so the file system that the kernel reads was written by the kernel. Standard library only.
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
    """The disk as a detached mount. In the launcher. disk: way, bytes, inodes."""
    if disk["way"] == "tmpfs":
        options = {"size": str(disk["bytes"]), "nr_inodes": str(disk["inodes"]), "mode": "755"}
        return kernel.new_mount("tmpfs", options, _SAFE)
    device, name = _attach(f"{slot}/disk")
    try:
        return kernel.new_mount("ext4", {"source": name, "errors": "remount-ro"}, _SAFE)
    finally:
        os.close(device)


def _attach(path: str) -> tuple[int, str]:
    """A loop device over a file, which lets go of it when its last user does: its descriptor and its name."""
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
                if error.errno != errno.EBUSY:  # somebody else took it in between
                    raise
        raise OSError(errno.EBUSY, "no loop device is free")
    finally:
        os.close(backing)
        if control >= 0:
            os.close(control)
