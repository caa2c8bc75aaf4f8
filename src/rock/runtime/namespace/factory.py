"""Creates sandboxes: the run folder, the uid range, the image lease, the launcher request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rock import errors, faults
from rock.guest.init.programs import FIRST_DATA, FIRST_KEY, FIRST_NUMBERS
from rock.host.atomic_file import not_started
from rock.host.child_process import Ended
from rock.images.records import Lease
from rock.images.store import Images
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import FolderMount
from rock.runtime.init.files import merged
from rock.runtime.init.link import FirstStreams, InitLink
from rock.runtime.namespace import records
from rock.runtime.namespace.admission import Kind
from rock.runtime.namespace.launcher import isolated_network
from rock.runtime.namespace.limits.disk_watch import Disks
from rock.runtime.namespace.retained import environment
from rock.runtime.namespace.slots import Sandbox, Slots
from rock.runtime.pools import FirstProgram

_LEASE_KEPT = 2.0  # seconds
_AT_ONCE = 64  # requests with descriptors that the launcher has at a time; it serves one after the other
_STOCKED_AFTER = 0.01  # seconds
_SPARES = 8  # run folders and user namespaces that are prepared in advance


class RetainedFiles(NamedTuple):
    """Retained files for a new sandbox. put_back: restores them after a failed create, by uid range."""

    slot: str
    put_back: Callable[[int], Awaitable[None]]


class _ZygoteEnded(errors.Unavailable):
    """The zygote died during a fork."""


class Factory:
    """spares: run folders that the launcher prepared; it appends their names. first: the program to start together with
    a sandbox of an image alone."""

    def __init__(self, slots: Slots, disks: Disks, images: Images) -> None:
        self.spares: list[str] = []
        self.first: FirstProgram | None = None
        self._slots = slots
        self._disks = disks
        self._images = images
        self._leases: dict[str, Lease] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._stocking: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._stocking is not None:
            self._stocking.cancel()
            self._stocking = None
        for digest in list(self._leases):
            self._end_lease(digest)

    async def make(self, id: str, kind: Kind, config: SandboxConfig, kept: RetainedFiles | None = None,
                   folders: Sequence[FolderMount] = (), layers: Sequence[str] = (),
                   identity: Sequence[str] = (), first: FirstProgram | None = None) -> Sandbox:
        """Have the launcher create a sandbox, over the files of `kept` if given, with these folders, and a record on
        disk; without an `id` it has no owner. layers: snapshots above its image, newest first. identity: their
        files that it has new, or not at all. first: its first program, where it has layers. StartFailed, StorageFull,
        ImageError.

        A started create runs to its end when the caller is cancelled, so that nothing is left behind.
        """
        first = first if layers else self.first
        task = asyncio.create_task(self._make_whole(id, kind, config, kept, folders, layers, identity, first))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(errors.RockError):
                made = await task
                await (self._slots.discard(made) if kept is None else kept.put_back(made.base))
            raise

    async def _make_whole(self, id: str, kind: Kind, config: SandboxConfig, kept: RetainedFiles | None,
                          mounted: Sequence[FolderMount], layers: Sequence[str], identity: Sequence[str],
                          first: FirstProgram | None) -> Sandbox:
        """Create a sandbox; retry once in another run folder when the launcher or its zygote died meanwhile."""
        try:
            return await self._make_once(id, kind, config, kept, mounted, layers, identity, first)
        except (Ended, _ZygoteEnded):
            if kept is not None:  # its files are restored; the next request uses a new launcher
                raise
            return await self._make_once(id, kind, config, kept, mounted, layers, identity, first)

    async def _make_once(self, id: str, kind: Kind, config: SandboxConfig, kept: RetainedFiles | None,
                         mounted: Sequence[FolderMount], layers: Sequence[str], identity: Sequence[str],
                         first: FirstProgram | None) -> Sandbox:
        slots = self._slots
        slot = kept.slot if kept else self.spares.pop(0) if self.spares else records.new_slot()
        base = slots.ranges.take(slot)
        folders = slots.limiter.groups.folders(slot)
        slots.making.add(slot)
        streams: FirstStreams | None = None
        try:
            program = None if kept is not None or mounted else self._program(first, kind, config)
            if kept is None:
                self._place(slot)
            if config.disk is not None:
                await self._disks.prepare(str(slots.run_dir / slot), config)
            spec = {**self.spec(slot, base, kind, config, layers), "woken": kept is not None,
                    "identity": list(identity), "folders": [_folder_spec(one) for one in mounted], "program": program}
            await faults.point("namespace.placed")
            if first is None or program is None:
                reply = await self._request(spec, kind, [])
            else:
                async with self._gate:
                    streams = FirstStreams(first.data)
                    reply = await self._request(spec, kind, streams.fds)
            if "error" in reply:
                if reply.get("errno") == errno.ESRCH:
                    raise _ZygoteEnded(f"the sandbox could not be made: {reply['error']}", hint="retry")
                reason = f"{reply['error']} ({reply['hint']})" if reply.get("hint") else reply["error"]
                raise errors.StartFailed(f"the sandbox could not be made: {reason}",
                                         hint="the log of the worker has the cause; `rock doctor` checks the machine")
            sandbox = Sandbox(slot, reply["pid"], reply["start"], base, folders, snapshots=layers)
            if mounted:
                sandbox.volumes = {one.volume: [one.name, one.read_only] for one in mounted if one.volume}
            if streams is not None and "program" in reply:
                sandbox.link, process = streams.adopt(slot, reply["program"], FIRST_KEY)
                sandbox.first, sandbox.shell = (reply["path"], process), (reply["path"], process.pid)
            else:
                sandbox.link = InitLink.connect(slots.run_dir / slot, slot)
            slots.live[slot] = sandbox
            await faults.point("namespace.born")
            (records.create if kept is None else records.write)(slots.run_dir, slot, sandbox.record(id))
            self._stock_up()
            return sandbox
        except (OSError, errors.RockError) as error:
            await (slots.clean_up(slot, None, None, base, folders) if kept is None else kept.put_back(base))
            if isinstance(error, OSError):
                raise not_started(error) from None
            raise
        finally:
            slots.making.discard(slot)
            if streams is not None:
                streams.close()

    async def _request(self, spec: dict[str, Any], kind: Kind, fds: list[int]) -> dict[str, Any]:
        lease = self._lease(kind)
        spec["leased"] = lease is not None
        return await self._slots.launcher.request("create", spec, fds if lease is None else [*fds, lease.fd])

    @staticmethod
    def _program(first: FirstProgram | None, kind: Kind, config: SandboxConfig) -> dict[str, Any] | None:
        """What the launcher needs to know of the first program. None where only pid 1 can start it."""
        if first is None or config.nofile is not None:
            return None
        program = first.program
        return {"paths": list(first.paths), "arguments": list(program.argv[1:]), "numbers": FIRST_NUMBERS,
                "data": 0 if first.data is None else FIRST_DATA,
                "user": kind.rootfs.user, "env": merged(environment(kind.rootfs, config), program.env),
                "cwd": kind.rootfs.cwd or "/"}

    def _lease(self, kind: Kind) -> Lease | None:
        """Each sandbox holds a copy of the lease; this one is cached for the creates of the next seconds."""
        found = self._leases.get(kind.digest)
        if found is None and (found := self._images.lease(kind.rootfs)) is not None:
            self._leases[kind.digest] = found
            asyncio.get_running_loop().call_later(_LEASE_KEPT, self._end_lease, kind.digest)
        return found

    def _end_lease(self, digest: str) -> None:
        if (lease := self._leases.pop(digest, None)) is not None:
            lease.close()

    def _place(self, slot: str) -> None:
        """The run folder: a prepared one, or a new one that the launcher's child fills."""
        run_dir = self._slots.run_dir
        try:
            os.rename(f"{run_dir}/{records.SPARE}/{slot}", f"{run_dir}/{slot}")
        except FileNotFoundError:
            os.mkdir(f"{run_dir}/{slot}", 0o700)

    def _stock_up(self) -> None:
        """Request run folders and namespaces for the next sandboxes soon: the launcher prepares them while idle, and
        the creates of a burst have one request."""
        if self._stocking is None:
            self._stocking = asyncio.get_running_loop().call_later(_STOCKED_AFTER, self._stock_up_now)

    def _stock_up_now(self) -> None:
        self._stocking = None
        fresh = [records.new_slot() for _ in range(_SPARES - len(self.spares))]  # replaces the earlier request
        folders = [f"{self._slots.run_dir}/{records.SPARE}/{slot}" for slot in fresh]
        self._slots.launcher.post("ahead", {"ranges": self._slots.ranges.coming(_SPARES), "folders": folders})

    def spec(self, slot: str, base: int, kind: Kind, config: SandboxConfig, layers: Sequence[str],
             freezing: bool = False) -> dict[str, Any]:
        """What the launcher needs to know of a sandbox. layers: see `make`. freezing: the first layer will receive what
        the sandbox has written."""
        run_dir, limiter = self._slots.run_dir, self._slots.limiter
        etc = {}
        if config.network == "host":
            with contextlib.suppress(OSError):
                etc["resolv.conf"] = Path("/etc/resolv.conf").read_text()
        elif config.network == "nat":
            etc["resolv.conf"] = isolated_network.RESOLV_CONF
        frozen = [records.layer(run_dir, one) for one in layers]
        binds: list[dict[str, Any]] = [
            {"source": bind.source, "target": bind.target, "writable": bind.writable, "idmap": bind.idmap}
            for bind in kind.rootfs.binds]  # fmt: skip
        for index, bind in enumerate(binds if frozen else ()):
            if bind["writable"]:
                known = [os.path.isdir(f"{one}/upper{index}") for one in frozen]
                known[0] |= freezing and os.path.isdir(f"{run_dir}/{slot}/upper{index}")
                bind["over"] = [f"{one}/upper{index}" for one, exists in zip(frozen, known, strict=True) if exists]
        return {
            "slot": f"{run_dir}/{slot}", "base": base, "network": config.network, "shared": kind.shared,
            "layers": [*(f"{one}/upper" for one in frozen), f"{run_dir}/{records.BASE}", *kind.rootfs.layers],
            "etc": etc, "binds": binds,
            "cgroups": list(limiter.groups.folders(slot).values()), "limits": limiter.files(slot, config),
            "affinity": limiter.affinity(config), "processes": limiter.processes(config),
            "disk": self._disks.spec(config), "frozen": frozen[0] if frozen else "", "snapshots": list(layers),
        }


def _folder_spec(mount: FolderMount) -> dict[str, Any]:
    return {"root": mount.root, "path": mount.path, "target": mount.target, "read_only": mount.read_only,
            "volume": bool(mount.volume), "identity": mount.identity}
