"""Snapshots of containers: images that the engine makes by a commit (decision 68).

    <run_dir>/snapshots/ID.json    a snapshot, from before its commit until its image is gone

The engine pauses a container during its commit. A snapshot has the files of the container and no process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rock import errors, faults
from rock.host import atomic_file
from rock.runtime.base import Frozen, Handle
from rock.runtime.docker.engine import Engine, EngineError, engine_errors
from rock.runtime.init.files import InitSandboxes

_REPOSITORY = "rock-snapshot"
_MOST_LAYERS = 100  # of snapshots; the engine has at most about 125, with those of the image
_MACHINE_ID = "/etc/machine-id"
_SSH = "/etc/ssh"
ONLY_FILES = "an engine commits files alone: the namespace runtime copies processes"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Committed:
    """A snapshot. image: the engine's id, "" until the commit is complete. settings: environment, working directory and
    user of the image below. layers: commits above that image. hidden: removed, while containers or other snapshots use
    its image."""

    id: str
    sandbox: str
    image: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: int = 1
    bytes: int | None = None
    paused_ms: float = 0.0
    left_out: Sequence[str] = ()
    hidden: bool = False


class Snapshots:
    """The snapshots of the containers whose run folders are in `run_dir`."""

    def __init__(self, engine: Engine, run_dir: Path) -> None:
        self._engine = engine
        self._folder = run_dir / "snapshots"
        self._known: dict[str, Committed] = {}
        self._making: set[str] = set()
        self._users: dict[str, tuple[str, str]] = {}  # by slot: sandbox and snapshot

    def open(self) -> None:
        """Read the records. Blocking."""
        for path in self._folder.glob("*.json"):
            try:
                found = Committed(**atomic_file.parsed(path.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                log.error("the record of snapshot %s cannot be read: %s", path.stem, error)
                continue
            self._known[found.id] = found

    # ---- users ----

    def note(self, slot: str, handle: Handle) -> None:
        """A sandbox exists."""
        if (snapshot := handle.data.get("snapshot")) is not None:
            self._users[slot] = handle.id, str(snapshot)

    async def gone(self, slot: str) -> None:
        """A sandbox is gone: images without another user are removed."""
        if self._users.pop(slot, None) is not None:
            await self._collect()

    def users(self) -> dict[str, list[str]]:
        """The ids of all snapshots, with those of the sandboxes that started from them."""
        found: dict[str, list[str]] = {one.id: [] for one in self._known.values() if not one.hidden}
        for sandbox, snapshot in self._users.values():
            if snapshot in found:
                found[snapshot].append(sandbox)
        return found

    # ---- read ----

    def image(self, snapshot_id: str) -> dict[str, Any]:
        """The image of a snapshot as the engine describes images, with the settings of the one below. NotFound."""
        found = self._known.get(snapshot_id)
        if found is None or found.hidden or not found.image:
            raise errors.NotFound(f"there is no snapshot {snapshot_id} on this worker",
                                  hint="its retention has ended, or it is on another worker: `rock snapshot ls`")
        return {"Id": found.image, "Config": dict(found.settings)}

    # ---- checkpoint ----

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         processes: bool) -> Frozen:
        """See `Forks.checkpoint`."""
        if (known := self._known.get(snapshot_id)) is not None and known.image:
            return _report(handle, known)
        self._refuse(handle, files, processes)
        self._making.add(snapshot_id)
        made = Committed(snapshot_id, handle.id)
        try:
            self._write(made)
            with engine_errors(handle.id):
                made = await self._commit(made, handle)
            await faults.point("docker.checkpoint.committed")
            self._write(made)
        except BaseException as error:
            self._known[snapshot_id] = dataclasses.replace(made, hidden=True)
            with contextlib.suppress(errors.RockError, EngineError, OSError):
                await self._remove(self._known[snapshot_id])
            if isinstance(error, OSError):
                raise atomic_file.not_kept(error, handle.id, "a snapshot") from None
            raise
        finally:
            self._making.discard(snapshot_id)
        self._known[snapshot_id] = made
        return _report(handle, made)

    def _refuse(self, handle: Handle, files: str, processes: bool) -> None:
        if processes:
            raise errors.Unsupported(ONLY_FILES, sandbox_id=handle.id, hint='use memory="session" or "auto"')
        if files == "switch":
            raise errors.Unsupported('files="switch": an engine copies the files of a container',
                                     sandbox_id=handle.id, hint='use files="copy" or "auto"')
        if handle.data["oci"] != "runc":
            raise errors.Unsupported(f"{handle.data['oci']} may have files that the engine does not commit",
                                     sandbox_id=handle.id, hint="use the OCI runtime runc")  # fmt: skip
        if _above(self._below(handle)) > _MOST_LAYERS:
            raise errors.Unsupported(f"the sandbox is on {_MOST_LAYERS} layers of snapshots: that is the most",
                                     sandbox_id=handle.id, hint="copy its files to a new sandbox")

    def _below(self, handle: Handle) -> Committed | None:
        """The snapshot from which a sandbox started."""
        return self._known.get(str(handle.data.get("snapshot")))

    async def _commit(self, made: Committed, handle: Handle) -> Committed:
        container = await self._engine.inspect(handle.data["container"])
        if container is None:
            raise errors.Lost("its container was removed from outside", sandbox_id=handle.id)
        below = self._below(handle)
        base = await self._engine.image(str(container.get("Image"))) or {}
        settings = (base.get("Config") or {}) if below is None else below.settings
        kept = {name: settings.get(name) for name in ("Env", "WorkingDir", "User")}
        began = time.monotonic()
        image = await self._engine.commit(handle.data["container"], _REPOSITORY, made.id)
        paused = time.monotonic() - began
        found = await self._engine.image(image) or {}
        size = max(0, int(found.get("Size") or 0) - int(base.get("Size") or 0)) if base and found else None
        left_out = [f"volume of the image at {str(one.get('Destination'))[:200]}: an engine does not commit it"
                    for one in container.get("Mounts") or () if one.get("Type") == "volume"]  # fmt: skip
        left_out.append("/dev/shm and other files in memory")
        return dataclasses.replace(made, image=image, settings=kept, layers=_above(below), bytes=size,
                                   paused_ms=round(paused * 1000, 3), left_out=left_out)

    def _write(self, made: Committed) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        atomic_file.replace(self._folder / f"{made.id}.json", atomic_file.summed(json.dumps(dataclasses.asdict(made))))

    # ---- delete ----

    async def drop(self, snapshot_id: str) -> bool:
        """See `Forks.drop_snapshot`."""
        found = self._known.get(snapshot_id)
        if found is None or snapshot_id in self._making:
            return True
        if not found.hidden:
            self._known[snapshot_id] = dataclasses.replace(found, hidden=True)
            self._write(self._known[snapshot_id])
        await self._collect()
        return snapshot_id not in self._known

    async def _collect(self) -> None:
        """Remove the images of hidden snapshots that have no user, the newest first."""
        for found in sorted((one for one in self._known.values() if one.hidden), key=lambda one: -one.layers):
            with contextlib.suppress(errors.RockError, EngineError, OSError):  # it is in use, or the engine is away
                await self._remove(found)

    async def _remove(self, found: Committed) -> None:
        await self._engine.remove_image(found.image or f"{_REPOSITORY}:{found.id}", force=False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / f"{found.id}.json")
        self._known.pop(found.id, None)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)


def _above(below: Committed | None) -> int:
    """The layers of a snapshot of a sandbox that started from `below`."""
    return 1 if below is None else below.layers + 1


def _report(handle: Handle, found: Committed) -> Frozen:
    after = dataclasses.replace(handle, data={**handle.data, "parent": found.id})
    return Frozen(after, "copy", found.bytes, found.layers, found.paused_ms, list(found.left_out))


def parent(handle: Handle) -> str | None:
    """The newest snapshot of which a sandbox has the files."""
    found = handle.data.get("parent") or handle.data.get("snapshot")
    return None if found is None else str(found)


async def give_identity(runtime: InitSandboxes, handle: Handle) -> None:
    """A machine id of its own for a sandbox from a snapshot, where it has one, and no host keys of SSH. RockError."""
    with contextlib.suppress(errors.NotFound):
        if (await runtime.stat(handle, _MACHINE_ID, follow=False)).kind == "file":
            fd, token = await runtime.open_write(handle, _MACHINE_ID)
            try:
                os.write(fd, f"{secrets.token_hex(16)}\n".encode())
            finally:
                os.close(fd)
            await runtime.commit_write(handle, token)
    with contextlib.suppress(errors.NotFound, errors.InvalidConfig):
        for found in await runtime.list(handle, _SSH):
            if found.name.startswith("ssh_host_") and found.kind == "file":
                await runtime.remove(handle, f"{_SSH}/{found.name}")


