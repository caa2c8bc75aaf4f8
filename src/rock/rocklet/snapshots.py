"""Snapshots of the sandboxes of this machine (decision 45): checkpoint, rollback, deletion.

    folder/ID.json    what a snapshot is, and the sessions that its sandbox had

The runtime has the files. A record without files, or files without a record, come from a crash in the middle; `open`
and the admin remove them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from rock import faults
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, StartFailed, Unsupported
from rock.host import atomic_file
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.protocol.snapshots import Level, NodeCheckpoint, NodeForkable, NodeImport, NodeSnapshot, NodeSnapshots
from rock.rocklet.commands import programs, shell_state
from rock.rocklet.commands.session import DEFAULT, Session
from rock.rocklet.commands.shell_process import first_program
from rock.rocklet.commands.shell_protocol import exports
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.rocklet.snapshot_archive import END, ArchivedSession, Manifest, Reader, header, padding
from rock.runtime.base import Forks, Frozen, Handle
from rock.runtime.pools import FirstProgram, MovesSnapshots

log = logging.getLogger("rock.node")
_PIECE = 1 << 20
_ID = re.compile(r"[0-9a-f]{32}")


class Shells(NamedTuple):
    """The sessions of a snapshot: request, state (base64, or None) and last exit status of each; the environment of its
    sandbox; and of copied background processes the command and the time of the start, by id."""

    sessions: Sequence[Mapping[str, Any]]
    env: Mapping[str, str]
    processes: Mapping[str, Mapping[str, Any]] = {}


class Snapshots:
    """The snapshots of this machine, by id. find: the running sandbox with an id."""

    def __init__(self, folder: Path, runtimes: Runtimes, find: Callable[[str], Awaitable[Supervisor]]) -> None:
        self._folder = folder
        self._runtimes = runtimes
        self._find = find
        self._known: dict[str, NodeSnapshot] = {}
        self._shells: dict[str, Shells] = {}
        self._taking: dict[str, asyncio.Task[NodeSnapshot]] = {}  # by sandbox

    def open(self) -> None:
        """Read the records. Blocking."""
        shutil.rmtree(self._folder.parent / "exports", ignore_errors=True)
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
                self._shells[found.snapshot_id] = Shells(data.get("sessions", []), data.get("env", {}),
                                                         data.get("processes", {}))  # fmt: skip

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
        sandbox = await self._find(sandbox_id)
        if (known := self._known.get(spec.snapshot_id)) is not None:
            return known
        task = self._taking.get(sandbox_id)
        if task is None:
            # It continues when its client leaves: a switch cannot be cancelled half-way.
            task = asyncio.create_task(self._taken(sandbox, spec), name=f"checkpoint-{sandbox_id}")
            self._taking[sandbox_id] = task
            task.add_done_callback(lambda _: self._taking.pop(sandbox_id, None))
            return await asyncio.shield(task)
        taken = await asyncio.shield(task)
        if taken.snapshot_id != spec.snapshot_id:
            raise Conflict(f"another snapshot of sandbox {sandbox_id} was being taken", sandbox_id=sandbox_id,
                           hint="retry")  # fmt: skip
        return taken

    async def _taken(self, sandbox: Supervisor, spec: NodeCheckpoint) -> NodeSnapshot:
        async with sandbox.awake():
            return await self._take(sandbox, spec)

    async def close(self) -> None:
        """Wait for the checkpoints in progress."""
        await asyncio.gather(*self._taking.values(), return_exceptions=True)

    async def _take(self, sandbox: Supervisor, spec: NodeCheckpoint) -> NodeSnapshot:
        runtime = sandbox.runtime
        if not isinstance(runtime, Forks):
            raise Unsupported(f"runtime {sandbox.handle.runtime!r} cannot take snapshots", sandbox_id=sandbox.id,
                              hint="use the namespace runtime, or `rock commit`, which makes an image")  # fmt: skip
        if sandbox.paused:
            raise Conflict(f"sandbox {sandbox.id} is paused", sandbox_id=sandbox.id, hint="resume it first")
        parent = runtime.parent(sandbox.handle)
        async with _Moment(sandbox, spec.wait) as moment:
            sessions, without, background = _requests(sandbox), list[str](), _background(sandbox)
            running = [one for one in sandbox.processes.values() if one.info.running]
            frozen, why = await self._with_processes(runtime, sandbox, spec, moment.over)
            if frozen is None:
                sessions, without = await self._states(sandbox, spec)
                frozen = await runtime.checkpoint(sandbox.handle, spec.snapshot_id, spec.files, continued=moment.over)
        copied = frozen.copied
        await faults.point("node.checkpoint.taken")
        changed = frozen.handle != sandbox.handle
        sandbox.handle = frozen.handle
        level: Level = "files" if spec.memory == "files" or without else "session"
        if copied is not None:
            level = "processes"
        made = NodeSnapshot(
            snapshot_id=spec.snapshot_id, sandbox_id=sandbox.id, parent=parent, tenant=spec.tenant, name=spec.name,
            image=sandbox.config.image, memory=level, files=frozen.files, bytes=frozen.bytes, layers=frozen.layers,
            paused_ms=frozen.paused_ms, left_out=_left_out(sandbox, frozen, sessions, without, running) + why,
            created_at=time.time(),
        )  # fmt: skip
        kept = {id: one for id, one in background.items() if programs.KEY + id in (copied or ())}
        shells = Shells(sessions, dict(sandbox.config.env), kept)
        try:
            if changed:
                await sandbox.saved()
            await faults.point("node.checkpoint.saved")
            await asyncio.to_thread(self._write, made, shells)
        except OSError as error:
            with contextlib.suppress(RockError):
                await runtime.drop_snapshot(spec.snapshot_id)
            raise atomic_file.not_kept(error, sandbox.id, "a snapshot") from None
        self._known[made.snapshot_id] = made
        self._shells[made.snapshot_id] = shells
        return made

    async def _with_processes(self, runtime: Forks, sandbox: Supervisor, spec: NodeCheckpoint,
                              continued: Callable[[], None]) -> tuple[Frozen | None, list[str]]:
        """A checkpoint with the processes where that is wanted and possible; else the reason against it, for the
        report. Unsupported when the request needs them."""
        if spec.memory not in ("auto", "processes"):
            return None, []
        try:
            return await runtime.checkpoint(sandbox.handle, spec.snapshot_id, spec.files, processes=True,
                                            continued=continued), []  # fmt: skip
        except Unsupported as error:
            if spec.memory == "processes":
                raise
            return None, [error.message]

    async def forkable(self, sandbox_id: str) -> NodeForkable:
        """The level that a checkpoint with memory="auto" would have at this moment, and the reasons against a better
        one. Unsupported for a runtime without snapshots, Conflict for a paused sandbox."""
        sandbox = await self._find(sandbox_id)
        runtime = sandbox.runtime
        if not isinstance(runtime, Forks):
            raise Unsupported(f"runtime {sandbox.handle.runtime!r} cannot take snapshots", sandbox_id=sandbox.id,
                              hint="use the namespace runtime, or `rock commit`, which makes an image")  # fmt: skip
        if sandbox.paused:
            raise Conflict(f"sandbox {sandbox.id} is paused", sandbox_id=sandbox.id, hint="resume it first")
        async with sandbox.awake():
            reasons = list(await runtime.refusals(sandbox.handle))
        if not reasons:
            return NodeForkable(memory="processes")
        without = [one.spec.session for one in sandbox.sessions if one.closed is None and not shell_state.carries(one)]
        reasons += [f"session: the state of session {name} cannot be read" for name in without]
        return NodeForkable(memory="files" if without else "session", reasons=reasons)

    async def _states(self, sandbox: Supervisor, spec: NodeCheckpoint) -> tuple[list[dict[str, Any]], list[str]]:
        """The open sessions with the states of their shells, and the names of those without one. Unsupported when the
        request needs all of them."""
        found, without = [], []
        for session in sandbox.sessions:
            if session.closed is not None:
                continue
            state = None
            if spec.memory != "files":
                state = await shell_state.read(session, sandbox.runtime, sandbox.handle)
                if state is None:
                    without.append(session.spec.session)
            encoded = None if state is None else base64.b64encode(state.encode("utf-8", "surrogateescape")).decode()
            found.append({"spec": session.spec.model_dump(mode="json"), "state": encoded})
        if without and spec.memory == "session":
            raise Unsupported(f'memory="session": the state of session {without[0]} cannot be read',
                              sandbox_id=sandbox.id,
                              hint="close it, or use memory=\"auto\": only the state of a bash without a terminal can "
                                   "be carried")  # fmt: skip
        return found, without

    def _write(self, made: NodeSnapshot, shells: Shells) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = {"snapshot": made.model_dump(mode="json"), **shells._asdict()}
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

    async def give(self, sandbox: Supervisor, snapshot_id: str) -> None:
        """Give a new sandbox from a snapshot its sessions: copied shells are attached now, others are opened when they
        are first used. Its background processes are `expected`. RockError."""
        made, shells = self._known.get(snapshot_id), self._shells.get(snapshot_id)
        if made is None or shells is None or made.memory != "processes":
            self.inherit(sandbox, snapshot_id)
            return
        sessions = {one["spec"]["session"]: one for one in shells.sessions}
        sandbox.expected = shells.processes
        await sandbox.sessions.recover({name: one["spec"] for name, one in sessions.items()},
                                       await sandbox.runtime.processes(sandbox.handle),
                                       sandbox.journal)  # fmt: skip
        if missing := [name for name in sessions if name not in sandbox.sessions]:
            raise StartFailed(f"the shell of session {missing[0]} ended while it was copied", sandbox_id=sandbox.id,
                              hint="retry")
        env = _changed(sandbox.config, shells)
        for session in sandbox.sessions:
            known = sessions.get(session.spec.session)
            session.continues(int(known["status"]) if known is not None else 0, env)
        await faults.point("node.sessions.attached")

    def inherit(self, sandbox: Supervisor, snapshot_id: str, names: Collection[str] | None = None) -> None:
        """Give a sandbox that starts from a snapshot its sessions, which are opened when they are first used. names:
        those that it has not opened before a restart of the rocklet; None is all."""
        shells = self._shells.get(snapshot_id)
        if shells is None:
            if names:
                log.warning("sandbox %s: sessions %s start without state: their snapshot is gone", sandbox.id, names)
            return
        sandbox.snapshot = snapshot_id
        for one in shells.sessions:
            request = CreateBashSessionRequest.model_validate(one["spec"])
            name, text = request.session, one["state"]
            if (names is None or name in names) and name not in sandbox.sessions:
                state = None if text is None else base64.b64decode(text).decode("utf-8", "surrogateescape")
                sandbox.sessions.inherited[name] = request, state
        env = _changed(sandbox.config, shells)

        async def give(session: Session, state: str) -> None:
            await shell_state.give(session, state, env, sandbox.runtime, sandbox.handle)

        sandbox.sessions.give = give

    def first_program(self, snapshot_id: str, config: SandboxConfig) -> FirstProgram | None:
        """The bash of the default session with its state in a snapshot, for a sandbox with this config. None where that
        session is another one."""
        shells = self._shells.get(snapshot_id)
        if shells is None:
            return None
        one = next((one for one in shells.sessions if one["spec"]["session"] == DEFAULT.session), None)
        if one is None:
            return first_program(DEFAULT)
        if CreateBashSessionRequest.model_validate(one["spec"]) != DEFAULT:
            return None
        if one["state"] is None:
            return first_program(DEFAULT)
        return first_program(DEFAULT, base64.b64decode(one["state"]) + exports(_changed(config, shells)))

    # ---- export and import ----

    async def export(self, snapshot_id: str) -> AsyncGenerator[bytes]:
        """A snapshot as a tar (snapshot_archive.py). NotFound, Unsupported, InvalidConfig; StorageFull for the layers,
        which are stored here until they are sent."""
        made, shells = self._known.get(snapshot_id), self._shells.get(snapshot_id)
        runtime = self._moving(snapshot_id)
        if made is None or shells is None:
            raise NotFound(f"there is no snapshot {snapshot_id} on this worker", hint="`rock snapshot ls` lists them")
        sessions = [ArchivedSession(spec=CreateBashSessionRequest.model_validate(one["spec"]), state=one["state"])
                    for one in shells.sessions]  # fmt: skip
        memory = "session" if made.memory == "session" else "files"
        left_out = [*made.left_out, *(["processes and their memory"] if made.memory == "processes" else [])]
        with tempfile.TemporaryDirectory(prefix="export-", dir=self._scratch()) as folder:
            layers: list[ArchivedFiles] = []
            for number in range(runtime.layer_count(snapshot_id)):
                layers.append(await self._spooled(runtime, snapshot_id, number, f"{folder}/{number}"))
            manifest = Manifest(sandbox_id=made.sandbox_id, image=made.image, image_digest=layers[0].image_digest,
                                memory=memory, layers=layers, sessions=sessions, env=dict(shells.env),
                                left_out=left_out)  # fmt: skip
            raw = manifest.model_dump_json().encode()
            yield header("manifest.json", len(raw)) + raw + padding(len(raw))
            for number, files in enumerate(layers):
                yield header(f"layers/{number}.tar", files.size)
                with open(f"{folder}/{number}", "rb") as file:
                    while part := await asyncio.to_thread(file.read, _PIECE):
                        yield part
                yield padding(files.size)
            yield END

    async def _spooled(self, runtime: MovesSnapshots, snapshot_id: str, number: int, path: str) -> ArchivedFiles:
        found: ArchivedFiles | None = None
        try:
            with open(path, "xb") as file:
                async with contextlib.aclosing(runtime.export_layer(snapshot_id, number)) as stream:
                    async for part in stream:
                        if isinstance(part, bytes):
                            await asyncio.to_thread(file.write, part)
                        else:
                            found = part
        except OSError as error:
            raise atomic_file.not_kept(error, "", "the export of a snapshot") from None
        assert found is not None
        return found

    async def take_in(self, snapshot_id: str, spec: NodeImport, data: AsyncIterator[bytes]) -> NodeSnapshot:
        """Create a snapshot from such a tar. InvalidConfig, ImageError, Unsupported, StorageFull."""
        if not _ID.fullmatch(snapshot_id):
            raise InvalidConfig(f"snapshot_id={snapshot_id[:64]!r} is no id of a snapshot", hint="use 32 hex digits")
        if (known := self._known.get(snapshot_id)) is not None:
            return known
        runtime, reader = self._moving(), Reader(data)
        manifest = await reader.manifest()
        size = await runtime.import_layers(
            snapshot_id, manifest.sandbox_id, manifest.image, manifest.image_digest, manifest.layers,
            lambda number: reader.layer(number, manifest.layers[number]))  # fmt: skip
        made = NodeSnapshot(
            snapshot_id=snapshot_id, sandbox_id=manifest.sandbox_id, tenant=spec.tenant, name=spec.name,
            image=manifest.image, memory="session" if manifest.memory == "session" else "files", files="import",
            bytes=size, layers=len(manifest.layers), left_out=manifest.left_out, created_at=time.time())  # fmt: skip
        shells = Shells([one.model_dump(mode="json") for one in manifest.sessions], manifest.env)
        try:
            await faults.point("node.import.unpacked")
            await asyncio.to_thread(self._write, made, shells)
        except OSError as error:
            for forking in self._forking():
                with contextlib.suppress(RockError):
                    await forking.drop_snapshot(snapshot_id)
            raise atomic_file.not_kept(error, manifest.sandbox_id, "a snapshot") from None
        self._known[snapshot_id], self._shells[snapshot_id] = made, shells
        return made

    def _moving(self, snapshot_id: str | None = None) -> MovesSnapshots:
        """The runtime that has a snapshot, or that imports one. Unsupported."""
        name = self._runtimes.having(snapshot_id)
        found = self._runtimes.of(SandboxConfig(image="host")) if name is None else self._runtimes[name]
        if not isinstance(found, MovesSnapshots):
            raise Unsupported(f"runtime {found.name!r} cannot export and import snapshots",
                              hint="use the namespace runtime")
        return found

    def _scratch(self) -> Path:
        """Where layers are stored until they are sent; removed at the start."""
        folder = self._folder.parent / "exports"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

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
        self._shells.pop(snapshot_id, None)
        return NodeSnapshots()


class _Moment:
    """A time in which a sandbox is quiet: until `over`, or the end of the context. Conflict, see Supervisor.quiet."""

    def __init__(self, sandbox: Supervisor, wait: float) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._quiet = sandbox.quiet(wait)
        self._ending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Moment:
        await self._stack.enter_async_context(self._quiet)
        return self

    def over(self) -> None:
        """Commands may begin again. Idempotent."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._stack.aclose(), name="checkpoint: commands continue")

    async def __aexit__(self, *_: object) -> None:
        self.over()
        assert self._ending is not None
        await asyncio.shield(self._ending)


