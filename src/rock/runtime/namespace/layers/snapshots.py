"""Snapshots of the namespace runtime: frozen upper folders, shared as layers (decision 45).

    <run_dir>/snapshots/ID/upper, /upperN   the written files: below /, and at the image's writable binds
                          /record.json      what it is; without it, it is hidden: only the layer of others
    <run_dir>/<slot>/record.json            "snapshots": the layers of a sandbox above its image, newest first
                    /switch                 a switch is in progress (launcher/switch.py)

A layer is removed with its last user: a snapshot with a record, or a sandbox, running or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rock import errors, faults
from rock.guest.init import process_tree
from rock.guest.init.remove import remove_tree
from rock.host import atomic_file, folders
from rock.images.records import Lease, RootFS
from rock.images.store import Images
from rock.runtime.base import Frozen, Handle
from rock.runtime.init.link import InitLink
from rock.runtime.namespace import records, retained
from rock.runtime.namespace.copies import Copies, refused
from rock.runtime.namespace.launcher import switch
from rock.runtime.namespace.layers.merges import Merges, PackerOptions, run_program
from rock.runtime.namespace.limits import disk_layout
from rock.runtime.namespace.processes import state
from rock.runtime.namespace.slots import Sandbox, Slots

log = logging.getLogger(__name__)
MOST_LAYERS = 64
_RESERVE = 512 << 20  # bytes of the disk that snapshots do not use
_COPY_PATIENCE = 600.0  # seconds
_MOST_KEYS = 100
_MOUNT_POINTS = ("proc", "sys", "dev")
_COPIER = str(Path(__file__).with_name("copier.py"))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot. layers: its own and those below it, newest first. rootfs: the image, see `retained.write_note`.
    identity: files that each new sandbox has new, or not at all: the machine id and the host keys of SSH. copied: see
    Frozen."""

    id: str
    sandbox: str
    rootfs: Mapping[str, Any]
    layers: Sequence[str]
    files: Literal["switch", "copy"]
    bytes: int | None
    left_out: Sequence[str]
    paused_ms: float
    identity: Sequence[str] = ()
    copied: Sequence[str] | None = None


