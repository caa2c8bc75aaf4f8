"""One sandbox from create to destroy: its sessions, processes and environments, and the tasks that watch them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rock.errors import Conflict, NotFound, RockError
from rock.protocol.action import Command, CreateBashSessionRequest
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import Cause, Isolation, Phase, SandboxConfig, Usage
from rock.rocklet import programs
from rock.rocklet.envs import EnvHost
from rock.rocklet.session import Session, Shell, find_shell
from rock.runtime.base import Handle, Limits, Runtime, Watches

DEFAULT_SESSION = "default"


class Supervisor:
    """Owns everything of one sandbox on this machine. `ended` is called once, when it dies by itself."""

    def __init__(
        self,
        sandbox_id: str,
        config: SandboxConfig,
        runtime: Runtime,
        handle: Handle,
        folder: Path,
        ended: Callable[[Supervisor, Cause, str], None],
    ) -> None:
        self.id = sandbox_id
        self.config = config
        self.runtime = runtime
        self.handle = handle
        self.folder = folder
        self.phases: dict[str, Phase] = {}
        self.cause: Cause | None = None
        self.reason: str | None = None
        self.sessions: dict[str, Session] = {}
        self.processes: dict[str, programs.Background] = {}
        self.env_host: EnvHost | None = None
        self._ended = ended
        self._busy = 0
        self._last = time.monotonic()
        self._shells: dict[str | None, Shell] = {}
        self._opening: dict[str, asyncio.Task[Session]] = {}
        self._env_lock = asyncio.Lock()
        self._save_lock = asyncio.Lock()
        self._watch = asyncio.create_task(self._watch_end(), name=f"watch-{sandbox_id}")

    # ---- what is kept on disk, for the rocklet after this one ----

    @property
    def record_path(self) -> Path:
        return self.folder / "record.json"

    def save(self) -> None:
        """Write the record: replaced at once, so that a crash leaves the old one or the new one."""
        self._write(self._record())

    async def saved(self) -> None:
        """Write the record without holding up anybody else."""
        async with self._save_lock:
            await asyncio.to_thread(self._write, self._record())

    def _record(self) -> str:
        record = {
            # The registry password was needed for one pull: it does not go to the disk.
            "config": self.config.model_dump(mode="json", exclude={"registry_password"}),
            "handle": {**asdict(self.handle), "isolation": self.handle.isolation.value},
            "sessions": {name: s.spec.model_dump(mode="json") for name, s in self.sessions.items() if not s.closed},
            "processes": {p.id: {"command": p.command, "started_at": p.started_at} for p in self.processes.values()},
        }
        return json.dumps(record)

    def _write(self, record: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.record_path.with_suffix(".new")
        temporary.write_text(record)
        os.replace(temporary, self.record_path)

    @staticmethod
    def load(folder: Path) -> tuple[SandboxConfig, Handle, dict[str, Any]]:
        record = json.loads((folder / "record.json").read_text())
        handle = record["handle"]
        handle["isolation"] = Isolation(handle["isolation"])
        return SandboxConfig.model_validate(record["config"]), Handle(**handle), record

    async def recover(self, record: dict[str, Any]) -> None:
        """Take over the sessions and processes of a former rocklet; what is gone is left out."""
        for name, spec in record.get("sessions", {}).items():
            request = CreateBashSessionRequest.model_validate(spec)
            with contextlib.suppress(RockError):
                session = Session(self.runtime, self.handle, request, await self.find_shell(request.shell))
                await session.attach()
                self.sessions[name] = session
        for key, entry in record.get("processes", {}).items():
            with contextlib.suppress(RockError):
                process = await self.runtime.attach(self.handle, programs.KEY + key)
                folder = self.folder / "processes" / key
                folder.mkdir(parents=True, exist_ok=True)
                self.processes[key] = programs.Background(key, entry["command"], process, folder, entry["started_at"])
        if EnvHost.KEY in await self.runtime.processes(self.handle):
            host = EnvHost(self.runtime, self.handle)
            with contextlib.suppress(RockError):
                await host.attach()
                self.env_host = host

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
            if request == CreateBashSessionRequest(session=DEFAULT_SESSION):
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
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._opening.pop(request.session, None)

    async def _open_now(self, request: CreateBashSessionRequest) -> Session:
        try:
            old = self.sessions.pop(request.session, None)
            if old is not None:
                await old.close()
            session = Session(self.runtime, self.handle, request, await self.find_shell(request.shell))
            await session.open()
            self.sessions[request.session] = session
            await self.saved()
            return session
        finally:
            self._opening.pop(request.session, None)

    async def session(self, name: str) -> Session:
        """An open session. "default" is opened when first used; any other has to be created."""
        found = self.sessions.get(name)
        if found is not None and (found.closed is None or name != DEFAULT_SESSION):
            return found
        opening = self._opening.get(name)
        if opening is not None:
            return await asyncio.shield(opening)
        if name == DEFAULT_SESSION:
            return await self._open(CreateBashSessionRequest(session=name))
        names = ", ".join(sorted(self.sessions)) or "none"
        raise NotFound(
            f"session {name!r} does not exist in sandbox {self.id} (open: {names})",
            sandbox_id=self.id,
            hint="open it with create_session",
        )

    async def close_session(self, name: str) -> None:
        session = self.sessions.pop(name, None)
        if session is None:
            raise NotFound(f"session {name!r} does not exist", sandbox_id=self.id)
        await session.close()
        await self.saved()

    # ---- programs ----

    async def shell_for(self, command: Command) -> Shell | None:
        return await self.find_shell() if isinstance(command.command, str) else None

    async def start_process(self, command: Command) -> programs.Background:
        key = uuid.uuid4().hex[:12]
        sh = await self.shell_for(command)
        process = await programs.start(
            self.runtime, self.handle, command, sh, key=programs.KEY + key, keep=True, stdin=True
        )
        try:
            folder = self.folder / "processes" / key
            folder.mkdir(parents=True)
            background = programs.Background(key, command.command, process, folder)
            self.processes[key] = background
            await self.saved()
        except BaseException:
            # Nobody would know of it.
            self.processes.pop(key, None)
            await asyncio.shield(process.kill_tree())
            raise
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

    async def environments(self) -> EnvHost:
        """The host of environments in this sandbox, started when first used."""
        async with self._env_lock:
            if self.env_host is not None and self.env_host.failed is not None:
                await self.env_host.close()
                self.env_host = None
            if self.env_host is None:
                host = EnvHost(self.runtime, self.handle)
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
            cause, text = Cause.LOST, "its pid 1 ended" + (f" (processes killed for memory: {kills})" if kills else "")
        self.cause, self.reason = cause, text
        self._ended(self, cause, text)

    async def detach(self) -> None:
        """Let go of it and leave it running, for a rocklet that comes after this one."""
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

    async def destroy(self, grace: float) -> None:
        """End it and remove all that it used."""
        self._watch.cancel()
        for task in self._opening.values():
            task.cancel()
        await asyncio.gather(self._watch, *self._opening.values(), return_exceptions=True)
        if grace > 0:
            await self.runtime.stop(self.handle, grace)
        await self.runtime.destroy(self.handle)
        for session in self.sessions.values():
            await session.close()
        for background in self.processes.values():
            await background.detach()
            background.process.close()
        if self.env_host is not None:
            await self.env_host.close()

    async def prepare(self) -> None:
        """Open the default session ahead of its first use; an image without a shell has none."""
        with contextlib.suppress(RockError):
            await self.session(DEFAULT_SESSION)
