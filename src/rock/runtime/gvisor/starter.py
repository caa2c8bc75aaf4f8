"""Starter of one gVisor sandbox: mounts its file system in a mount namespace of its own, then executes runsc.

    join cgroups -> own mount and network namespace -> overlay -> binds -> runsc run

Run by its path, `python -I -S starter.py JSON`. Standard library only. Errors are written to the file `failure`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import contextlib
import json
from typing import Any

from rock.runtime.namespace.launcher import kernel, mounts
from rock.runtime.namespace.limits import cgroups

_SAFE = kernel.ATTR_NOSUID | kernel.ATTR_NODEV


def mount(spec: dict[str, Any]) -> None:
    """Mount the image over the sandbox's own files, at `root`."""
    folder, root = str(spec["slot"]), str(spec["root"])
    os.setgroups([])
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    mounts.make_folders(spec)
    mounts.overlay(root, list(spec["layers"]), f"{folder}/upper", f"{folder}/work", rootless=False)
    waiting = [(_detached(bind, index, folder), str(bind["target"])) for index, bind in enumerate(spec["binds"])]
    if (child := os.fork()) == 0:
        os._exit(_attach(root, waiting))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, f"a folder of the image cannot be mounted: {os.strerror(abs(status))}")
    for fd, _ in waiting:
        os.close(fd)


def _detached(bind: dict[str, Any], index: int, folder: str) -> int:
    source = str(bind["source"])
    if bind["public"] and os.path.isdir(source):  # gVisor reads as root
        public = f"{folder}/public{index}"
        os.mkdir(public)
        kernel.mount("rock", public, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=64k")
        os.chdir(public)  # the mounting process can traverse neither the server's folders nor the source
        for name in ("source", "nothing", "public"):
            os.mkdir(name)
        fd = kernel.open_tree(source)
        kernel.move_mount(fd, "source")
        os.close(fd)
        mounts.mount_public("source", "public", "nothing", 0)
        source = f"{public}/public"
    if bind["writable"] and os.path.isdir(bind["source"]):
        spot = f"{folder}/bind{index}"
        os.mkdir(spot)
        mounts.overlay(spot, [source], f"{folder}/upper{index}", f"{folder}/work{index}", rootless=False)
        fd = kernel.open_tree(spot)
        kernel.umount(spot, kernel.MNT_DETACH)
        return fd
    fd = kernel.open_tree(source)
    kernel.set_attributes(fd, _SAFE | kernel.ATTR_RDONLY, private=True)
    return fd


def _attach(root: str, waiting: list[tuple[int, str]]) -> int:
    """Mount in a child whose root is the sandbox's, so that no link of the image redirects a mount; returns an
    errno."""
    try:
        os.chroot(root)
        os.chdir("/")
        for fd, target in waiting:
            kernel.move_mount(fd, target)
    except OSError as error:
        return error.errno or 1
    return 0


def main() -> None:
    """Execute runsc; does not return."""
    spec = json.loads(sys.argv[1])
    try:
        for group in spec["cgroups"]:
            cgroups.write(f"{group}/cgroup.procs", str(os.getpid()))
        mount(spec)
        os.execve(spec["command"][0], spec["command"], {"PATH": str(spec["path"])})
    except OSError as error:
        with contextlib.suppress(OSError), open(f"{spec['slot']}/failure", "w") as file:
            file.write(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)


if __name__ == "__main__":
    main()
