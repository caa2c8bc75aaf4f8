"""Stopped sandboxes: retention of their files, their handles, restart, and transfer of the files as an archive.

    <run_dir>/<slot>/record.json     sandbox id, "resting"
                    /upper, /upperN  written files: below /, and at the image's writable binds
                    /work, /workN    empty

The guest wrote `upper`, so nothing below it is opened by a path. Handles are plain data, from which a later server
finds a sandbox again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init.remove import remove_tree
from rock.images.records import Bind, Lease, RootFS
from rock.images.store import Images
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig
from rock.runtime.base import Handle, Program
from rock.runtime.init.files import merged
from rock.runtime.init.link import InitLink
from rock.runtime.namespace import records
from rock.runtime.namespace.layers import packer_link
from rock.runtime.namespace.limits import cgroups
from rock.runtime.namespace.limits.disk_watch import Disks
from rock.runtime.namespace.slots import Sandbox, Slots, find_init, kill_init
from rock.runtime.process.runtime import wait_gone

# ---- retained files ----

_libc = ctypes.CDLL(None, use_errno=True)
_MOUNT_POINTS = ("proc", "sys", "dev")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN, _MOST_SEEN = 200, 100_000  # more empty folders than this do not come from ordinary programs


def write_note(rootfs: RootFS) -> dict[str, Any]:
    """An image as plain data, for a handle: a sandbox is restarted over exactly its original layers."""
    return {**asdict(rootfs), "env": dict(rootfs.env), "labels": dict(rootfs.labels),
            "other": dict(rootfs.other)}


def noted(data: Mapping[str, Any]) -> RootFS:
    """The image that `write_note` wrote."""
    words = ("layers", "entrypoint", "cmd")
    fields: dict[str, Any] = {name: tuple(value) if name in words else value for name, value in data.items()}
    fields["binds"] = tuple(Bind(**bind) for bind in data["binds"])
    return RootFS(**fields)


def record(id: str, slot: str, snapshots: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a stopped sandbox. snapshots: its layers above the image."""
    more = {"snapshots": list(snapshots)} if snapshots else {}
    return {"id": id, "slot": slot, "resting": True, **more}


def make_empty(run_dir: Path, slot: str, id: str, rootfs: RootFS) -> None:
    """Create an empty run folder, for files from an archive. Blocking."""
    folder = run_dir / slot
    folder.mkdir(mode=0o700)
    records.write(run_dir, slot, record(id, slot))
    for name, _ in records.written(rootfs):
        (folder / name).mkdir(mode=0o755)


def strip(run_dir: Path, slot: str, id: str, groups: list[str], layers: Sequence[str]) -> None:
    """Remove everything but the files of a sandbox without processes, and sync them to disk. layers: of snapshots, on
    which it runs. Blocking, idempotent.

    Lost when there are no files; Unavailable when something remains that must not.
    """
    folder = run_dir / slot
    left = cgroups.remove(groups)
    if left:
        raise errors.Unavailable(f"cgroups of a stopped sandbox could not be removed: {', '.join(left)}", hint="retry")
    if not _is_folder(folder / "upper"):
        raise errors.Lost("its files are gone from its worker", sandbox_id=id)
    for name in ("s", "stopped"):
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    try:
        for name in sorted(os.listdir(folder)):
            if name.startswith("upper"):
                work = folder / f"work{name.removeprefix('upper')}"
                remove_tree(str(work))  # the kernel's state of the former mount, which blocks a new mount
                os.mkdir(work)
        records.write(run_dir, slot, record(id, slot, layers))
        _sync(folder)
    except OSError as error:
        raise errors.Unavailable(f"the files of a stopped sandbox could not be put away: {error}",
                                 hint=f"look at {folder}; asking again tries again") from None


def refuse_unusable(folder: Path, id: str) -> None:
    """Raise Lost when there are no files. Raise StartFailed when the guest replaced a mount point of its file systems,
    which the launcher would follow."""
    if not _is_folder(folder / "upper"):
        raise errors.Lost("its files are gone from its worker", sandbox_id=id)
    for name in _MOUNT_POINTS:
        path = folder / "upper" / name
        if os.path.lexists(path) and not _is_folder(path):
            raise errors.StartFailed(f"/{name} of the stopped sandbox is not a folder, so it cannot start again",
                                     sandbox_id=id,
                                     hint="create a new sandbox; copy files out of this one with `rock cp` before a "
                                          "stop")


def refuse_written(places: Sequence[Mapping[str, str]]) -> None:
    """Raise Unsupported when one of these folders, which hold files written below `target`, contains a file. Folders
    and caches of Python are ignored. Blocking."""
    for place in places:
        found = _first_file(os.open(place["folder"], _FOLDER))
        if found is not None:
            raise errors.Unsupported(
                f"{place['target']} is this machine's own, and what was written there cannot be part of an image: "
                f"{place['target']}/{ascii(found[-200:])[1:-1]}",
                hint=f"write elsewhere than below {place['target']}, or use an image that was imported or pulled")


