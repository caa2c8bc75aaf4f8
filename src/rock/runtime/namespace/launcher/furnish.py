"""Builds a sandbox's mount namespace from outside: the launcher enters it, mounts everything, and returns.

    cgroups -> limits -> overlay -> new root -> /dev /proc /sys

The setup uses no memory of the sandbox's pid 1, which waits meanwhile. All mounts belong to the launcher's user
namespace, so processes inside cannot undo them. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any

from rock.guest.init import users
from rock.guest.init.link import Fault
from rock.runtime.namespace.launcher import kernel, mounts
from rock.runtime.namespace.limits import cgroups
from rock.runtime.namespace.network import NetworkPool


class HostNamespaces:
    """The original mount and network namespaces of the launcher."""

    def __init__(self, privileged: bool, nets: NetworkPool) -> None:
        self._nets = nets
        self._fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)  # its root is that of mounts.lift_host
        self._permitted = kernel.permitted()
        self._privileged = privileged
        self._empty = -1  # the network namespace that the shared /sys shows
        self.shared_sys = False  # whether there is one

    def share_sys(self, staging: str) -> None:
        """Mount a /sys for all sandboxes that have no device but loopback, which is all without the host's network.

        The kernel compares each new /sys with every other one, and counts it in each memory group. A /sys shows the
        devices of the network namespace of its mounting process, so this one shows an unused namespace.
        """
        if not self._nets.usable:
            return
        try:
            kernel.unshare(kernel.CLONE_NEWNET)
            kernel.loopback_up()
            self._empty = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            mounts.mount_sys(f"{staging}/sys")
            self.shared_sys = True
        except OSError:
            self.shared_sys = False
        finally:
            self._nets.back()

    def outside(self) -> None:
        """Enter the root of the launcher's namespace. The kernel denies new user namespaces to a process with another
        root; `mounts.enter_host` returns."""
        kernel.setns(self._fd, kernel.CLONE_NEWNS)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that `back` needs."""
        return self._fd, self._nets.home

    def enter(self, pid: int, owner: int, net: int | None) -> None:
        """Enter the namespaces of a process; new files belong to `owner` from then on. All rights are retained.

        net: the network namespace that the process will enter; -1 is its current one, None is the launcher's. A new
        /sys shows the devices of the mounting process's network namespace.
        """
        fd = os.pidfd_open(pid)
        try:
            kernel.setns(fd, kernel.CLONE_NEWNS | (kernel.CLONE_NEWNET if net == -1 and self._nets.usable else 0))
        finally:
            os.close(fd)
        if net is not None and net >= 0 and self._nets.usable:
            self._nets.enter(net)
        self.own(owner)

    def own(self, owner: int) -> None:
        """New files and mounts belong to `owner` from now on. All rights are retained."""
        if self._privileged:
            kernel.set_file_owner(owner)
            kernel.capset(self._permitted)

    def back(self) -> None:
        """Return to the original namespaces. After a failure the launcher cannot continue."""
        kernel.setns(self._fd, kernel.CLONE_NEWNS)
        mounts.enter_host()
        if self._nets.usable:
            self._nets.back()
        if self._privileged:
            kernel.set_file_owner(0)
            kernel.capset(self._permitted)


