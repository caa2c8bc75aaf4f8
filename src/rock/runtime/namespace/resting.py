"""Sandboxes at rest: put away, given up, and their files read out and brought in. The files are in `keeping.py`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from rock import errors
from rock.guest.remove import remove_tree
from rock.protocol.sandbox import ArchivedFiles, Isolation
from rock.runtime.base import Handle
from rock.runtime.image.leases import Lease
from rock.runtime.image.rootfs import RootFS
from rock.runtime.image.source import Images
from rock.runtime.initlink import InitLink
from rock.runtime.namespace import keeping, packlink, records, teardown
from rock.runtime.namespace.handles import RUNTIME, Handles
from rock.runtime.namespace.slots import Slots
from rock.runtime.process import wait_gone


class Resting:
    """Holds the images of those at rest."""

    def __init__(self, slots: Slots, handles: Handles, images: Images) -> None:
        self._slots = slots
        self._handles = handles
        self._images = images
        self._leases: dict[str, Lease | None] = {}  # by slot

    def close(self) -> None:
        for slot in list(self._leases):
            self.let_go(slot)

    async def rest(self, handle: Handle, grace: float) -> Handle:
        """End it and put its files away: its handle from now on."""
        data, slot = handle.data, handle.data["slot"]
        if "rootfs" not in data:
            raise errors.Unsupported("its files are not kept: it was not made for that", sandbox_id=handle.id)
        if slot not in self._leases:  # before its pid 1 lets go of it; a removed image is told when it is woken
            with contextlib.suppress(errors.ImageError):
                self._leases[slot] = self._images.lease(keeping.noted(data["rootfs"]))
        pid, start = data.get("pid"), data.get("start")
        if pid is not None and grace > 0:
            await self._slots.stop(handle, grace)
        self._slots.forget(slot)
        for found in (pid, start) if pid is not None else None, teardown.find(self._slots.run_dir / slot):
            if found is not None:
                teardown.kill(*found)
                await wait_gone(*found)
        folders = self._slots.limiter.groups.folders(slot)
        try:
            await asyncio.to_thread(keeping.strip, self._slots.run_dir, slot, handle.id, list(folders.values()))
        except errors.Lost:
            self.let_go(slot)
            raise
        if "base" in data:
            self._slots.ranges.give_back(data["base"], slot)
        kept = {"id": handle.id, "slot": slot, "cgroups": folders, "rootfs": data["rootfs"]}
        return Handle(RUNTIME, handle.id, handle.isolation, handle.enforced, kept)

    async def put_back(self, kept: Handle, base: int) -> None:
        """What became of a wake is given up, and the files stay. base: the uid range that it had."""
        with contextlib.suppress(errors.RockError):  # then the next wake or rest tells
            await self.rest(kept, 0.0)
        self._slots.ranges.give_back(base, kept.data["slot"])

    def let_go(self, slot: str) -> None:
        """Hold its image no longer."""
        lease = self._leases.pop(slot, None)
        if lease is not None:
            lease.close()

    # ---- files ----

    def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """What it wrote, as a layer."""
        rootfs = keeping.noted(handle.data["rootfs"])
        parts = packlink.parts(self._slots.run_dir / handle.data["slot"], rootfs)
        return packlink.pack({**self._packer_options(parts), "limit": limit}, rootfs.digest)

    def image(self, handle: Handle) -> RootFS:
        """What it was made of."""
        note = handle.data.get("rootfs") or handle.data.get("image")
        if note is None:
            raise errors.Unsupported("it was made by a server that did not note its image", sandbox_id=handle.id)
        return keeping.noted(note)

    async def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """What it wrote so far, whether it lives or rests; meanwhile it stands still."""
        rootfs, folder = self.image(handle), self._slots.run_dir / handle.data["slot"]
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

    async def unpack(self, id: str, rootfs: RootFS, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        """Files from elsewhere, as those of a sandbox at rest. rootfs: what they were written over."""
        slots = self._slots
        slot = records.new_slot()
        folder = slots.run_dir / slot
        slots.making.add(slot)
        try:
            await asyncio.to_thread(keeping.make_empty, slots.run_dir, slot, id, rootfs)
            options = self._packer_options(packlink.parts(folder, rootfs))
            await packlink.unpack({**options, "size": files.size, "digest": files.digest}, data)
            plain = {"id": id, "slot": slot, "cgroups": {}, "rootfs": keeping.note(rootfs)}
            enforced = slots.limiter.enforced()
            return await self.rest(Handle(RUNTIME, id, self._handles.isolation, enforced, plain), 0.0)
        except BaseException:
            self.let_go(slot)
            await asyncio.shield(asyncio.to_thread(remove_tree, str(folder)))
            raise
        finally:
            slots.making.discard(slot)

    def _packer_options(self, parts: list[dict[str, str]]) -> dict[str, Any]:
        """As root files have their owners' ids as seen inside; else all are ours, and inside they are root's."""
        privileged = self._handles.isolation == Isolation.NAMESPACES
        return {"parts": parts, "enter": os.geteuid() != 0, "one_owner": not privileged,
                "overlay": "trusted.overlay." if privileged else "user.overlay."}
