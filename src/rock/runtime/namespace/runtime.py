"""Runtime "namespace": sandboxes from Linux namespaces, created by a launcher process, with our own pid 1 in each.

    create -> admission -> image -> warm pool, or the launcher (factory.py) -> record -> Handle
    spawn, files, ports -> pid 1 (runtime/init/files.py)      destroy -> kill pid 1, cgroups, folder (slots.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rock import errors
from rock.guest.init import process_tree
from rock.guest.init.programs import FIRST_KEY
from rock.host import swapping
from rock.images.records import RootFS
from rock.images.store import Images
from rock.protocol.action import ConnectionList
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig, Usage
from rock.runtime.base import FolderMount, Frozen, Handle, Liveness, MountSource, Process, Program, Trait
from rock.runtime.init.files import InitSandboxes
from rock.runtime.init.link import InitLink
from rock.runtime.namespace import admission, retained
from rock.runtime.namespace.admission import Kind
from rock.runtime.namespace.copies import CopiesEnded
from rock.runtime.namespace.egress_sockets import EgressSockets
from rock.runtime.namespace.factory import Factory, RetainedFiles
from rock.runtime.namespace.launcher import userns
from rock.runtime.namespace.launcher.link import LaunchLink
from rock.runtime.namespace.layers.snapshots import Snapshot, Snapshots, taken_file
from rock.runtime.namespace.layers.transfer import LayerTransfer
from rock.runtime.namespace.limits import disk_layout, limiter
from rock.runtime.namespace.limits.disk_watch import Disks, DiskWatch, Held
from rock.runtime.namespace.limits.limiter import MemoryWatch
from rock.runtime.namespace.pools import Pool
from rock.runtime.namespace.retained import RUNTIME, Handles, StoppedSandboxes
from rock.runtime.namespace.slots import Ending, Sandbox, Slots
from rock.runtime.pools import FirstProgram, PoolState, PoolTarget, Prepared
from rock.runtime.process.runtime import wait_gone


def _quarter() -> int:
    """A quarter of the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


_HELLOS = 6  # requests to a live pid 1 after a restart, 10 s each, before it counts as gone
_RECENT = 0.02  # seconds for which a check counts for the create after it
_POOL = SandboxConfig(image="pool", memory="1g", cpus=1.0)  # limits of unclaimed pool members


