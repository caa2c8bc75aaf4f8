"""Every sandbox on this machine: admit, create, find again after a restart, tell of ends, destroy."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from rock import faults
from rock.errors import Conflict, Lost, NoCapacity, NotFound, NotHere
from rock.protocol.node import NodeInventory, NodeSandbox, NodeStatus
from rock.protocol.sandbox import ArchivedFiles, Cause, Isolation, SandboxConfig
from rock.rocklet import creation
from rock.rocklet.builds import Builds
from rock.rocklet.commits import Commits
from rock.rocklet.ends import Ends
from rock.rocklet.envdoor import Door
from rock.rocklet.envs import ENV_LEASE
from rock.rocklet.images import Images, UsedImages
from rock.rocklet.kept import KeptSandboxes
from rock.rocklet.quarantine import Quarantine
from rock.rocklet.recovery import Recovery
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.session import Session
from rock.rocklet.shelf import Shelf
from rock.rocklet.supervisor import Supervisor
from rock.runtime import hostmemory
from rock.runtime.base import Handle, Pools, Prepared, Runtime
from rock.runtime.diskerrors import not_started
from rock.wire.waits import settled

log = logging.getLogger("rock.node")


class Node:
    """The sandboxes of one machine.

    runtimes: by name; `default` is the one for configs that name none. folder: see Shelf.
    """

    def __init__(
        self,
        runtimes: dict[str, Runtime],
        default: str,
        folder: Path,
        limit: int,
        images: Images,
        env_lease: float = ENV_LEASE,
    ) -> None:
        self.images = images
        self.runtimes = Runtimes(runtimes, default, images)
        self.shelf = Shelf(folder)
        self.door = Door(folder, self.get)
        self.limit = limit
        self._env_lease = env_lease
        self.boot = uuid.uuid4().hex[:12]
        self.ends = Ends(self.boot)
        self._host_name = socket.gethostname()
        self.supervisors: dict[str, Supervisor] = {}
        self.kept = KeptSandboxes(self.shelf)
        self.quarantine = Quarantine(self.shelf, self.runtimes, folder)
        self.commits = Commits(self)
        self.builds = Builds(self)
        self._creating: dict[str, asyncio.Task[Supervisor]] = {}
        self._destroying: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._resting: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._used = UsedImages()
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life ----

    async def open(self) -> None:
        """Start the runtimes, find the sandboxes of a former run, and remove what has no record."""
        self.shelf.make()
        self.door.open()
        await self.runtimes.open()
        for name in reversed(await asyncio.to_thread(self.images.store.names)):
            self._used.note(name)
        await Recovery(self).run()

    def let_go(self) -> None:
        """The server is about to stop: requests that wait for commands end now, and the commands go on."""
        for supervisor in self.supervisors.values():
            supervisor.let_go()

    async def close(self) -> None:
        """Let go of every sandbox and leave it running."""
        self.ends.closing = True
        tasks = [*self._creating.values(), *self._destroying.values(), *self._resting.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.commits.close()
        await self.builds.close()
        await self.door.close()
        for supervisor in self.supervisors.values():
            await supervisor.detach()
        self.shelf.close()
        await self.runtimes.close()
        await self.ends.notify()

    # ---- create and destroy ----

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make a sandbox. The same id and config again is the same sandbox, made once."""
        return await self._started(sandbox_id, config, wake=False)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make a sandbox again over its kept files; one that runs stays as it is. Lost when there are no files."""
        return await self._started(sandbox_id, config, wake=True)

    async def _started(self, sandbox_id: str, config: SandboxConfig, *, wake: bool) -> NodeSandbox:
        await self._ended_first(sandbox_id, self._destroying, self._resting)
        held = self.quarantine.error(sandbox_id)
        if held is not None:
            raise held
        found = self.supervisors.get(sandbox_id)
        if found is not None:
            # The registry password is not kept.
            if found.config.model_copy(update={"registry_password": config.registry_password}) != config:
                raise Conflict(f"sandbox {sandbox_id} exists already", sandbox_id=sandbox_id)
            return found.describe()
        task = self._creating.get(sandbox_id)
        if task is None:
            if len(self.supervisors) + len(self._creating) >= self.limit:
                raise NoCapacity(
                    f"this machine is at its limit of {self.limit} sandboxes",
                    hint="stop some, or raise ROCK_SANDBOX_LIMIT",
                )
            if not wake and sandbox_id in self.kept:
                raise Conflict(f"sandbox {sandbox_id} exists already: its files are kept", sandbox_id=sandbox_id)
            work = self._wake(sandbox_id, config) if wake else self._create(sandbox_id, config)
            task = asyncio.create_task(work, name=f"create-{sandbox_id}")
            self._creating[sandbox_id] = task
            self.ends.forget(sandbox_id)  # of an earlier one with this name
            task.add_done_callback(lambda _: self._creating.pop(sandbox_id, None))
        await settled(task)
        if task.cancelled():
            raise Conflict(f"sandbox {sandbox_id} was stopped while it started", sandbox_id=sandbox_id)
        return task.result().describe()

    async def _create(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        runtime, handle, phases = await creation.make(self.runtimes, sandbox_id, config)
        supervisor = self.supervise(sandbox_id, config, runtime, handle)
        supervisor.phases = phases
        try:
            supervisor.save()
        except OSError as error:
            await supervisor.destroy(0)
            await supervisor.forget()
            raise not_started(error, sandbox_id) from None
        await faults.point("node.create.saved")
        self.supervisors[sandbox_id] = supervisor
        self._used.note(config.image)
        ahead = runtime.prepared(handle) if isinstance(runtime, Pools) else None
        if not isinstance(ahead, Session) or not supervisor.sessions.claim(ahead):
            self._spawn(self._open_default(supervisor, ahead))
        return supervisor

    async def _wake(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        runtime, handle, phases = await creation.wake(self.kept, sandbox_id, config)
        supervisor = self.supervise(sandbox_id, config, runtime, handle)
        supervisor.phases = phases
        try:
            supervisor.save()
        except OSError as error:
            await self.kept.rest(supervisor, 0)
            raise not_started(error, sandbox_id) from None
        self.kept.awake(sandbox_id)
        self.supervisors[sandbox_id] = supervisor
        self._spawn(self._open_default(supervisor, None))
        return supervisor

    def supervise(
        self, sandbox_id: str, config: SandboxConfig, runtime: Runtime, handle: Handle, spools: str | None = None
    ) -> Supervisor:
        """One that runs. spools: the name of the folder that it has already."""
        return Supervisor(sandbox_id, config, runtime, handle, self.shelf, self._ended, spools, self._env_lease)

    @staticmethod
    async def _open_default(supervisor: Supervisor, unfit: Prepared | None) -> None:
        if isinstance(unfit, Session):
            await unfit.close()
        await supervisor.sessions.prepare()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def destroy(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """Remove a sandbox and all it used, its kept files too. Idempotent: an unknown one answers as not alive.

        However many ask, and whoever of them leaves: it is done once, and all are answered when nothing is left.
        """
        await self._ended_first(sandbox_id, self._resting)
        return await _joined(self._destroying, sandbox_id, lambda: self._destroy(sandbox_id, grace))

    async def _destroy(self, sandbox_id: str, grace: float) -> NodeSandbox:
        supervisor = await self._after_creation(sandbox_id)
        if supervisor is None:
            others = {*self.supervisors, *self._creating, *self.kept.ids(), *self.quarantine.ids()} - {sandbox_id}
            await self.quarantine.remove(sandbox_id, sorted(others))
            await self.kept.remove(sandbox_id)
            return NodeSandbox(sandbox_id=sandbox_id)
        supervisor.cause = supervisor.cause or Cause.USER  # from now on it is not found
        await faults.point("node.destroy.begun")
        await supervisor.destroy(grace)
        await faults.point("node.destroy.gone")
        await supervisor.forget()
        await faults.point("node.destroy.forgotten")
        del self.supervisors[sandbox_id]  # only now: a destroy that failed can be repeated
        return supervisor.describe()

    async def rest(self, sandbox_id: str, grace: float = 0.0) -> NodeSandbox:
        """End a sandbox and keep its files. Idempotent: `kept` of the answer tells whether they are there.

        Done once, however many ask, as in `destroy`.
        """
        await self._ended_first(sandbox_id, self._destroying)
        return await _joined(self._resting, sandbox_id, lambda: self._rest(sandbox_id, grace))

    async def _rest(self, sandbox_id: str, grace: float) -> NodeSandbox:
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
        """Take in a sandbox from the archive, to be woken."""
        await self._ended_first(sandbox_id, self._destroying, self._resting)
        found = self.supervisors.get(sandbox_id)
        if found is not None:
            if found.config != config:
                raise Conflict(f"sandbox {sandbox_id} exists already", sandbox_id=sandbox_id)
            return found.describe()  # of a restore whose end was not seen
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

    async def _after_creation(self, sandbox_id: str) -> Supervisor | None:
        """The sandbox, once nobody makes it any more."""
        creating = self._creating.get(sandbox_id)
        if creating is not None:
            creating.cancel()
            await asyncio.gather(creating, return_exceptions=True)
        return self.supervisors.get(sandbox_id)

    @staticmethod
    async def _ended_first(sandbox_id: str, *ends: dict[str, asyncio.Task[NodeSandbox]]) -> None:
        """Wait until none of these is under way for a sandbox."""
        while tasks := {found[sandbox_id] for found in ends if sandbox_id in found}:
            await asyncio.wait(tasks)

    # ---- find ----

    def get(self, sandbox_id: str) -> Supervisor:
        """The sandbox, or the error that tells what became of it."""
        supervisor = self.supervisors.get(sandbox_id)
        if supervisor is not None and supervisor.cause is None:
            return supervisor
        held = self.quarantine.error(sandbox_id)
        raise held or self.ends.error(sandbox_id) or NotHere(f"sandbox {sandbox_id} not found", sandbox_id=sandbox_id)

    async def look(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        """What is known of a sandbox now. NotFound when it is not here."""
        supervisor = self.supervisors.get(sandbox_id)
        if supervisor is None:
            held = self.quarantine.look(sandbox_id)
            if held is not None:
                return held
            raise NotFound(f"sandbox {sandbox_id} is not here", sandbox_id=sandbox_id)
        if touch:
            supervisor.touch()
        return supervisor.describe(await supervisor.usage() if usage else None)

    def inventory(self) -> NodeInventory:
        here = [s.describe() for s in self.supervisors.values()]
        return NodeInventory(sandboxes=[*here, *self.quarantine.describe()], kept=self.kept.ids())

    async def status(self) -> NodeStatus:
        runtime = self.runtimes[self.runtimes.default]
        total, free = hostmemory.read()
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
            sandboxes=len(self.supervisors),
            sandbox_limit=self.limit,
            boot=self.boot,
            memory_pressure=hostmemory.pressure(),
            images=self._used.names(),
            fetching=self.runtimes.fetching.words(),
            gpus=len(kinds),
            gpus_free=unused,
            accelerators=sorted(set(kinds)),
            load=round(os.getloadavg()[0], 2),
        )

    # ---- ends ----

    def lose(self, reason: str) -> None:
        """Every sandbox here is over from now on; what is left of them is removed in the background."""
        for task in self._creating.values():
            task.cancel()
        for supervisor in list(self.supervisors.values()):
            if supervisor.cause is None:
                supervisor.cause, supervisor.reason = Cause.LOST, reason
                self._ended(supervisor, Cause.LOST, reason)

    async def emptied(self, seconds: float) -> bool:
        """Wait for the ends that are under way, at most so long; whether nothing is left."""
        tasks = [*self._creating.values(), *self._destroying.values(), *self._resting.values(), *self._tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        return not self.has_sandboxes

    @property
    def has_sandboxes(self) -> bool:
        """Whether one runs, starts or is being ended."""
        return bool(self.supervisors or self._creating)

    def _ended(self, supervisor: Supervisor, cause: Cause, reason: str) -> None:
        """A sandbox died by itself: tell of it, and remove what is left of it."""
        log.warning("sandbox %s ended: %s", supervisor.id, reason)
        self.ends.tell(supervisor.id, cause, reason)
        self._spawn(self._clean_up(supervisor))

    async def _clean_up(self, supervisor: Supervisor) -> None:
        await self.ends.notify()
        if self.supervisors.get(supervisor.id) is supervisor:
            try:
                await (self.rest if supervisor.config.keeps_files else self.destroy)(supervisor.id)
            except Exception:
                log.exception("removing what is left of sandbox %s; its stop tries again", supervisor.id)


async def _joined(
    tasks: dict[str, asyncio.Task[NodeSandbox]], sandbox_id: str, work: Callable[[], Coroutine[Any, Any, NodeSandbox]]
) -> NodeSandbox:
    """The answer of the work that is under way for a sandbox, which is begun when there is none."""
    task = tasks.get(sandbox_id)
    if task is None:
        task = tasks[sandbox_id] = asyncio.create_task(work(), name=f"end-{sandbox_id}")
        task.add_done_callback(lambda _: tasks.pop(sandbox_id, None))
    return await asyncio.shield(task)
