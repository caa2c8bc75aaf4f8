"""Freezes the written files of a running sandbox as a layer: its root becomes a new overlay above them.

    stop all processes -> look -> move the folders -> new overlays -> pivot_root -> repair each process -> continue

Nothing has changed when `switch` refuses or fails before `pivot_root`. decision 45. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rock.guest.init import process_tree
from rock.host import folders
from rock.runtime.namespace.launcher import furnish, kernel, mounts, process_files, ptrace
from rock.runtime.namespace.launcher.process_files import Found

JOURNAL = "switch"
LOCK = "switching"  # held during a switch by a process that outlives the launcher
_PATIENCE = 0.25  # seconds in which all processes have to be stopped, and again in which they have to be examined
_MOST_FILES = 2000
_OPEN, _CLOSE, _LSEEK, _CHDIR, _DUP3, _FCNTL = 2, 3, 8, 80, 292, 72  # x86_64
_SEEK_SET = 0
_URGENT = -15  # niceness while the processes of a sandbox are stopped


class Refused(Exception):
    """The sandbox has something that a switch cannot preserve. args: the reasons."""


def switch(spec: dict[str, Any], staging: str, namespace: int, home: furnish.HostNamespaces,
           between: Callable[[ptrace.Stopped], None] | None = None) -> dict[str, Any]:
    """Switch a sandbox. spec: as of a create, with the layers that it has afterwards; `pid`, `start`, and `frozen`, the
    folder that receives the written files. between: called while all processes are stopped, before any change.
    Refused, OSError."""
    entry = process_tree.read(spec["pid"])
    if entry is None or entry.start != spec["start"]:
        raise ProcessLookupError(errno.ESRCH, "its pid 1 has ended")
    if not spec["privileged"]:
        raise Refused("the server is not root, so it cannot stop pid 1 of a sandbox from outside")
    if not ptrace.SUPPORTED:
        raise Refused("this machine's processor is not supported")
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    lowers = _attach_lowers(spec, staging, namespace, home)
    stopped, began = ptrace.Stopped(), time.monotonic()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _URGENT)
    try:
        _stop(stopped, spec["pid"], began + _PATIENCE)
        replaced, others = _replaced(spec)
        found = _look(stopped.pids, spec["pid"], replaced, began + 2 * _PATIENCE)
        _rehearse(found)
        if between is not None:
            between(stopped)
        with _moved(spec):
            _mount(spec, staging, namespace, home, set(replaced.values()), others, lowers)
        lost = [reason for one in found if (reason := _repair(one))]
    finally:
        stopped.release()
        os.close(lowers)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, usual)
    return {"paused": time.monotonic() - began, "lost": lost, "processes": len(found) - 1}


def _stop(stopped: ptrace.Stopped, first: int, end: float) -> None:
    """Stop every process of the sandbox, parents first, until none is new."""
    try:
        stopped.seize([first], end)
        while stopped.seize(descendants(stopped.pids), end):
            if time.monotonic() > end:
                raise ptrace.NotStopped("new processes appear faster than they can be stopped")
    except ptrace.NotStopped as error:
        raise Refused(str(error)) from None


def descendants(pids: Sequence[int]) -> list[int]:
    """The living children of these processes, and of those in turn."""
    found, known = list[int](), set(pids)
    for pid in (todo := list(pids)):
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
                    fresh = [int(child) for child in file.read().split()]
                found += [child for child in fresh if child not in known]
                todo += [child for child in fresh if child not in known]
                known.update(fresh)
    return found


def _replaced(spec: dict[str, Any]) -> tuple[dict[int, str], list[str]]:
    """The mounts that get a new overlay, the root and the writable binds, as targets by number; and the targets of the
    other mounts directly below the root."""
    known = process_files.mounts(spec["pid"])
    root = process_files.mount_of(f"/proc/{spec['pid']}/root")
    if not any(one.number == root and one.kind == "overlay" for one in known):
        raise Refused("its root is not an overlay")
    writable = {bind["target"] for bind in spec["binds"] if bind["writable"]}
    replaced, others = {root: "/"}, []
    for one in known:
        if one.parent == root and one.kind == "overlay" and one.target in writable:
            replaced[one.number] = one.target
        elif one.parent == root:
            others.append(one.target)
    if set(replaced) & {one.parent for one in known if one.parent != root}:
        raise Refused("something is mounted below a folder of the machine that it may write to")
    return replaced, others


def _look(pids: Sequence[int], first: int, replaced: Mapping[int, str], end: float) -> list[Found]:
    own = os.readlink(f"/proc/{first}/ns/mnt")
    try:
        found = [process_files.look(pid, first, replaced, own, end) for pid in pids]
    except process_files.TooLong as error:
        raise Refused(str(error)) from None
    if sum(len(one.files) for one in found) > _MOST_FILES:
        raise Refused(f"more than {_MOST_FILES} files are open")
    problems = [problem for one in found for problem in one.problems]
    problems += process_files.own_filters(process_files.filters(pids), first)
    problems += process_files.shared(found)
    problems += process_files.bound_sockets(first, {inode for one in found for inode in one.sockets})
    if problems:
        raise Refused(*problems[:20])
    return found


# ---- processes ----


def _rehearse(found: Sequence[Found]) -> None:
    """Have each process open its files again, without effect: a refusal comes before any change."""
    for one in found:
        if not one.folder and not one.files:
            continue
        try:
            with ptrace.Injection(one.pid) as process:
                if one.folder:
                    fd = process.call(_OPEN, process.text(os.fsencode(one.folder)), os.O_PATH | os.O_DIRECTORY, 0)
                    process.call(_CLOSE, fd)
                for file in one.files:
                    if file.alike < 0:
                        _open_again(process, file)
        except OSError as error:
            raise Refused(f"process {one.pid} cannot open its files again: {error.strerror or error}") from None


def _open_again(process: ptrace.Injection, file: process_files.OpenFile) -> None:
    """Open a file as the repair will, and close it. Refused if its path leads to another file, as below a mount."""
    fd = process.call(_OPEN, process.text(os.fsencode(file.path)), file.flags | os.O_NONBLOCK, 0)
    try:
        found, known = (os.stat(f"/proc/{process.pid}/fd/{number}") for number in (fd, file.number))
        if (found.st_dev, found.st_ino) != (known.st_dev, known.st_ino):
            raise Refused(f"process {process.pid} has an open file whose path {file.path[:200]!r} leads to another one")
    finally:
        process.call(_CLOSE, fd)


def _repair(one: Found) -> str:
    """Lead its working directory and its files to the new mounts. A process for which that fails is killed: it would
    write to the frozen files. Returns the reason, or ""."""
    if not one.folder and not one.files:
        return ""
    try:
        with ptrace.Injection(one.pid) as process:
            if one.folder:
                process.call(_CHDIR, process.text(os.fsencode(one.folder)))
            for file in one.files:
                close_on_exec = file.flags & os.O_CLOEXEC
                if file.alike >= 0:
                    process.call(_DUP3, file.alike, file.number, close_on_exec)
                    continue
                fd = process.call(_OPEN, process.text(os.fsencode(file.path)), file.flags, 0)
                if file.offset and not file.flags & os.O_PATH:
                    process.call(_LSEEK, fd, file.offset, _SEEK_SET)
                process.call(_DUP3, fd, file.number, close_on_exec)
                process.call(_CLOSE, fd)
        return ""
    except OSError as error:
        with contextlib.suppress(OSError):
            os.kill(one.pid, 9)
        return f"process {one.pid} was killed: its files could not be opened again ({error.strerror or error})"


# ---- files ----


@contextlib.contextmanager
def _moved(spec: dict[str, Any]) -> Iterator[None]:
    """The written files are in `frozen`, and the run folder has empty folders; undone when the body fails. The journal
    names both states for a server that starts after a crash."""
    slot, frozen = spec["slot"], spec["frozen"]
    device = os.stat(f"/proc/{spec['pid']}/root/").st_dev
    journal = {"frozen": frozen, "device": device, "snapshots": spec["snapshots"]}
    mounts.write_file(f"{slot}/{JOURNAL}", json.dumps(journal))
    names = [name for name in sorted(os.listdir(slot)) if name.startswith(("upper", "work"))]
    moved: list[str] = []
    try:
        for name in names:
            os.rename(f"{slot}/{name}", f"{frozen}/{name}")
            moved.append(name)
            os.mkdir(f"{slot}/{name}", 0o755 if name.startswith("upper") else 0o700)
            if name.startswith("upper"):
                mounts.copy_owner(f"{frozen}/{name}", f"{slot}/{name}")
        yield
    except BaseException:
        undo_move(slot, frozen, moved)
        raise


def undo_move(slot: str, frozen: str, names: Sequence[str]) -> None:
    """Put the written files back. OSError."""
    for name in names:
        if os.path.isdir(f"{frozen}/{name}"):
            with contextlib.suppress(FileNotFoundError):
                _remove_empty(f"{slot}/{name}")
            os.rename(f"{frozen}/{name}", f"{slot}/{name}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{slot}/{JOURNAL}")


def _remove_empty(folder: str) -> None:
    """Remove a folder in which only the kernel has made folders: a work folder that was mounted."""
    for path in (f"{folder}/work/incompat/volatile/dirty",):
        with contextlib.suppress(OSError):
            os.unlink(path)
    for path in (f"{folder}/work/incompat/volatile", f"{folder}/work/incompat", f"{folder}/work", f"{folder}/index"):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    os.rmdir(folder)


# ---- mounts ----


def _attach_lowers(spec: dict[str, Any], staging: str, namespace: int, home: furnish.HostNamespaces) -> int:
    """A mount namespace with the layers below the one that will be frozen, for `_overlays`: its descriptor. It needs no
    stopped process. OSError."""
    kernel.unshare(kernel.CLONE_NEWNS)
    try:
        home.own(spec["base"])
        mounts.attach_lowers(spec, staging, namespace)
        return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        home.back()


def _mount(spec: dict[str, Any], staging: str, namespace: int, home: furnish.HostNamespaces, replaced: set[str],
           others: Sequence[str], lowers: int) -> None:
    """Put the new overlays in place of the old ones. OSError; then nothing has changed."""
    trees = _overlays(spec, staging, namespace, home, replaced, lowers)
    try:
        home.enter(spec["pid"], spec["base"], None)
        try:
            _exchange(trees, others)
        finally:
            home.back()
    finally:
        for fd in trees.values():
            os.close(fd)


def _overlays(spec: dict[str, Any], staging: str, namespace: int, home: furnish.HostNamespaces,
              replaced: set[str], lowers: int) -> dict[str, int]:
    """The new overlays as detached mounts, by target. They are made in a mount namespace that disappears again."""
    kernel.setns(lowers, kernel.CLONE_NEWNS)
    try:
        mounts.enter_host()
        home.own(spec["base"])
        return mounts.stack_written(spec, staging, namespace, replaced - {"/"})
    finally:
        home.back()


def _exchange(trees: Mapping[str, int], others: Sequence[str]) -> None:
    """In the mount namespace of the sandbox: attach the new root, move the other mounts to it, and pivot."""
    root, moved = trees["/"], list[tuple[int, str]]()
    with contextlib.ExitStack() as opened:

        def place(tree: int, target: str, *, mounted: bool = False) -> int:
            fd = folders.open_place(tree, target, mounted=mounted)
            opened.callback(os.close, fd)
            return fd

        old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, old)
        sources = [(place(old, target, mounted=True), target) for target in others]
        targets = [place(root, target) for target in others]
        spots = {target: place(root, target) for target in trees if target != "/"}
        kernel.move_mount(root, "/")
        try:
            for target, spot in spots.items():
                kernel.move_mount(trees[target], "", spot)
            for (fd, target), spot in zip(sources, targets, strict=True):
                kernel.move_mount(fd, "", spot)
                moved.append((fd, target))
            os.fchdir(root)
            kernel.pivot_root(".", ".")
        except BaseException:
            for fd, target in reversed(moved):
                kernel.move_mount(fd, "", place(old, target))
            os.fchdir(root)
            kernel.umount(".", kernel.MNT_DETACH)
            raise
    with contextlib.suppress(OSError):  # the switch is done; the old root then stays below the new one, unreachable
        mounts.leave()
