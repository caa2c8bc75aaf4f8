"""Merges the old layers of deep snapshots in the background, so that a sandbox can have any number of checkpoints
(decision 67).

A merged layer is a folder beside the snapshots without a record. The next checkpoint of a sandbox with these layers
uses it in their place; snapshots and running sandboxes keep the layers that they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from rock import errors, faults
from rock.host import atomic_file
from rock.images.records import RootFS
from rock.runtime.namespace import records
from rock.runtime.namespace.limits import disk_layout

log = logging.getLogger(__name__)
MERGED_FROM = 32  # layers
_KEPT = 8  # the newest layers, which are not merged
_EVERY = 8  # layers between two attempts
_PATIENCE = 120.0  # seconds
_LONGEST = 600.0  # seconds of a merge for which a request waits
_MERGER = str(Path(__file__).with_name("merger.py"))

Layers = Sequence[str]
PackerOptions = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Merges:
    """The merged layers below `run_dir`. make: creates the folder of a layer. claims: layers in use, by their users.
    collect: removes unused layers. options: see StoppedSandboxes.packer_options."""

    def __init__(self, run_dir: Path, make: Callable[[str], None], claims: dict[str, Layers],
                 collect: Callable[[], None], options: PackerOptions) -> None:
        self._run_dir = run_dir
        self._make = make
        self._claims = claims
        self._collect = collect
        self._options = options
        self._done: dict[tuple[str, ...], str] = {}
        self._running: dict[tuple[str, ...], asyncio.Task[None]] = {}
        self._one = asyncio.Semaphore()  # at a time

    async def close(self) -> None:
        """Cancel the merges in progress; the next start removes their folders."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._done.clear()

    def shortened(self, layers: Layers) -> list[str]:
        """These layers, newest first, with a merged one in place of the oldest where it exists."""
        for start in range(len(layers) if self._done else 0):
            merged = self._done.get(tuple(layers[start:]))
            if merged is not None:
                return [*layers[:start], merged]
        return list(layers)

    def start(self, layers: Layers, rootfs: RootFS) -> None:
        """Merge the old ones of these layers in the background when they are many. rootfs: the image below."""
        if len(layers) < MERGED_FROM or (len(layers) - MERGED_FROM) % _EVERY:
            return
        key = tuple(layers[_KEPT:])
        if key not in self._done and key not in self._running:
            task = asyncio.create_task(self._merge(key, rootfs), name="merge of layers")
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))

    async def settled(self, layers: Layers) -> None:
        """Wait for merges of these layers that are in progress."""
        tasks = [task for start in range(len(layers)) if (task := self._running.get(tuple(layers[start:]))) is not None]
        if tasks:
            await asyncio.wait(tasks)

    def needed(self, used: set[str]) -> set[str]:
        """The merged layers that a sandbox on one of the layers `used` could use; others are forgotten."""
        self._done = {key: name for key, name in self._done.items() if name in used or key[0] in used}
        return set(self._done.values())

    async def _merge(self, key: tuple[str, ...], rootfs: RootFS) -> None:
        try:
            async with self._one, self._made(key, [self._folder(one) for one in key], rootfs, _PATIENCE) as name:
                self._done[key] = name
        except (OSError, TimeoutError, errors.RockError) as error:
            log.warning("%d layers of snapshots stay unmerged: %s", len(key), error)

    @contextlib.asynccontextmanager
    async def whole(self, slot: str, rootfs: RootFS) -> AsyncIterator[Path]:
        """The folder of one layer with all that a sandbox has written above its image; its processes must be stopped
        meanwhile. A merged layer is removed at the end. StorageFull, Unavailable."""
        own, layers = self._run_dir / slot, self._claims.get(slot, ())
        if not layers:
            yield own
            return
        async with contextlib.AsyncExitStack() as stack:
            sources = [str(own), *map(self._folder, layers)]
            try:
                name = await stack.enter_async_context(self._made(layers, sources, rootfs, _LONGEST))
            except TimeoutError:
                raise errors.Unavailable(f"{len(layers) + 1} layers could not be merged within {_LONGEST:g} seconds",
                                         hint="the sandbox continues unchanged") from None
            except OSError as error:
                raise atomic_file.not_kept(error, "", "a merged layer") from None
            yield Path(self._folder(name))

    def _folder(self, layer: str) -> str:
        return records.layer(self._run_dir, layer)

    @contextlib.asynccontextmanager
    async def _made(self, layers: Layers, sources: Sequence[str], rootfs: RootFS,
                    patience: float) -> AsyncIterator[str]:
        """A new layer, merged from `sources`, folders with written files. At the end it is removed unless it is in use.
        layers: those among the sources, which stay. OSError, TimeoutError, StorageFull, Unavailable."""
        name = secrets.token_hex(16)
        self._claims[f"merged {name}"] = [name, *layers]
        try:
            await asyncio.to_thread(self._make, self._folder(name))
            parts = await asyncio.to_thread(self._parts, sources, self._folder(name), rootfs)
            await faults.point("namespace.merge.made")
            await run_program(_MERGER, self._options(parts), "merged", patience)
            await faults.point("namespace.merge.done")
            yield name
        finally:
            del self._claims[f"merged {name}"]
            self._collect()

    def _parts(self, folders: Sequence[str], folder: str, rootfs: RootFS) -> list[dict[str, Any]]:
        """What is merged: the files below /, and at each writable bind of the image. Blocking."""
        base = [str(self._run_dir / records.BASE), *rootfs.layers]
        parts = []
        for name, bind in records.written(rootfs):
            sources = [path for one in folders if os.path.isdir(path := f"{one}/{name}")]
            if sources:
                below = base if bind is None else [bind.source]
                parts.append({"sources": sources, "target": f"{folder}/{name}", "below": below})
        return parts


async def run_program(program: str, options: dict[str, Any], done: str, patience: float) -> None:
    """Run a program of this folder with options. done: what it does with the files, for a message. StorageFull,
    Unavailable, TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", program, json.dumps(options), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd="/", start_new_session=True,
        env={"PATH": disk_layout.PATH, "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C"})  # fmt: skip
    try:
        async with asyncio.timeout(patience):
            _, output = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        text = output.decode("utf-8", "replace").strip()[-300:]
        kind = errors.StorageFull if "No space left" in text or "quota" in text else errors.Unavailable
        raise kind(f"the files could not be {done}: {text}", hint="the sandbox continues unchanged")
