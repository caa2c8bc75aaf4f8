"""The sessions of one sandbox, by name: created, claimed, recovered after a restart, closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rock import faults
from rock.errors import Conflict, NotFound, RockError
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.commands.session import DEFAULT, Session
from rock.rocklet.commands.shell_process import KEY, Shell, find_shell
from rock.rocklet.commands.shell_protocol import BASH
from rock.rocklet.durability.journal import Journal
from rock.rocklet.state import StateDirectory
from rock.runtime.base import Handle, Process, Runtime
from rock.runtime.pools import StartsFirst


async def open_ahead(runtime: Runtime, handle: Handle) -> Session:
    """Open the default session of a sandbox of the warm pool, before a client claims it."""
    first = runtime.started(handle) if isinstance(runtime, StartsFirst) else None
    if first is not None:
        return await open_started(runtime, handle, *first)
    session = Session(runtime, handle, DEFAULT, await find_shell(runtime, handle))
    await session.open()
    return session


async def open_started(runtime: Runtime, handle: Handle, path: str, process: Process) -> Session:
    """Open the default session with its bash, which was started together with the sandbox."""
    session = Session(runtime, handle, DEFAULT, Shell(path, BASH))
    await session.open(process)
    return session


class Sessions:
    """The sessions of a sandbox, including ended ones. saved: called when the record has to be written again."""

    def __init__(
        self,
        runtime: Runtime,
        handle: Handle,
        config: SandboxConfig,
        state_dir: StateDirectory,
        saved: Callable[[], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._handle = handle
        self._config = config
        self._state_dir = state_dir
        self._saved = saved
        self._sessions: dict[str, Session] = {}
        self._shells: dict[str | None, Shell] = {}
        self._opening: dict[str, asyncio.Task[Session]] = {}
        # path and process of the bash of the default session, where it was started with the sandbox, and with the
        # state that it inherits
        self.first: tuple[str, Process] | None = None

        # sessions of the snapshot from which the sandbox was started, until they are opened: request and state
        self.inherited: dict[str, tuple[CreateBashSessionRequest, str | None]] = {}
        self.give: Callable[[Session, str], Awaitable[None]] | None = None
        self.memory_kill: Callable[[int | None], str] = lambda exit_code: ""  # see Supervisor.memory_kill
        self.reopened: Callable[[], None] = lambda: None  # see Session

    def _add(self, name: str, session: Session) -> None:
        session.memory_kill = self.memory_kill
        session.reopened = self.reopened
        self._sessions[name] = session

    def __contains__(self, name: object) -> bool:
        return name in self._sessions

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def names(self) -> list[str]:
        return sorted(self._sessions)

    # ---- open and close ----

    async def find_shell(self, wanted: str | None = None) -> Shell:
        if wanted not in self._shells:
            self._shells[wanted] = await find_shell(self._runtime, self._handle, wanted)
        return self._shells[wanted]

    async def create(self, request: CreateBashSessionRequest) -> str:
        """Open a session; Conflict when one of that name exists. Returns the output of its start-up files."""
        old = self._sessions.get(request.session)
        if request.session in self._opening or (old is not None and old.closed is None):
            if request == DEFAULT:
                await self.get(DEFAULT.session)  # the default session always exists
                return ""
            raise Conflict(
                f"session {request.session!r} exists already in sandbox {self._handle.id}",
                sandbox_id=self._handle.id,
                hint="close it first, or take another name",
            )
        return (await self._open(request)).startup_output

    async def _open(self, request: CreateBashSessionRequest) -> Session:
        task = asyncio.create_task(self._open_now(request), name=f"open-{request.session}")
        self._opening[request.session] = task
        return await asyncio.shield(task)  # the task removes itself from `_opening`

    async def _open_now(self, request: CreateBashSessionRequest) -> Session:
        try:
            old = self._sessions.pop(request.session, None)
            if old is not None:
                await old.close()
            has_state = self.first is not None and request == DEFAULT  # it was started with it
            session = await self._open_shell(request)
            _, state = self.inherited.pop(request.session, (None, None))
            if state is not None and has_state:
                session.startup_output = ""  # such as of `set -x`
            elif state is not None and self.give is not None:
                await self.give(session, state)
            self._add(request.session, session)
            await faults.point("session.opened")
            if request != DEFAULT:
                await self._saved()
            return session
        finally:
            self._opening.pop(request.session, None)

    async def _open_shell(self, request: CreateBashSessionRequest) -> Session:
        """Open a shell. The shell of the last sandbox of this image is tried first; otherwise it is searched."""
        place = (self._handle.runtime, self._config.image, request.shell)
        if self.first is not None and request == DEFAULT:
            first, self.first = self.first, None
            session = await open_started(self._runtime, self._handle, *first)
            self._state_dir.shells[place] = self._shells[None] = session.shell
            return session
        guess = self._state_dir.shells.get(place)
        if guess is not None:
            session = Session(self._runtime, self._handle, request, guess)
            try:
                await session.open()
            except NotFound:
                del self._state_dir.shells[place]
            else:
                self._shells[request.shell] = guess
                return session
        session = Session(self._runtime, self._handle, request, await self.find_shell(request.shell))
        await session.open()
        self._state_dir.shells[place] = session.shell
        return session

    async def get(self, name: str) -> Session:
        """An open session. "default" is opened when first used; any other has to be created."""
        found = self._sessions.get(name)
        if found is not None and (found.closed is None or name != DEFAULT.session):
            return found
        opening = self._opening.get(name)
        if opening is not None:
            return await asyncio.shield(opening)
        if name in self.inherited:
            return await self._open(self.inherited[name][0])
        if name == DEFAULT.session:
            return await self._open(DEFAULT)
        names = ", ".join(self.names()) or "none"
        raise NotFound(
            f"session {name!r} does not exist in sandbox {self._handle.id} (open: {names})",
            sandbox_id=self._handle.id,
            hint="open it with create_session",
        )

    async def close(self, name: str) -> None:
        opening = self._opening.get(name)
        if opening is not None:
            await asyncio.wait({opening})
        session = self._sessions.pop(name, None)
        if session is None:
            raise NotFound(f"session {name!r} does not exist", sandbox_id=self._handle.id,
                           hint="create it first with create_session; sessions end with their shell")
        await session.close()
        await self._saved()

    def claim(self, session: Session) -> bool:
        """Use a default session that was opened in the warm pool; False when it does not fit this sandbox."""
        if not session.claim(self._handle, self._config.env):
            return False
        self._add(DEFAULT.session, session)
        self._shells[None] = session.shell
        return True

    async def prepare(self) -> None:
        """Open the default session ahead of its first use; an image without a shell has none."""
        with contextlib.suppress(RockError):
            await self.get(DEFAULT.session)

    # ---- restart of the rocklet ----

    def record(self) -> dict[str, Any]:
        """The sessions that the record has to name: pid 1 itself reports whether a plain default session exists."""
        return {name: s.spec.model_dump(mode="json") for name, s in self._sessions.items()
                if not s.closed and s.spec != DEFAULT}  # fmt: skip

    async def recover(self, record: Mapping[str, Any], kept: Sequence[str], journal: Journal) -> None:
        """Recover the sessions of an earlier rocklet process; sessions that ended are omitted. kept: keys of the
        processes that exist."""
        specs = {name: CreateBashSessionRequest.model_validate(s) for name, s in record.items()}
        if KEY + DEFAULT.session in kept:
            specs.setdefault(DEFAULT.session, DEFAULT)
            path = self._runtime.first_path(self._handle) if isinstance(self._runtime, StartsFirst) else None
            if path is not None:  # it is always bash, and needs no look at the files inside
                self._shells[None] = Shell(path, BASH)
        for name, request in specs.items():
            with contextlib.suppress(RockError):
                session = Session(self._runtime, self._handle, request, await self.find_shell(request.shell))
                await session.attach(journal)
                self._add(name, session)

    # ---- end ----

    def let_go(self) -> None:
        """Prepare for the stop of the server: waiting requests end with an error, and running commands continue."""
        for session in self._sessions.values():
            session.let_go()

    def cancel_opening(self) -> Iterable[asyncio.Task[Session]]:
        """Open no more sessions; returns the tasks that have to end first."""
        tasks = list(self._opening.values())
        for task in tasks:
            task.cancel()
        return tasks

    async def close_streams(self) -> bool:
        """Close the descriptors of the shells that run no command; False when some stay open."""
        return all([await session.close_streams() for session in list(self._sessions.values())]) and not self._opening

    def _close_first(self, *, forget: bool) -> None:
        first, self.first = self.first, None
        if first is not None:
            first[1].close(forget=forget)

    async def detach(self) -> None:
        """Detach from all sessions and leave them running."""
        self._close_first(forget=False)
        for session in self._sessions.values():
            await session.detach()

    async def close_all(self) -> None:
        self._close_first(forget=True)
        for session in self._sessions.values():
            await session.close()
