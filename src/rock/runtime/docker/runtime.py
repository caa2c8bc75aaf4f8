"""Runtime "docker": one container of an engine per sandbox, with our own pid 1 in it.

    create -> admission -> image -> container -> its pid 1 connects (links.py) -> Handle
    spawn, files, ports -> pid 1 (runtime/init/files.py), never `exec`      destroy -> the engine removes the container

The engine creates and removes containers; operations on a running container bypass the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rock import errors
from rock.guest.init import process_tree
from rock.guest.init.remove import remove_tree
from rock.host import atomic_file
from rock.host.resources import Gpus
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime.base import Frozen, Handle, Liveness, Program, Trait
from rock.runtime.docker import images, snapshots, spec
from rock.runtime.docker.engine import Engine, EngineError, Facts, engine_errors, refusal
from rock.runtime.docker.links import InitTransport, SocketTransport, StreamTransport
from rock.runtime.init import python
from rock.runtime.init.delayed import BACK, DelayedInit, DelayedSandboxes
from rock.runtime.init.files import merged
from rock.runtime.init.python import GuestPython
from rock.runtime.namespace import admission
from rock.runtime.namespace.limits import cgroups, limiter
from rock.runtime.process.runtime import read_record, wait_gone

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE_RUNS = "check that the image runs with `docker run` on the engine's machine"
_PREFIX = "d-"
_AT_ONCE = 4  # concurrent starts of one engine: with 32 and more it collapses
_JUST = 5.0  # seconds between an out-of-memory kill and the exit that it caused
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Container(DelayedInit):
    """A living container; its pid is that of its pid 1."""

    engine_id: str
    oci: spec.Oci = "runc"
    way: InitTransport | None = None

    async def let_go(self) -> None:
        if self.link is not None:
            self.link.close()
        if self.way is not None:
            await self.way.close()


class DockerRuntime(DelayedSandboxes[Container]):
    """Containers of the engine at `host`, "unix:///path". run_dir: one folder per sandbox; guest_dir: our Python
    interpreters."""

    name = "docker"
    isolation = Isolation.CONTAINER
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.CONTAINER: frozenset(Trait) - {Trait.IMAGES},
        # gVisor of 2022 (Debian): a terminal outlives its program, pid 1 can be killed from inside, orphans leave their
        # tree, and its kernel is one process of the host, which memory and process limits end as a whole.
        Isolation.GVISOR: frozenset(Trait)
        - {Trait.IMAGES, Trait.TERMINALS, Trait.PROCESSES, Trait.TREES, Trait.LIMITS},
        Isolation.MICROVM: frozenset(Trait) - {Trait.IMAGES},
    }

    def __init__(self, run_dir: Path, guest_dir: Path, host: str = "", *, gpus: bool = True) -> None:
        """gpus: whether it assigns the GPUs of this machine."""
        super().__init__(Path(os.path.realpath(run_dir)))
        self._guest_dir = Path(os.path.realpath(guest_dir))
        self.engine = Engine(host)
        self._label = hashlib.sha256(str(self._run_dir).encode()).hexdigest()[:16]
        self._gpus = Gpus() if gpus else Gpus([])
        self._making: set[str] = set()
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._python: GuestPython | None = None
        self._preparing: asyncio.Task[GuestPython] | None = None
        self._events: asyncio.Task[None] | None = None
        self._oom_at: dict[str, float] = {}  # by the engine's id
        self._snapshots = snapshots.Snapshots(self.engine, self._run_dir)
        self._unswept: frozenset[str] | None = None
        self._slot_of: dict[str, str] = {}  # of recovered sandboxes: a rollback gives a sandbox another slot

    # ---- lifecycle of the runtime ----

    async def open(self) -> None:
        """Never fails because of a missing engine: the first create reports that error."""
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self._run_dir, 0o700)
        await asyncio.to_thread(self._snapshots.open)

    async def close(self) -> None:
        if self._events is not None:
            self._events.cancel()
            await asyncio.gather(self._events, return_exceptions=True)
            self._events = None
        if self._preparing is not None:  # a thread cannot be cancelled
            await asyncio.wait({self._preparing})
            self._preparing = None
        for slot in list(self._live):
            await self._forget(slot)

    async def _ready(self) -> Facts:
        """The engine's facts; starts to listen to its events."""
        facts = await self.engine.facts()
        if self._events is None:
            self._events = asyncio.create_task(self._listen(), name="docker events")
        return facts

    async def _listen(self) -> None:
        """Record out-of-memory kills; remove remains of the time without a connection to the engine."""
        pause, since = 1.0, time.time()
        while True:
            try:
                if self._unswept is not None:
                    await self._sweep_engine(self._unswept | {c.slot for c in self._live.values()})
                    self._unswept = None
                stream = self.engine.events(f"{spec.HOME_LABEL}={self._label}", since)
                async with contextlib.aclosing(stream):
                    async for event in stream:
                        pause = 1.0
                        since = max(since, float(event.get("timeNano", 0)) / 1e9)
                        if event.get("Action") == "oom":
                            self._oom_at[str(event.get("id"))] = time.monotonic()
            except (errors.RockError, EngineError, ValueError, TypeError) as error:
                log.info("docker events: %s", error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30.0)
            with contextlib.suppress(errors.RockError, EngineError):
                await self.engine.facts(anew=True)  # the engine may have changed after a restart

    # ---- images ----

    async def has_image(self, config: SandboxConfig) -> bool:
        with engine_errors(config.image):
            return config.image == "host" or await images.is_ready(self.engine, config)

    async def prepare_image(self, config: SandboxConfig, tell: Callable[[str], None]) -> None:
        spec.refuse(config, await self._ready(), spec.wanted_runtime(config), self._gpus)
        with engine_errors(config.image):
            await images.prepare(self.engine, config, tell)

    # ---- create ----

    async def check(self, config: SandboxConfig) -> None:
        await self._admit(config)

    async def _admit(self, config: SandboxConfig) -> tuple[str, dict[str, Any]]:
        """The engine's name of the OCI runtime, and the image details."""
        _ = self.engine.socket
        oci = spec.wanted_runtime(config)
        with engine_errors(config.image):
            facts = await self._ready()
            name = spec.runtime_name(facts, oci)
            spec.refuse(config, facts, oci, self._gpus)
            admission.refuse_nofile(config)
            admission.refuse_too_large(config)
            if config.network == "bridge" and not await self.engine.has_network("bridge"):
                raise errors.Unsupported('network "bridge" cannot be given here: this engine has none',
                                         hint="start the engine with a bridge, or use another network")
            if config.snapshot is not None:
                return name, self._snapshots.image(config.snapshot)
            return name, await images.find(self.engine, config)

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        name, image = await self._admit(config)
        await self._guest()
        task = asyncio.create_task(self._make(id, config, name, image))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # wait for the outcome, so that nothing is left behind
            with contextlib.suppress(errors.RockError):
                await self.destroy(await task)
            raise

    async def _guest(self) -> GuestPython:
        if self._python is None or not self._python.folder.is_dir():
            if self._preparing is None:
                work = asyncio.to_thread(python.prepare, self._guest_dir)
                self._preparing = asyncio.create_task(work, name="guest python")
            task = self._preparing
            try:
                self._python = await asyncio.shield(task)
            finally:
                if task.done():
                    self._preparing = None
        return self._python

    async def _make(self, id: str, config: SandboxConfig, name: str, image: dict[str, Any]) -> Handle:
        slot = _PREFIX + secrets.token_hex(5)
        folder = self._run_dir / slot
        self._making.add(slot)
        way: InitTransport | None = None
        engine_id: str | None = None
        try:
            folder.mkdir(mode=0o700)
            atomic_file.replace(folder / "record.json", atomic_file.summed(json.dumps({"id": id, "slot": slot})))
            oci = spec.wanted_runtime(config)
            way = self.way(oci, folder)
            labels = {spec.HOME_LABEL: self._label, spec.ID_LABEL: id, "rock.slot": slot}
            gpus = self._gpus.take(slot, config)
            body = spec.container(config, image["Id"], labels, await self._guest(), way.folder, name, way.options,
                                   gpus)  # fmt: skip
            async with self._gate:
                engine_id = await self.engine.create(f"rock-{slot}", body)
                await self.engine.start(engine_id)
                pid = await self._pid(engine_id)
                container = await self._entered(id, slot, engine_id, pid, way, config.startup_timeout)
            container.oci = oci
            self._live[slot] = container
            handle = self._handle(id, config, container, image)
            self._snapshots.note(slot, handle)
            if config.snapshot is not None:
                await snapshots.give_identity(self, handle)
            return handle
        except BaseException as error:
            if way is not None:
                await way.close()
            with contextlib.suppress(errors.RockError, EngineError):  # the sweep retries
                await asyncio.shield(self._remove(slot, engine_id or f"rock-{slot}"))
            if isinstance(error, EngineError):
                raise refusal(error, config) from None
            if isinstance(error, OSError | errors.Lost):
                raise errors.StartFailed(f"the container started, but its pid 1 cannot be reached: {error}",
                                         sandbox_id=id,
                                         hint="run the rocklet on the engine's machine, with access to its "
                                              "ROCK_HOME") from None
            raise
        finally:
            self._making.discard(slot)

    async def _pid(self, engine_id: str) -> int:
        state = ((await self.engine.inspect(engine_id)) or {}).get("State") or {}
        pid = int(state.get("Pid") or 0)
        if pid <= 0:
            text = state.get("Error") or f"exit status {state.get('ExitCode')}"
            raise errors.StartFailed(f"the container's pid 1 exited during its start: {text}", hint=IMAGE_RUNS)
        return pid

    async def _entered(
        self, id: str, slot: str, engine_id: str, pid: int, way: InitTransport, patience: float
    ) -> Container:
        """The sandbox, once its pid 1 has connected and responds."""
        entry = process_tree.read(pid)
        if entry is None:
            raise errors.StartFailed("the container's pid 1 cannot be seen from here", sandbox_id=id,
                                     hint="it ended at once, or the rocklet runs in a container of its own")
        entering = asyncio.ensure_future(way.enter(engine_id, pid, id, patience))
        ending = asyncio.ensure_future(wait_gone(pid, entry.start))
        try:
            await asyncio.wait({entering, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not entering.done():
                await self._pid(engine_id)  # raises with the reason of the exit
                raise errors.StartFailed("the container's pid 1 exited during its start", sandbox_id=id,
                                         hint=IMAGE_RUNS)
            link = entering.result()
        finally:
            for task in (entering, ending):
                task.cancel()
            await asyncio.gather(entering, ending, return_exceptions=True)
        folders = await asyncio.to_thread(cgroup_folders, pid)
        container = Container(slot, pid, entry.start, folders, link, engine_id=engine_id, way=way)
        await link.request("hello", patience=patience)
        return container

    def _handle(self, id: str, config: SandboxConfig, container: Container, image: dict[str, Any]) -> Handle:
        env, cwd, user = spec.image_settings(image)
        facts = self.engine.known
        oci = spec.wanted_runtime(config)
        data = {"slot": container.slot, "container": container.engine_id, "pid": container.pid,
                "start": container.start, "env": merged({"PATH": _PATH}, env, config.env), "cwd": cwd, "user": user,
                "cgroups": container.folders, "oci": oci, "gpus": self._gpus.of(container.slot)}  # fmt: skip
        if config.nofile is not None:
            data["nofile"] = config.nofile
        if config.snapshot is not None:
            data["snapshot"] = config.snapshot
        return Handle(self.name, id, spec.isolation_of(oci), spec.enforced(facts, config), data)

    def way(self, oci: spec.Oci, folder: Path) -> InitTransport:
        """Transport to pid 1: descriptors cross only with the same kernel."""
        return SocketTransport(folder) if oci == "runc" else StreamTransport(self.engine, folder)

    # ---- operations ----

    def _found(self, handle: Handle) -> Container:
        data = handle.data
        return Container(data["slot"], data["pid"], data["start"], dict(data["cgroups"]), engine_id=data["container"],
                         oci=data["oci"])

    async def _enter_again(self, sandbox: Container, handle: Handle) -> None:
        if not process_tree.lives(sandbox.pid, sandbox.start):
            raise errors.Lost("the sandbox's pid 1 is gone", sandbox_id=handle.id)
        if sandbox.way is not None:
            await sandbox.way.close()
        sandbox.way = self.way(sandbox.oci, self._run_dir / sandbox.slot)
        with engine_errors(handle.id):
            sandbox.link = await sandbox.way.enter(sandbox.engine_id, sandbox.pid, handle.id, BACK)

    def complete(self, handle: Handle, program: Program) -> Program:
        if program.pty is not None and Trait.TERMINALS not in self.traits[handle.isolation]:
            raise errors.Unsupported(f"{handle.data['oci']} has no terminals here", sandbox_id=handle.id,
                                     hint="run it without a pty")
        return super().complete(handle, program)

    def gpus(self) -> tuple[Sequence[str], int]:
        return self._gpus.kinds(), len(self._gpus.free)

    async def recover(self, handle: Handle) -> Liveness:
        found = await super().recover(handle)
        if found is Liveness.RUNNING:
            with contextlib.suppress(errors.RockError, EngineError):
                await self._ready()
            self._gpus.taken(handle.data["slot"], tuple(handle.data.get("gpus", ())))
            self._snapshots.note(handle.data["slot"], handle)
            self._slot_of[handle.id] = handle.data["slot"]
        return found

    async def wait(self, handle: Handle) -> str:
        data = handle.data
        await wait_gone(data["pid"], data["start"])
        if self._was_ended(data["slot"]):
            return "gone"
        return await self._why(data["container"])

    async def _why(self, engine_id: str) -> str:
        """The engine's reason for a container's exit."""
        for _ in range(10):
            try:
                found = await self.engine.inspect(engine_id)
            except (errors.RockError, EngineError):
                return "the container engine ended, and its containers with it"
            if found is None:
                return "its container was removed from outside"
            state = found.get("State") or {}
            if not state.get("Running"):
                break
            await asyncio.sleep(0.1)  # the engine sees the exit later than this process does
        recently = time.monotonic() - self._oom_at.get(engine_id, float("-inf")) < _JUST
        if state.get("OOMKilled") and (recently or engine_id not in self._oom_at):
            return "oom"
        error = f": {state['Error']}" if state.get("Error") else ""
        return f"exited: its container ended with status {state.get('ExitCode')}{error}"

    async def usage(self, handle: Handle) -> Usage:
        data = handle.data
        kills = self.oom_kills(handle)
        return await asyncio.to_thread(limiter.usage, data["cgroups"], data["pid"], kills)

    # ---- snapshots ----

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         processes: bool = False, continued: Callable[[], None] = lambda: None) -> Frozen:
        await self._ready()
        return await self._snapshots.checkpoint(handle, snapshot_id, files, processes)

    async def refusals(self, handle: Handle) -> Sequence[str]:
        return [snapshots.ONLY_FILES]

    def parent(self, handle: Handle) -> str | None:
        return snapshots.parent(handle)

    async def replace(self, handle: Handle, config: SandboxConfig, snapshot_id: str) -> Handle:
        return await self.create(handle.id, config.model_copy(update={"snapshot": snapshot_id}))

    def snapshots(self) -> Mapping[str, Sequence[str]]:
        return self._snapshots.users()

    async def drop_snapshot(self, snapshot_id: str) -> bool:
        return await self._snapshots.drop(snapshot_id)

    # ---- stop and destroy ----

    async def _end(self, handle: Handle) -> None:
        pid, start = handle.data["pid"], handle.data["start"]
        if process_tree.lives(pid, start):
            with engine_errors(handle.id):
                await self.engine.kill(handle.data["container"])
            await wait_gone(pid, start)

    async def destroy(self, handle: Handle) -> None:
        await self._forget(handle.data["slot"])
        with engine_errors(handle.id):
            await self._remove(handle.data["slot"], handle.data["container"])

    async def _forget(self, slot: str) -> None:
        container = self._live.get(slot)
        await super()._forget(slot)
        if container is not None:
            self._oom_at.pop(container.engine_id, None)

    async def _remove(self, slot: str, engine_id: str) -> None:
        """Remove all resources of a complete or incomplete sandbox. Idempotent."""
        await self.engine.remove(engine_id)
        self._gpus.give_back(slot)
        await asyncio.to_thread(remove_tree, str(self._run_dir / slot))
        await self._snapshots.gone(slot)

    async def sweep(self, known: Sequence[str]) -> list[str]:
        keep, slots, gone = set(known), set(), set()
        for folder in self._run_dir.glob(f"{_PREFIX}*"):
            id = str(read_record(folder).get("id", ""))
            if folder.name in self._making or (id in keep and self._slot_of.get(id, folder.name) == folder.name):
                slots.add(folder.name)
            else:
                gone.add(id or folder.name)
        try:
            gone |= await self._sweep_engine(slots) if os.path.exists(self.engine.socket) else set()
        except (errors.RockError, EngineError) as error:
            self._unswept = frozenset(slots)
            log.warning("what is left of containers is removed when the engine is back: %s", error)
            return []
        for folder in self._run_dir.glob(f"{_PREFIX}*"):
            if folder.name not in slots and folder.name not in self._making:
                await asyncio.to_thread(remove_tree, str(folder))
        return sorted(gone)

    async def _sweep_engine(self, slots: set[str] | frozenset[str]) -> set[str]:
        """Remove containers with our label whose slot is not listed."""
        gone = set()
        for found in await self.engine.list(f"{spec.HOME_LABEL}={self._label}"):
            labels = found.get("Labels") or {}
            slot = str(labels.get("rock.slot", ""))
            if labels.get(spec.HOME_LABEL) == self._label and slot not in slots and slot not in self._making:
                await self.engine.remove(str(found["Id"]))
                gone.add(str(labels.get(spec.ID_LABEL) or slot))
        return gone


# ---- cgroups ----

def cgroup_folders(pid: int) -> dict[str, str]:
    """Folder per controller ("memory", "cpu", "cpuacct", "pids") of the cgroups that the engine made for a process, as
    seen by this machine; empty when the process is gone."""
    mounts: dict[str, str] = {}
    unified = ""
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3 or fields[3] != "/":
            continue
        if kind[0] == "cgroup2":
            unified = unified or fields[4]
        elif kind[0] == "cgroup":
            mounts.update(dict.fromkeys(kind[2].split(","), fields[4]))
    found: dict[str, str] = {}
    for line in cgroups.read_text(f"/proc/{pid}/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers and unified:
            for name in cgroups.read_text(f"{unified}{path}/cgroup.controllers").split():
                found.setdefault(name, f"{unified}{path}")
        for name in controllers.split(","):
            if name in mounts:
                found[name] = f"{mounts[name]}{path}"
    return {name: folder for name, folder in found.items() if name in ("memory", "cpu", "cpuacct", "pids")}
