"""The sandboxes of a former run of the server, found again."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

from rock.protocol.sandbox import Cause
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
        if len(node.shelf.ids()) == len(node.supervisors) + len(node.kept.ids()):  # else some are not understood
            node.shelf.sweep({supervisor.spools.path.name for supervisor in node.supervisors.values()})

    async def _try(self, sandbox_id: str) -> None:
        async with self._gate:
            try:
                await self._recover(sandbox_id)
            except Exception:  # what is not understood is left as it is, for a server that does
                log.exception("sandbox %s could not be found again", sandbox_id)
                for ids in self._known.values():
                    ids.append(sandbox_id)

    async def _recover(self, sandbox_id: str) -> None:
        node = self._node
        try:
            config, handle, record = node.shelf.load(sandbox_id)
            runtime = node.runtimes[handle.runtime]
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:  # anything else may be a newer server's
            log.warning("no usable record of %s: %s", sandbox_id, error)
            await asyncio.to_thread(node.shelf.remove, sandbox_id)
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
        await supervisor.recover(record)
        node.supervisors[sandbox_id] = supervisor
        log.info("found sandbox %s again, sessions: %s", sandbox_id, supervisor.sessions.names())
