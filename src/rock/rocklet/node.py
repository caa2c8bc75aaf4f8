"""Every sandbox on this machine: admit, create, find again after a restart, tell of ends, destroy."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from rock import faults
from rock.errors import (
    Conflict,
    Expired,
    InvalidConfig,
    Lost,
    NoCapacity,
    NotFound,
    NotHere,
    OutOfMemory,
    RockError,
    Unsupported,
)
from rock.protocol.network import ConnectionList
from rock.protocol.node import NodeEvent, NodeEvents, NodeInventory, NodeSandbox, NodeStatus
from rock.protocol.sandbox import ArchivedFiles, Cause, Isolation, Phase, SandboxConfig
from rock.rocklet.builds import Builds
from rock.rocklet.commits import Commits
from rock.rocklet.envdoor import Door
from rock.rocklet.images import Images
from rock.rocklet.kept import KeptSandboxes
from rock.rocklet.session import Session
from rock.rocklet.supervisor import Shelf, Supervisor, open_ahead
from rock.runtime import hostmemory
from rock.runtime.base import Accelerates, Connects, Handle, Keeps, Liveness, OwnImages, Pools, Prepared, Runtime, Trait
from rock.runtime.plugins import BrokenRuntime
from rock.telemetry import tracing

log = logging.getLogger("rock.node")

_KEPT_EVENTS = 10_000
_KEPT_ENDS = 5_000
_RECOVERED_AT_ONCE = 16
_MOST_IMAGES = 256  # that are told of, for the scheduler
_LONGEST_NAME = 256


class Node:
    """The sandboxes of one machine.

    runtimes: by name; `default` is the one for configs that name none. folder: see Shelf.
    """

    def __init__(self, runtimes: dict[str, Runtime], default: str, folder: Path, limit: int, images: Images) -> None:
        self.images = images
        self.runtimes = runtimes
        self.default = default
        self.shelf = Shelf(folder)
        self.door = Door(folder, self.get)
        self.limit = limit
        self.boot = uuid.uuid4().hex[:12]
        self._host_name = socket.gethostname()
        self.supervisors: dict[str, Supervisor] = {}
        self.kept = KeptSandboxes(self.shelf)
        self.commits = Commits(self)
        self.builds = Builds(self)
        self._creating: dict[str, asyncio.Task[Supervisor]] = {}
        self._destroying: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._resting: dict[str, asyncio.Task[NodeSandbox]] = {}
        self._phases: dict[str, dict[str, Phase]] = {}
        self._used: OrderedDict[str, None] = OrderedDict()  # names of images that are here, the last used last
        self._events: list[NodeEvent] = []
        self._changed = asyncio.Condition()
        self._ends: OrderedDict[str, tuple[Cause, str]] = OrderedDict()
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # ---- life ----

    async def open(self) -> None:
        """Start the runtimes, find the sandboxes of a former run, and remove what has no record."""
        self.shelf.make()
        self.door.open()
        for runtime in self.runtimes.values():
            await self._open(runtime)
        for name in reversed(await asyncio.to_thread(self.images.store.names)):
            self._note(name)
        known: dict[str, list[str]] = {name: [] for name in self.runtimes}
        gate = asyncio.Semaphore(_RECOVERED_AT_ONCE)

        async def recover(sandbox_id: str) -> None:
            async with gate:
                try:
                    await self._recover(sandbox_id, known)
                except Exception:  # what is not understood is left as it is, for a server that does
                    log.exception("sandbox %s could not be found again", sandbox_id)
                    for ids in known.values():
                        ids.append(sandbox_id)

        await asyncio.gather(*(recover(sandbox_id) for sandbox_id in self.shelf.ids()))
        for name, runtime in self.runtimes.items():
            await self._sweep(runtime, known[name])
        if len(self.shelf.ids()) == len(self.supervisors) + len(self.kept.ids()):  # else some are not understood
            self.shelf.sweep({supervisor.spools.path.name for supervisor in self.supervisors.values()})

    async def _open(self, runtime: Runtime) -> None:
        """Open a runtime; one that cannot be opened refuses from then on. Raises when the default one says why."""
        if isinstance(runtime, Pools):
            runtime.prepare = functools.partial(open_ahead, runtime)
        try:
            await runtime.open()
        except Exception as error:
            if runtime.name == self.default and isinstance(error, RockError):
                raise
            log.warning("runtime %s cannot be used: %r", runtime.name, error)
            self.runtimes = {**self.runtimes, runtime.name: BrokenRuntime(runtime.name, _told(error))}

    @staticmethod
    async def _sweep(runtime: Runtime, known: list[str]) -> None:
        try:
            swept = await runtime.sweep(known)
        except RockError as error:
            log.warning("runtime %s cannot look for what has no record: %s", runtime.name, error)
        except Exception:  # of a runtime from elsewhere: the others are none the worse
            log.exception("runtime %s fails when it looks for what has no record", runtime.name)
        else:
            if swept:
                log.warning("removed %d sandboxes of %s that had no record: %s", len(swept), runtime.name, swept)

    async def _recover(self, sandbox_id: str, known: dict[str, list[str]]) -> None:
        try:
            config, handle, record = self.shelf.load(sandbox_id)
            runtime = self.runtimes[handle.runtime]
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:  # anything else may be a newer server's
            log.warning("no usable record of %s: %s", sandbox_id, error)
            await asyncio.to_thread(self.shelf.remove, sandbox_id)
            return
        resting = bool(record.get("resting"))
        if resting or await runtime.recover(handle) is Liveness.GONE:
            if not resting:
                self._tell(sandbox_id, Cause.LOST, "it ended while no server was running")
            if config.keeps_files and await self.kept.recover(config, runtime, handle):
                await asyncio.to_thread(self.shelf.remove_logs, sandbox_id)
                known[handle.runtime].append(handle.id)
                return
            await runtime.destroy(handle)
            await asyncio.to_thread(self.shelf.remove, sandbox_id)
            return
        known[handle.runtime].append(handle.id)
        supervisor = Supervisor(sandbox_id, config, runtime, handle, self.shelf, self._ended, record.get("spools"))
        await supervisor.recover(record)
        self.supervisors[sandbox_id] = supervisor
        log.info("found sandbox %s again, sessions: %s", sandbox_id, sorted(supervisor.sessions))

    def let_go(self) -> None:
        """The server is about to stop: requests that wait for commands end now, and the commands go on."""
        for supervisor in self.supervisors.values():
            supervisor.let_go()

    async def close(self) -> None:
        """Let go of every sandbox and leave it running."""
        self._closing = True
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
        for runtime in self.runtimes.values():
            await runtime.close()
        async with self._changed:
            self._changed.notify_all()

    # ---- create and destroy ----

    def runtime_for(self, config: SandboxConfig) -> Runtime:
        name = config.runtime or self._runtime_giving(config.isolation)
        try:
            runtime = self.runtimes[name]
        except KeyError:
            names = ", ".join(sorted(self.runtimes))
            raise InvalidConfig(f"no runtime {name!r} on this machine (there are: {names})") from None
        if config.keeps_files and not isinstance(runtime, Keeps):
            raise Unsupported(
                f"runtime {name!r} cannot keep the files of a stopped sandbox",
                hint="leave auto_delete_seconds and auto_archive_seconds unset",
            )
        if config.egress is not None and not isinstance(runtime, Connects):
            raise Unsupported(
                f"runtime {name!r} cannot hold a sandbox to a list of places (egress)",
                hint="use the namespace runtime, or leave egress unset",
            )
        return runtime

    def _runtime_giving(self, isolation: Isolation | None) -> str:
        """The runtime for who names a level and no runtime: the default if it gives that, else one that does."""
        if isolation is None or getattr(self.runtimes[self.default], "isolation", None) == isolation:
            return self.default
        for name, runtime in self.runtimes.items():
            if getattr(runtime, "isolation", None) == isolation:
                return name
        given = ", ".join(sorted(str(getattr(r, "isolation", "")) for r in self.runtimes.values()))
        raise Unsupported(f"isolation {isolation}: no runtime on this machine gives it (there are: {given})",
                          hint="`rock doctor` tells what is missing here")

    async def check(self, config: SandboxConfig) -> None:
        """Raise what a create would raise at once; starts nothing."""
        runtime = self.runtime_for(config)
        # What has to be installed first is checked when it is.
        if await self._has_image(runtime, config):
            await runtime.check(config)

    async def _has_image(self, runtime: Runtime, config: SandboxConfig) -> bool:
        if isinstance(runtime, OwnImages):
            return await runtime.has_image(config)
        return not _mounts_images(runtime) or self.images.is_ready(config)

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make a sandbox. The same id and config again is the same sandbox, made once."""
        return await self._started(sandbox_id, config, wake=False)

    async def wake(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make a sandbox again over its kept files; one that runs stays as it is. Lost when there are no files."""
        return await self._started(sandbox_id, config, wake=True)

    async def _started(self, sandbox_id: str, config: SandboxConfig, *, wake: bool) -> NodeSandbox:
        await self._ended_first(sandbox_id, self._destroying, self._resting)
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
            self._ends.pop(sandbox_id, None)  # of an earlier one with this name
            task.add_done_callback(lambda _: self._creating.pop(sandbox_id, None))
        await asyncio.wait({task})
        if task.cancelled():
            raise Conflict(f"sandbox {sandbox_id} was stopped while it started", sandbox_id=sandbox_id)
        return task.result().describe()

    async def _create(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        runtime = self.runtime_for(config)
        phases = {"image": Phase(status="running", started_at=time.time()), "sandbox": Phase()}
        self._phases[sandbox_id] = phases
        step = "image"
        try:

            def tell(text: str) -> None:
                phases["image"] = phases["image"].model_copy(update={"message": text})

            if isinstance(runtime, OwnImages):
                await runtime.prepare_image(config, tell)
            elif _mounts_images(runtime):
                await self.images.prepare(config, tell)
            phases["image"] = _finished(phases["image"], "on disk")
            step = "sandbox"
            phases["sandbox"] = Phase(status="running", started_at=time.time())
            with tracing.span("create sandbox", {"rock.sandbox_id": sandbox_id, "rock.runtime": runtime.name}):
                await faults.point("node.create.begun")
                handle = await runtime.create(sandbox_id, config)
                await faults.point("node.create.made")
            phases["sandbox"] = _finished(phases["sandbox"], "running")
        except RockError as error:
            phases[step] = phases[step].model_copy(update={"status": "failed", "message": error.message})
            error.sandbox_id = sandbox_id
            raise
        finally:
            self._phases.pop(sandbox_id, None)
        supervisor = self._supervise(sandbox_id, config, runtime, handle, phases)
        try:
            supervisor.save()
        except OSError:
            await supervisor.destroy(0)
            await supervisor.forget()
            raise
        await faults.point("node.create.saved")
        self.supervisors[sandbox_id] = supervisor
        self._note(config.image)
        ahead = runtime.prepared(handle) if isinstance(runtime, Pools) else None
        if not isinstance(ahead, Session) or not supervisor.take_over(ahead):
            self._spawn(self._open_default(supervisor, ahead))
        return supervisor

    async def _wake(self, sandbox_id: str, config: SandboxConfig) -> Supervisor:
        phases = {"image": Phase(status="success", message="on disk"),
                  "sandbox": Phase(status="running", started_at=time.time())}  # fmt: skip
        await faults.point("node.wake.begun")
        runtime, handle = await self.kept.wake(sandbox_id, config)
        await faults.point("node.wake.made")
        phases["sandbox"] = _finished(phases["sandbox"], "running")
        supervisor = self._supervise(sandbox_id, config, runtime, handle, phases)
        try:
            supervisor.save()
        except OSError:
            await self.kept.rest(supervisor, 0)
            raise
        self.kept.awake(sandbox_id)
        self.supervisors[sandbox_id] = supervisor
        self._spawn(self._open_default(supervisor, None))
        return supervisor

    def _supervise(
        self, sandbox_id: str, config: SandboxConfig, runtime: Runtime, handle: Handle, phases: dict[str, Phase]
    ) -> Supervisor:
        supervisor = Supervisor(sandbox_id, config, runtime, handle, self.shelf, self._ended)
        supervisor.phases = phases
        return supervisor

    @staticmethod
    async def _open_default(supervisor: Supervisor, unfit: Prepared | None) -> None:
        if isinstance(unfit, Session):
            await unfit.close()
        await supervisor.prepare()

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
        runtime = self.runtime_for(config)
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
        if sandbox_id in self._ends:
            cause, reason = self._ends[sandbox_id]
            kind = OutOfMemory if cause is Cause.OUT_OF_MEMORY else Lost if cause is Cause.LOST else Expired
            raise kind(f"sandbox {sandbox_id} is gone: {reason}", sandbox_id=sandbox_id)
        raise NotHere(f"sandbox {sandbox_id} not found", sandbox_id=sandbox_id)

    async def look(self, sandbox_id: str, *, touch: bool = False, usage: bool = False) -> NodeSandbox:
        """What is known of a sandbox now. NotFound when it is not here."""
        supervisor = self.supervisors.get(sandbox_id)
        if supervisor is None:
            raise NotFound(f"sandbox {sandbox_id} is not here", sandbox_id=sandbox_id)
        if touch:
            supervisor.touch()
        return supervisor.describe(await supervisor.usage() if usage else None)

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """What a sandbox connected to, for as long as that is remembered."""
        for runtime in self.runtimes.values():
            if isinstance(runtime, Connects) and (found := await runtime.connections(sandbox_id)).total:
                return found
        return ConnectionList()

    def inventory(self) -> NodeInventory:
        return NodeInventory(sandboxes=[s.describe() for s in self.supervisors.values()], kept=self.kept.ids())

    async def status(self) -> NodeStatus:
        runtime = self.runtimes[self.default]
        total, free = hostmemory.read()
        kinds, unused = next((r.gpus() for r in self.runtimes.values() if isinstance(r, Accelerates)), ([], 0))
        return NodeStatus(
            host_name=self._host_name,
            host_ip="127.0.0.1",
            runtime=self.default,
            isolation=getattr(runtime, "isolation", Isolation.NONE),
            enforced=dict(getattr(runtime, "enforced", {})),
            cpus=os.cpu_count() or 1,
            memory_total=total,
            memory_free=free,
            sandboxes=len(self.supervisors),
            sandbox_limit=self.limit,
            boot=self.boot,
            memory_pressure=hostmemory.pressure(),
            images=[*reversed(self._used)],
            gpus=len(kinds),
            gpus_free=unused,
            accelerators=sorted(set(kinds)),
            load=round(os.getloadavg()[0], 2),
        )

    def _note(self, image: str) -> None:
        """Remember that an image is here."""
        if len(image) <= _LONGEST_NAME:
            self._used[image] = None
            self._used.move_to_end(image)
            while len(self._used) > _MOST_IMAGES:
                self._used.popitem(last=False)

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

    def _remember(self, sandbox_id: str, cause: Cause, reason: str) -> None:
        self._ends[sandbox_id] = (cause, reason)
        while len(self._ends) > _KEPT_ENDS:
            self._ends.popitem(last=False)

    def _tell(self, sandbox_id: str, cause: Cause, reason: str) -> None:
        self._remember(sandbox_id, cause, reason)
        self._number += 1
        self._events.append(NodeEvent(number=self._number, sandbox_id=sandbox_id, cause=cause, reason=reason,
                                      at=time.time()))  # fmt: skip
        del self._events[:-_KEPT_EVENTS]

    def _ended(self, supervisor: Supervisor, cause: Cause, reason: str) -> None:
        """A sandbox died by itself: tell of it, and remove what is left of it."""
        log.warning("sandbox %s ended: %s", supervisor.id, reason)
        self._tell(supervisor.id, cause, reason)
        self._spawn(self._clean_up(supervisor))

    async def _clean_up(self, supervisor: Supervisor) -> None:
        async with self._changed:
            self._changed.notify_all()
        if self.supervisors.get(supervisor.id) is supervisor:
            try:
                await (self.rest if supervisor.config.keeps_files else self.destroy)(supervisor.id)
            except Exception:
                log.exception("removing what is left of sandbox %s; its stop tries again", supervisor.id)

    async def events(self, after: int, wait: float) -> NodeEvents:
        """Ends with a number above `after`; waits up to `wait` seconds for one."""
        try:
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(lambda: self._number > after or self._closing)
        except TimeoutError:
            pass
        return NodeEvents(boot=self.boot, events=[event for event in self._events if event.number > after])


async def _joined(
    tasks: dict[str, asyncio.Task[NodeSandbox]], sandbox_id: str, work: Callable[[], Coroutine[Any, Any, NodeSandbox]]
) -> NodeSandbox:
    """The answer of the work that is under way for a sandbox, which is begun when there is none."""
    task = tasks.get(sandbox_id)
    if task is None:
        task = tasks[sandbox_id] = asyncio.create_task(work(), name=f"end-{sandbox_id}")
        task.add_done_callback(lambda _: tasks.pop(sandbox_id, None))
    return await asyncio.shield(task)


def _mounts_images(runtime: Runtime) -> bool:
    """Whether the server's store has to have an image before a sandbox is made of it."""
    return any(Trait.IMAGES in traits for traits in runtime.traits.values())


def _told(error: Exception) -> str:
    return error.message if isinstance(error, RockError) else repr(error)


def _finished(phase: Phase, message: str) -> Phase:
    return phase.model_copy(update={"status": "success", "message": message, "completed_at": time.time()})