def _changed(config: SandboxConfig, shells: Shells) -> dict[str, str]:
    """The variables of a sandbox that differ from those of the sandbox of a snapshot."""
    return {name: value for name, value in config.env.items() if shells.env.get(name) != value}


def _requests(sandbox: Supervisor) -> list[dict[str, Any]]:
    """The open sessions, whose shells are copied."""
    return [{"spec": one.spec.model_dump(mode="json"), "state": None, "status": one.status}
            for one in sandbox.sessions if one.closed is None]  # fmt: skip


def _background(sandbox: Supervisor) -> dict[str, dict[str, Any]]:
    """The background processes, by id."""
    return {one.id: {"command": one.command, "started_at": one.started_at} for one in sandbox.processes.values()}


def _left_out(sandbox: Supervisor, frozen: Frozen, sessions: Sequence[Mapping[str, Any]],
              without: Sequence[str], running: Sequence[programs.Background]) -> list[str]:
    """What existed in the sandbox and is not in the snapshot. running: its background processes."""
    found = list(frozen.left_out)
    copied = frozen.copied or ()
    carried = [one["spec"]["session"] for one in sessions if one["state"] is not None]
    others = [one["spec"]["session"] for one in sessions if one["state"] is None and frozen.copied is None]
    if carried:
        found.append(f"of the shells of sessions {', '.join(sorted(carried))}: {shell_state.NOT_CARRIED}")
    if others:
        why = ", which is not a bash without a terminal" if without else ""
        found.append(f"state of the shell in sessions {', '.join(sorted(others))}{why}: variables, functions, working "
                     "directory")  # fmt: skip
    for process in running:
        if programs.KEY + process.id not in copied:
            found.append(f"background process {process.id}: {str(process.command)[:200]}")
    if sandbox.hosts_environments:
        found.append("open environments")
    for mount in sandbox.config.volumes or ():
        found.append(f"volume {mount.name} at {mount.target}: it is shared, not copied")
    return found
