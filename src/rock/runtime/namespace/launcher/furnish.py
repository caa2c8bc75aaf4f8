"""Builds a sandbox's mount namespace from outside: the launcher enters it, mounts everything, and returns.

    cgroups -> limits -> overlay -> new root -> /dev /proc /sys

The setup uses no memory of the sandbox's pid 1, which waits meanwhile. All mounts belong to the launcher's user
namespace, so processes inside cannot undo them. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

from rock.runtime.namespace.launcher import kernel, mounts
from rock.runtime.namespace.limits import cgroups, disk_quota
from rock.runtime.namespace.network import NetworkPool


class HostNamespaces:
    """The original mount and network namespaces of the launcher."""

    def __init__(self, privileged: bool, nets: NetworkPool) -> None:
        self._nets = nets
        self._fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._permitted = kernel.permitted()
        self._privileged = privileged

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
        if self._privileged:
            kernel.set_file_owner(owner)
            kernel.capset(self._permitted)

    def back(self) -> None:
        """Return to the original namespaces. After a failure the launcher cannot continue."""
        kernel.setns(self._fd, kernel.CLONE_NEWNS)
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
          net: int) -> None:
    """Build the mount namespace of `pid`, a waiting child. Failure names the step.

    namespace: its user namespace. proc: returns the detached /proc that the child created. net: see
    HostNamespaces.enter.
    """
    step, disk = "run folder", -1
    try:
        if spec["disk"]:
            step = "disk"
            disk = disk_quota.mount(spec["slot"], spec["disk"])
            spec = {**spec, "mounted": disk}
        mounts.make_folders(spec if disk < 0 else {**spec, "slot": f"/proc/self/fd/{disk}"})
        step = "cgroup"
        _limit(spec, pid)
        step = "files"
        try:
            home.enter(pid, spec["base"], None if spec["network"] == "host" else net)
            waiting = mounts.stack(spec, staging, namespace if spec["privileged"] else -1)
            waiting.append((proc(), "/proc"))  # until then the child needs its initial root
            mounts.switch(staging)
            mounts.furnish(spec, waiting)
            mounts.leave()
        finally:
            home.back()
    except OSError as error:
        raise Failure(step, error) from None
    finally:
        if disk >= 0:
            os.close(disk)


def _limit(spec: dict[str, Any], pid: int) -> None:
    cgroups.join(spec["cgroups"], pid)
    cgroups.write_limits([(path, value) for path, value in spec["limits"]])
    if spec["affinity"]:
        os.sched_setaffinity(pid, spec["affinity"])
    if spec["processes"]:  # counted per user namespace, and the child enters one of its own
        resource.prlimit(pid, resource.RLIMIT_NPROC, (spec["processes"], spec["processes"]))
    for name, value in spec["rlimits"]:
        resource.prlimit(pid, name, (value, value))


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
