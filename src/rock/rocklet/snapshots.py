"""Snapshots of the sandboxes of this machine (decision 45): checkpoint, rollback, deletion.

    folder/ID.json    what a snapshot is, and the sessions that its sandbox had

The runtime has the files. A record without files, or files without a record, come from a crash in the middle; `open`
and the admin remove them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from rock import faults
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unsupported
from rock.host import atomic_file
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.snapshots import NodeCheckpoint, NodeSnapshot, NodeSnapshots
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.runtime.base import Forks, Frozen, Handle

log = logging.getLogger("rock.node")
_ID = re.compile(r"[0-9a-f]{32}")


class Snapshots:
    """The snapshots of this machine, by id. find: the running sandbox with an id."""

    def __init__(self, folder: Path, runtimes: Runtimes, find: Callable[[str], Supervisor]) -> None:
        self._folder = folder
        self._runtimes = runtimes
        self._find = find
        self._known: dict[str, NodeSnapshot] = {}
        self._sessions: dict[str, list[dict[str, Any]]] = {}
        self._taking: dict[str, asyncio.Task[NodeSnapshot]] = {}  # by sandbox

    def open(self) -> None:
        """Read the records. Blocking."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                if not _ID.fullmatch(name.removesuffix(".json")):
                    with contextlib.suppress(OSError):  # of an interrupted write
                        os.unlink(self._folder / name)
                    continue
                try:
                    data = atomic_file.parsed((self._folder / name).read_bytes())
                    found = NodeSnapshot.model_validate(data["snapshot"])
                except (OSError, ValueError, KeyError) as error:
                    log.error("the record of snapshot %s cannot be read: %s", name, error)
                    continue
                self._known[found.snapshot_id] = found
                self._sessions[found.snapshot_id] = list(data.get("sessions", []))

    # ---- read ----

    def inventory(self) -> NodeSnapshots:
        """All snapshots that have files here; those without a record are damaged or incomplete."""
        found = {}
        for runtime in self._forking():
            for snapshot_id, users in runtime.snapshots().items():
                known = self._known.get(snapshot_id, NodeSnapshot(snapshot_id=snapshot_id))
                found[snapshot_id] = known.model_copy(update={"users": sorted(users)})
        return NodeSnapshots(snapshots=found)

    def _forking(self) -> list[Forks]:
        return [one for name in self._runtimes.names() if isinstance(one := self._runtimes[name], Forks)]

    # ---- checkpoint ----

    async def checkpoint(self, sandbox_id: str, spec: NodeCheckpoint) -> NodeSnapshot:
        """Take a snapshot of a running sandbox. A repetition with the same id returns the same. Conflict, Unsupported,
        StorageFull; the sandbox then continues unchanged."""
        sandbox = self._find(sandbox_id)
        if (known := self._known.get(spec.snapshot_id)) is not None:
            return known
        task = self._taking.get(sandbox_id)
        if task is None:
            # It continues when its client leaves: a switch cannot be cancelled half-way.
            task = asyncio.create_task(self._take(sandbox, spec), name=f"checkpoint-{sandbox_id}")
            self._taking[sandbox_id] = task
            task.add_done_callback(lambda _: self._taking.pop(sandbox_id, None))
            return await asyncio.shield(task)
        taken = await asyncio.shield(task)
        if taken.snapshot_id != spec.snapshot_id:
            raise Conflict(f"another snapshot of sandbox {sandbox_id} was being taken", sandbox_id=sandbox_id,
                           hint="retry")  # fmt: skip
        return taken

    async def close(self) -> None:
        """Wait for the checkpoints in progress."""
        await asyncio.gather(*self._taking.values(), return_exceptions=True)

    async def _take(self, sandbox: Supervisor, spec: NodeCheckpoint) -> NodeSnapshot:
        runtime = sandbox.runtime
        if not isinstance(runtime, Forks):
            raise Unsupported(f"runtime {sandbox.handle.runtime!r} cannot take snapshots", sandbox_id=sandbox.id,
                              hint="use the namespace runtime, or `rock commit`, which makes an image")  # fmt: skip
        if spec.memory == "processes":
            raise Unsupported("memory=\"processes\": this server copies no processes", sandbox_id=sandbox.id,
                              hint='use memory="session" or "files"')  # fmt: skip
        if sandbox.paused:
            raise Conflict(f"sandbox {sandbox.id} is paused", sandbox_id=sandbox.id, hint="resume it first")
        parent = runtime.parent(sandbox.handle)
        async with sandbox.quiet(spec.wait):
            frozen = await runtime.checkpoint(sandbox.handle, spec.snapshot_id, spec.files)
            await faults.point("node.checkpoint.taken")
            sandbox.handle = frozen.handle
            try:
                await sandbox.saved()
                await faults.point("node.checkpoint.saved")
                made = NodeSnapshot(
                    snapshot_id=spec.snapshot_id, sandbox_id=sandbox.id, parent=parent, tenant=spec.tenant,
                    name=spec.name, image=sandbox.config.image, memory="files", files=frozen.files, bytes=frozen.bytes,
                    layers=frozen.layers, paused_ms=frozen.paused_ms, left_out=_left_out(sandbox, frozen),
                    created_at=time.time(),
                )  # fmt: skip
                sessions = [session.spec.model_dump(mode="json") for session in sandbox.sessions if not session.closed]
                await asyncio.to_thread(self._write, made, sessions)
            except OSError as error:
                with contextlib.suppress(RockError):
                    await runtime.drop_snapshot(spec.snapshot_id)
                raise atomic_file.not_kept(error, sandbox.id, "a snapshot") from None
        self._known[made.snapshot_id] = made
        self._sessions[made.snapshot_id] = sessions
        return made

    def _write(self, made: NodeSnapshot, sessions: list[dict[str, Any]]) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = {"snapshot": made.model_dump(mode="json"), "sessions": sessions}
        atomic_file.replace(self._folder / f"{made.snapshot_id}.json", atomic_file.summed(orjson.dumps(data).decode()))

    # ---- rollback ----

    async def replacement(self, sandbox: Supervisor, snapshot_id: str) -> Handle:
        """A new sandbox from a snapshot, under the id of this one. NotFound, Conflict, Unsupported."""
        runtime = sandbox.runtime
        if not isinstance(runtime, Forks):
            raise Unsupported(f"runtime {sandbox.handle.runtime!r} has no snapshots", sandbox_id=sandbox.id,
                              hint="use the namespace runtime")  # fmt: skip
        if snapshot_id not in self._known:
            raise NotFound(f"there is no snapshot {snapshot_id} on this worker", sandbox_id=sandbox.id,
                           hint="a rollback needs a snapshot of its own worker: `rock snapshot ls`")  # fmt: skip
        if (task := self._taking.get(sandbox.id)) is not None:
            await asyncio.gather(asyncio.shield(task), return_exceptions=True)
        return await runtime.replace(sandbox.handle, sandbox.config, snapshot_id)

    async def restore_sessions(self, sandbox: Supervisor, snapshot_id: str) -> None:
        """Open the sessions that existed at the checkpoint, as new shells."""
        for data in self._sessions.get(snapshot_id, []):
            with contextlib.suppress(RockError):
                request = CreateBashSessionRequest.model_validate(data)
                if request.session not in sandbox.sessions:
                    await sandbox.sessions.create(request)

    # ---- delete ----

    async def delete(self, snapshot_id: str) -> NodeSnapshots:
        """Remove a snapshot; one in use is hidden and removed with its last user. Idempotent."""
        if not _ID.fullmatch(snapshot_id):
            raise InvalidConfig(f"snapshot_id={snapshot_id[:64]!r} is no id of a snapshot",
                                hint="use the id of its record")  # fmt: skip
        await faults.point("node.snapshot.delete")
        for runtime in self._forking():
            await runtime.drop_snapshot(snapshot_id)
        await faults.point("node.snapshot.dropped")
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(os.unlink, self._folder / f"{snapshot_id}.json")
        self._known.pop(snapshot_id, None)
        self._sessions.pop(snapshot_id, None)
        return NodeSnapshots()


def _left_out(sandbox: Supervisor, frozen: Frozen) -> list[str]:
    """What existed in the sandbox and is not in the snapshot."""
    found = list(frozen.left_out)
    names = sorted(session.spec.session for session in sandbox.sessions if not session.closed)
    if names:
        found.append(f"state of the shell in sessions {', '.join(names)}: variables, functions, working directory")
    for process in sandbox.processes.values():
        if process.info.running:
            found.append(f"background process {process.id}: {str(process.command)[:200]}")
    if sandbox.hosts_environments:
        found.append("open environments")
    for mount in sandbox.config.volumes or ():
        found.append(f"volume {mount.name} at {mount.target}: it is shared, not copied")
    return found
