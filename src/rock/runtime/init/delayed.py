"""Base of runtimes whose sandboxes run under another program and whose pid 1 takes time to connect (docker, gvisor)."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from rock import errors
from rock.guest.init import process_tree
from rock.runtime.base import Handle, Liveness, Program
from rock.runtime.init.files import InitSandboxes, merged
from rock.runtime.init.link import InitLink
from rock.runtime.namespace.limits import cgroups
from rock.runtime.process.runtime import wait_gone

BACK = 30.0  # seconds for a pid 1 to respond to a restarted server


@dataclass
class DelayedInit:
    """State of a living sandbox in this server; all of it can be recovered from the handle."""

    slot: str
    pid: int  # on this machine: it ends with the sandbox
    start: int
    folders: dict[str, str]
    link: InitLink | None = None
    kills: int = 0
    entering: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def let_go(self) -> None:
        """Close this server's descriptors and tasks of the sandbox."""
        raise NotImplementedError


Living = TypeVar("Living", bound=DelayedInit)


class DelayedSandboxes(InitSandboxes, Generic[Living]):
    """Base of such runtimes. Subclasses implement `_found`, `_enter_again` and `_end`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._live: dict[str, Living] = {}

    def _found(self, handle: Handle) -> Living:
        """State of a living sandbox, from its handle."""
        raise NotImplementedError

    async def _enter_again(self, sandbox: Living, handle: Handle) -> None:
        """Connect its link. Lost, Unavailable."""
        raise NotImplementedError

    async def _end(self, handle: Handle) -> None:
        """Kill it, if it still lives, and wait until it is gone."""
        raise NotImplementedError

    # ---- operations ----

    def _find(self, handle: Handle) -> Living:
        data = handle.data
        sandbox = self._live.get(data["slot"])
        if sandbox is None:
            if not process_tree.lives(data["pid"], data["start"]):
                raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
            sandbox = self._live[data["slot"]] = self._found(handle)
        return sandbox

    async def linked(self, handle: Handle) -> InitLink:
        sandbox = self._find(handle)
        if sandbox.link is None or sandbox.link.closed:
            async with sandbox.entering:
                if sandbox.link is None or sandbox.link.closed:
                    await self._enter_again(sandbox, handle)
        assert sandbox.link is not None
        return sandbox.link

    def complete(self, handle: Handle, program: Program) -> Program:
        data = handle.data
        if (most := data.get("nofile")) is not None:
            program = replace(program, nofile=min(program.nofile or most, most))
        user = program.user if program.user is not None else data["user"]
        return replace(program, env=merged(data["env"], program.env), cwd=program.cwd or data["cwd"], user=user or None)

    async def recover(self, handle: Handle) -> Liveness:
        try:
            await (await self.linked(handle)).request("hello", patience=BACK)
        except errors.RockError:
            return Liveness.GONE
        return Liveness.RUNNING

    def oom_kills(self, handle: Handle) -> int:
        """How many of its processes the kernel of this machine killed for memory so far."""
        folder = handle.data["cgroups"].get("memory")
        found = cgroups.oom_kills(folder) if folder else 0
        sandbox = self._live.get(handle.data["slot"])
        if sandbox is not None:  # its cgroup is removed with it
            found = sandbox.kills = max(found, sandbox.kills)
        return found

    # ---- stop and destroy ----

    async def stop(self, handle: Handle, grace: float) -> None:
        pid, start, slot = handle.data["pid"], handle.data["start"], handle.data["slot"]
        with contextlib.suppress(OSError):
            self._stopped(slot).touch()
        if process_tree.lives(pid, start):
            with contextlib.suppress(errors.RockError, TimeoutError):
                await (await self.linked(handle)).request("stop", {"grace": grace}, patience=grace + 5)
                async with asyncio.timeout(grace + 2):
                    await wait_gone(pid, start)
        await self._end(handle)
        await self._forget(slot)

    def _was_ended(self, slot: str) -> bool:
        """Whether it ended because of a stop or a destroy."""
        return not (self._run_dir / slot).exists() or self._stopped(slot).exists()

    def _stopped(self, slot: str) -> Path:
        return self._run_dir / slot / "stopped"

    async def _forget(self, slot: str) -> None:
        sandbox = self._live.pop(slot, None)
        if sandbox is not None:
            await sandbox.let_go()
