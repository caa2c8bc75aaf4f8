"""One running sandbox: its sessions, processes and environments, its record, and the tasks that watch it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from rock import faults
from rock.envhub import datasets
from rock.envhub.packages import requirements_of
from rock.errors import Conflict, NotFound, RockError, Unsupported
from rock.host import atomic_file
from rock.host.atomic_file import not_kept
from rock.http.asgi import App
from rock.images.packages import CURRENT
from rock.protocol.action import Command
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import Cause, Phase, SandboxConfig, Usage
from rock.rocklet.auto_pause import AutoPause
from rock.rocklet.commands import programs
from rock.rocklet.commands.registry import Sessions
from rock.rocklet.commands.shell_process import Shell
from rock.rocklet.durability.checksums import Slot
from rock.rocklet.durability.journal import Journal
from rock.rocklet.environments.host import ENV_LEASE, EnvHost
from rock.rocklet.gateway_port import GatewayPort
from rock.rocklet.idle import IdleDescriptors
from rock.rocklet.port_connections import Connections
from rock.rocklet.state import StateDirectory, written
from rock.runtime.base import Handle, Keeps, Limits, Pauses, ReportsEnds, Runtime, Watches


class Uploads:
    """Writes of files through descriptors of the rocklet. A checkpoint waits for their end and delays new ones."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Condition()
        self._held = False

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncGenerator[None]:
        """Context of one upload."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held)
            self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if self._held:
                async with self._changed:
                    self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def none(self) -> AsyncGenerator[None]:
        """Context without uploads."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held)
            self._held = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._count)
            yield
        finally:
            self._held = False
            async with self._changed:
                self._changed.notify_all()