class NamespaceRuntime(InitSandboxes):
    """The embedded default. `run_dir` holds one folder per sandbox; pool_size 0 disables the warm pool. disk_limit:
    bytes for the files of a sandbox without `disk`; 0 is no limit. native: False starts pid 1 and programs by fork, as
    where the compiled extension (guest/init/native.py) is missing."""

    name = RUNTIME
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.NAMESPACES: frozenset(Trait),
        Isolation.USERNS: frozenset(Trait) - {Trait.USERS},
    }

    def __init__(self, run_dir: Path, pool_size: int, images: Images, resolvers: Sequence[str] = (),
                 disk_limit: int = 0, *, native: bool = True, snapshot_memory: int | None = None) -> None:
        self._run_dir = Path(os.path.realpath(run_dir))
        self._egress = EgressSockets(self._run_dir, resolvers)
        self._images = images
        self._native = native
        self._slots = Slots(self._run_dir, self._egress)
        self._disks = Disks(self._try_disk)
        self._handles = Handles(self._slots, self._disks, disk_limit)
        self._factory = Factory(self._slots, self._disks, images)
        self._stopped = StoppedSandboxes(self._slots, self._handles, images)
        self._snapshots = Snapshots(
            self._slots, images, _quarter() if snapshot_memory is None else snapshot_memory,
            self._stopped.packer_options)
        self._stopped.whole = self._snapshots.merges.whole
        self._layer_transfer = LayerTransfer(self._snapshots, self._stopped.packer_options)
        self._pool: Pool[Kind, Sandbox] = Pool(pool_size, self._prepare, self._slots.discard, self._usable)
        self._watch = MemoryWatch("namespace", lambda: {
            sandbox.pid: (sandbox.memory, sandbox.count_kill)
            for sandbox in self._slots.live.values() if sandbox.memory})  # fmt: skip
        self._disk_watch = DiskWatch(self._measured)
        self._disk_limit = disk_limit
        self.mount_source: MountSource | None = None
        self._opened = False
        self._known_images: dict[str, Kind] = {}
        self._checked: tuple[SandboxConfig, Kind, float] | None = None  # by `check`, for the create that follows it
        self._shared_pools: dict[str, str] = {}  # names of pools that have the members of another one
        self.isolation = Isolation.NAMESPACES
        self.prepare: Callable[[Handle], Awaitable[Prepared | None]] | None = None
        self.first_of: Callable[[str, SandboxConfig], FirstProgram | None] = lambda snapshot_id, config: None

    # ---- lifecycle of the runtime ----

    async def open(self) -> None:
        if self._opened:
            return
        await self._slots.open()
        await asyncio.to_thread(self._snapshots.open)
        try:
            await self._choose_level()
        except BaseException:
            await self._slots.close()
            raise
        self._egress.found(await self._slots.launcher.request("wired", {}))
        self._opened = True
        if self._slots.limiter.enforced()["memory"] == "watched":
            self._watch.start()
        if self._disk_limit or self.mount_source is not None:
            self._disk_watch.start()

    def _measured(self) -> list[Held]:
        volumes = [] if self.mount_source is None else self._slots.measured_volumes(self.mount_source)
        return [*self._slots.measured(), *volumes]

    async def _choose_level(self) -> None:
        """Start a test sandbox to detect the isolation level; as root, fall back to a lower level."""
        shapes = [(True, Isolation.NAMESPACES), (False, Isolation.USERNS)] if os.geteuid() == 0 else \
            [(False, Isolation.USERNS)]
        reasons = []
        for privileged, isolation in shapes:
            options = {"privileged": privileged, "staging": str(self._run_dir / "staging"), "native": self._native}
            launcher = LaunchLink(options, self._run_dir / "launcher.log", self._factory.spares.append)
            self._slots.launcher = launcher
            self.isolation = self._handles.isolation = isolation
            self._slots.ranges.limited = privileged
            try:
                await launcher.start()
                await self._try_one()
                return
            except errors.RockError as error:
                launcher.close()
                reasons.append(f"{isolation.value}: {error.message}")
        raise errors.Unsupported("this host cannot run the namespace runtime: " + "; ".join(reasons),
                                 hint="`rock doctor` tells what is missing. ROCK_RUNTIME=landlock is weaker, and needs "
                                      "none; the process runtime isolates nothing: both must be asked for by name")

    @property
    def most_sandboxes(self) -> int | None:
        """How many can exist at once, by the user ids of this container; None is no such limit."""
        return userns.IDS.most if self._slots.ranges.limited else None

    async def _try_disk(self, way: str) -> None:
        await self._try_one("16m", way)

    async def _try_one(self, size: str | None = None, way: str = "") -> None:
        layer = self._run_dir / "probe"
        for name in ("proc", "sys", "dev", "tmp", "etc"):
            (layer / name).mkdir(parents=True, exist_ok=True)
        config = SandboxConfig(image="probe", memory="64m", cpus=0.5, disk=size)
        self._disks.trying = way
        made = await self._factory.make("", Kind.of(RootFS("probe", (str(layer),)), config), config)
        await self._slots.discard(made)

    # ---- pools ----

    def resize_pool(self, size: int | None) -> None:
        self._pool.resize(size)

    async def define_pools(self, targets: Sequence[PoolTarget], budget: int) -> Mapping[str, PoolState]:
        wanted: dict[Kind, tuple[str, int, int]] = {}
        failed: dict[str, PoolState] = {}
        self._shared_pools = {}
        for one in targets:
            try:
                kind = await self._admit(one.config)
            except errors.RockError as error:
                failed[one.name] = PoolState(error=error.message)
                continue
            name, minimum, maximum = wanted.get(kind, (one.name, one.minimum, one.maximum))
            wanted[kind] = name, max(minimum, one.minimum), max(maximum, one.maximum)
            if name != one.name:
                self._shared_pools[one.name] = name
        self._pool.define(wanted, budget)
        return {**self.pool_states(), **failed}

    def pool_states(self) -> Mapping[str, PoolState]:
        found = self._pool.states()
        return found | {name: found[of] for name, of in self._shared_pools.items() if of in found}

    async def close(self) -> None:
        await self._watch.close()
        await self._disk_watch.close()
        await self._pool.close()
        await self._egress.close()
        self._factory.close()
        self._stopped.close()
        await self._snapshots.close()
        self._slots.let_go_of_all()
        if self._opened:
            self._slots.launcher.close()
            self._opened = False
            self._factory.spares.clear()
            await self._slots.close()

    # ---- create ----

    async def check(self, config: SandboxConfig) -> None:
        kind = await self._admit(config)
        self._checked = config, kind, time.monotonic()

    async def _admitted(self, config: SandboxConfig) -> Kind:
        """The result of a check of this config that no other create has used, if it is recent; else a new one."""
        checked, self._checked = self._checked, None
        if checked is not None and checked[0] is config and time.monotonic() - checked[2] < _RECENT \
                and not (config.has_mounts or config.snapshot or config.disk):
            return checked[1]
        return await self._admit(config)

    async def _admit(self, config: SandboxConfig) -> Kind:
        self._refuse(config)
        if config.disk is not None:
            await self._disks.choose(config)
        await self._folders(config)
        if config.snapshot is not None:
            if config.disk is not None:
                raise errors.Unsupported("snapshot and disk: the files of a snapshot are not on a disk with a limit",
                                         hint="leave disk unset")
            return Kind.of(self._snapshots.rootfs(config.snapshot), config)
        return await self._kind(config)

    async def _folders(self, config: SandboxConfig) -> Sequence[FolderMount]:
        """The volumes and host folders of a sandbox. NotFound, Forbidden, InvalidConfig, StorageFull, Unsupported."""
        if not config.has_mounts:
            return ()
        if self.mount_source is None:
            raise errors.Unsupported("this runtime has no volumes and folders to mount", hint="leave them unset")
        return await self.mount_source.resolve(config)

    def _refuse(self, config: SandboxConfig) -> None:
        admission.refuse_unsupported(config, self.isolation, self._egress.networks, why=self._egress.missing)
        admission.refuse_too_large(config)

    async def _kind(self, config: SandboxConfig) -> Kind:
        if config.image in self._known_images:
            rootfs = self._images.resolve(config.image)
        else:  # it may have to be built first
            rootfs = await asyncio.to_thread(self._images.resolve, config.image)
        kind = self._known_images[config.image] = Kind.of(rootfs, config)
        return kind

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        kind = await self._admitted(config)
        special = config.disk is not None or config.nofile is not None or config.shm_size is not None \
            or config.has_mounts
        sandbox = None if special else self._pool.claim(kind, recent=config.snapshot is None)
        if sandbox is not None:
            try:
                self._slots.limiter.apply(sandbox.slot, sandbox.pid, config, _POOL)
            except OSError as error:
                await self._slots.discard(sandbox)
                raise errors.StartFailed(f"the limits of the sandbox cannot be set: {error}", sandbox_id=id,
                                         hint="check the cgroups of the worker with `rock doctor`") from None
        elif config.snapshot is None:
            sandbox = await self._made(id, kind, config)
        if config.snapshot is not None:
            found = self._snapshots.get(config.snapshot)
            first = self._first_of(found, config)
            sandbox = await self._with_copies(sandbox, config.snapshot, id, lambda: self._made(
                id, kind, config, layers=found.layers, identity=found.identity, first=first))
        assert sandbox is not None
        handle = self._handles.claimed(sandbox, id, kind.rootfs, config)
        if config.network == "nat":
            try:
                await self._connect(handle, fresh=True)
            except BaseException:
                await asyncio.shield(self._slots.discard(sandbox))
                raise
        return handle

    async def _with_copies(self, sandbox: Sandbox | None, snapshot_id: str, id: str,
                           make: Callable[[], Awaitable[Sandbox]]) -> Sandbox:
        """A sandbox with copies of the processes of a snapshot: this one, or one of `make`. When the launcher or a
        template dies meanwhile, another one gets them, once."""
        for left in (1, 0):
            one = await make() if sandbox is None else sandbox
            try:
                await self._copy(one, id, snapshot_id)
                return one
            except CopiesEnded:
                sandbox = None
                if not left:
                    raise
        raise AssertionError("there are two attempts")

    async def _copy(self, sandbox: Sandbox, id: str, snapshot_id: str) -> None:
        """Start copies of the processes of a snapshot, if it has some."""
        if self._snapshots.get(snapshot_id).copied:
            try:
                await self._snapshots.copies.start(sandbox, id, snapshot_id, self._snapshots.folder(snapshot_id))
            except BaseException:
                await asyncio.shield(self._slots.discard(sandbox))
                raise

    async def _made(self, id: str, kind: Kind, config: SandboxConfig, kept: RetainedFiles | None = None,
                    layers: Sequence[str] = (), identity: Sequence[str] = (),
                    first: FirstProgram | None = None) -> Sandbox:
        """layers: snapshots above its image. identity, first: see Factory.make."""
        with self._snapshots.using(layers) as claim:
            try:
                sandbox = await self._factory.make(id, kind, config, kept, await self._folders(config), layers,
                                                   identity, first)
            except errors.RockError as error:
                error.sandbox_id = id
                raise
            claim(sandbox.slot)
        return sandbox

    def _first_of(self, found: Snapshot, config: SandboxConfig) -> FirstProgram | None:
        """The first program of a sandbox that starts from this snapshot; copied processes have their own."""
        return self.first_of(found.id, config) if found.copied is None else None

    async def _connect(self, handle: Handle, *, fresh: bool = False) -> None:
        """Have the egress proxy serve its connections, according to its policy."""
        await self._egress.connect(handle.data["slot"], handle.id, lambda: self.link(handle), handle.data["egress"],
                                    fresh=fresh)

    async def connections(self, id: str) -> ConnectionList:
        return await self._egress.connections(id)

    async def _prepare(self, kind: Kind) -> Sandbox:
        """Create a pool member: everything but its limits and its name."""
        config = _POOL.model_copy(update={"network": kind.network})
        # Without a sandbox's id: a claim stores it in a handle, and the sweep removes unclaimed members.
        if kind.snapshot:  # its sessions and processes start with the claim
            admission.refuse_too_large(config)
            found = self._snapshots.get(kind.snapshot)
            return await self._made("", kind, config, layers=found.layers, identity=found.identity)
        sandbox = await self._factory.make("", kind, config)
        try:
            if self.prepare is not None:
                with contextlib.suppress(errors.RockError):
                    sandbox.prepared = await self.prepare(self._handles.of(sandbox, sandbox.slot, kind.rootfs, config))
        except BaseException:
            await self._slots.discard(sandbox)
            raise
        return sandbox

    def prepared(self, handle: Handle) -> Prepared | None:
        sandbox = self._slots.live.get(handle.data["slot"])
        if sandbox is None:
            return None
        found, sandbox.prepared = sandbox.prepared, None
        return found

    @property
    def first(self) -> FirstProgram | None:
        return self._factory.first

    @first.setter
    def first(self, program: FirstProgram | None) -> None:
        self._factory.first = program

    def started(self, handle: Handle) -> tuple[str, Process] | None:
        sandbox = self._slots.live.get(handle.data["slot"])
        if sandbox is None:
            return None
        found, sandbox.first = sandbox.first, None
        return found

    def first_path(self, handle: Handle) -> str | None:
        path, pid = handle.data.get("first") or (None, 0)
        return path if pid and self.link(handle).kept_pids.get(FIRST_KEY) == pid else None

    @staticmethod
    def _usable(sandbox: Sandbox) -> bool:
        return sandbox.link is not None and not sandbox.link.closed

    # ---- operations ----

    def link(self, handle: Handle) -> InitLink:
        return self._slots.link(handle)

    def complete(self, handle: Handle, program: Program) -> Program:
        return self._handles.complete(handle, program)

    def note_running(self, handle: Handle) -> bool:
        try:
            self._slots.find(handle)
        except errors.Lost:
            return False
        return True

    async def recover(self, handle: Handle) -> Liveness:
        data = handle.data
        for left in reversed(range(_HELLOS)):
            try:
                await self.link(handle).kept(patience=10)
                break
            except errors.RockError:  # on a machine without free memory or CPU, a response may take long
                if not left or "pid" not in data or not process_tree.lives(data["pid"], data["start"]):
                    return Liveness.GONE
        if "egress" in data:
            self._egress.adopt(data["slot"], handle.id, lambda: self.link(handle), data["egress"])
        return Liveness.RUNNING

    async def wait(self, handle: Handle) -> str:
        kills = self.oom_kills(handle)
        await wait_gone(handle.data["pid"], handle.data["start"])
        return self._why(handle, kills)

    def when_ended(self, handle: Handle, ended: Callable[[str], None]) -> Callable[[], None]:
        """The connection to pid 1 shows its end; where it closes earlier, the process is awaited."""
        sandbox = self._slots.live.get(handle.data["slot"])
        kills = 0 if sandbox is not None and not sandbox.recovered else self.oom_kills(handle)
        return Ending(handle.data["pid"], handle.data["start"], lambda: self.link(handle),
                      lambda: ended(self._why(handle, kills))).cancel

    def _why(self, handle: Handle, kills: int) -> str:
        """The reason of its end. kills: see oom_kills, of an earlier time."""
        if self._slots.was_signalled(handle):
            return "gone"
        if (full := self._slots.full(handle)) is not None:
            return full
        return "oom" if self.oom_kills(handle) > kills else "exited"

    async def usage(self, handle: Handle) -> Usage:
        sandbox = self._slots.live.get(handle.data["slot"])
        kills = self.oom_kills(handle)
        folders = sandbox.folders if sandbox else dict(handle.data["cgroups"])
        used = await asyncio.to_thread(limiter.usage, folders, handle.data["pid"], kills)
        if "disk" in handle.data:
            with contextlib.suppress(errors.RockError):
                used.disk_bytes = (await self.space(handle)).used
        else:
            upper = f"{self._run_dir}/{handle.data['slot']}/upper"
            used.disk_bytes = await asyncio.to_thread(disk_layout.written, upper)
        return used

    async def swap_out(self, handle: Handle) -> int:
        def work() -> int:
            tree = process_tree.descendants(process_tree.scan(), handle.data["pid"])
            return swapping.swap_out([entry.pid for entry in tree if entry.alive])

        return await asyncio.to_thread(work)

    def oom_kills(self, handle: Handle) -> int:
        return self._slots.oom_kills(handle)

    # ---- stop and destroy ----

    async def stop(self, handle: Handle, grace: float) -> None:
        await self._slots.stop(handle, grace)

    async def destroy(self, handle: Handle) -> None:
        data = handle.data
        self._stopped.let_go(data["slot"])
        await self._slots.clean_up(data["slot"], data.get("pid"), data.get("start"), data.get("base"), data["cgroups"])
        await self._snapshots.collected()

    async def sweep(self, known: Sequence[str]) -> list[str]:
        return await self._slots.sweep(known)

    # ---- stop and restart ----

    async def rest(self, handle: Handle, grace: float = 0.0) -> Handle:
        return await self._stopped.rest(handle, grace)

    async def wake(self, handle: Handle, config: SandboxConfig) -> Handle:
        self._refuse(config)
        rootfs, slot = retained.noted(handle.data["rootfs"]), handle.data["slot"]
        retained.refuse_unusable(self._run_dir / slot, handle.id)
        kept = RetainedFiles(slot, partial(self._stopped.put_back, handle))
        layers = self._snapshots.layers(slot)
        sandbox = await self._made(handle.id, Kind.of(rootfs, config), config, kept, layers)
        self._stopped.let_go(slot)  # its pid 1 holds the lease now
        woken = self._handles.claimed(sandbox, handle.id, rootfs, config)
        if config.network == "nat":
            try:
                await self._connect(woken)
            except BaseException:
                await asyncio.shield(self._stopped.put_back(handle, sandbox.base))
                raise
        return woken

    # ---- snapshots ----

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         processes: bool = False, continued: Callable[[], None] = lambda: None) -> Frozen:
        link = self.link(handle) if processes else None
        return await self._snapshots.checkpoint(handle, snapshot_id, files, self.image(handle),
                                                await self._switch_spec(handle, snapshot_id), link, continued)

    async def _switch_spec(self, handle: Handle, snapshot_id: str) -> dict[str, Any]:
        rootfs, slot = self.image(handle), handle.data["slot"]
        layers = [snapshot_id, *await self._snapshots.next_layers(slot)]
        config = SandboxConfig(image=rootfs.name)  # its limits do not matter here
        return self._factory.spec(slot, handle.data["base"], Kind.of(rootfs, config), config, layers, freezing=True)

    def take_file(self, handle: Handle, path: str, most: int) -> bytes | None:
        return taken_file(handle.data["pid"], handle.data["start"], path, most)

    async def refusals(self, handle: Handle) -> Sequence[str]:
        return await self._snapshots.refusals(handle, await self._switch_spec(handle, "0" * 32), self.link(handle))

    def parent(self, handle: Handle) -> str | None:
        return self._snapshots.parent(handle.data["slot"])

    async def replace(self, handle: Handle, config: SandboxConfig, snapshot_id: str) -> Handle:
        found = self._snapshots.get(snapshot_id)
        rootfs, first = self._snapshots.rootfs(snapshot_id), self._first_of(found, config)
        sandbox = await self._with_copies(None, snapshot_id, handle.id, lambda: self._made(
            handle.id, Kind.of(rootfs, config), config, layers=found.layers, first=first))
        replaced = self._handles.claimed(sandbox, handle.id, rootfs, config)
        if config.network == "nat":
            try:
                await self._connect(replaced)
            except BaseException:
                await asyncio.shield(self._slots.discard(sandbox))
                raise
        return replaced

    def snapshots(self) -> Mapping[str, Sequence[str]]:
        names = {slot: id for id, slot in self._slots.slot_of.items()}
        others = {member.slot for member in self._pool.members()} | self._slots.ending
        return {one: [names.get(slot, slot) for slot in slots if slot not in others]
                for one, slots in self._snapshots.users().items()}  # fmt: skip

    async def drop_snapshot(self, snapshot_id: str) -> bool:
        return await self._snapshots.drop(snapshot_id)

    def layer_count(self, snapshot_id: str) -> int:
        return self._layer_transfer.count(snapshot_id)

    def export_layer(self, snapshot_id: str, number: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        return self._layer_transfer.export(snapshot_id, number)

    async def import_layers(self, snapshot_id: str, sandbox_id: str, image: str, image_digest: str,
                            layers: Sequence[ArchivedFiles], data: Callable[[int], AsyncIterator[bytes]]) -> int | None:
        rootfs = await asyncio.to_thread(self._images.resolve, image)
        if rootfs.digest != image_digest:
            raise errors.ImageError(f"image {image} is not the one of the snapshot",
                                    hint="bring that image to this machine under its name")
        return await self._layer_transfer.take_in(snapshot_id, sandbox_id, rootfs, layers, data)

    # ---- archives ----

    def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        return self._stopped.pack(handle, limit)

    def image(self, handle: Handle) -> RootFS:
        return self._stopped.image(handle)

    def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        return self._stopped.snapshot(handle, limit)

    async def unpack(self, id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        rootfs = (await self._admit(config)).rootfs
        if rootfs.digest != files.image_digest:
            raise errors.ImageError(f"image {config.image} is not the one that sandbox {id} was made of", sandbox_id=id,
                                    hint="bring that image to this machine under its name")
        return await self._stopped.unpack(id, rootfs, files, data)
