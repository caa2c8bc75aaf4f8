"""The sandboxes of a former run of the server, found again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rock.protocol.sandbox import Cause
from rock.runtime import wholefile
from rock.runtime.base import Liveness

if TYPE_CHECKING:
    from rock.rocklet.node import Node

log = logging.getLogger("rock.node")

_AT_ONCE = 16


class Recovery:
    """What a node does once, when its runtimes are open."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: dict[str, list[str]] = {name: [] for name in node.runtimes.names()}  # ids by runtime
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Find again what runs or rests, and remove what has no record."""
        node = self._node
        await asyncio.gather(*(self._try(sandbox_id) for sandbox_id in node.shelf.ids()))
        await node.runtimes.sweep(self._known)
        await asyncio.to_thread(node.shelf.sweep_logs)
        unused = node.shelf.unused({supervisor.spools.path.name for supervisor in node.supervisors.values()})
        if node.quarantine.ids():  # some may be theirs
            node.quarantine.spools = unused
        else:
            await asyncio.to_thread(node.shelf.sweep, unused)

    async def _try(self, sandbox_id: str) -> None:
        async with self._gate:
            try:
                await self._recover(sandbox_id)
            except Exception as error:  # what is not understood is left as it is, for a server that does
                log.exception("sandbox %s could not be found again", sandbox_id)
                self._hold(sandbox_id, f"it could not be found again ({error!r})")

    def _hold(self, sandbox_id: str, why: str) -> None:
        """Keep one that cannot be used: nothing of it is removed before somebody asks for that."""
        if not self._node.quarantine.add(sandbox_id, why):
            self._node.ends.tell(sandbox_id, Cause.LOST, f"{why}, and it ended while no server was running")
        for ids in self._known.values():
            ids.append(sandbox_id)

    async def _recover(self, sandbox_id: str) -> None:
        node = self._node
        try:
            config, handle, record = node.shelf.load(sandbox_id)
            runtime = node.runtimes[handle.runtime]
        except OSError as error:
            self._hold(sandbox_id, f"its record on the server's disk cannot be read ({error.strerror})")
            return
        except wholefile.Damaged as error:  # what is not understood may be a newer server's
            log.error("the record of sandbox %s is damaged: %s", sandbox_id, error)
            self._hold(sandbox_id, "its record on the server's disk is damaged")
            return
        resting = bool(record.get("resting"))
        if resting or await runtime.recover(handle) is Liveness.GONE:
            if not resting:
                node.ends.tell(sandbox_id, Cause.LOST, "it ended while no server was running")
            if config.keeps_files and await node.kept.recover(config, runtime, handle):
                await asyncio.to_thread(node.shelf.remove_logs, sandbox_id)
                self._known[handle.runtime].append(handle.id)
                return
            await runtime.destroy(handle)
            await asyncio.to_thread(node.shelf.remove, sandbox_id)
            return
        self._known[handle.runtime].append(handle.id)
        supervisor = node.supervise(sandbox_id, config, runtime, handle, record.get("spools"))
        try:
            await supervisor.recover(record)
        except BaseException:
            await supervisor.detach()
            raise
        node.supervisors[sandbox_id] = supervisor
        log.info("found sandbox %s again, sessions: %s", sandbox_id, supervisor.sessions.names())