class Supervisor:
    """Owns all resources of one sandbox on this machine. `ended` is called once, when the sandbox ends by itself."""

    def __init__(
        self,
        sandbox_id: str,
        config: SandboxConfig,
        runtime: Runtime,
        handle: Handle,
        state_dir: StateDirectory,
        ended: Callable[[Supervisor, Cause, str], None],
        spools: str | None = None,
        env_lease: float = ENV_LEASE,
        gateway: App | None = None,
        descriptors: IdleDescriptors | None = None,
    ) -> None:
        self.id = sandbox_id
        self.config = config
        self.runtime = runtime
        self.handle = handle
        self._state_dir = state_dir
        self.sessions = Sessions(runtime, handle, config, state_dir, self.saved)
        self.sessions.memory_kill = self.memory_kill
        self.phases: dict[str, Phase] = {}
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.processes: dict[str, programs.Background] = {}
        self.expected: Mapping[str, Any] = {}  # background processes that are there and not yet attached
        # programs with an idempotency key, which continue when the server stops
        self.executions: set[programs.Execution] = set()
        self.leaving = False
        self._over = asyncio.Event()  # set when it has ended, or is being stopped
        self.env_host: EnvHost | None = None
        self._env_lease = env_lease
        # a host of an earlier rocklet process exists; attached only on use, because it may hang
        self._env_host_kept = False
        self.connections = Connections(sandbox_id, runtime, handle)
        self.gateway_port = GatewayPort(sandbox_id, runtime, handle, gateway, self.active)
        self.uploads = Uploads()
        self.snapshot: str | None = None  # whose sessions it has not opened yet
        self.spools = state_dir.spools(spools)
        self.journal = Journal(self.spools)
        self._marked = False  # whether the folder of spool files has been made
        self._ended = ended
        self._descriptors = descriptors
        self.sessions.reopened = self._note_use
        self._busy = 0
        self.paused = False
        self._last = time.monotonic()
        self._memory_kills = 0  # of which a result told
        self._killed_at = -math.inf
        self._env_lock = asyncio.Lock()
        self._save_lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._unwatch: Callable[[], None] | None = None
        if isinstance(runtime, ReportsEnds):
            self._unwatch = runtime.when_ended(handle, self._end)
        else:
            self._watch = asyncio.create_task(self._watch_end(), name=f"watch-{sandbox_id}")
        self.auto_pause = None if config.auto_pause is None else AutoPause(self, config.auto_pause)
        self._pauser: asyncio.Task[None] | None = None

    # ---- record for the next rocklet process ----

    def save(self) -> None:
        """Write the record: replaced atomically, so that a crash leaves the old one or the new one."""
        with contextlib.suppress(OSError):
            self.spools.make()
            self._marked = True
        atomic_file.replace(self._state_dir.record(self.id), self._record())

    async def saved(self) -> None:
        """Write the record without blocking the event loop."""
        async with self._save_lock:
            await asyncio.to_thread(atomic_file.replace, self._state_dir.record(self.id), self._record())

    def _record(self) -> str:
        processes = dict(self.expected)
        processes |= {p.id: {"command": p.command, "started_at": p.started_at} for p in self.processes.values()}
        return written(self.config, self.handle, sessions=self.sessions.record(), processes=processes,
                       spools=self.spools.path.name, marked=self._marked, paused=self.paused,
                       auto_paused=self.auto_pause is not None and self.auto_pause.paused,
                       gateway_port=self.gateway_port.port,
                       inherited=[self.snapshot, *self.sessions.inherited])  # fmt: skip

    def load_journal(self, record: dict[str, Any]) -> None:
        """Read the requests that an earlier rocklet process left unfinished."""
        self._marked = bool(record.get("marked"))
        if isinstance(self.runtime, Watches):
            self._memory_kills = self.runtime.oom_kills(self.handle)  # those of the earlier rocklet process
        self.journal.load(expected=self._marked)

    async def attach(self, record: dict[str, Any], kept: Sequence[str]) -> None:
        """Attach to the sessions and processes of an earlier rocklet process; those that ended are omitted. kept: the
        keys of the processes that the runtime still has."""
        if record.get("auto_paused") and isinstance(self.runtime, Pauses):
            await self.runtime.resume(self.handle)
        await self.sessions.recover(record.get("sessions", {}), kept, self.journal)
        if record.get("paused") and isinstance(self.runtime, Pauses):
            self.paused = True
            await self.runtime.pause(self.handle)  # the crash may have come before it
        await self.attach_processes(record.get("processes", {}), found=self.spools.found)
        self._env_host_kept = EnvHost.KEY in kept
        if record.get("gateway_port"):
            with contextlib.suppress(RockError):
                await self.gateway_port.open(int(record["gateway_port"]))

    async def attach_processes(self, known: Mapping[str, Any], found: Mapping[int, Slot] | None = None) -> None:
        """Attach to background processes of which these are the commands and start times; ended ones are omitted.
        found: the sizes of their logs, of an earlier rocklet process."""
        for key, entry in known.items():
            with contextlib.suppress(RockError):
                process = await self.runtime.attach(self.handle, programs.KEY + key)
                folder = self._state_dir.logs(self.id) / key
                folder.mkdir(parents=True, exist_ok=True)
                self.processes[key] = programs.Background(key, entry["command"], process, folder, entry["started_at"],
                                                          marks=self.spools.marks, found=found)  # fmt: skip
        self.expected = {}

    async def open_gateway_port(self, port: int | None) -> int:
        """Open the loopback port to the gateway; returns its number. Unsupported, Conflict."""
        before = self.gateway_port.port
        opened = await self.gateway_port.open(port)
        if opened != before:
            await self.saved()
        return opened

    async def close_gateway_port(self) -> None:
        await self.gateway_port.close()
        await self.saved()

    # ---- activity ----

    def begin_idle(self) -> None:
        """From now on, close its descriptors when it is idle, and pause it, if its config has that."""
        self._note_use()
        if self.auto_pause is not None and self._pauser is None:
            self._pauser = asyncio.create_task(self.auto_pause.run(), name=f"auto-pause-{self.id}")

    def awake(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Context in which an automatic pause is over, and none begins."""
        return contextlib.nullcontext() if self.auto_pause is None else self.auto_pause.awake()

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress, and no environment is open."""
        return not self._busy and not self._has_environments

    @property
    def _has_environments(self) -> bool:
        return self._env_host_kept or (self.env_host is not None and self.env_host.load()[0] > 0)

    def active(self) -> Supervisor:
        """Context of a request, which counts as activity while it lasts."""
        return self

    def __enter__(self) -> None:
        if self.paused:
            raise Conflict(f"sandbox {self.id} is paused", sandbox_id=self.id,
                           hint="resume it first, as with `rock resume`")  # fmt: skip
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._last = time.monotonic()
        if not self._busy:
            self._note_use()

    def _note_use(self) -> None:
        if self._descriptors is not None and self.cause is None:
            self._descriptors.note(self)

    @property
    def is_in_use(self) -> bool:
        """Whether a request is in progress, or its processes are paused."""
        return bool(self._busy or self.paused)

    @property
    def last_active(self) -> float:
        """time.monotonic() of its last request."""
        return self._last

    async def close_descriptors(self) -> bool:
        """Close the descriptors of sessions and spool files until the next request; False when some stay open."""
        if self.cause is not None or self.leaving:
            return True
        closed = await self.sessions.close_streams()
        if not self._busy:
            self.journal.close_files()
        return closed

    async def during(self, stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """A stream that counts as activity while it is read: a slow client does not make the sandbox idle."""
        with self.active():
            async with contextlib.aclosing(stream):
                async for part in stream:
                    yield part

    @contextlib.asynccontextmanager
    async def quiet(self, wait: float) -> AsyncGenerator[None]:
        """No command of a session and no upload is in progress, and none begins meanwhile. Conflict when one does not
        end within `wait` seconds."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(max(wait, 0.01)):
                    for session in list(self.sessions):
                        await stack.enter_async_context(session.between_commands)
                    await stack.enter_async_context(self.uploads.none())
            except TimeoutError:
                busy = [session.spec.session for session in self.sessions if session.info.busy]
                what = f"a command runs in session {busy[0]}" if busy else "files are being uploaded"
                raise Conflict(f"sandbox {self.id} is not quiet after {wait:g} s: {what}", sandbox_id=self.id,
                               hint="wait for its end, or give a longer wait") from None  # fmt: skip
            yield

    async def pause(self) -> None:
        """Stop all processes until `resume`; requests that need them are refused meanwhile. Idempotent.

        Conflict while requests are in progress, and for open environments, whose clients would hang. Unsupported.
        """
        runtime = self._pausing()
        if not self.paused and not self.is_idle:
            what = (f"{self._busy} requests are in progress, such as commands, terminals or followed logs"
                    if self._busy else "it has open environments")  # fmt: skip
            raise Conflict(f"sandbox {self.id} cannot be paused: {what}", sandbox_id=self.id,
                           hint="wait for their end, or close them")  # fmt: skip
        self.paused = True
        try:
            await self.saved()
            await faults.point("sandbox.pausing")
            await runtime.pause(self.handle)
        except BaseException:
            self.paused = False
            with contextlib.suppress(RockError):
                await asyncio.shield(runtime.resume(self.handle))
            await asyncio.shield(self.saved())
            raise

    async def resume(self) -> None:
        """Continue the processes. Idempotent."""
        await self._pausing().resume(self.handle)
        await faults.point("sandbox.resumed")
        self.paused = False
        self.touch()
        await self.saved()

    def _pausing(self) -> Pauses:
        if isinstance(self.runtime, Pauses):
            return self.runtime
        raise Unsupported(f"runtime {self.handle.runtime!r} cannot pause a sandbox", sandbox_id=self.id,
                          hint="stop it with retained files, and restart it later")

    def touch(self) -> None:
        self._last = time.monotonic()

    def idle_since(self, began: float) -> None:
        """It had no request since this time.monotonic(): it was found again later."""
        self._last = began

    @property
    def idle_seconds(self) -> float:
        return 0.0 if self._busy or self.paused else time.monotonic() - self._last

    async def usage(self) -> Usage | None:
        used = await self.runtime.usage(self.handle) if isinstance(self.runtime, Limits) else None
        return used if self.auto_pause is None else self.auto_pause.report(used)

    def describe(self, usage: Usage | None = None) -> NodeSandbox:
        return NodeSandbox.made(
            sandbox_id=self.id,
            alive=self.cause is None,
            paused=self.paused,
            idle_seconds=self.idle_seconds,
            isolation=self.handle.isolation,
            enforced=dict(self.handle.enforced),
            runtime=self.handle.runtime,
            phases=dict(self.phases),
            cause=self.cause,
            reason=self.reason,
            usage=usage,
            environments=self.env_host.load() if self.env_host is not None else None,
        )

    # ---- processes ----

    async def shell_for(self, command: Command) -> Shell | None:
        return await self.sessions.find_shell() if isinstance(command.command, str) else None

    async def start_process(self, command: Command, key: str) -> programs.Background:
        """Start a background process under a unique name."""
        sh = await self.shell_for(command)
        process = await programs.start(
            self.runtime, self.handle, command, sh, key=programs.KEY + key, keep=True, stdin=True
        )
        try:
            await faults.point("process.started")
            folder = self._state_dir.logs(self.id) / key
            folder.mkdir(parents=True)
            background = programs.Background(key, command.command, process, folder, marks=self.spools.marks)
            self.processes[key] = background
            await self.saved()
            await faults.point("process.saved")
        except BaseException as error:
            # The process would have no record.
            await asyncio.shield(process.kill_tree())
            if key in self.processes:
                await self.processes.pop(key).forget()
            await asyncio.to_thread(shutil.rmtree, self._state_dir.logs(self.id) / key, True)
            if isinstance(error, OSError):
                raise not_kept(error, self.id, "what the process writes") from None
            raise
        if command.input is not None:
            background.feed(command.input)
        return background

    async def adopt_process(self, key: str, command: Command) -> programs.Background:
        """Attach to a process that an earlier rocklet process started and had not recorded. NotFound."""
        process = await self.runtime.attach(self.handle, programs.KEY + key)
        folder = self._state_dir.logs(self.id) / key
        folder.mkdir(parents=True, exist_ok=True)
        background = self.processes[key] = programs.Background(
            key, command.command, process, folder, marks=self.spools.marks, found=self.spools.found)  # fmt: skip
        await self.saved()
        if command.input is not None:
            background.feed(command.input)
        return background

    def process(self, key: str) -> programs.Background:
        try:
            return self.processes[key]
        except KeyError:
            raise NotFound(f"process {key!r} does not exist in sandbox {self.id}", sandbox_id=self.id,
                           hint="check its id; its record is removed some time after its end") from None

    async def forget_process(self, key: str) -> programs.Background:
        background = self.process(key)
        del self.processes[key]
        await background.forget()
        await self.saved()
        return background

    # ---- environments ----

    @property
    def hosts_environments(self) -> bool:
        """Whether a host was started, by this rocklet process or an earlier one."""
        return self.env_host is not None or self._env_host_kept

    async def environments(self) -> EnvHost:
        """The host of environments in this sandbox, started on first use."""
        async with self._env_lock:
            if self.env_host is not None and self.env_host.failed is not None:
                await self.env_host.close()
                self.env_host = None
            if self.env_host is None:
                own = requirements_of(self.config.image) is None  # an ordinary image hosts with its own Python
                adapter = datasets.adapter_of(self.config.image)
                host = EnvHost(self.runtime, self.handle, folder=None if own else CURRENT, adapter=adapter,
                               lease=self._env_lease)  # fmt: skip
                host.recorded = bool(self.config.record)
                if self._env_host_kept:
                    self._env_host_kept = False
                    with contextlib.suppress(NotFound):  # it ended meanwhile
                        await host.attach()
                        self.env_host = host
                        return host
                await host.open()
                self.env_host = host
            return self.env_host

    # ---- end ----

    def memory_kill(self, exit_code: int | None) -> str:
        """The failure reason of a program that ended with this exit code: "" unless the kernel killed a process of the
        sandbox for memory within the last second."""
        if exit_code != 128 + signal.SIGKILL or not isinstance(self.runtime, Watches):
            return ""
        kills, now = self.runtime.oom_kills(self.handle), time.monotonic()
        if kills > self._memory_kills:
            self._memory_kills, self._killed_at = kills, now
        if now - self._killed_at > 1.0:
            return ""
        return f"the memory limit of {self.config.memory} was exceeded, and the kernel killed a process"

    async def _watch_end(self) -> None:
        self._end(await self.runtime.wait(self.handle))

    def _end(self, why: str) -> None:
        """Record the end and its reason."""
        kills = self.runtime.oom_kills(self.handle) if isinstance(self.runtime, Watches) else 0
        if why == "oom":
            cause, text = Cause.OUT_OF_MEMORY, f"it ran out of its {self.config.memory} of memory"
        elif why.partition(": ")[0] == "disk":
            cause = Cause.DISK_FULL
            text = why.partition(": ")[2] or "its files took more of the disk than a sandbox may have"
        else:
            what, _, more = why.partition(": ")
            cause = Cause.EXITED if what == "exited" else Cause.LOST
            told = more or "its pid 1 ended" if cause is Cause.EXITED else "it was ended" if why == "gone" else why
            text = told + (f" (processes killed for memory: {kills})" if kills else "")
        self.cause, self.reason = cause, text
        self._ended(self, cause, text)
        self._over.set()

    async def ends_within(self, seconds: float) -> bool:
        """Whether it ends, or is being stopped, within that time."""
        if seconds <= 0:
            return self._over.is_set()
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return False
        return True

    def let_go(self) -> None:
        """Prepare for the stop of the server: waiting requests get an error, and programs continue. Idempotent."""
        self.leaving = True
        self.connections.cut()
        self.gateway_port.cut()
        self.sessions.let_go()
        for execution in self.executions:
            execution.let_go()

    async def detach(self) -> None:
        """Detach from it and leave it running, for the next rocklet process."""
        self.let_go()
        await self.journal.let_go()
        await self._end_tasks()
        await self.sessions.detach()
        for background in self.processes.values():
            await background.detach()
        if self.env_host is not None:
            await self.env_host.detach()
        await self.journal.close()
        self.spools.close()

    async def destroy(self, grace: float) -> None:
        """End it and remove all its resources."""
        await self._let_go()
        if grace > 0:
            await self.runtime.stop(self.handle, grace)
        await self.runtime.destroy(self.handle)
        await self._close_all()

    async def replaced(self, *, logs: bool) -> None:
        """End it: another sandbox has its id and its record now. logs: also remove the output of its processes, before
        that sandbox has any."""
        await self._let_go()
        await self.runtime.destroy(self.handle)
        await self._close_all()
        if logs:
            await asyncio.to_thread(self._state_dir.remove_logs, self.id)
        self._state_dir.give_back(self.spools)

    async def rest(self, grace: float) -> Handle:
        """End it and retain its files: returns the handle of the files. The intent is written to disk first."""
        assert isinstance(self.runtime, Keeps)
        await self._let_go()
        async with self._save_lock:
            self._state_dir.rest(self.config, self.handle)
        await faults.point("node.rest.saved")
        kept = await self.runtime.rest(self.handle, grace)
        await faults.point("node.rest.kept")
        await self._close_all()
        self._state_dir.rest(self.config, kept)
        await asyncio.to_thread(self._state_dir.remove_logs, self.id)
        self._state_dir.give_back(self.spools)
        return kept

    async def _let_go(self) -> None:
        """Stop watching for its end, opening sessions, and connections to its ports."""
        if self._descriptors is not None:
            self._descriptors.forget(self)
        self._over.set()
        self.connections.cut()
        self.gateway_port.cut()
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
        tasks = [task for task in (self._watch, self._pauser) if task is not None]
        for task in tasks:
            task.cancel()
        if self.auto_pause is not None:
            await self.auto_pause.close()
        await asyncio.gather(*tasks, *self.sessions.cancel_opening(), return_exceptions=True)

    async def _close_all(self) -> None:
        await self.sessions.close_all()
        for background in self.processes.values():
            await background.detach()
            background.process.close()
        if self.env_host is not None:
            await self.env_host.close()
        await self.journal.close()

    async def forget(self) -> None:
        """Remove its files of the rocklet on disk, after its end."""
        if self.processes:  # logs may be large
            await asyncio.to_thread(self._state_dir.remove, self.id)
        else:
            self._state_dir.remove(self.id)
        self._state_dir.give_back(self.spools)  # after the record that names it was removed
