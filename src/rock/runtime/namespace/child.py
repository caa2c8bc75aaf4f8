"""What a child of the launcher does to become pid 1 of a sandbox. Standard library only.

    cgroups -> network -> overlay -> new root -> /dev /proc /sys -> user namespace -> few capabilities, seccomp -> init

All mounts are made before the user namespace is entered, so they belong to its parent and nothing inside can undo them.
Until it is ready, the child dies with the launcher; afterwards it outlives it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import signal
import socket
from typing import Any

from rock.guest import init as guest_init
from rock.guest import syscalls
from rock.runtime.namespace import cgroups, kernel, mounts, userns

# chown, dac_override, fowner, fsetid, kill, setgid, setuid, net_bind_service, sys_chroot
CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 23, 24, 38
_PR_CAP_AMBIENT, _CLEAR_ALL = 47, 4
_LAST_CAPABILITY = int(cgroups.read_text("/proc/sys/kernel/cap_last_cap") or 40)
_OVERFLOW_UID = int(cgroups.read_text("/proc/sys/kernel/overflowuid") or 65534)


class Step:
    """What is being done, for the error's text."""

    def __init__(self) -> None:
        self.name = "start"


def live(spec: dict[str, Any], staging: str, namespace: int, bpf: bytes, ready: int) -> None:
    """Become the sandbox's pid 1; never returns. `ready` gets one line of JSON: {} or {"error", "errno"}."""
    step = Step()
    try:
        init = _build(spec, staging, namespace, bpf, ready, step)
        kernel.prctl(_PR_SET_PDEATHSIG, 0)
        os.dup2(0, 2)  # pid 1 holds no file of the host
        os.write(ready, b"{}")
        os.close(ready)
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) else 0
        text = f"{step.name}: {error}" if isinstance(error, OSError) else f"{step.name}: {error!r}"
        with contextlib.suppress(OSError):
            os.write(ready, json.dumps({"error": text[:1000], "errno": number}).encode())
        os._exit(1)
    try:
        init.run()
    finally:
        os._exit(0)


def _build(spec: dict[str, Any], staging: str, namespace: int, bpf: bytes, ready: int,
           step: Step) -> guest_init.Init:
    kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    step.name = "run folder"
    listener = _listen(spec["slot"])
    _redirect(f"{spec['slot']}/log")
    mounts.make_folders(spec)
    step.name = "cgroup"
    _limit(spec)
    step.name = "network"
    if spec["network"] == "none":
        _wire()
    with contextlib.suppress(OSError):
        socket.sethostname(spec["hostname"])
    with contextlib.suppress(OSError):
        cgroups.write("/proc/sys/kernel/shmall", str(spec["shared"] // resource.getpagesize()))
    step.name = "files"
    privileged = spec["privileged"]
    if privileged and namespace >= 0:
        kernel.set_file_owner(spec["base"])
        kernel.capset((1 << (_LAST_CAPABILITY + 1)) - 1 & _permitted())
    waiting = mounts.stack(spec, staging, namespace if privileged else -1)
    mounts.switch(staging)
    mounts.furnish(spec, waiting)
    mounts.leave()
    step.name = "user namespace"
    if privileged and namespace >= 0:
        kernel.setns(namespace, kernel.CLONE_NEWUSER)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        server = _OVERFLOW_UID
    elif privileged:
        server = 0
    else:
        kernel.unshare(kernel.CLONE_NEWUSER)
        userns.become_root(0, 0)
        server = 0
    if spec["processes"]:  # counted in the user namespace, so it counts this sandbox alone
        resource.setrlimit(resource.RLIMIT_NPROC, (spec["processes"], spec["processes"]))
    step.name = "init"
    init = guest_init.prepare(listener, server, outside=True)
    step.name = "privileges"
    _drop_privileges(bpf)
    step.name = "descriptors"
    _close_others({0, 1, 2, ready, *init.descriptors()})
    gc.freeze()
    return init


def _listen(slot: str) -> socket.socket:
    fd = os.open(slot, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(f"/proc/self/fd/{fd}/s")
        listener.listen(16)
        return listener
    finally:
        os.close(fd)


def _redirect(log: str) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0, inheritable=True)
    os.dup2(null, 1, inheritable=True)
    os.close(null)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2, inheritable=True)
    os.close(fd)


def _limit(spec: dict[str, Any]) -> None:
    if spec["cgroups"]:
        cgroups.join(spec["cgroups"])
        cgroups.write_limits([(path, value) for path, value in spec["limits"]])
        kernel.unshare(kernel.CLONE_NEWCGROUP)
    if spec["affinity"]:
        os.sched_setaffinity(0, spec["affinity"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wire() -> None:
    """Loopback up, and ports and pings for everybody: uid 0 inside has no rights over the network namespace."""
    kernel.loopback_up()
    for name, value in (("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 2147483647")):
        with contextlib.suppress(OSError):
            cgroups.write(f"/proc/sys/net/ipv4/{name}", value)


def _permitted() -> int:
    for line in cgroups.read_text("/proc/self/status").splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _drop_privileges(bpf: bytes) -> None:
    for number in range(_LAST_CAPABILITY + 1):
        if not CAPABILITIES >> number & 1:
            kernel.prctl(_PR_CAPBSET_DROP, number)
    kernel.capset(CAPABILITIES & _permitted())
    with contextlib.suppress(OSError):
        kernel.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL)
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if bpf:
        kernel.seccomp(bpf)


def _close_others(keep: set[int]) -> None:
    """Nothing of the launcher's stays open in here."""
    lowest = 0
    for fd in [*sorted(keep), None]:
        if fd is None:
            syscalls.close_range(lowest, 0xFFFFFFFF)
        elif fd > lowest:
            syscalls.close_range(lowest, fd - 1)
        lowest = lowest if fd is None else fd + 1


def explain(number: int) -> str:
    """What an error number of a step usually means on a host."""
    return {
        errno.EPERM: "this host does not allow it",
        errno.ENOSPC: "a limit of the host is reached: see user.max_*_namespaces in sysctl, or the disk is full",
        errno.EAGAIN: "the host has no process left for it",
        errno.ENOMEM: "the host or the memory limit has no memory left for it",
    }.get(number, "")
