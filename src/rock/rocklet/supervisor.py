"""One sandbox from create to destroy: its sessions, processes and environments, and the tasks that watch them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

from rock import faults
from rock.envhub import datasets
from rock.envhub.packages import requirements_of
from rock.errors import Conflict, NotFound, RockError
from rock.protocol.action import Command, CreateBashSessionRequest
from rock.protocol.encoded import kept
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import Cause, Isolation, Phase, SandboxConfig, Usage
from rock.rocklet import programs, resuming
from rock.rocklet.dialled import Connections
from rock.rocklet.envs import EnvHost
from rock.rocklet.imageshell import Shell, find_shell
from rock.rocklet.journal import Journal
from rock.rocklet.session import DEFAULT, Session
from rock.rocklet.shellprocess import KEY
from rock.rocklet.spool import SpoolFolder
from rock.runtime import wholefile
from rock.runtime.base import Handle, Keeps, Limits, Runtime, Watches
from rock.runtime.image.packages import CURRENT

DEFAULT_SESSION = "default"
_FREE_SPOOLS = 16


class Shelf:
    """What is kept on disk for the rocklet after this one, and what sandboxes learn from each other.

    folder/records/ID   config, handle, sessions and processes of a sandbox
    folder/logs/ID/     a folder a background process
    folder/spools/N/    what else has to outlive the rocklet: its record says which is whose
    shells              by runtime, image and wish: where the last sandbox had its shell
    """

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._logs = folder / "logs"
        self._spools = folder / "spools"
        self._free: list[SpoolFolder] = []  # empty ones, for the next sandboxes
        self.shells: dict[tuple[str, str, str | None], Shell] = {}

    def make(self) -> None:
        for folder in (self._records, self._logs, self._spools):
            folder.mkdir(parents=True, exist_ok=True)

    def record(self, sandbox_id: str) -> str:
        return f"{self._records}/{sandbox_id}"

    def logs(self, sandbox_id: str) -> Path:
        return self._logs / sandbox_id

    def ids(self) -> list[str]:
        """All that have a record."""
        return sorted(name for name in os.listdir(self._records) if not name.startswith("."))

    def load(self, sandbox_id: str) -> tuple[SandboxConfig, Handle, dict[str, Any]]:
        record = json.loads(Path(self.record(sandbox_id)).read_text())
        handle = record["handle"]
        handle["isolation"] = Isolation(handle["isolation"])
        return SandboxConfig.model_validate(record["config"]), Handle(**handle), record

    def rest(self, config: SandboxConfig, handle: Handle) -> None:
        """Write the record of a sandbox that does not run, or is about not to, and whose files are kept."""
        wholefile.replace(self.record(handle.id), _written(config, handle, resting=True))

    # ---- folders of spool files

    def spools(self, name: str | None = None) -> SpoolFolder:
        """That of a sandbox of a former rocklet, or one for a new sandbox."""
        if name is None and self._free:
            return self._free.pop()
        return SpoolFolder(self._spools / os.path.basename(name or os.urandom(6).hex()))

    def give_back(self, spools: SpoolFolder) -> None:
        """Of a sandbox that has no record any more."""
        if len(self._free) < _FREE_SPOOLS and spools.clear():
            self._free.append(spools)
        else:
            spools.remove()

    def sweep(self, used: set[str]) -> None:
        """Remove what former rocklets left for sandboxes that are gone."""
        for name in os.listdir(self._spools):
            if name not in used:
                shutil.rmtree(self._spools / name, ignore_errors=True)

    def close(self) -> None:
        for spools in self._free:
            spools.remove()
        self._free.clear()

    # ---- removing

    def remove(self, sandbox_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.record(sandbox_id))
        self.remove_logs(sandbox_id)

    def remove_logs(self, sandbox_id: str) -> None:
        shutil.rmtree(self.logs(sandbox_id), ignore_errors=True)


def _written(config: SandboxConfig, handle: Handle, **more: Any) -> str:
    """The text of a record."""
    rest = {
        "handle": {"runtime": handle.runtime, "id": handle.id, "isolation": handle.isolation.value,
                   "enforced": dict(handle.enforced), "data": handle.data},
        **more,
    }  # fmt: skip
    return f'{{"config": {kept(config)}, {json.dumps(rest)[1:]}'


async def open_ahead(runtime: Runtime, handle: Handle) -> Session:
    """The default session of a sandbox that nobody has claimed yet."""
    session = Session(runtime, handle, DEFAULT, await find_shell(runtime, handle))
    await session.open()
    return session


class Supervisor:
    """Owns everything of one sandbox on this machine. `ended` is called once, when it dies by itself."""

    def __init__(
        self,
        sandbox_id: str,
        config: SandboxConfig,
        runtime: Runtime,
        handle: Handle,
        shelf: Shelf,
        ended: Callable[[Supervisor, Cause, str], None],
        spools: str | None = None,
    ) -> None:
        self.id = sandbox_id
        self.config = config
        self.runtime = runtime
        self.handle = handle
        self._shelf = shelf
        self.phases: dict[str, Phase] = {}
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.sessions: dict[str, Session] = {}
        self.processes: dict[str, programs.Background] = {}
        self.executions: set[programs.Execution] = set()  # those with a key, which go on without a server
        self.leaving = False
        self.env_host: EnvHost | None = None
        self._env_host_kept = False  # a former rocklet's is there; asked only when it is needed, as it may hang
        self.connections = Connections()
        self.spools = shelf.spools(spools)
        self.journal = Journal(self.spools)
        self._ended = ended
        self._busy = 0
        self._last = time.monotonic()
        self._shells: dict[str | None, Shell] = {}
        self._opening: dict[str, asyncio.Task[Session]] = {}
        self._env_lock = asyncio.Lock()
        self._save_lock = asyncio.Lock()
        self._watch = asyncio.create_task(self._watch_end(), name=f"watch-{sandbox_id}")

    # ---- what is kept on disk, for the rocklet after this one ----

    def save(self) -> None:
        """Write the record: replaced at once, so that a crash leaves the old one or the new one."""
        wholefile.replace(self._shelf.record(self.id), self._record())

    async def saved(self) -> None:
        """Write the record without holding up anybody else."""
        async with self._save_lock:
            await asyncio.to_thread(wholefile.replace, self._shelf.record(self.id), self._record())

    def _record(self) -> str:
        # A plain default session is not worth a write: pid 1 tells whether there is one.
        sessions = {name: s.spec.model_dump(mode="json") for name, s in self.sessions.items()
                    if not s.closed and s.spec != DEFAULT}  # fmt: skip
        processes = {p.id: {"command": p.command, "started_at": p.started_at} for p in self.processes.values()}
        return _written(self.config, self.handle, sessions=sessions, processes=processes,
                        spools=self.spools.path.name)  # fmt: skip

    async def recover(self, record: dict[str, Any]) -> None:
        """Take over the sessions and processes of a former rocklet; what is gone is left out."""
        self.journal.load()
        kept = await self.runtime.processes(self.handle)
        await resuming.settle_sessions(self, kept, record.get("sessions", {}))
        specs = {name: CreateBashSessionRequest.model_validate(s) for name, s in record.get("sessions", {}).items()}
        if KEY + DEFAULT_SESSION in kept:
            specs.setdefault(DEFAULT_SESSION, DEFAULT)
        for name, request in specs.items():
            with contextlib.suppress(RockError):
                session = Session(self.runtime, self.handle, request, await self.find_shell(request.shell))
                await session.attach(self.journal)
                self.sessions[name] = session
        for key, entry in record.get("processes", {}).items():
            with contextlib.suppress(RockError):
                process = await self.runtime.attach(self.handle, programs.KEY + key)
                folder = self._shelf.logs(self.id) / key
                folder.mkdir(parents=True, exist_ok=True)
                self.processes[key] = programs.Background(key, entry["command"], process, folder, entry["started_at"])
        self._env_host_kept = EnvHost.KEY in kept
        await resuming.settle(self, kept)

    # ---- activity ----

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A call that counts as activity for as long as it lasts."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._last = time.monotonic()

    async def during(self, stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """A stream that counts as activity for as long as it is read: a slow client is not an idle sandbox."""
        with self.active():
            async with contextlib.aclosing(stream):
                async for part in stream:
                    yield part

    def touch(self) -> None:
        self._last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return 0.0 if self._busy else time.monotonic() - self._last

    async def usage(self) -> Usage | None:
        return await self.runtime.usage(self.handle) if isinstance(self.runtime, Limits) else None

    def describe(self, usage: Usage | None = None) -> NodeSandbox:
        return NodeSandbox(
            sandbox_id=self.id,
            alive=self.cause is None,
            idle_seconds=self.idle_seconds,
            isolation=self.handle.isolation,
            enforced=dict(self.handle.enforced),
            runtime=self.handle.runtime,
            phases=self.phases,
            cause=self.cause,
            reason=self.reason,
            usage=usage,
        )

    # ---- sessions ----

    async def find_shell(self, wanted: str | None = None) -> Shell:
        if wanted not in self._shells:
            self._shells[wanted] = await find_shell(self.runtime, self.handle, wanted)
        return self._shells[wanted]

    async def create_session(self, request: CreateBashSessionRequest) -> str:
        """Open a session; Conflict when there is one of that name. Answers what its start-up printed."""
        old = self.sessions.get(request.session)
        if request.session in self._opening or (old is not None and old.closed is None):
            if request == DEFAULT:
                await self.session(DEFAULT_SESSION)  # it stands ready from the start
                return ""
            raise Conflict(
                f"session {request.session!r} exists already in sandbox {self.id}",
                sandbox_id=self.id,
                hint="close it first, or take another name",
            )
        return (await self._open(request)).startup_output

    async def _open(self, request: CreateBashSessionRequest) -> Session:
        task = asyncio.create_task(self._open_now(request), name=f"open-{request.session}")
        self._opening[request.session] = task
        return await asyncio.shield(task)  # which takes itself out of `_opening`

    async def _open_now(self, request: CreateBashSessionRequest) -> Session:
        try:
            old = self.sessions.pop(request.session, None)
            if old is not None:
                await old.close()
            session = await self._open_shell(request)
            self.sessions[request.session] = session
            await faults.point("session.opened")
            if request != DEFAULT:
                await self.saved()
            return session
        finally:
            self._opening.pop(request.session, None)

    async def _open_shell(self, request: CreateBashSessionRequest) -> Session:
        """Where the last sandbox of this image had its shell, this one probably has it too; else it is looked for."""
        place = (self.handle.runtime, self.config.image, request.shell)
        guess = self._shelf.shells.get(place)
        if guess is not None:
            session = Session(self.runtime, self.handle, request, guess)
            try:
                await session.open()
            except NotFound:
                del self._shelf.shells[place]
            else:
                self._shells[request.shell] = guess
                return session
        session = Session(self.runtime, self.handle, request, await self.find_shell(request.shell))
        await session.open()
        self._shelf.shells[place] = session.shell
        return session

    async def session(self, name: str) -> Session:
        """An open session. "default" is opened when first used; any other has to be created."""
        found = self.sessions.get(name)
        if found is not None and (found.closed is None or name != DEFAULT_SESSION):
            return found
        opening = self._opening.get(name)
        if opening is not None:
            return await asyncio.shield(opening)
        if name == DEFAULT_SESSION:
            return await self._open(DEFAULT)
        names = ", ".join(sorted(self.sessions)) or "none"
        raise NotFound(
            f"session {name!r} does not exist in sandbox {self.id} (open: {names})",
            sandbox_id=self.id,
            hint="open it with create_session",
        )

    async def close_session(self, name: str) -> None:
        opening = self._opening.get(name)
        if opening is not None:
            await asyncio.wait({opening})
        session = self.sessions.pop(name, None)
        if session is None:
            raise NotFound(f"session {name!r} does not exist", sandbox_id=self.id)
        await session.close()
        await self.saved()

    # ---- programs ----

    async def shell_for(self, command: Command) -> Shell | None:
        return await self.find_shell() if isinstance(command.command, str) else None

    async def start_process(self, command: Command, key: str) -> programs.Background:
        """Start one in the background, under a name that nobody else has."""
        sh = await self.shell_for(command)
        process = await programs.start(
            self.runtime, self.handle, command, sh, key=programs.KEY + key, keep=True, stdin=True
        )
        try:
            await faults.point("process.started")
            folder = self._shelf.logs(self.id) / key
            folder.mkdir(parents=True)
            background = programs.Background(key, command.command, process, folder)
            self.processes[key] = background
            await self.saved()
            await faults.point("process.saved")
        except BaseException:
            # Nobody would know of it.
            self.processes.pop(key, None)
            await asyncio.shield(process.kill_tree())
            raise
        if command.stdin is not None:
            background.feed(command.stdin.encode("utf-8", "surrogateescape"))
        return background

    async def adopt_process(self, key: str, command: Command) -> programs.Background:
        """Take over one that a former rocklet had started, and of which it had not written yet. NotFound."""
        process = await self.runtime.attach(self.handle, programs.KEY + key)
        folder = self._shelf.logs(self.id) / key
        folder.mkdir(parents=True, exist_ok=True)
        background = self.processes[key] = programs.Background(key, command.command, process, folder)
        await self.saved()
        if command.stdin is not None:
            background.feed(command.stdin.encode("utf-8", "surrogateescape"))
        return background

    def process(self, key: str) -> programs.Background:
        try:
            return self.processes[key]
        except KeyError:
            raise NotFound(f"process {key!r} does not exist in sandbox {self.id}", sandbox_id=self.id) from None

    async def forget_process(self, key: str) -> programs.Background:
        background = self.process(key)
        del self.processes[key]
        await background.forget()
        await self.saved()
        return background

    # ---- environments ----

    @property
    def hosts_environments(self) -> bool:
        """Whether a host was started, by this rocklet or a former one."""
        return self.env_host is not None or self._env_host_kept

    async def environments(self) -> EnvHost:
        """The host of environments in this sandbox, started when first used."""
        async with self._env_lock:
            if self.env_host is not None and self.env_host.failed is not None:
                await self.env_host.close()
                self.env_host = None
            if self.env_host is None:
                own = requirements_of(self.config.image) is None  # an image like any other hosts with its own Python
                adapter = datasets.adapter_of(self.config.image)
                host = EnvHost(self.runtime, self.handle, folder=None if own else CURRENT, adapter=adapter)
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

    async def _watch_end(self) -> None:
        why = await self.runtime.wait(self.handle)
        kills = self.runtime.oom_kills(self.handle) if isinstance(self.runtime, Watches) else 0
        if why == "oom":
            cause, text = Cause.OUT_OF_MEMORY, f"it ran out of its {self.config.memory} of memory"
        else:
            told = "its pid 1 ended" if why == "gone" else why
            cause, text = Cause.LOST, told + (f" (processes killed for memory: {kills})" if kills else "")
        self.cause, self.reason = cause, text
        self._ended(self, cause, text)

    def let_go(self) -> None:
        """The server is about to stop: whoever waits is told so, and what runs goes on. Idempotent."""
        self.leaving = True
        self.connections.cut()
        for session in self.sessions.values():
            session.let_go()
        for execution in self.executions:
            execution.let_go()

    async def detach(self) -> None:
        """Let go of it and leave it running, for a rocklet that comes after this one."""
        self.let_go()
        await self.journal.let_go()
        tasks = [self._watch, *self._opening.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self.sessions.values():
            await session.detach()
        for background in self.processes.values():
            await background.detach()
        if self.env_host is not None:
            await self.env_host.detach()
        await self.journal.close()
        self.spools.close()

    async def destroy(self, grace: float) -> None:
        """End it and remove all that it used."""
        await self._let_go()
        if grace > 0:
            await self.runtime.stop(self.handle, grace)
        await self.runtime.destroy(self.handle)
        await self._close_all()

    async def rest(self, grace: float) -> Handle:
        """End it and keep its files: the handle of what is kept. The intent is on disk first."""
        assert isinstance(self.runtime, Keeps)
        await self._let_go()
        async with self._save_lock:
            self._shelf.rest(self.config, self.handle)
        await faults.point("node.rest.saved")
        kept = await self.runtime.rest(self.handle, grace)
        await faults.point("node.rest.kept")
        await self._close_all()
        self._shelf.rest(self.config, kept)
        await asyncio.to_thread(self._shelf.remove_logs, self.id)
        self._shelf.give_back(self.spools)
        return kept

    async def _let_go(self) -> None:
        """Nobody waits for its end, opens a session or has a connection any more."""
        self._watch.cancel()
        self.connections.cut()
        for task in self._opening.values():
            task.cancel()
        await asyncio.gather(self._watch, *self._opening.values(), return_exceptions=True)

    async def _close_all(self) -> None:
        for session in self.sessions.values():
            await session.close()
        for background in self.processes.values():
            await background.detach()
            background.process.close()
        if self.env_host is not None:
            await self.env_host.close()
        await self.journal.close()

    async def forget(self) -> None:
        """Remove what is kept of it on disk, once it is gone."""
        if self.processes:  # logs may be large
            await asyncio.to_thread(self._shelf.remove, self.id)
        else:
            self._shelf.remove(self.id)
        self._shelf.give_back(self.spools)  # now that no record names it

    def take_over(self, session: Session) -> bool:
        """Use a default session that was opened before this sandbox had a name; False when it does not suit."""
        if not session.claim(self.handle, self.config.env):
            return False
        self.sessions[DEFAULT_SESSION] = session
        self._shells[None] = session.shell
        return True

    async def prepare(self) -> None:
        """Open the default session ahead of its first use; an image without a shell has none."""
        with contextlib.suppress(RockError):
            await self.session(DEFAULT_SESSION)
