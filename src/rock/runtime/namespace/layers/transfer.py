"""Layers of snapshots as tars: export, and import under new names (decision 60)."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path

from rock import faults
from rock.host.atomic_file import not_kept
from rock.images.records import RootFS
from rock.protocol.sandbox import ArchivedFiles
from rock.runtime.namespace import records, retained
from rock.runtime.namespace.layers import packer_link
from rock.runtime.namespace.layers.merges import PackerOptions
from rock.runtime.namespace.layers.snapshots import Snapshot, Snapshots, refuse_mount_points
from rock.runtime.namespace.limits import disk_layout


class LayerTransfer:
    """options: see StoppedSandboxes.packer_options."""

    def __init__(self, snapshots: Snapshots, options: PackerOptions) -> None:
        self._snapshots = snapshots
        self._options = options

    async def export(self, snapshot_id: str, number: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The tar of a layer, the oldest of the snapshot is number 0, and its summary. NotFound, InvalidConfig."""
        found, rootfs = self._snapshots.get(snapshot_id), self._snapshots.rootfs(snapshot_id)
        layers = list(reversed(found.layers))
        with self._snapshots.using(layers):
            parts = packer_link.parts(Path(self._snapshots.folder(layers[number])), rootfs)
            async for part in packer_link.pack({**self._options(parts), "limit": 1 << 44}, rootfs.digest):
                yield part

    def count(self, snapshot_id: str) -> int:
        return len(self._snapshots.get(snapshot_id).layers)

    async def take_in(self, snapshot_id: str, sandbox_id: str, rootfs: RootFS, layers: Sequence[ArchivedFiles],
                      data: Callable[[int], AsyncIterator[bytes]]) -> int | None:
        """Create a snapshot of layers, the oldest first; returns the size of the newest. InvalidConfig for a tar that
        no layer can be, Unsupported for mount points that are no folders, StorageFull."""
        names = [*(secrets.token_hex(16) for _ in layers[1:]), snapshot_id]
        with self._snapshots.using(names):
            try:
                for number, (name, files) in enumerate(zip(names, layers, strict=True)):
                    folder = self._snapshots.folder(name)
                    await asyncio.to_thread(self._make, folder, rootfs)
                    options = self._options(packer_link.parts(Path(folder), rootfs))
                    await packer_link.unpack({**options, "size": files.size, "digest": files.digest}, data(number))
                    await asyncio.to_thread(refuse_mount_points, folder, sandbox_id)
                    await faults.point("namespace.import.unpacked")
                size = await asyncio.to_thread(disk_layout.written, f"{self._snapshots.folder(snapshot_id)}/upper")
                made = Snapshot(snapshot_id, sandbox_id, retained.write_note(rootfs), list(reversed(names)), "copy",
                                size, [], 0.0)  # fmt: skip
                await self._snapshots.add(made, rootfs)
            except OSError as error:
                raise not_kept(error, sandbox_id, "a snapshot") from None
        return size

    def _make(self, folder: str, rootfs: RootFS) -> None:
        self._snapshots.make_folder(folder)
        for name, _ in records.written(rootfs):
            os.mkdir(f"{folder}/{name}", 0o755)
