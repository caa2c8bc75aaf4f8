"""The workers that joined: one row each, changed under the epoch and the heartbeat that were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rock.errors import Conflict, NotFound
from rock.protocol.node import NodeStatus
from rock.protocol.workers import Beat, JoinWorker, WorkerInfo, WorkerState

COLUMNS = "name, holder, url, epoch, beat, lost, draining, version, status"


class Workers(Protocol):
    """Each method raises Unavailable or StorageFull when the medium fails."""

    async def join(self, wish: JoinWorker) -> WorkerInfo:
        """Have it, under the epoch that it goes on with, or under a new one. Conflict while another holder of the name
        is not lost."""
        ...

    async def beat(self, name: str, beat: Beat) -> WorkerInfo:
        """Count a heartbeat. Conflict when its epoch is over, or the name is another holder's; NotFound."""
        ...

    async def lose(self, name: str, epoch: int, beat: int | None = None) -> bool:
        """Take it for lost: its epoch is over. False when it is in another, or made a heartbeat since `beat`."""
        ...

    async def drain(self, name: str, draining: bool) -> WorkerInfo:
        """Whether it takes no more sandboxes. NotFound."""
        ...

    async def remove(self, name: str) -> None:
        """Forget one that is lost. Conflict for one that is not; NotFound."""
        ...

    async def list(self) -> Sequence[WorkerInfo]:
        """All, by name."""
        ...


def loaded(row: Any) -> WorkerInfo:
    """Of COLUMNS, and the seconds since the last heartbeat."""
    name, holder, url, epoch, beat, lost, draining, version, status, age = row
    state = WorkerState.LOST if lost else WorkerState.DRAINING if draining else WorkerState.READY
    return WorkerInfo(name=name, holder=holder, url=url, epoch=epoch, beat=beat, state=state, draining=bool(draining),
                      version=version, status=NodeStatus.model_validate_json(status), age=max(age, 0.0))  # fmt: skip


def next_epoch(known: WorkerInfo | None, wish: JoinWorker) -> int:
    """Under which epoch it joins. Conflict."""
    if known is None:
        return wish.epoch + 1  # of a row that was removed: above what it ever had
    if known.holder != wish.holder and not known.is_lost:
        raise Conflict(f"another machine is worker {wish.name} ({known.url})",
                       hint="choose another --name, or wait until that one is lost")  # fmt: skip
    same = known.holder == wish.holder and known.epoch == wish.epoch
    goes_on = same and not known.is_lost and not wish.fresh
    return known.epoch if goes_on else max(known.epoch, wish.epoch) + 1


def over(name: str, known: WorkerInfo | None) -> Conflict | NotFound:
    """Why a heartbeat is refused."""
    if known is None:
        return unknown(name)
    return Conflict(f"the lease of worker {name} is over", hint="join again", details={"epoch": known.epoch})


def unknown(name: str) -> NotFound:
    return NotFound(f"there is no worker {name}", hint="rock worker ls")


def not_lost(name: str) -> Conflict:
    return Conflict(f"worker {name} is there", hint="stop its rocklet first, or give force")
