"""Sandboxes of which the record is damaged: kept alive, not usable, and ended on request."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import Lost
from rock.guest import proctree
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import Isolation
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.shelf import Shelf
from rock.runtime import wholefile
from rock.runtime.base import Handle

log = logging.getLogger("rock.node")


@dataclass(frozen=True)
class _Held:
    """One of them. data: what its runtime noted of it, None when nothing is found."""

    reason: str
    runtime: str
    data: dict[str, Any] | None

    @property
    def alive(self) -> bool:
        pid, start = (self.data or {}).get("pid"), (self.data or {}).get("start")
        return isinstance(pid, int) and isinstance(start, int) and proctree.lives(pid, start)


class Quarantine:
    """Those of this machine, by id. folder: the run folder, in which each runtime has a folder with its own records."""

    def __init__(self, shelf: Shelf, runtimes: Runtimes, folder: Path) -> None:
        self._shelf = shelf
        self._runtimes = runtimes
        self._folder = folder
        self._held: dict[str, _Held] = {}
        self.spools: list[str] = []  # folders that may be theirs: a damaged record does not say

    def __contains__(self, sandbox_id: object) -> bool:
        return sandbox_id in self._held

    def ids(self) -> list[str]:
        return sorted(self._held)

    def add(self, sandbox_id: str, why: str) -> bool:
        """Keep one; whether it is alive."""
        reason = f"{why}; it was kept and cannot be used"
        found = _Held(reason, "", None)
        for name in self._runtimes.names():
            for record in (self._folder / name).glob("*/record.json"):
                try:
                    data = wholefile.parsed(record.read_bytes())
                except (OSError, ValueError):
                    continue
                if data.get("id") == sandbox_id:
                    found = _Held(reason, name, data)
        self._held[sandbox_id] = found
        log.error("sandbox %s: %s", sandbox_id, reason)
        return found.alive

    def describe(self) -> list[NodeSandbox]:
        return [NodeSandbox(sandbox_id=name, alive=held.alive, runtime=held.runtime, reason=held.reason)
                for name, held in self._held.items()]  # fmt: skip

    def look(self, sandbox_id: str) -> NodeSandbox | None:
        return next((found for found in self.describe() if found.sandbox_id == sandbox_id), None)

    def error(self, sandbox_id: str) -> Lost | None:
        """For a call to one of them."""
        held = self._held.get(sandbox_id)
        if held is None:
            return None
        state = "its processes still run" if held.alive else "it has ended"
        return Lost(f"sandbox {sandbox_id} cannot be used: {held.reason}; {state}", sandbox_id=sandbox_id,
                    hint=f"rock rm {sandbox_id} ends it; rock doctor store tells what is damaged")  # fmt: skip

    async def remove(self, sandbox_id: str, others: list[str]) -> None:
        """End one and remove all that it used; its damaged record is set aside. others: ids of all other sandboxes."""
        held = self._held.get(sandbox_id)
        if held is None:
            return
        data = held.data
        if data is not None:
            runtime = self._runtimes[held.runtime]
            if "slot" in data and "pid" in data and "container" not in data:
                data = {"cgroups": {}, **data}
                await runtime.destroy(Handle(held.runtime, sandbox_id, Isolation.NONE, {}, data))
            else:
                await runtime.sweep(others)
        await asyncio.to_thread(self._shelf.set_aside, sandbox_id)
        await asyncio.to_thread(self._shelf.remove, sandbox_id)
        self._held.pop(sandbox_id, None)
        if not self._held:
            await asyncio.to_thread(self._shelf.sweep, self.spools)
            self.spools = []
