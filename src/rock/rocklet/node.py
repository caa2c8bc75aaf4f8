"""All sandboxes of this machine: admission, creation, events of their ends, removal. Recovery is in recovery.py."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from rock import faults
from rock.errors import Conflict, Lost, NoCapacity, NotFound, NotHere, RockError
from rock.host import resources
from rock.host.atomic_file import not_started
from rock.http.asgi import App
from rock.http.event_loop import settled
from rock.protocol.node import NodeInventory, NodeSandbox, NodeStatus, NodeVolumes
from rock.protocol.sandbox import ArchivedFiles, Cause, Isolation, SandboxConfig
from rock.rocklet.commands.session import Session
from rock.rocklet.configuration import WorkerConfiguration
from rock.rocklet.environments.host import ENV_LEASE
from rock.rocklet.environments.local_socket import LocalSocket
from rock.rocklet.idle import AFTER, IdleDescriptors
from rock.rocklet.images.build import Builds
from rock.rocklet.images.commits import Commits
from rock.rocklet.images.store import Images, UsedImages
from rock.rocklet.lifecycle import Ends, Replaced, make, wake_sandbox
from rock.rocklet.pools import Pools as WarmPools
from rock.rocklet.recovery import Recovery, Unattached
from rock.rocklet.retained import Quarantine, RetainedSandboxes
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.rocklet.snapshots import Snapshots
from rock.rocklet.state import StateDirectory
from rock.rocklet.volumes import HostFolders, Volumes
from rock.runtime.base import Handle, Runtime
from rock.runtime.pools import Pools, Prepared, StartsFirst

log = logging.getLogger("rock.node")

EXISTS = "choose another sandbox_id, or stop that sandbox first"  # hint of errors


class Node:
    """The sandboxes of one machine.

    runtimes: by name; `default` is for configs that name none. folder: see StateDirectory.
    """

    def __init__(
        self,
        runtimes: dict[str, Runtime],
        default: str,
        folder: Path,
        limit: int,
        images: Images,
        env_lease: float = ENV_LEASE,
        host_mounts: Sequence[str] = (),
        own_logs: bool = False,
        idle_after: float = AFTER,
        share: int = 1,
        home: Path | None = None,
    ) -> None:
        """limit: maximum number of sandboxes; 0 is what memory and file descriptors permit. host_mounts: folders of
        this machine below which sandboxes may mount folders. own_logs: of WorkerConfiguration. idle_after: of
        IdleDescriptors. share: number of processes that share the memory. home: of the server, if not that of this
        rocklet."""
        self.images = images
        self.runtimes = Runtimes(runtimes, default, images)
        self.state_dir = StateDirectory(folder)
        self.configuration = WorkerConfiguration(folder.parent / "configuration.json", self.runtimes, own_logs)
        self.local_socket = LocalSocket(folder, self.find)
        self.limit, self._limit_reason = (limit, "ROCK_SANDBOX_LIMIT") if limit else resources.sandboxes(share)
        self._env_lease = env_lease
        self.boot = uuid.uuid4().hex[:12]
        self.ends = Ends(self.boot)
        self.gateway: App | None = None  # serves /gateway for the loopback ports of sandboxes
        self._host_name = socket.gethostname()
        self.supervisors: dict[str, Supervisor] = {}
        self.kept = RetainedSandboxes(self.state_dir)
        self.quarantine = Quarantine(self.state_dir, self.runtimes, folder)
        self.commits = Commits(images.store, self.kept, self.supervisors, self.find)
        self.builds = Builds(images, self.runtimes)
        mountable = HostFolders(host_mounts, home or folder.parent)
        self.volumes = Volumes(folder.parent / "volumes", mountable, self._users_of, images.agents)
        self.runtimes.mount_source = self.volumes
        self.snapshots = Snapshots(folder.parent / "snapshots", self.runtimes, self.find)
        self.runtimes.first_of = self.snapshots.first_program
        self.recovery = Recovery(self.state_dir, self.runtimes, self.kept, self.quarantine, self.snapshots, self.ends,
                                 self.supervisors, self.supervise)
        self.pools = WarmPools(self.runtimes)
        self.descriptors = IdleDescriptors(idle_after)
        self._creating: dict[str, asyncio.Task[Supervisor]] = {}
        self._destroying: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._stopped: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._rolling: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._replaced = Replaced()
        self._used = UsedImages()
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- start and stop ----

    async def open(self, *, later: bool = False) -> None:
        """Open the runtimes, recover the sandboxes of an earlier run, and remove resources without a record. later:
        some sandboxes stay unattached until a request needs them, or until `recovery.begin`."""
        self.state_dir.make()
        self.local_socket.open()
        await asyncio.to_thread(self.volumes.open)
        await asyncio.to_thread(self.snapshots.open)
        await self.runtimes.open()
        self.configuration.open()
        self.descriptors.start()
        for name in reversed(await asyncio.to_thread(self.images.store.names)):
            self._used.note(name)
        await self.recovery.survey(later=later)

    def let_go(self) -> None:
        """Prepare for the stop of the server: requests that wait for commands or events end now, and the
        commands continue."""
        self.ends.let_go()
        self.recovery.let_go()
        for supervisor in self.supervisors.values():
            supervisor.let_go()

    async def close(self) -> None:
        """Detach from every sandbox and leave it running."""
        self.ends.let_go()
        await self.recovery.close()
        tasks = [*self._creating.values(), *self._destroying.values(), *self._stopped.values(), *self._rolling.values(),
                 *self._replaced.tasks(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.descriptors.close()
        await self.pools.close()
        await self.snapshots.close()
        await self.commits.close()
        await self.builds.close()
        await self.local_socket.close()
        for supervisor in self.supervisors.values():
            await supervisor.detach()
        self.state_dir.close()
        self.configuration.close()
        await self.runtimes.close()

    # ---- create, stop and destroy ----

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Create a sandbox. A repetition with the same id and config returns the same sandbox."""
        return await self._started(sandbox_id, config, wake=False)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Start a sandbox again from its retained files; a running one stays unchanged. Lost when there are no
        files."""
        return await self._started(sandbox_id, config, wake=True)

    async def _started(self, sandbox_id: str, config: SandboxConfig, *, wake: bool) -> NodeSandbox:
        await self.recovery.found(sandbox_id)
        await self._ended_first(sandbox_id, self._destroying, self._stopped)
        held = self.quarantine.error(sandbox_id)
        if held is not None:
            raise held
        found = self.supervisors.get(sandbox_id)
        if found is not None:
            # The registry password is not stored.
            if found.config.model_copy(update={"registry_password": config.registry_password}) != config:
                raise Conflict(f"sandbox {sandbox_id} exists already", sandbox_id=sandbox_id, hint=EXISTS)
            return found.describe()
        task = self._creating.get(sandbox_id)
        if task is None:
            if self.count + len(self._creating) >= self.limit:
                raise NoCapacity(
                    f"this machine is at its limit of {self.limit} sandboxes: {self._limit_reason}",
                    hint="stop some, or set ROCK_SANDBOX_LIMIT to a higher number",
                )
            if not wake and sandbox_id in self.kept:
                raise Conflict(f"sandbox {sandbox_id} exists already: its files are retained after its stop",
                               sandbox_id=sandbox_id,
                               hint="choose another sandbox_id, restart that sandbox, or delete it with `rock rm`")
            start = self._wake if wake else self._create
            work = start(sandbox_id, config) if not config.volumes else \
                self.volumes.during(config, functools.partial(start, sandbox_id, config))
            task = asyncio.create_task(work, name=f"create-{sandbox_id}")
            self._creating[sandbox_id] = task
            self.ends.forget(sandbox_id)  # the end of an earlier sandbox with this name
            task.add_done_callback(lambda _: self._creating.pop(sandbox_id, None))
        await settled(task)
        if task.cancelled():
            raise Conflict(f"sandbox {sandbox_id} was stopped before its start was complete", sandbox_id=sandbox_id,
                           hint="create it again")
        return task.result().describe()

    async def _create(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        runtime, handle, phases = await make(self.runtimes, sandbox_id, config)
        supervisor = self.supervise(sandbox_id, config, runtime, handle)
        supervisor.phases = phases
        try:
            if config.snapshot is not None:
                await self.snapshots.give(supervisor, config.snapshot)
                await supervisor.attach_processes(supervisor.expected)
            supervisor.save()
        except BaseException as error:
            await self._undo(supervisor)
            if isinstance(error, OSError):
                raise not_started(error, sandbox_id) from None
            raise
        await faults.point("node.create.saved")
        self.supervisors[sandbox_id] = supervisor
        supervisor.begin_idle()
        self._used.note(config.image)
        ahead = runtime.prepared(handle) if isinstance(runtime, Pools) else None
        supervisor.sessions.first = runtime.started(handle) if isinstance(runtime, StartsFirst) else None
        if not isinstance(ahead, Session) or not supervisor.sessions.claim(ahead):
            self._spawn(self._open_default(supervisor, ahead))
        return supervisor

    async def _wake(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        runtime, handle, phases = await wake_sandbox(self.kept, sandbox_id, config)
        supervisor = self.supervise(sandbox_id, config, runtime, handle)
        supervisor.phases = phases
        try:
            supervisor.save()
        except OSError as error:
            await self.kept.rest(supervisor, 0)
            raise not_started(error, sandbox_id) from None
        self.kept.awake(sandbox_id)
        self.supervisors[sandbox_id] = supervisor
        supervisor.begin_idle()
        self._spawn(self._open_default(supervisor, None))
        return supervisor

    def supervise(
        self, sandbox_id: str, config: SandboxConfig, runtime: Runtime, handle: Handle, spools: str | None = None
    ) -> Supervisor:
        """The supervisor of a running sandbox. spools: the name of its existing spool folder."""
        return Supervisor(sandbox_id, config, runtime, handle, self.state_dir, self._ended, spools, self._env_lease,
                          self.gateway, self.descriptors)  # fmt: skip

    async def _undo(self, supervisor: Supervisor) -> None:
        """Remove a sandbox whose start failed, completely, also if its stop cancels the start meanwhile."""
        async def remove() -> None:
            await supervisor.destroy(0)
            await supervisor.forget()

        task = asyncio.create_task(remove(), name=f"undo-{supervisor.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise
        task.result()

    @staticmethod
    async def _open_default(supervisor: Supervisor, unfit: Prepared | None) -> None:
        if isinstance(unfit, Session):
            await unfit.close()
        await supervisor.sessions.prepare()
        for name in list(supervisor.sessions.inherited):
            with contextlib.suppress(RockError):  # the next request for it gets the error
                await supervisor.sessions.get(name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """Remove a sandbox and all its resources, including retained files. Idempotent: an unknown id is reported as
        not alive.

        Concurrent calls share one removal, which continues when callers disconnect; all get the response when it is
        complete.
        """
        await self.recovery.found(sandbox_id)
        await self._ended_first(sandbox_id, self._stopped, self._rolling)
        return await _joined(self._destroying, sandbox_id, lambda: self._destroy(sandbox_id, grace))

    async def _destroy(self, sandbox_id: str, grace: float) -> NodeSandbox:
        await self._replaced.gone(sandbox_id)
        supervisor = await self._after_creation(sandbox_id)
        if supervisor is None:
            others = {*self.supervisors, *self.recovery.unattached, *self._creating, *self.kept.ids(),
                      *self.quarantine.ids()} - {sandbox_id}  # fmt: skip
            await self.quarantine.remove(sandbox_id, sorted(others))
            await self.kept.remove(sandbox_id)
            return NodeSandbox(sandbox_id=sandbox_id)
        supervisor.cause = supervisor.cause or Cause.USER  # from now on requests do not find it
        await faults.point("node.destroy.begun")
        await supervisor.destroy(grace)
        await faults.point("node.destroy.gone")
        await supervisor.forget()
        await faults.point("node.destroy.forgotten")
        del self.supervisors[sandbox_id]  # removed last, so that a failed destroy can be repeated
        return supervisor.describe()

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """Stop a sandbox and retain its files. Idempotent: `kept` of the response reports whether they exist.

        Concurrent calls share one operation, as in `destroy`.
        """
        await self.recovery.found(sandbox_id)
        await self._ended_first(sandbox_id, self._destroying, self._rolling)
        return await _joined(self._stopped, sandbox_id, lambda: self._rest(sandbox_id, grace))

    async def _rest(self, sandbox_id: str, grace: float) -> NodeSandbox:
        await self._replaced.gone(sandbox_id)
        supervisor = await self._after_creation(sandbox_id)
        if supervisor is not None:
            supervisor.cause = supervisor.cause or Cause.USER
            try:
                await self.kept.rest(supervisor, grace)
            except Lost:
                await supervisor.destroy(0)
                await supervisor.forget()
            del self.supervisors[sandbox_id]
        return self.kept.describe(sandbox_id)

    async def unpack(
        self, sandbox_id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]
    ) -> NodeSandbox:
        """Restore a stopped sandbox from the archive, for a later `wake`."""
        await self.recovery.found(sandbox_id)
        await self._ended_first(sandbox_id, self._destroying, self._stopped)
        found = self.supervisors.get(sandbox_id)
        if found is not None:
            if found.config != config:
                raise Conflict(f"sandbox {sandbox_id} exists already", sandbox_id=sandbox_id, hint=EXISTS)
            return found.describe()  # the response to an earlier restore was lost
        runtime = self.runtimes.of(config)
        await self.images.prepare(config)
        task = asyncio.ensure_future(self.kept.unpack(sandbox_id, config, runtime, files, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        return self.kept.describe(sandbox_id)

    async def rollback(self, sandbox_id: str, snapshot_id: str) -> NodeSandbox:
        """Return a running sandbox to a snapshot: a new sandbox under its id replaces it. NotFound, Conflict,
        Unsupported; the sandbox then continues unchanged."""
        await self.recovery.found(sandbox_id)
        await self._ended_first(sandbox_id, self._destroying, self._stopped, self._rolling)
        return await _joined(self._rolling, sandbox_id, lambda: self._rollback(sandbox_id, snapshot_id))

    async def _rollback(self, sandbox_id: str, snapshot_id: str) -> NodeSandbox:
        await self._replaced.gone(sandbox_id)
        old = self.get(sandbox_id)
        handle = await self.snapshots.replacement(old, snapshot_id)
        new = self.supervise(sandbox_id, old.config, old.runtime, handle)
        try:
            await self.snapshots.give(new, snapshot_id)
            new.save()  # from here on a crash finds the new one
        except (OSError, RockError) as error:
            await new.destroy(0)
            self.state_dir.give_back(new.spools)
            if isinstance(error, RockError):
                raise
            raise not_started(error, sandbox_id) from None
        await faults.point("node.rollback.saved")
        self.supervisors[sandbox_id] = new
        new.sessions.first = old.runtime.started(handle) if isinstance(old.runtime, StartsFirst) else None
        new.begin_idle()
        self._spawn(self._open_default(new, None))  # while the old one ends
        if old.processes or new.expected:  # both have their logs in one folder
            await self._replaced.end(old, whole=True)
            await new.attach_processes(new.expected)
            await new.saved()
        else:
            await self._replaced.end(old, whole=False)
        if (port := old.gateway_port.port) is not None:
            await new.open_gateway_port(port)
        return new.describe()

    def _users_of(self, volume_id: str) -> list[str]:
        """The sandboxes that use a volume; those with a damaged record may use any."""
        here: list[Supervisor | Unattached] = [*self.supervisors.values(), *self.recovery.unattached.values()]
        running = (one for one in here if one.config.volumes)
        mounted = [one.id for one in running if volume_id in (m.volume_id for m in one.config.volumes or ())]
        return [*mounted, *self.quarantine.ids()]

    async def delete_volume(self, volume_id: str) -> NodeVolumes:
        """Delete a volume, after the removal of sandboxes that have ended. Conflict, Unavailable."""
        for sandbox_id in self._users_of(volume_id):
            supervisor = self.supervisors.get(sandbox_id)
            if supervisor is not None and supervisor.cause is not None:
                await self._clean_up(supervisor)
        return await self.volumes.delete(volume_id)

    async def _after_creation(self, sandbox_id: str) -> Supervisor | None:
        """The sandbox, once its creation is complete."""
        creating = self._creating.get(sandbox_id)
        if creating is not None:
            creating.cancel()
            await asyncio.gather(creating, return_exceptions=True)
        return self.supervisors.get(sandbox_id)

    @staticmethod
    async def _ended_first(sandbox_id: str, *ends: dict[str, asyncio.Task[NodeSandbox]]) -> None:
        """Wait until none of these operations is in progress for a sandbox."""
        while tasks := {found[sandbox_id] for found in ends if sandbox_id in found}:
            await asyncio.wait(tasks)

    # ---- lookup ----

    def get(self, sandbox_id: str) -> Supervisor:
        """The sandbox, or the error that describes its end."""
        supervisor = self.supervisors.get(sandbox_id)
        if supervisor is not None and supervisor.cause is None:
            return supervisor
        held = self.quarantine.error(sandbox_id)
        raise held or self.ends.error(sandbox_id) or NotHere(f"sandbox {sandbox_id} not found", sandbox_id=sandbox_id)

    async def find(self, sandbox_id: str) -> Supervisor:
        """As `get`, once the sandbox is attached."""
        await self.recovery.found(sandbox_id)
        return self.get(sandbox_id)

    async def pause(self, sandbox_id: str) -> NodeSandbox:
        """See `Supervisor.pause`."""
        supervisor = await self.find(sandbox_id)
        async with supervisor.awake():
            await supervisor.pause()
        return supervisor.describe()

    async def resume(self, sandbox_id: str) -> NodeSandbox:
        """See `Supervisor.resume`."""
        supervisor = await self.find(sandbox_id)
        await supervisor.resume()
        return supervisor.describe()

    async def look(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        """The current state of a sandbox. NotFound when it is not on this machine."""
        await self.recovery.found(sandbox_id)
        supervisor = self.supervisors.get(sandbox_id)
        if supervisor is None:
            held = self.quarantine.look(sandbox_id)
            if held is not None:
                return held
            raise NotFound(f"sandbox {sandbox_id} is not on this worker", sandbox_id=sandbox_id,
                           hint="check the id; `rock ps` lists the sandboxes")
        if touch:
            supervisor.touch()
        return supervisor.describe(await supervisor.usage() if usage else None)

    def inventory(self) -> NodeInventory:
        here = [supervisor.describe() for supervisor in self.supervisors.values()]
        unattached = [one.describe() for one in self.recovery.unattached.values()]
        return NodeInventory(sandboxes=[*here, *unattached, *self.quarantine.describe()], kept=self.kept.ids())

    async def status(self) -> NodeStatus:
        runtime = self.runtimes[self.runtimes.default]
        total, free = resources.read()
        kinds, unused = self.runtimes.gpus()
        return NodeStatus(
            host_name=self._host_name,
            host_ip="127.0.0.1",
            runtime=self.runtimes.default,
            isolation=getattr(runtime, "isolation", Isolation.NONE),
            enforced=dict(getattr(runtime, "enforced", {})),
            cpus=os.cpu_count() or 1,
            memory_total=total,
            memory_free=free,
            sandboxes=self.count,
            sandbox_limit=self.limit,
            boot=self.boot,
            memory_pressure=resources.pressure(),
            images=self._used.names(),
            fetching=self.runtimes.fetching.words(),
            gpus=len(kinds),
            gpus_free=unused,
            accelerators=sorted(set(kinds)),
            load=round(os.getloadavg()[0], 2),
        )

    # ---- ends of sandboxes ----

    def lose(self, reason: str) -> None:
        """Give up every sandbox of this machine; their resources are removed in the background."""
        for task in self._creating.values():
            task.cancel()
        for supervisor in list(self.supervisors.values()):
            if supervisor.cause is None:
                supervisor.cause, supervisor.reason = Cause.LOST, reason
                self._ended(supervisor, Cause.LOST, reason)

    async def emptied(self, seconds: float) -> bool:
        """Wait for the removals in progress, up to a time limit; whether none is left."""
        tasks = [*self._creating.values(), *self._destroying.values(), *self._stopped.values(), *self._rolling.values(),
                 *self._replaced.tasks(), *self._tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        return not self.has_sandboxes

    @property
    def count(self) -> int:
        """The number of sandboxes that run or are being ended."""
        return len(self.supervisors) + len(self.recovery.unattached)

    @property
    def has_sandboxes(self) -> bool:
        """Whether a sandbox runs, starts or is being ended."""
        return bool(self.count or self._creating)

    def _ended(self, supervisor: Supervisor, cause: Cause, reason: str) -> None:
        """A sandbox ended by itself: publish an event, and remove its resources."""
        log.warning("sandbox %s ended: %s", supervisor.id, reason)
        self.ends.tell(supervisor.id, cause, reason)
        self._spawn(self._clean_up(supervisor))

    async def _clean_up(self, supervisor: Supervisor) -> None:
        self.ends.notify()
        if self.supervisors.get(supervisor.id) is supervisor:
            try:
                await (self.rest if supervisor.config.keeps_files else self.destroy)(supervisor.id)
            except Exception:
                log.exception("removing what is left of sandbox %s; its stop tries again", supervisor.id)


async def _joined(
    tasks: dict[str, asyncio.Task[NodeSandbox]], sandbox_id: str, work: Callable[[], Coroutine[Any, Any, NodeSandbox]]
) -> NodeSandbox:
    """The result of the operation in progress for a sandbox; starts the operation when there is none."""
    task = tasks.get(sandbox_id)
    if task is None:
        task = tasks[sandbox_id] = asyncio.create_task(work(), name=f"end-{sandbox_id}")
        task.add_done_callback(lambda _: tasks.pop(sandbox_id, None))
    return await asyncio.shield(task)