class Failure(Exception):
    """A failed step: its name, the reason, and an errno."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(f"{step}: {error}")
        self.number = error.errno or 0


def build(spec: dict[str, Any], pid: int, staging: str, namespace: int, home: HostNamespaces, proc: Callable[[], int],
          net: int) -> tuple[str, users.User] | None:
    """Build the mount namespace of `pid`, a waiting child. Returns the path and the user of its first program,
    where they are known. Failure names the step.

    namespace: its user namespace. proc: returns the detached /proc that the child created. net: see
    HostNamespaces.enter.
    """
    step, disk, opened, base = "run folder", -1, list[int](), -1
    try:
        if spec["disk"]:
            step = "disk"
            disk = mount_disk(spec["slot"], spec["disk"])
            spec = {**spec, "mounted": disk}
        mounts.make_folders(spec if disk < 0 else {**spec, "slot": f"/proc/self/fd/{disk}"})
        step = "cgroup"
        _limit(spec, pid)
        if spec["folders"]:
            step = "volumes and mounts"
            opened = mounts.open_folders(spec, namespace if spec["privileged"] else -1)
        step = "files"
        try:
            home.enter(pid, spec["base"], None if spec["network"] == "host" or home.shared_sys else net)
            base = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            mounts.enter_host()
            waiting = mounts.stack(spec, staging, namespace if spec["privileged"] else -1)
            shared_sys = home.shared_sys and spec["network"] != "host"
            if shared_sys:
                waiting.append((kernel.open_tree("sys"), "/sys"))
            waiting.append((proc(), "/proc"))  # until then the child needs its initial root
            mounts.switch(staging, base)
            mounts.furnish(spec, waiting, own_sys=not shared_sys)
            mounts.leave()
            if opened:
                step = "volumes and mounts"
                mounts.attach_folders(spec, opened)
                return None  # folders of others may cover its files: pid 1 finds it
            return _find_program(spec["program"]) if spec["program"] else None
        finally:
            home.back()
    except OSError as error:
        raise Failure(step, error) from None
    finally:
        mounts.close_folders(opened)
        for fd in (disk, base):
            if fd >= 0:
                os.close(fd)


def _limit(spec: dict[str, Any], pid: int) -> None:
    cgroups.join(spec["cgroups"], pid)
    cgroups.write_limits([(path, value) for path, value in spec["limits"]])
    if spec["affinity"]:
        os.sched_setaffinity(pid, spec["affinity"])
    if spec["processes"]:  # counted per user namespace, and the child enters one of its own
        resource.prlimit(pid, resource.RLIMIT_NPROC, (spec["processes"], spec["processes"]))
    for name, value in spec["rlimits"]:
        resource.prlimit(pid, name, (value, value))


def _find_program(program: dict[str, Any]) -> tuple[str, users.User] | None:
    """The path of the first program and its user, in the root of this process: the files of an image, before any
    program runs over them. None where pid 1 has to report what is missing."""
    with contextlib.suppress(OSError, Fault):
        path = next((one for one in program["paths"] if _is_executable(one)), None)
        return None if path is None else (path, users.find_in_image(program["user"] or "0"))
    return None


def _is_executable(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def explain(number: int) -> str:
    """The usual cause on a host of an errno in a step."""
    return {
        errno.EPERM: "this host does not allow it",
        errno.ENOSPC: "a limit of the host is reached: see user.max_*_namespaces in sysctl, or the disk is full",
        errno.EAGAIN: "the host has no process left for it",
        errno.ENOMEM: "the host or the memory limit has no memory left for it",
    }.get(number, "")


def bind(slot: str) -> socket.socket:
    """Bind the socket of a sandbox's pid 1 in its run folder. pid 1 itself listens, which identifies it (`find_init` in
    slots.py)."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{slot}/s")
    fd = os.open(slot, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(f"/proc/self/fd/{fd}/s")
        return listener
    finally:
        os.close(fd)


# ---- disk of a sandbox ----
#
# A dedicated disk for a sandbox with a disk limit: an ext4 image on a loop device, or a tmpfs.
#
#     loop   <slot>/disk, made by mke2fs in the server (disk_layout.py); the launcher mounts it. Requires root and a
#            loop device.
#     tmpfs  in memory, and part of the memory limit. Requires nothing, also as an ordinary user.
#
# It is mounted in the sandbox's mount namespace only and disappears with it, however the sandbox ends. No process
# inside can access the image or the device, so only the kernel has written the file system that it reads.

_SAFE = kernel.ATTR_NOSUID | kernel.ATTR_NODEV
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_AUTOCLEAR = 4
_TRIES = 16


def mount_disk(slot: str, disk: dict[str, Any]) -> int:
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