class Snapshots:
    """The snapshots below the run folder of `slots`."""

    def __init__(self, slots: Slots, images: Images, memory: int, options: PackerOptions) -> None:
        """memory: see Copies. options: see Merges."""
        self._slots = slots
        self.copies = Copies(slots, memory)
        self._images = images
        self._known: dict[str, Snapshot] = {}
        self._layers = slots.layers  # also of starts and checkpoints in progress, under other names
        self._parents: dict[str, Sequence[str]] = {}  # by slot: the last snapshot, where that was a copy
        self._leases: dict[str, Lease | None] = {}  # by snapshot
        self._removing: set[asyncio.Task[None]] = set()
        self._again = self._collecting = False
        self.merges = Merges(slots.run_dir, self.make_folder, self._layers, self._collect, options)
        slots.removed.append(self._slot_removed)

    @property
    def _folder(self) -> Path:
        return self._slots.run_dir / records.SNAPSHOTS

    def folder(self, snapshot_id: str) -> str:
        """The folder of a snapshot's layer."""
        return records.layer(self._slots.run_dir, snapshot_id)

    # ---- start and end of the runtime ----

    def open(self) -> None:
        """Read the records, complete or undo interrupted switches, and remove unused layers. Blocking."""
        for slot in records.slots(self._slots.run_dir):
            self._settle(slot)
            layers = records.read(self._slots.run_dir, slot).get("snapshots", [])
            if layers:
                self._layers[slot] = [str(one) for one in layers]
        for name in self._names():
            try:
                data = atomic_file.parsed((self._folder / name / "record.json").read_bytes())
                self._known[name] = Snapshot(**data)
            except (OSError, ValueError, TypeError):  # hidden, or incomplete; a damaged one is hidden too
                continue
        for name, found in self._known.items():
            with contextlib.suppress(errors.ImageError):
                self._leases[name] = self._images.lease(retained.noted(found.rootfs))
        for name in self._unused():
            with contextlib.suppress(OSError):
                remove_tree(self.folder(name))

    async def close(self) -> None:
        """Release the leases; wait for removals."""
        await self.merges.close()
        await self.collected()
        for lease in self._leases.values():
            if lease is not None:
                lease.close()
        self._leases.clear()
        self._known.clear()
        self._layers.clear()

    def _settle(self, slot: str) -> None:
        """A crash came during a switch: the device number of the root tells whether it happened."""
        folder = f"{self._slots.run_dir}/{slot}"
        with contextlib.suppress(FileNotFoundError), open(f"{folder}/{switch.LOCK}", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until a template has completed it, or has ended
        try:
            with open(f"{folder}/{switch.JOURNAL}", encoding="utf-8") as file:
                journal = json.load(file)
            frozen, device, layers = str(journal["frozen"]), int(journal["device"]), journal.get("snapshots")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):  # written before anything else, so nothing has changed
            os.unlink(f"{folder}/{switch.JOURNAL}")
            return
        record = records.read(self._slots.run_dir, slot)
        try:
            switched = os.stat(f"/proc/{record.get('pid')}/root/").st_dev != device
        except OSError:
            switched = True  # it has ended: both states have the same files
        if process_tree.lives(int(record.get("pid") or 0), record.get("start")) and not switched:
            names = [name for name in sorted(os.listdir(frozen)) if name.startswith(("upper", "work"))]
            switch.undo_move(folder, frozen, names)
            log.warning("an interrupted snapshot of %s was undone", record.get("id"))
            return
        name, known = os.path.basename(frozen), record.get("snapshots", [])
        if name not in known:
            record["snapshots"] = [str(one) for one in layers] if layers else [name, *known]
            records.write(self._slots.run_dir, slot, record)
        os.unlink(f"{folder}/{switch.JOURNAL}")

    # ---- users of layers ----

    def note(self, slot: str, layers: Sequence[str]) -> None:
        """A sandbox with these layers exists."""
        if layers:
            self._layers[slot] = list(layers)

    @contextlib.contextmanager
    def using(self, layers: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """These layers are not removed in this context; the function that it gives claims them for a slot."""
        if not layers:
            yield lambda slot: None
            return
        place = f"new {secrets.token_hex(8)}"
        self._layers[place] = list(layers)
        try:
            yield lambda slot: self.note(slot, layers)
        finally:
            del self._layers[place]
            self._collect()

    def parent(self, slot: str) -> str | None:
        """The newest snapshot of which a sandbox has the files."""
        return next((one for one in self._parents.get(slot, self.layers(slot)) if one in self._known), None)

    def layers(self, slot: str) -> Sequence[str]:
        """The layers of a sandbox above its image, newest first."""
        return self._layers.get(slot, ())

    async def next_layers(self, slot: str) -> Sequence[str]:
        """The layers below the next snapshot of a sandbox: its own, merged where that is done."""
        if len(self.layers(slot)) >= MOST_LAYERS:
            await self.merges.settled(self.layers(slot))
        return self.merges.shortened(self.layers(slot))

    def users(self) -> dict[str, list[str]]:
        """Ids of all snapshots, with the slots of the sandboxes that use their layers."""
        found: dict[str, list[str]] = {name: [] for name in self._known}
        for slot, layers in self._layers.items():
            for one in layers if slot.startswith(records.SLOT_PREFIX) else ():
                if one in found:
                    found[one].append(slot)
        return found

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []

    def _unused(self) -> list[str]:
        used = {one for layers in self._layers.values() for one in layers}
        used.update(one for found in self._known.values() for one in found.layers)
        used |= self.merges.needed(used)
        return [name for name in self._names() if name not in used]

    def _slot_removed(self, slot: str) -> None:
        """A sandbox is gone: layers without another user are removed."""
        self._parents.pop(slot, None)
        if self._layers.pop(slot, None):
            self._collect()

    def _collect(self) -> None:
        """Remove unused layers in the background."""
        self._again = True
        if not self._collecting:
            self._collecting = True
            self._in_background(self._remove(), "unused layers")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def _remove(self) -> None:
        try:
            await self._remove_all()
            if not self._layers:  # else a checkpoint may be about to use it
                with contextlib.suppress(OSError):
                    os.rmdir(self._folder)
        finally:
            self._collecting = False  # without a pause since the last look: no request is missed

    async def _remove_all(self) -> None:
        while self._again:
            self._again = False
            for name in self._unused():
                try:
                    await asyncio.to_thread(remove_tree, self.folder(name))
                except OSError as error:  # the next start tries again
                    log.warning("layer %s could not be removed: %s", name, error)

    # ---- read ----

    def get(self, snapshot_id: str) -> Snapshot:
        """A snapshot. NotFound."""
        found = self._known.get(snapshot_id)
        if found is None:
            raise errors.NotFound(f"there is no snapshot {snapshot_id} on this worker",
                                  hint="its retention has ended, or it is on another worker: `rock snapshot ls`")
        return found

    def rootfs(self, snapshot_id: str) -> RootFS:
        """The image of a snapshot. NotFound."""
        return retained.noted(self.get(snapshot_id).rootfs)

    # ---- checkpoint ----

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         rootfs: RootFS, spec: dict[str, Any], link: InitLink | None,
                         continued: Callable[[], None]) -> Frozen:
        """See `Forks.checkpoint`. spec: of a create of this sandbox. link: of its pid 1, to copy its processes."""
        known = self._known.get(snapshot_id)
        if known is not None:
            return _report(handle, known)
        sandbox = self._slots.find(handle)
        layers = spec["snapshots"][1:]
        self._refuse(handle, layers)
        if link is not None and (files == "copy" or (reason := self.copies.refused())):
            raise refused(handle, ['files="copy" takes files alone' if files == "copy" else reason])
        folder = self.folder(snapshot_id)
        await self.collected()  # the remains of an earlier attempt
        if any(snapshot_id in used for used in self._layers.values()):  # it must not be replaced
            raise errors.Unavailable(f"an earlier attempt at snapshot {snapshot_id} ended after its files were frozen",
                                     sandbox_id=handle.id, hint="retry with another id")
        self._layers[f"new {snapshot_id}"] = [snapshot_id, *layers]  # it must not be collected meanwhile
        in_memory: asyncio.Task[list[str]] | None = None
        try:
            if os.path.lexists(folder):  # it could not be removed before
                await asyncio.to_thread(remove_tree, folder)
            self.make_folder(folder)
            in_memory = asyncio.create_task(asyncio.to_thread(_left_out, sandbox.pid))
            left_out: list[str] = []
            reasons: list[str] = []
            copied: Sequence[str] | None = None
            paused = -1.0
            used: Literal["switch", "copy"] = "copy"
            if files != "copy":
                reasons, paused, lost, copied = await self._switch(sandbox, spec, folder, link)
                left_out += lost
                if paused >= 0:
                    used = "switch"
                elif link is not None:
                    raise refused(handle, reasons)
                elif files == "switch":
                    raise errors.Unsupported(f"files cannot be switched: {'; '.join(reasons)}", sandbox_id=handle.id,
                                             hint='use files="copy", or "auto", which copies where that is necessary')
            if paused < 0:
                left_out += [f"the files were copied: {reason}" for reason in reasons]
                paused = await self._copy(sandbox, handle, folder)
            if used == "switch":
                self._layers[sandbox.slot] = [snapshot_id, *layers]
                await faults.point("namespace.checkpoint.switched")
                self._switched(sandbox, handle, [snapshot_id, *layers])
            continued()
            if link is not None:
                await self.copies.finish(snapshot_id, handle.id)
            await faults.point("namespace.checkpoint.frozen")
            made = Snapshot(snapshot_id, handle.id, retained.write_note(rootfs), [snapshot_id, *layers], used, None,
                            [*await in_memory, *left_out], round(paused * 1000, 3), copied=copied)
            made = await asyncio.to_thread(self._measured, made, rootfs)
        except BaseException as error:
            if in_memory is not None:
                in_memory.cancel()
            self._layers.pop(f"new {snapshot_id}", None)
            self.copies.forget(snapshot_id)
            self._collect()  # the layer stays while the sandbox runs on it
            if isinstance(error, OSError):
                raise atomic_file.not_kept(error, handle.id, "a snapshot") from None
            raise
        self._known[snapshot_id] = made
        self._in_background(asyncio.to_thread(_remove_work, folder), "unused work folders")
        self._parents[sandbox.slot] = made.layers
        self.merges.start(made.layers, rootfs)
        self._layers.pop(f"new {snapshot_id}", None)
        with contextlib.suppress(errors.ImageError):
            self._leases[snapshot_id] = self._images.lease(rootfs)
        return _report(handle, made)

    async def refusals(self, handle: Handle, spec: dict[str, Any], link: InitLink) -> Sequence[str]:
        """See `Forks.refusals`."""
        if reason := self.copies.refused():
            return [reason]
        sandbox = self._slots.find(handle)
        try:
            self._refuse(handle, spec["snapshots"][1:])
        except errors.Unsupported as error:
            return [error.message]
        reply = await self.copies.take(sandbox, spec, link, sandbox.slot, self._space(), dry=True)
        return [str(reason) for reason in reply.get("refused", [reply.get("error")])]

    def make_folder(self, folder: str) -> None:
        """Create the folder of a layer. OSError, also when little space is left, which running sandboxes need."""
        if self._space() <= 0:
            raise OSError(errno.ENOSPC, "less than 1 % of the disk, or 512 MiB, is left")
        if not self._folder.exists():
            self._folder.mkdir(mode=0o700, exist_ok=True)
            disk_layout.spread(str(self._folder))
        if os.path.lexists(folder):  # it could not be removed before
            remove_tree(folder)
        os.mkdir(folder, 0o700)

    def _space(self) -> int:
        """Bytes of the disk that snapshots may use."""
        info = os.statvfs(self._slots.run_dir)
        return (info.f_bavail - max(info.f_blocks // 100, _RESERVE // info.f_frsize)) * info.f_frsize

    def _refuse(self, handle: Handle, layers: Sequence[str]) -> None:
        if "disk" in handle.data:
            raise errors.Unsupported("a disk with a limit cannot be frozen", sandbox_id=handle.id,
                                     hint="create the sandbox without disk=")
        if len(layers) >= MOST_LAYERS:
            raise errors.Unsupported(f"the sandbox has {len(layers)} layers of snapshots: that is the most",
                                     sandbox_id=handle.id,
                                     hint="the log of the worker says why they are not merged; use files=\"copy\" for "
                                          "some, or commit it to an image and go on from that")

    async def _switch(self, sandbox: Sandbox, spec: dict[str, Any], folder: str, link: InitLink | None,
                      ) -> tuple[list[str], float, list[str], Sequence[str] | None]:
        """The reasons against a switch; else how long processes were stopped in seconds, those that were killed, and
        the keys of programs that were copied."""
        spec = {**spec, "pid": sandbox.pid, "start": sandbox.start, "frozen": folder}
        try:
            if link is None:
                reply = await self._slots.launcher.request("switch", spec)
            else:
                reply = await self.copies.take(sandbox, spec, link, os.path.basename(folder), self._space())
        except errors.RockError:  # the launcher ended in the middle: as after a crash of the server
            await asyncio.to_thread(self._settle, sandbox.slot)
            found = records.read(self._slots.run_dir, sandbox.slot).get("snapshots", [])
            sandbox.snapshots = self._layers[sandbox.slot] = [str(one) for one in found]
            raise
        if "refused" in reply:
            return list(reply["refused"]), -1.0, [], None
        if "error" in reply:
            if reply.get("errno") == errno.ESRCH:
                raise errors.Lost("the sandbox has ended")
            if reply.get("errno") == errno.ECHILD:  # the template was killed, perhaps in the middle
                await asyncio.to_thread(self._settle, sandbox.slot)
                found = records.read(self._slots.run_dir, sandbox.slot).get("snapshots", [])
                sandbox.snapshots = self._layers[sandbox.slot] = [str(one) for one in found]
                raise errors.Unavailable(f"the processes were not copied: {reply['error']}", hint="retry")
            return [str(reply["error"])], -1.0, [], None
        return [], float(reply["paused"]), list(reply["lost"]), reply.get("keys")

    def _switched(self, sandbox: Sandbox, handle: Handle, layers: Sequence[str]) -> None:
        """Record that the sandbox runs on its frozen files."""
        folder = f"{self._slots.run_dir}/{sandbox.slot}"
        sandbox.snapshots = self._layers[sandbox.slot] = list(layers)
        records.write(self._slots.run_dir, sandbox.slot, sandbox.record(handle.id))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{switch.JOURNAL}")

    async def _copy(self, sandbox: Sandbox, handle: Handle, folder: str) -> float:
        """Copy the written files while all processes are stopped; returns for how long."""
        slot = self._slots.run_dir / sandbox.slot
        link = InitLink.connect(slot, handle.id)  # separate: pid 1 continues them when it closes
        try:
            await link.request("pause")
            began = time.monotonic()
            await faults.point("namespace.checkpoint.stopped")
            await run_program(_COPIER, {"source": str(slot), "target": folder, "enter": os.geteuid() != 0},
                              "copied", _COPY_PATIENCE)
            return time.monotonic() - began
        finally:
            link.close()

    def _measured(self, made: Snapshot, rootfs: RootFS) -> Snapshot:
        size = disk_layout.written(f"{self.folder(made.id)}/upper")
        return self._complete(dataclasses.replace(made, bytes=size), rootfs)

    def _complete(self, made: Snapshot, rootfs: RootFS) -> Snapshot:
        """Record a snapshot. Unsupported, OSError. Blocking."""
        folder = Path(self.folder(made.id))
        refuse_mount_points(str(folder), made.sandbox)
        below = self._known.get(made.layers[1]) if len(made.layers) > 1 else None
        if below is not None and list(below.layers) == list(made.layers[1:]):  # its own names are known
            identity = _identity([f"{folder}/upper"], (), below.identity)
        else:
            identity = _identity([f"{self.folder(one)}/upper" for one in made.layers], rootfs.layers)
        made = dataclasses.replace(made, identity=identity)
        atomic_file.replace(folder / "record.json", atomic_file.summed(json.dumps(dataclasses.asdict(made))))
        return made

    async def add(self, made: Snapshot, rootfs: RootFS) -> None:
        """Record a snapshot whose layers were imported. OSError."""
        made = await asyncio.to_thread(self._complete, made, rootfs)
        self._known[made.id] = made
        with contextlib.suppress(errors.ImageError):
            self._leases[made.id] = self._images.lease(rootfs)

    # ---- delete ----

    async def drop(self, snapshot_id: str) -> bool:
        """Remove a snapshot; False when its layer is still used. Idempotent."""
        self.copies.forget(snapshot_id)
        if self._known.pop(snapshot_id, None) is None:
            return True
        for file in ("record.json", state.STATE, state.PAGES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.folder(snapshot_id)}/{file}")
        lease = self._leases.pop(snapshot_id, None)
        if lease is not None:
            lease.close()
        self._collect()
        await self.collected()
        return not os.path.lexists(self.folder(snapshot_id))

    async def collected(self) -> None:
        """Wait for the removal of unused layers."""
        if self._removing:
            await asyncio.gather(*self._removing)


def refuse_mount_points(folder: str, sandbox_id: str) -> None:
    """Raise Unsupported for a layer in which a mount point is not a folder. Blocking."""
    for name in _MOUNT_POINTS:
        path = f"{folder}/upper/{name}"
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise errors.Unsupported(f"/{name} of the sandbox is not a folder, so nothing can start from it",
                                     sandbox_id=sandbox_id, hint="restore it")  # fmt: skip


def _identity(frozen: Sequence[str], image: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """The machine id of the image or the layers, and host keys that were made in a sandbox, relative to /. known: those
    of layers below. Blocking."""
    machine = "etc/machine-id" in known or any("machine-id" in _names(layer, "etc") for layer in (*frozen, *image))
    keys = {f"etc/ssh/{name}" for layer in frozen for name in _names(layer, "etc/ssh") if name.startswith("ssh_host_")}
    keys.update(name for name in known if name.startswith("etc/ssh/"))
    return [*(["etc/machine-id"] if machine else []), *sorted(keys)[:_MOST_KEYS]]


def _names(layer: str, path: str) -> list[str]:
    """The names in a folder of a guest's layer; no link is followed."""
    with contextlib.suppress(OSError):
        top = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fd = folders.open_under(top, path, folders.NO_SYMLINKS | folders.BENEATH)
        finally:
            os.close(top)
        try:
            return os.listdir(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    return []


def _remove_work(folder: str) -> None:
    """Remove the work folders of a frozen layer, which would otherwise go with the layer. Blocking."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith("work"):
                remove_tree(f"{folder}/{name}")


def _report(handle: Handle, found: Snapshot) -> Frozen:
    return Frozen(handle, found.files, found.bytes, len(found.layers), found.paused_ms, list(found.left_out),
                  found.copied)


def _left_out(first: int) -> list[str]:
    """Files in memory, which no layer has."""
    with contextlib.suppress(OSError):
        info = os.statvfs(f"/proc/{first}/root/dev/shm")
        used = (info.f_blocks - info.f_bfree) * info.f_frsize
        if used:
            return [f"/dev/shm: {used} bytes in memory"]
    return []


def taken_file(first: int, start: int, path: str, most: int) -> bytes | None:
    """See `TakesFiles`. Only of the root's own file system, where no link and no file of another kind can delay the
    server or lead it out. first, start: pid 1."""
    folder, name = os.path.split(path)
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
        root = os.open(f"/proc/{first}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, root)
        if not process_tree.lives(first, start):  # another process has its number
            return None
        inside = folders.open_under(root, folder.lstrip("/"), folders.NO_XDEV | folders.NO_SYMLINKS | folders.BENEATH)
        opened.callback(os.close, inside)
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=inside)
        opened.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        parts, left = list[bytes](), most
        while left and (part := os.read(fd, min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
        os.unlink(name, dir_fd=inside)
        return b"".join(parts)
    return None


def has_copier() -> bool:
    """Whether this machine has the program that copies."""
    return shutil.which("cp", path=disk_layout.PATH) is not None
