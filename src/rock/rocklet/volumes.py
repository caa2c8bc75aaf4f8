"""Folders that sandboxes of this machine mount: volumes, the host folders that the server's owner has listed, and the
layers of agents.

    folder/ID/data          the files of a volume, which sandboxes write
             /record.json   name, tenant and limit
             /full          exists while the files exceed the limit
    folder/.new-ID          being created
    folder/.removed-ID      being removed

Only the server may enter `folder`. Requests name a volume by its id; no path of a request becomes a path of a volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rock import faults
from rock.errors import Conflict, Forbidden, InvalidConfig, NotFound, StorageFull, Unavailable
from rock.guest.init.remove import remove_tree
from rock.host import atomic_file, folders
from rock.images.agents import AgentLayers
from rock.protocol.node import NodeVolume, NodeVolumes
from rock.protocol.sandbox import HostMount, SandboxConfig, VolumeMount
from rock.runtime.base import FolderMount

T = TypeVar("T")
log = logging.getLogger("rock.node")

_ID = re.compile(r"[0-9a-f]{32}")
_NEW, _REMOVED = ".new-", ".removed-"
_SETTING = "the owner of the server lists such folders in ROCK_HOST_MOUNTS"


class HostFolders:
    """The folders below which sandboxes may mount folders. listed: absolute paths. home: the server's own folder, of
    which nothing is ever mounted. InvalidConfig."""

    def __init__(self, listed: Sequence[str], home: Path) -> None:
        for path in listed:
            if not path.startswith("/"):
                raise InvalidConfig(f"ROCK_HOST_MOUNTS: {path!r} is not an absolute path", hint="/data:/models")
        # Links in a listed path are resolved once, here: a later change of one has no effect.
        self._listed = [(os.path.normpath(path), os.path.realpath(path)) for path in listed]
        self._home = home

    def find(self, mount: HostMount) -> FolderMount:
        """The folder of a mount. Forbidden, NotFound, InvalidConfig. Blocking."""
        source = mount.source
        for listed, real in self._listed:
            if source != listed and not source.startswith(listed.rstrip("/") + "/"):
                continue
            path = source[len(listed) :].strip("/")
            identity = self._identity(source, real, path)
            return FolderMount(real, path, mount.target, read_only=True, identity=identity)
        raise Forbidden(f"the folder {source} of the server's machine may not be mounted", hint=_SETTING)

    def _identity(self, source: str, listed: str, path: str) -> tuple[int, int]:
        try:
            fd = folders.open_listed(listed, path)
        except OSError as error:
            raise _refused(source, error) from None
        try:
            above = folders.identities(fd)
            home = os.open(self._home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                around = folders.identities(home)
            finally:
                os.close(home)
        finally:
            os.close(fd)
        if around[0] in above or above[0] in around:
            raise Forbidden(f"the folder {source} may not be mounted: it has files of the server itself",
                            hint="mount a folder outside of ROCK_HOME, and not one above it")  # fmt: skip
        return above[0]


def _refused(source: str, error: OSError) -> Exception:
    if error.errno in (errno.ELOOP, errno.EXDEV):
        return Forbidden(f"the folder {source} may not be mounted: its path has a symbolic link",
                         hint=f"name the folder to which the link leads; {_SETTING}")  # fmt: skip
    if error.errno == errno.ENOENT:
        return NotFound(f"there is no folder {source} on the server's machine", hint="create it there first")
    if error.errno == errno.ENOTDIR:
        return InvalidConfig(f"{source} is not a folder", hint="only folders can be mounted")
    return Forbidden(f"the folder {source} cannot be opened: {os.strerror(error.errno or 0)}", hint=_SETTING)


class Volumes:
    """The volumes of this machine. users: ids of the sandboxes that may use a volume. agents: layers that sandboxes
    mount too."""

    def __init__(
        self, folder: Path, host: HostFolders, users: Callable[[str], Collection[str]], agents: AgentLayers
    ) -> None:
        self._folder = folder
        self._agents = agents
        self._host = host
        self._users = users
        self._known: dict[str, NodeVolume] = {}
        self._full: set[str] = set()
        self._starting: Counter[str] = Counter()  # starts in progress, by volume

    def open(self) -> None:
        """Read the records, and finish removals that a crash interrupted. Blocking."""
        self._folder = Path(os.path.realpath(self._folder))
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return
        for name in names:
            if name.startswith((_NEW, _REMOVED)):
                with contextlib.suppress(OSError):  # the next start tries again
                    remove_tree(str(self._folder / name))
            elif _ID.fullmatch(name):
                try:
                    data = atomic_file.parsed((self._folder / name / "record.json").read_bytes())
                    self._known[name] = NodeVolume.model_validate(data)
                except (OSError, ValueError) as error:  # its files stay
                    log.error("the record of volume %s cannot be read: %s", name, error)
                    continue
                if (self._folder / name / "full").exists():
                    self._full.add(name)

    def inventory(self) -> NodeVolumes:
        return NodeVolumes(volumes=dict(self._known))

    def ids(self) -> list[str]:
        return sorted(self._known)

    # ---- create and delete ----

    async def create(self, volume_id: str, spec: NodeVolume) -> NodeVolumes:
        """Create a volume; an existing one gets this size. StorageFull, Unavailable."""
        _check(volume_id)
        await faults.point("node.volume.create")
        known = self._known.get(volume_id)
        if known is None and os.path.lexists(self._folder / volume_id):
            raise Unavailable(f"the record of volume {volume_id} cannot be read", hint=f"look at {self._folder}")
        if known != spec:
            try:
                await asyncio.to_thread(self._write, volume_id, spec)
            except OSError as error:
                raise atomic_file.not_kept(error, "", "a volume") from None
            self._known[volume_id] = spec
        await faults.point("node.volume.created")
        return NodeVolumes(volumes={volume_id: spec})

    def _write(self, volume_id: str, spec: NodeVolume) -> None:
        """Complete under its name at once: a crash leaves the whole volume or none. It is synced, because it survives a
        crash of the machine."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self._folder, 0o700)
        final = self._folder / volume_id
        folder = final if final.exists() else self._folder / f"{_NEW}{volume_id}"
        if folder is not final:
            remove_tree(str(folder))
            folder.mkdir(mode=0o700)
            (folder / "data").mkdir()
            os.chmod(folder / "data", 0o777)  # every user of each sandbox that mounts it
        atomic_file.replace(folder / "record.json", atomic_file.summed(spec.model_dump_json()))
        for path in (folder / "record.json", folder):
            _sync(path)
        if folder is not final:
            os.rename(folder, final)
            _sync(self._folder)

    async def delete(self, volume_id: str) -> NodeVolumes:
        """Remove a volume and its files. Idempotent. Conflict while a sandbox may use it; Unavailable when some files
        could not be removed."""
        _check(volume_id)
        users = self._users(volume_id)
        if users or self._starting[volume_id]:
            first = f", as {sorted(users)[0]}" if users else ""
            raise Conflict(f"sandboxes use the volume{first}", hint="stop them first",
                           details={"sandboxes": sorted(users)[:10]})  # fmt: skip
        await faults.point("node.volume.delete")
        known = self._known.pop(volume_id, None)  # from here on no start finds it
        removed = self._folder / f"{_REMOVED}{volume_id}"
        try:
            if known is not None:
                os.rename(self._folder / volume_id, removed)
            await faults.point("node.volume.renamed")
            await asyncio.to_thread(remove_tree, str(removed))
        except OSError as error:
            if known is not None and not removed.exists():
                self._known[volume_id] = known  # it was not renamed
            raise Unavailable(f"the files of a volume could not be removed: {os.strerror(error.errno or 0)}",
                              hint="retry; the next start of its worker tries again") from None  # fmt: skip
        self._full.discard(volume_id)
        return NodeVolumes()

    # ---- use ----

    async def during(self, config: SandboxConfig, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a start; until it ends, its volumes cannot be deleted."""
        ids = {mount.volume_id or "" for mount in config.volumes or ()}
        self._starting.update(ids)
        try:
            return await start()
        finally:
            self._starting.subtract(ids)
            self._starting += Counter()  # drops zeros

    async def resolve(self, config: SandboxConfig) -> Sequence[FolderMount]:
        """The folders that a sandbox mounts. NotFound, Forbidden, InvalidConfig; StorageFull for a volume over its
        limit."""
        found = [self._volume(mount) for mount in config.volumes or ()]
        for mount in config.mounts or ():  # a network file system may be slow
            found.append(await asyncio.to_thread(self._host.find, mount))
        if config.agents:
            found += await asyncio.to_thread(self._layers, config.agents)
        return found

    def _layers(self, names: Sequence[str]) -> Sequence[FolderMount]:
        """The layers of agents, without those of recipes without packages. InvalidConfig, NotFound."""
        found = []
        for name in names:
            recipe = self._agents.recipe(name)
            layer = self._agents.find(recipe)
            if layer is not None:
                tree = os.path.realpath(layer.tree)
                found.append(FolderMount(os.path.dirname(tree), "tree", recipe.mount, read_only=True))
            elif recipe.packages:
                raise NotFound(f"agent {name} is not installed on this worker any more", hint=f"rock agent add {name}")
        return found

    def _volume(self, mount: VolumeMount) -> FolderMount:
        volume_id = mount.volume_id or ""
        if volume_id not in self._known:
            raise NotFound(f"there is no volume {mount.name} on this worker: it was deleted, or never created",
                           hint="list the volumes: Client.list_volumes()")  # fmt: skip
        if not mount.read_only and volume_id in self._full:
            raise StorageFull(f"volume {mount.name} is over its limit, and can only be mounted read-only",
                              hint="copy what you need to a larger volume, and delete this one")  # fmt: skip
        return FolderMount(str(self._folder), f"{volume_id}/data", mount.target, mount.read_only, volume_id, mount.name)

    # ---- limits ----

    def limit(self, volume_id: str) -> tuple[str, int] | None:
        """The folder with the files, and their limit in bytes; None for an unknown volume."""
        known = self._known.get(volume_id)
        return None if known is None else (f"{self._folder}/{volume_id}/data", known.size)

    def full(self) -> Collection[str]:
        """Volumes that were over their limit when they were last measured."""
        return tuple(self._full)

    def measured(self, volume_id: str, size: int) -> bool:
        """Record a measurement in bytes; returns whether the volume is over its limit."""
        known = self._known.get(volume_id)
        if known is None:
            return False
        over, mark = size > known.size, self._folder / volume_id / "full"
        with contextlib.suppress(OSError):  # the mark only outlives a restart of the server
            if over and volume_id not in self._full:
                log.warning("volume %s has %d bytes, and its limit is %d", known.name, size, known.size)
                mark.touch(mode=0o600)
            elif not over and volume_id in self._full:
                mark.unlink(missing_ok=True)
        (self._full.add if over else self._full.discard)(volume_id)
        return over


def _check(volume_id: str) -> None:
    if _ID.fullmatch(volume_id) is None:
        raise InvalidConfig(f"volume_id={volume_id[:64]!r} is no id of a volume", hint="use the id of its record")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