def _first_file(top: int) -> str | None:
    """The name of a file below a guest's folder, whose descriptor is closed."""
    todo, looked_at = [(top, "")], 0
    try:
        while todo:
            fd, path = todo.pop()
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        looked_at += 1
                        inner = f"{path}/{entry.name}" if path else entry.name
                        if not entry.is_dir(follow_symlinks=False) or len(todo) > _MOST_OPEN or looked_at > _MOST_SEEN:
                            return inner
                        if entry.name != "__pycache__":
                            todo.append((os.open(entry.name, _FOLDER, dir_fd=fd), inner))
            finally:
                os.close(fd)
    finally:
        for fd, _ in todo:
            os.close(fd)
    return None


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Sync the files: overlay does not (`volatile`), and retained files must survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) < 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(fd)


# ---- handles ----

RUNTIME = "namespace"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_NOTES = 100


def environment(rootfs: RootFS, config: SandboxConfig) -> dict[str, str]:
    """The environment of the programs of a sandbox."""
    return merged({"PATH": _PATH}, rootfs.env, config.env)


class Handles:
    """isolation: the level of sandboxes on this host. disk_limit: bytes for the files of a sandbox without a dedicated
    disk; 0 is no limit."""

    def __init__(self, slots: Slots, disks: Disks, disk_limit: int) -> None:
        self._disk_limit = disk_limit
        self.isolation = Isolation.NAMESPACES
        self._slots = slots
        self._disks = disks
        self._notes: dict[str, tuple[RootFS, dict[str, Any]]] = {}

    def of(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        """The handle of a living sandbox, under the name `id`."""
        data = {**sandbox.record(id), "env": environment(rootfs, config),
                "cwd": rootfs.cwd or "/", "user": rootfs.user, "memory": sandbox.memory or config.memory_bytes}
        # The value differs for a sandbox that can be retained, and its handle says so.
        data["rootfs" if config.keeps_files else "image"] = self._note(rootfs)
        if config.network == "nat":
            data["egress"] = config.egress
        enforced = self._slots.limiter.enforced()
        if config.disk is not None:
            data["disk"], enforced["disk"] = config.disk_bytes, self._disks.way
        elif self._disk_limit:
            data["disk_limit"], enforced["disk"] = self._disk_limit, "watched"
        else:
            enforced["disk"] = "none"
        if sandbox.volumes:
            data["volumes"] = sandbox.volumes
        if config.nofile is not None:
            data["nofile"], enforced["nofile"] = config.nofile, "rlimit"
        if config.shm_size is not None:
            enforced["shm_size"] = "tmpfs"
        return Handle(RUNTIME, id, self.isolation, enforced, data)

    def claimed(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        """The handle of a claimed pool member, with the limits of `config`."""
        sandbox.disk = self._disk_limit if config.disk is None else 0
        self._slots.slot_of[id] = sandbox.slot
        sandbox.memory = config.memory_bytes - self._disks.in_memory(config)
        if sandbox.link is not None:
            sandbox.link.sandbox_id = id
        return self.of(sandbox, id, rootfs, config)

    def _note(self, rootfs: RootFS) -> dict[str, Any]:
        """The image as immutable plain data; cached, because it takes 0.1 ms to build."""
        known = self._notes.get(rootfs.digest)
        if known is None or known[0] != rootfs:
            if len(self._notes) >= _MOST_NOTES:
                self._notes.clear()
            known = self._notes[rootfs.digest] = rootfs, write_note(rootfs)
        return known[1]

    def complete(self, handle: Handle, program: Program) -> Program:
        """The program with the handle's defaults for its open fields."""
        data = handle.data
        if (most := data.get("nofile")) is not None:
            program = replace(program, nofile=min(program.nofile or most, most))
        user = program.user
        if user is None and self.isolation == Isolation.NAMESPACES:  # otherwise there is one user only, root inside
            user = data["user"]
        return replace(program, env=merged(data["env"], program.env), cwd=program.cwd or data["cwd"], user=user or None)


# ---- stop and restart ----


class StoppedSandboxes:
    """Stops and restarts sandboxes with retained files, and holds the leases of their images.

    whole: see Merges; set when the runtime is made.
    """

    whole: Callable[[str, RootFS], AbstractAsyncContextManager[Path]]

    def __init__(self, slots: Slots, handles: Handles, images: Images) -> None:
        self._slots = slots
        self._handles = handles
        self._images = images
        self._leases: dict[str, Lease | None] = {}  # by slot

    def close(self) -> None:
        for slot in list(self._leases):
            self.let_go(slot)

    async def rest(self, handle: Handle, grace: float) -> Handle:
        """End the sandbox and retain its files; returns its new handle."""
        data, slot = handle.data, handle.data["slot"]
        if "rootfs" not in data:
            raise errors.Unsupported("the sandbox was created without retained files", sandbox_id=handle.id,
                                     hint="set auto_delete_seconds, the seconds of their retention, when you create it")
        if slot not in self._leases:  # before its pid 1 releases the lease; a removed image is reported at the restart
            with contextlib.suppress(errors.ImageError):
                self._leases[slot] = self._images.lease(noted(data["rootfs"]))
        self._slots.slot_of[handle.id] = slot
        pid, start = data.get("pid"), data.get("start")
        if pid is not None and grace > 0:
            await self._slots.stop(handle, grace)
        self._slots.forget(slot)
        for found in (pid, start) if pid is not None else None, find_init(self._slots.run_dir / slot):
            if found is not None:
                kill_init(*found)
                await wait_gone(*found)
        folders = self._slots.limiter.groups.folders(slot)
        try:
            layers = self._slots.layers.get(slot, ())
            await asyncio.to_thread(strip, self._slots.run_dir, slot, handle.id, list(folders.values()), layers)
        except errors.Lost:
            self.let_go(slot)
            raise
        if "base" in data:
            self._slots.ranges.give_back(data["base"], slot)
        kept = {"id": handle.id, "slot": slot, "cgroups": folders, "rootfs": data["rootfs"]}
        return Handle(RUNTIME, handle.id, handle.isolation, handle.enforced, kept)

    async def put_back(self, kept: Handle, base: int) -> None:
        """Undo a failed restart; the files stay. base: its uid range."""
        with contextlib.suppress(errors.RockError):  # the next restart or stop reports it
            await self.rest(kept, 0.0)
        self._slots.ranges.give_back(base, kept.data["slot"])

    def let_go(self, slot: str) -> None:
        """Release the lease of its image."""
        lease = self._leases.pop(slot, None)
        if lease is not None:
            lease.close()

    # ---- files ----

    async def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The written files, as a layer."""
        rootfs = noted(handle.data["rootfs"])
        async with self.whole(handle.data["slot"], rootfs) as folder:
            options = self.packer_options(packer_link.parts(folder, rootfs))
            async with contextlib.aclosing(packer_link.pack({**options, "limit": limit}, rootfs.digest)) as data:
                async for part in data:
                    yield part

    def image(self, handle: Handle) -> RootFS:
        """The original image."""
        note = handle.data.get("rootfs") or handle.data.get("image")
        if note is None:
            raise errors.Unsupported("the sandbox was created by an older server, which did not record its image",
                                     sandbox_id=handle.id, hint="create a new sandbox for this operation")
        return noted(note)

    async def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The files written so far, running or stopped; the sandbox is frozen meanwhile."""
        rootfs, folder = self.image(handle), self._slots.run_dir / handle.data["slot"]
        if "disk" in handle.data:
            raise errors.Unsupported("what is on a disk with a limit cannot be read from outside",
                                     sandbox_id=handle.id, hint="commit a sandbox that was made without disk=")
        async with contextlib.AsyncExitStack() as stack:
            if "pid" in handle.data:
                link = InitLink.connect(folder, handle.id)  # separate: pid 1 resumes when it closes
                stack.callback(link.close)
                await link.request("pause")
            places = packer_link.parts(await stack.enter_async_context(self.whole(folder.name, rootfs)), rootfs)
            await asyncio.to_thread(refuse_written, places[1:])
            data = packer_link.pack({**self.packer_options(places[:1]), "limit": limit}, rootfs.digest)
            async for part in await stack.enter_async_context(contextlib.aclosing(data)):
                yield part

    async def unpack(self, id: str, rootfs: RootFS, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        """Create a stopped sandbox from an archive. rootfs: the image below the files."""
        slots = self._slots
        slot = records.new_slot()
        folder = slots.run_dir / slot
        slots.making.add(slot)
        try:
            await asyncio.to_thread(make_empty, slots.run_dir, slot, id, rootfs)
            options = self.packer_options(packer_link.parts(folder, rootfs))
            await packer_link.unpack({**options, "size": files.size, "digest": files.digest}, data)
            plain = {"id": id, "slot": slot, "cgroups": {}, "rootfs": write_note(rootfs)}
            enforced = slots.limiter.enforced()
            return await self.rest(Handle(RUNTIME, id, self._handles.isolation, enforced, plain), 0.0)
        except BaseException:
            self.let_go(slot)
            await asyncio.shield(asyncio.to_thread(remove_tree, str(folder)))
            raise
        finally:
            slots.making.discard(slot)

    def packer_options(self, parts: list[dict[str, str]]) -> dict[str, Any]:
        """As root, files have their owners' ids as seen inside. Otherwise all belong to the server's user, and to root
        inside."""
        privileged = self._handles.isolation == Isolation.NAMESPACES
        return {"parts": parts, "enter": os.geteuid() != 0, "one_owner": not privileged,
                "overlay": "trusted.overlay." if privileged else "user.overlay."}
