"""Checks that a server starts with the store to which its sandboxes belong."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rock.admin.sandboxes.lifecycle import new_info
from rock.errors import Conflict, InvalidConfig, Unsupported
from rock.host import atomic_file
from rock.protocol.node import VolumeInfo
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.rocklet.node import Node
from rock.settings import RESTORED, STORE_NOTE
from rock.store.base import Record, Store

log = logging.getLogger("rock.server")

WAYS = ("", "adopt", "abandon")


class Identity:
    """The identity of the store, recorded in the run folder. A server with a different or missing store does not start
    while there are sandboxes or volumes, because it would remove all that the store does not contain.

    changed: the action in this case. "adopt": creates records for the sandboxes of this machine, which then belong to
    the server's owner and have no idempotency key, and for its volumes, which keep their tenants. "abandon": ends the
    sandboxes, and removes retained files and volumes.
    """

    def __init__(self, run_dir: Path, store: Store, changed: str, node: Node | None) -> None:
        """node: the rocklet of a server with local sandboxes. InvalidConfig."""
        if changed not in WAYS:
            raise InvalidConfig(f"ROCK_STORE_CHANGED={changed} is not a known choice", hint="use adopt or abandon")
        if changed == "adopt" and node is None:
            raise Unsupported("sandboxes of other machines cannot be adopted",
                              hint="restore a backup, or rock admin start --abandon")  # fmt: skip
        self._note = run_dir / STORE_NOTE
        self._store = store
        self._changed = changed
        self._node = node

    def check_there(self) -> None:
        """Check before the store is opened, which creates a missing one. Conflict."""
        missing = self._store.missing()
        if missing is not None and self._noted() is not None:
            self._decide(missing, self._left())

    async def check(self) -> None:
        """Check the opened store. Conflict."""
        identity, noted = await self._store.identity(), self._noted()
        if noted not in (None, identity):
            left = await self._unknown()
            if left:
                self._decide("the store is another one and does not know them", left)
                if self._changed == "adopt":
                    await self._adopt()
            log.warning("the store is another one than before: %s", self._changed or "nothing was left of that one")
        if noted != identity:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            atomic_file.replace(self._note, atomic_file.summed(json.dumps({"identity": identity})))

    def _noted(self) -> str | None:
        try:
            return str(atomic_file.parsed(self._note.read_bytes()).get("identity"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.error("%s is damaged (%s): whether the store is the right one is not known", self._note, error)
            return None

    def _left(self) -> Sequence[str]:
        """Sandboxes that would be ended, and volumes that would be removed. Those of other machines are not
        included."""
        node = self._node
        if node is None:
            return ["those of its workers"]
        return sorted({*node.supervisors, *node.recovery.unattached, *node.kept.ids(), *node.quarantine.ids(),
                       *node.volumes.ids()})  # fmt: skip

    async def _unknown(self) -> Sequence[str]:
        """Local sandboxes and volumes that are not in the store."""
        if self._node is None:
            return [] if self._noted() == RESTORED else self._left()
        volumes = {row.volume_id for row in await self._store.volumes.list()}
        return [one for one in self._left() if one not in volumes and await self._store.get(one) is None]

    def _decide(self, why: str, left: Sequence[str]) -> None:
        if not left or self._changed:
            return
        kinds = "sandboxes and volumes" if self._node is not None and self._node.volumes.ids() else "sandboxes"
        count = f"{len(left)} {kinds} are" if self._node is not None else "sandboxes of its workers may be"
        raise Conflict(
            f"the server does not start: {count} there, and {why}",
            hint="put the store back with: rock admin restore FILE. Or start with a new one: "
            "rock admin start --adopt goes on with the sandboxes, rock admin start --abandon ends them",
        )

    async def _adopt(self) -> None:
        """Create records of the running sandboxes, so that they are not ended as unknown."""
        assert self._node is not None
        await self._node.recovery.complete()
        status, now = await self._node.status(), time.time()
        for supervisor in self._node.supervisors.values():
            made = supervisor.describe()
            await self._insert(new_info(supervisor.id, supervisor.config, "local", status, ""), supervisor.config, {
                "state": State.RUNNING, "is_alive": True, "started_at": now, "isolation": made.isolation,
                "enforced": made.enforced, "runtime": made.runtime})  # fmt: skip
        stopped = {"state": State.STOPPED, "kept": True, "stopped_at": now, "reason": "it was adopted by a new store"}
        for sandbox_id, config in self._node.kept.configs().items():
            await self._insert(new_info(sandbox_id, config, "local", status, ""), config, stopped)
        unknown = SandboxConfig(image="unknown")  # for a damaged record
        for sandbox_id in self._node.quarantine.ids():
            await self._insert(new_info(sandbox_id, unknown, "local", status, ""), unknown, {"state": State.RUNNING})
        known = {row.volume_id for row in await self._store.volumes.list()}
        for volume_id, volume in self._node.volumes.inventory().volumes.items():
            if volume_id not in known:
                await self._store.volumes.add(VolumeInfo(volume_id=volume_id, worker="local", created_at=now,
                                                         **volume.model_dump()))  # fmt: skip

    async def _insert(self, info: SandboxInfo, config: SandboxConfig, fields: dict[str, Any]) -> None:
        if await self._store.get(info.sandbox_id) is None:
            await self._store.insert(Record(info.model_copy(update=fields), config))
