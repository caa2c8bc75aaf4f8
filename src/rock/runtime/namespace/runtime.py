"""Runtime "namespace": sandboxes from Linux namespaces, made by a launcher process, with our own pid 1 in each.

    create -> admission -> image -> warm pool, or the launcher -> record -> Handle
    spawn, files, ports -> pid 1 (initfiles.py)      destroy -> kill pid 1, cgroups, folder (teardown.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from rock import errors, faults
from rock.guest import proctree
from rock.guest.remove import remove_tree
from rock.protocol.network import ConnectionList
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig, Usage
from rock.runtime.base import Handle, Liveness, Prepared, Program, Trait
from rock.runtime.image.leases import Lease
from rock.runtime.image.rootfs import RootFS
from rock.runtime.initfiles import InitSandboxes, merged
from rock.runtime.initlink import InitLink
from rock.runtime.namespace import admission, cgroups, disk, keeping, limits, mounts, packlink, records, teardown, wired
from rock.runtime.namespace.disks import Disks
from rock.runtime.namespace.launchlink import LaunchLink
from rock.runtime.namespace.outlets import Outlets
from rock.runtime.namespace.pool import Pool
from rock.runtime.process import wait_gone

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_SHARED = 2 << 30
_WATCH_EVERY = 0.25  # seconds
_FILES_EVERY = 8  # looks: files in memory are dearer to find
_POOL = SandboxConfig(image="pool", memory="1g", cpus=1.0)  # limits of what nobody has claimed yet
_LEASE_KEPT = 2.0  # seconds
_MOST_NOTES = 100
_SPARES = 8  # run folders and user namespaces that are made ahead


class Images(Protocol):
    """Where root file systems come from."""

    def resolve(self, name: str) -> RootFS:
        """The image, ready to be mounted. ImageError when it is not on this machine."""
        ...

    def lease(self, rootfs: RootFS) -> Lease | None:
        """Hold its layers on disk, for as long as a copy of the lease's descriptor is open; None if nothing has to be.
        ImageError when they were removed since."""
        ...


@dataclass(frozen=True)
class Kind:
    """What pool members have in common."""

    rootfs: RootFS = field(compare=False, hash=False)
    digest: str
    network: Literal["none", "nat", "bridge", "host"]
    shared: int

    @classmethod
    def of(cls, rootfs: RootFS, config: SandboxConfig) -> Kind:
        return cls(rootfs, rootfs.digest, config.network, config.shm_bytes or _shared_memory(config.memory_bytes))


def _shared_memory(memory: int) -> int:
    """Bytes of /dev/shm, and of System V shared memory, for a memory limit: the greatest power of two up to a quarter.

    What lies there belongs to no process, so with more of it than the limit the kernel would find only pid 1 to kill.
    """
    return min(_MOST_SHARED, 1 << max(20, (memory // 4).bit_length() - 1))


@dataclass
class Sandbox:
    """What this server knows of a living sandbox; all of it can be found again by the handle."""

    slot: str
    pid: int
    start: int
    base: int
    folders: dict[str, str]
    link: InitLink | None = None
    memory: int = 0
    kills: int = 0  # by our own watching
    prepared: Prepared | None = None


class NamespaceRuntime(InitSandboxes):
    """The embedded default. `run_dir` holds a folder a sandbox; pool_size 0 switches the warm pool off."""

    name = "namespace"
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.NAMESPACES: frozenset(Trait),
        Isolation.USERNS: frozenset(Trait) - {Trait.USERS},
    }

    def __init__(self, run_dir: Path, pool_size: int, images: Images, resolvers: Sequence[str] = ()) -> None:
        self._run_dir = Path(os.path.realpath(run_dir))
        self._outlets = Outlets(self._run_dir, resolvers)
        self._images = images
        self._live: dict[str, Sandbox] = {}
        self._spares: list[str] = []
        self._making: set[str] = set()
        self._pool: Pool[Kind, Sandbox] = Pool(pool_size, self._prepare, self._discard, self._usable)
        self._watcher: asyncio.Task[None] | None = None
        self._opened = False
        self._known_images: dict[str, Kind] = {}
        self._disks = Disks(self._try_disk)
        self._notes: dict[str, tuple[RootFS, dict[str, Any]]] = {}
        self._leases: dict[str, Lease] = {}
        self._resting: dict[str, Lease | None] = {}  # by slot: what holds the image of a sandbox at rest
        self.isolation = Isolation.NAMESPACES
        self.prepare: Callable[[Handle], Awaitable[Prepared | None]] | None = None

    # ---- life of the runtime ----

    async def open(self) -> None:
        if self._opened:
            return
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self._run_dir, 0o700)
        await asyncio.to_thread(remove_tree, str(self._run_dir / records.SPARE))
        (self._run_dir / records.SPARE).mkdir(mode=0o700)
        for folder in (self._run_dir, self._run_dir / records.SPARE):
            disk.spread(str(folder))
        mounts.make_base(str(self._run_dir / records.BASE))
        self._ranges = records.UidRanges(self._run_dir)
        for slot in records.slots(self._run_dir):
            base = records.read(self._run_dir, slot).get("base")
            if isinstance(base, int):
                self._ranges.reserve(base, slot)
        self._limiter = limits.Limiter(await asyncio.to_thread(cgroups.discover, str(self._run_dir)))
        try:
            await self._choose_level()
        except BaseException:
            await asyncio.to_thread(remove_tree, str(self._run_dir / records.SPARE))
            cgroups.remove_parents(self._limiter.groups)
            raise
        self._outlets.found(await self._launcher.request("wired", {}))
        self._opened = True
        if self._limiter.enforced()["memory"] == "watched":
            self._watcher = asyncio.create_task(self._watch(), name="namespace memory watch")

    async def _choose_level(self) -> None:
        """Start one sandbox of nothing and look; as root with less when the whole cannot be had."""
        shapes = [(True, Isolation.NAMESPACES), (False, Isolation.USERNS)] if os.geteuid() == 0 else \
            [(False, Isolation.USERNS)]
        reasons = []
        for privileged, isolation in shapes:
            options = {"privileged": privileged, "staging": str(self._run_dir / "staging")}
            self._launcher = LaunchLink(options, self._run_dir / "launcher.log", self._spares.append)
            self.isolation = isolation
            try:
                await self._launcher.start()
                await self._try_one()
                return
            except errors.RockError as error:
                self._launcher.close()
                reasons.append(f"{isolation.value}: {error.message}")
        raise errors.Unsupported("this host cannot run the namespace runtime: " + "; ".join(reasons),
                                 hint="`rock doctor` tells what is missing. ROCK_RUNTIME=landlock is weaker, and needs "
                                      "none; the process runtime isolates nothing: both must be asked for by name")

    async def _try_disk(self, way: str) -> None:
        await self._try_one("16m", way)

    async def _try_one(self, size: str | None = None, way: str = "") -> None:
        layer = self._run_dir / "probe"
        for name in ("proc", "sys", "dev", "tmp", "etc"):
            (layer / name).mkdir(parents=True, exist_ok=True)
        config = SandboxConfig(image="probe", memory="64m", cpus=0.5, disk=size)
        self._disks.trying = way
        await self._discard(await self._make(Kind.of(RootFS("probe", (str(layer),)), config), config))

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await self._pool.close()
        await self._outlets.close()
        for digest in list(self._leases):
            self._end_lease(digest)
        for slot in list(self._resting):
            self._let_go(slot)
        for sandbox in self._live.values():
            if sandbox.link is not None:
                sandbox.link.close()
        self._live.clear()
        if self._opened:
            self._launcher.close()
            self._opened = False
            self._spares.clear()
            await asyncio.to_thread(remove_tree, str(self._run_dir / records.SPARE))
            cgroups.remove_parents(self._limiter.groups)

    # ---- creating ----

    async def check(self, config: SandboxConfig) -> None:
        await self._admit(config)

    async def _admit(self, config: SandboxConfig) -> Kind:
        admission.refuse_unsupported(config, self.isolation, self._outlets.networks, why=self._outlets.missing)
        admission.refuse_too_large(config)
        if config.disk is not None:
            await self._disks.choose(config)
        return await self._kind(config)

    async def _kind(self, config: SandboxConfig) -> Kind:
        if config.image in self._known_images:
            rootfs = self._images.resolve(config.image)
        else:  # the first time it may have to be made
            rootfs = await asyncio.to_thread(self._images.resolve, config.image)
        kind = self._known_images[config.image] = Kind.of(rootfs, config)
        return kind

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        kind = await self._admit(config)
        special = config.disk is not None or config.nofile is not None or config.shm_size is not None
        sandbox = None if special else self._pool.claim(kind)
        if sandbox is not None:
            try:
                self._limiter.apply(sandbox.slot, sandbox.pid, config, _POOL)
            except OSError as error:
                await self._discard(sandbox)
                raise errors.StartFailed(f"its limits could not be set: {error}", sandbox_id=id) from None
        else:
            try:
                sandbox = await self._make(kind, config)
            except errors.RockError as error:
                error.sandbox_id = id
                raise
            records.write(self._run_dir, sandbox.slot, self._record(sandbox, id))
        handle = self._named(sandbox, id, kind.rootfs, config)
        if config.network == "nat":
            try:
                await self._connect(handle, fresh=True)
            except BaseException:
                await asyncio.shield(self._discard(sandbox))
                raise
        return handle

    async def _connect(self, handle: Handle, *, fresh: bool = False) -> None:
        """Have its connections served, as far as its policy goes."""
        await self._outlets.connect(handle.data["slot"], handle.id, lambda: self.link(handle), handle.data["egress"],
                                    fresh=fresh)

    async def connections(self, id: str) -> ConnectionList:
        return await self._outlets.connections(id)

    def _named(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        sandbox.memory = config.memory_bytes - self._disks.in_memory(config)
        if sandbox.link is not None:
            sandbox.link.sandbox_id = id
        return self._handle(sandbox, id, rootfs, config)

    def _handle(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        data = {**self._record(sandbox, id), "env": merged({"PATH": _PATH}, rootfs.env, config.env),
                "cwd": rootfs.cwd or "/", "user": rootfs.user, "memory": sandbox.memory or config.memory_bytes}
        # Of one that can rest it is called otherwise: its handle says so.
        data["rootfs" if config.keeps_files else "image"] = self._note(rootfs)
        if config.network == "nat":
            data["egress"] = config.egress
        enforced = self._limiter.enforced()
        if config.disk is not None:
            data["disk"], enforced["disk"] = config.disk_bytes, self._disks.way
        if config.nofile is not None:
            data["nofile"], enforced["nofile"] = config.nofile, "rlimit"
        if config.shm_size is not None:
            enforced["shm_size"] = "tmpfs"
        return Handle(self.name, id, self.isolation, enforced, data)

    def _note(self, rootfs: RootFS) -> dict[str, Any]:
        """The image as plain data, which nobody changes: it takes 0.1 ms to make, and is the same for many."""
        known = self._notes.get(rootfs.digest)
        if known is None or known[0] != rootfs:
            if len(self._notes) >= _MOST_NOTES:
                self._notes.clear()
            known = self._notes[rootfs.digest] = rootfs, keeping.note(rootfs)
        return known[1]

    @staticmethod
    def _record(sandbox: Sandbox, id: str) -> dict[str, Any]:
        return {"id": id, "slot": sandbox.slot, "pid": sandbox.pid, "start": sandbox.start, "base": sandbox.base,
                "cgroups": sandbox.folders}

    async def _prepare(self, kind: Kind) -> Sandbox:
        """A pool member: everything but its limits and its name."""
        config = _POOL.model_copy(update={"network": kind.network})
        sandbox = await self._make(kind, config)
        try:
            # Without a sandbox's id: whoever claims it has it in a handle, and what nobody claimed is swept away.
            records.write(self._run_dir, sandbox.slot, self._record(sandbox, ""))
            if self.prepare is not None:
                with contextlib.suppress(errors.RockError):
                    sandbox.prepared = await self.prepare(self._handle(sandbox, sandbox.slot, kind.rootfs, config))
        except BaseException:
            await self._discard(sandbox)
            raise
        return sandbox

    def prepared(self, handle: Handle) -> Prepared | None:
        sandbox = self._live.get(handle.data["slot"])
        if sandbox is None:
            return None
        found, sandbox.prepared = sandbox.prepared, None
        return found

    async def _make(self, kind: Kind, config: SandboxConfig, kept: Handle | None = None) -> Sandbox:
        """Have the launcher make one, over the files of `kept` where it is given.

        Once asked it is waited for, so that a cancelled caller leaves nothing behind.
        """
        task = asyncio.create_task(self._make_whole(kind, config, kept))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(errors.RockError):
                made = await task
                await (self._discard(made) if kept is None else self._put_back(kept, made.base))
            raise

    async def _make_whole(self, kind: Kind, config: SandboxConfig, kept: Handle | None) -> Sandbox:
        slot = kept.data["slot"] if kept else self._spares.pop(0) if self._spares else records.new_slot()
        base = self._ranges.take(slot)
        folders = self._limiter.groups.folders(slot)
        self._making.add(slot)
        try:
            if kept is None:
                self._place(slot)
            if config.disk is not None:
                await self._disks.prepare(str(self._run_dir / slot), config)
            lease = self._lease(kind)
            spec = {**self._spec(slot, base, kind, config, folders), "woken": kept is not None}
            await faults.point("namespace.placed")
            reply = await self._launcher.request("create", spec, lease.fd if lease else None)
            if "error" in reply:
                reason = f"{reply['error']} ({reply['hint']})" if reply.get("hint") else reply["error"]
                raise errors.StartFailed(f"the sandbox could not be made: {reason}")
            sandbox = Sandbox(slot, reply["pid"], reply["start"], base, folders)
            sandbox.link = InitLink.connect(self._run_dir / slot, slot)
            self._live[slot] = sandbox
            await faults.point("namespace.born")
            self._stock_up()
            return sandbox
        except (OSError, errors.RockError) as error:
            await (self._clean_up(slot, None, None, base, folders) if kept is None else self._put_back(kept, base))
            if isinstance(error, OSError):
                raise errors.StartFailed(f"the sandbox could not be made: {error}") from None
            raise
        finally:
            self._making.discard(slot)

    def _lease(self, kind: Kind) -> Lease | None:
        """Every sandbox holds a copy of it; ours is for those that come in the next seconds."""
        found = self._leases.get(kind.digest)
        if found is None and (found := self._images.lease(kind.rootfs)) is not None:
            self._leases[kind.digest] = found
            asyncio.get_running_loop().call_later(_LEASE_KEPT, self._end_lease, kind.digest)
        return found

    def _end_lease(self, digest: str) -> None:
        if (lease := self._leases.pop(digest, None)) is not None:
            lease.close()

    def _place(self, slot: str) -> None:
        """The run folder: one that was made ahead, or a new one that the launcher's child fills."""
        try:
            os.rename(self._run_dir / records.SPARE / slot, self._run_dir / slot)
        except FileNotFoundError:
            os.mkdir(self._run_dir / slot, 0o700)

    def _stock_up(self) -> None:
        """Have the launcher make, while it is idle, what the next sandboxes will need."""
        fresh = [records.new_slot() for _ in range(_SPARES - len(self._spares))]  # in place of those asked for before
        folders = [str(self._run_dir / records.SPARE / slot) for slot in fresh]
        self._launcher.post("ahead", {"ranges": self._ranges.coming(_SPARES), "folders": folders})

    def _spec(self, slot: str, base: int, kind: Kind, config: SandboxConfig,
              folders: Mapping[str, str]) -> dict[str, Any]:
        etc = {}
        if config.network == "host":
            with contextlib.suppress(OSError):
                etc["resolv.conf"] = Path("/etc/resolv.conf").read_text()
        elif config.network == "nat":
            etc["resolv.conf"] = wired.RESOLV_CONF
        return {
            "slot": str(self._run_dir / slot), "base": base, "network": config.network,
            "shared": kind.shared, "layers": [str(self._run_dir / records.BASE), *kind.rootfs.layers], "etc": etc,
            "binds": [{"source": bind.source, "target": bind.target, "writable": bind.writable, "idmap": bind.idmap}
                      for bind in kind.rootfs.binds],
            "cgroups": list(folders.values()), "limits": self._limiter.files(slot, config),
            "affinity": self._limiter.affinity(config), "processes": self._limiter.processes(config),
            "disk": self._disks.spec(config),
        }

    # ---- using ----

    def _find(self, handle: Handle) -> Sandbox:
        slot = handle.data["slot"]
        sandbox = self._live.get(slot)
        if sandbox is None:
            data = handle.data
            if "pid" not in data or not proctree.lives(data["pid"], data["start"]):  # one at rest has none
                raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
            sandbox = Sandbox(slot, data["pid"], data["start"], data["base"], dict(data["cgroups"]),
                              memory=int(data["memory"]))
            self._ranges.reserve(sandbox.base, slot)
            self._live[slot] = sandbox
        return sandbox

    def link(self, handle: Handle) -> InitLink:
        sandbox = self._find(handle)
        if sandbox.link is None or sandbox.link.closed:
            sandbox.link = InitLink.connect(self._run_dir / sandbox.slot, handle.id)
        return sandbox.link

    def complete(self, handle: Handle, program: Program) -> Program:
        data = handle.data
        if (most := data.get("nofile")) is not None:
            program = replace(program, nofile=min(program.nofile or most, most))
        user = program.user
        if user is None and self.isolation == Isolation.NAMESPACES:  # else there is one user only, who is root inside
            user = data["user"]
        return replace(program, env=merged(data["env"], program.env), cwd=program.cwd or data["cwd"], user=user or None)

    async def recover(self, handle: Handle) -> Liveness:
        try:
            await self.link(handle).request("hello", patience=10)
        except errors.RockError:
            return Liveness.GONE
        if "egress" in handle.data:
            data = handle.data
            self._outlets.adopt(data["slot"], handle.id, lambda: self.link(handle), data["egress"])
        return Liveness.RUNNING

    async def wait(self, handle: Handle) -> str:
        kills = self.oom_kills(handle)
        await wait_gone(handle.data["pid"], handle.data["start"])
        return "oom" if self.oom_kills(handle) > kills and not await self._was_told(handle) else "gone"

    async def _was_told(self, handle: Handle) -> bool:
        """Whether pid 1 ended by itself, as `stop` makes it do."""
        return (self._run_dir / str(handle.data["slot"]) / "stopped").exists()

    async def usage(self, handle: Handle) -> Usage:
        sandbox = self._live.get(handle.data["slot"])
        kills = self.oom_kills(handle)
        folders = sandbox.folders if sandbox else dict(handle.data["cgroups"])
        used = await asyncio.to_thread(limits.usage, folders, handle.data["pid"], kills)
        if "disk" in handle.data:
            with contextlib.suppress(errors.RockError):
                used.disk_bytes = (await self.space(handle)).used
        else:
            used.disk_bytes = await asyncio.to_thread(disk.written, f"{self._run_dir}/{handle.data['slot']}/upper")
        return used

    def oom_kills(self, handle: Handle) -> int:
        sandbox = self._live.get(handle.data["slot"])
        folder = handle.data["cgroups"].get("memory")
        return (cgroups.oom_kills(folder) if folder else 0) + (sandbox.kills if sandbox else 0)

    async def _watch(self) -> None:
        """Hold memory limits where no cgroup does."""
        for turn in itertools.count():
            await asyncio.sleep(_WATCH_EVERY)
            by_pid = {sandbox.pid: sandbox for sandbox in self._live.values() if sandbox.memory}
            if by_pid:
                wanted = {pid: sandbox.memory for pid, sandbox in by_pid.items()}
                for pid, count in (
                        await asyncio.to_thread(limits.watch, wanted, files=turn % _FILES_EVERY == 0)).items():
                    by_pid[pid].kills += count

    # ---- ending ----

    async def stop(self, handle: Handle, grace: float) -> None:
        pid, start, slot = handle.data["pid"], handle.data["start"], handle.data["slot"]
        with contextlib.suppress(OSError):
            (self._run_dir / slot / "stopped").touch()
        with contextlib.suppress(errors.RockError, TimeoutError):
            await self.link(handle).request("stop", {"grace": grace}, patience=grace + 5)
            async with asyncio.timeout(grace + 2):
                await wait_gone(pid, start)
        teardown.kill(pid, start)
        await wait_gone(pid, start)
        self._forget(slot)

    async def destroy(self, handle: Handle) -> None:
        data = handle.data
        self._let_go(data["slot"])
        await self._clean_up(data["slot"], data.get("pid"), data.get("start"), data.get("base"), data["cgroups"])

    # ---- at rest ----

    async def rest(self, handle: Handle, grace: float = 0.0) -> Handle:
        data, slot = handle.data, handle.data["slot"]
        if "rootfs" not in data:
            raise errors.Unsupported("its files are not kept: it was not made for that", sandbox_id=handle.id)
        if slot not in self._resting:  # before its pid 1 lets go of it; a removed image is told when it is woken
            with contextlib.suppress(errors.ImageError):
                self._resting[slot] = self._images.lease(keeping.noted(data["rootfs"]))
        pid, start = data.get("pid"), data.get("start")
        if pid is not None and grace > 0:
            await self.stop(handle, grace)
        self._forget(slot)
        for found in (pid, start) if pid is not None else None, teardown.find(self._run_dir / slot):
            if found is not None:
                teardown.kill(*found)
                await wait_gone(*found)
        folders = self._limiter.groups.folders(slot)
        try:
            await asyncio.to_thread(keeping.strip, self._run_dir, slot, handle.id, list(folders.values()))
        except errors.Lost:
            self._let_go(slot)
            raise
        if "base" in data:
            self._ranges.give_back(data["base"], slot)
        kept = {"id": handle.id, "slot": slot, "cgroups": folders, "rootfs": data["rootfs"]}
        return Handle(self.name, handle.id, handle.isolation, handle.enforced, kept)

    async def wake(self, handle: Handle, config: SandboxConfig) -> Handle:
        admission.refuse_unsupported(config, self.isolation, self._outlets.networks, why=self._outlets.missing)
        admission.refuse_too_large(config)
        rootfs = keeping.noted(handle.data["rootfs"])
        keeping.refuse_unusable(self._run_dir / handle.data["slot"], handle.id)
        try:
            sandbox = await self._make(Kind.of(rootfs, config), config, handle)
        except errors.RockError as error:
            error.sandbox_id = handle.id
            raise
        records.write(self._run_dir, sandbox.slot, self._record(sandbox, handle.id))
        self._let_go(sandbox.slot)  # its pid 1 holds the image now
        woken = self._named(sandbox, handle.id, rootfs, config)
        if config.network == "nat":
            try:
                await self._connect(woken)
            except BaseException:
                await asyncio.shield(self._put_back(handle, sandbox.base))
                raise
        return woken

    def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        rootfs = keeping.noted(handle.data["rootfs"])
        parts = packlink.parts(self._run_dir / handle.data["slot"], rootfs)
        return packlink.pack({**self._packer_options(parts), "limit": limit}, rootfs.digest)

    def image(self, handle: Handle) -> RootFS:
        note = handle.data.get("rootfs") or handle.data.get("image")
        if note is None:
            raise errors.Unsupported("it was made by a server that did not note its image", sandbox_id=handle.id)
        return keeping.noted(note)

    async def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        rootfs, folder = self.image(handle), self._run_dir / handle.data["slot"]
        if "disk" in handle.data:
            raise errors.Unsupported("what is on a disk with a limit cannot be read from outside",
                                     sandbox_id=handle.id, hint="commit a sandbox that was made without disk=")
        places = packlink.parts(folder, rootfs)
        async with contextlib.AsyncExitStack() as stack:
            if "pid" in handle.data:
                link = InitLink.connect(folder, handle.id)  # of its own: pid 1 resumes when it ends, however it does
                stack.callback(link.close)
                await link.request("pause")
            await asyncio.to_thread(keeping.refuse_written, places[1:])
            data = packlink.pack({**self._packer_options(places[:1]), "limit": limit}, rootfs.digest)
            async for part in await stack.enter_async_context(contextlib.aclosing(data)):
                yield part

    async def unpack(self, id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        rootfs = (await self._admit(config)).rootfs
        if rootfs.digest != files.image_digest:
            raise errors.ImageError(f"image {config.image} is not the one that sandbox {id} was made of", sandbox_id=id,
                                    hint="bring that image to this machine under its name")
        slot = records.new_slot()
        folder = self._run_dir / slot
        self._making.add(slot)
        try:
            await asyncio.to_thread(keeping.make_empty, self._run_dir, slot, id, rootfs)
            options = self._packer_options(packlink.parts(folder, rootfs))
            await packlink.unpack({**options, "size": files.size, "digest": files.digest}, data)
            plain = {"id": id, "slot": slot, "cgroups": {}, "rootfs": keeping.note(rootfs)}
            return await self.rest(Handle(self.name, id, self.isolation, self._limiter.enforced(), plain))
        except BaseException:
            self._let_go(slot)
            await asyncio.shield(asyncio.to_thread(remove_tree, str(folder)))
            raise
        finally:
            self._making.discard(slot)

    def _packer_options(self, parts: list[dict[str, str]]) -> dict[str, Any]:
        """As root files have their owners' ids as seen inside; else all are ours, and inside they are root's."""
        privileged = self.isolation == Isolation.NAMESPACES
        return {"parts": parts, "enter": os.geteuid() != 0, "one_owner": not privileged,
                "overlay": "trusted.overlay." if privileged else "user.overlay."}

    async def _put_back(self, kept: Handle, base: int) -> None:
        """What became of a wake is given up, and the files stay."""
        with contextlib.suppress(errors.RockError):  # then the next wake or rest tells
            await self.rest(kept)
        self._ranges.give_back(base, kept.data["slot"])

    def _let_go(self, slot: str) -> None:
        lease = self._resting.pop(slot, None)
        if lease is not None:
            lease.close()

    async def _discard(self, sandbox: Sandbox) -> None:
        if sandbox.prepared is not None:
            await sandbox.prepared.detach()
        await self._clean_up(sandbox.slot, sandbox.pid, sandbox.start, sandbox.base, sandbox.folders)

    @staticmethod
    def _usable(sandbox: Sandbox) -> bool:
        return sandbox.link is not None and not sandbox.link.closed

    async def _clean_up(self, slot: str, pid: int | None, start: int | None, base: int | None,
                        folders: Mapping[str, str]) -> None:
        """Remove all of a sandbox, made in whole or in part. Idempotent."""
        self._forget(slot)
        if pid is None or start is None:
            pid, start = teardown.find(self._run_dir / slot) or (None, None)
        clean = False
        if pid is not None and start is not None:
            with contextlib.suppress(errors.RockError):
                clean = await self._retire(slot, pid, start, folders)
            if not clean:
                teardown.kill(pid, start)
                await wait_gone(pid, start)
        if not clean:
            await asyncio.to_thread(teardown.remove, self._run_dir / slot, list(folders.values()))
        if base is not None:
            self._ranges.give_back(base, slot)

    async def _retire(self, slot: str, pid: int, start: int, folders: Mapping[str, str]) -> bool:
        """Have the launcher end it; False when there is more to remove than it does."""
        reply = await self._launcher.request("retire", {
            "pid": pid, "start": start, "slot": str(self._run_dir / slot), "cgroups": list(folders.values())})
        return bool(reply.get("clean"))

    def _forget(self, slot: str) -> None:
        self._outlets.drop(slot)
        sandbox = self._live.pop(slot, None)
        if sandbox is not None and sandbox.link is not None:
            sandbox.link.close()

    async def sweep(self, known: Sequence[str]) -> list[str]:
        keep, gone = set(known), []
        groups = await asyncio.to_thread(teardown.leftover_groups, self._limiter.groups)
        for slot in sorted({*records.slots(self._run_dir), *groups}):
            record = records.read(self._run_dir, slot)
            id = str(record.get("id", ""))
            if slot in self._making or (id in keep if id else slot in self._live):
                continue
            folders = self._limiter.groups.folders(slot)
            await self._clean_up(slot, record.get("pid"), record.get("start"), record.get("base"), folders)
            gone.append(id or slot)
        return gone
