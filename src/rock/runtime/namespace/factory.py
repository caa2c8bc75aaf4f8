"""How a sandbox comes to be: a run folder, a uid range, a lease of its image, and the launcher's answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rock import errors, faults
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.childlink import Ended
from rock.runtime.diskerrors import not_started
from rock.runtime.image.leases import Lease
from rock.runtime.image.source import Images
from rock.runtime.initlink import InitLink
from rock.runtime.namespace import records, wired
from rock.runtime.namespace.disks import Disks
from rock.runtime.namespace.kind import Kind
from rock.runtime.namespace.slots import Sandbox, Slots

_LEASE_KEPT = 2.0  # seconds
_SPARES = 8  # run folders and user namespaces that are made ahead


class Kept(NamedTuple):
    """Files that a sandbox is made over. put_back: what to do with them when that comes to nothing, by uid range."""

    slot: str
    put_back: Callable[[int], Awaitable[None]]


class _ZygoteEnded(errors.Unavailable):
    """The process that pid 1 is forked of died while it forked one."""


class Factory:
    """spares: run folders that the launcher made ahead; it appends their names."""

    def __init__(self, slots: Slots, disks: Disks, images: Images) -> None:
        self.spares: list[str] = []
        self._slots = slots
        self._disks = disks
        self._images = images
        self._leases: dict[str, Lease] = {}

    def close(self) -> None:
        for digest in list(self._leases):
            self._end_lease(digest)

    async def make(self, id: str, kind: Kind, config: SandboxConfig, kept: Kept | None = None) -> Sandbox:
        """Have the launcher make one, over the files of `kept` where it is given, with a record on disk: of nobody's
        without an `id`. StartFailed, StorageFull, ImageError.

        Once asked it is waited for, so that a cancelled caller leaves nothing behind.
        """
        task = asyncio.create_task(self._make_whole(id, kind, config, kept))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(errors.RockError):
                made = await task
                await (self._slots.discard(made) if kept is None else kept.put_back(made.base))
            raise

    async def _make_whole(self, id: str, kind: Kind, config: SandboxConfig, kept: Kept | None) -> Sandbox:
        """Make one; once more, in another run folder, when the launcher or its zygote died meanwhile."""
        try:
            return await self._make_once(id, kind, config, kept)
        except (Ended, _ZygoteEnded):
            if kept is not None:  # its files are back where they were; the next request finds another launcher
                raise
            return await self._make_once(id, kind, config, kept)

    async def _make_once(self, id: str, kind: Kind, config: SandboxConfig, kept: Kept | None) -> Sandbox:
        slots = self._slots
        slot = kept.slot if kept else self.spares.pop(0) if self.spares else records.new_slot()
        base = slots.ranges.take(slot)
        folders = slots.limiter.groups.folders(slot)
        slots.making.add(slot)
        try:
            if kept is None:
                self._place(slot)
            if config.disk is not None:
                await self._disks.prepare(str(slots.run_dir / slot), config)
            lease = self._lease(kind)
            spec = {**self._spec(slot, base, kind, config, folders), "woken": kept is not None}
            await faults.point("namespace.placed")
            reply = await slots.launcher.request("create", spec, lease.fd if lease else None)
            if "error" in reply:
                if reply.get("errno") == errno.ESRCH:
                    raise _ZygoteEnded(f"the sandbox could not be made: {reply['error']}", hint="retry")
                reason = f"{reply['error']} ({reply['hint']})" if reply.get("hint") else reply["error"]
                raise errors.StartFailed(f"the sandbox could not be made: {reason}")
            sandbox = Sandbox(slot, reply["pid"], reply["start"], base, folders)
            sandbox.link = InitLink.connect(slots.run_dir / slot, slot)
            slots.live[slot] = sandbox
            await faults.point("namespace.born")
            records.write(slots.run_dir, slot, sandbox.record(id))
            self._stock_up()
            return sandbox
        except (OSError, errors.RockError) as error:
            await (slots.clean_up(slot, None, None, base, folders) if kept is None else kept.put_back(base))
            if isinstance(error, OSError):
                raise not_started(error) from None
            raise
        finally:
            slots.making.discard(slot)

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
        run_dir = self._slots.run_dir
        try:
            os.rename(run_dir / records.SPARE / slot, run_dir / slot)
        except FileNotFoundError:
            os.mkdir(run_dir / slot, 0o700)

    def _stock_up(self) -> None:
        """Have the launcher make, while it is idle, what the next sandboxes will need."""
        fresh = [records.new_slot() for _ in range(_SPARES - len(self.spares))]  # in place of those asked for before
        folders = [str(self._slots.run_dir / records.SPARE / slot) for slot in fresh]
        self._slots.launcher.post("ahead", {"ranges": self._slots.ranges.coming(_SPARES), "folders": folders})

    def _spec(self, slot: str, base: int, kind: Kind, config: SandboxConfig,
              folders: Mapping[str, str]) -> dict[str, Any]:
        run_dir, limiter = self._slots.run_dir, self._slots.limiter
        etc = {}
        if config.network == "host":
            with contextlib.suppress(OSError):
                etc["resolv.conf"] = Path("/etc/resolv.conf").read_text()
        elif config.network == "nat":
            etc["resolv.conf"] = wired.RESOLV_CONF
        return {
            "slot": str(run_dir / slot), "base": base, "network": config.network,
            "shared": kind.shared, "layers": [str(run_dir / records.BASE), *kind.rootfs.layers], "etc": etc,
            "binds": [{"source": bind.source, "target": bind.target, "writable": bind.writable, "idmap": bind.idmap}
                      for bind in kind.rootfs.binds],
            "cgroups": list(folders.values()), "limits": limiter.files(slot, config),
            "affinity": limiter.affinity(config), "processes": limiter.processes(config),
            "disk": self._disks.spec(config),
        }
