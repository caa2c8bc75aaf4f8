"""Which worker takes a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import Cause, SandboxConfig

Placement = Literal["spread", "pack"]


class Scheduler(Protocol):
    """Decides by the last reports of the workers and by the placements since, without requests."""

    def report(self, workers: Mapping[str, NodeStatus]) -> None:
        """All workers that may take sandboxes now, as they are."""
        ...

    def place(self, config: SandboxConfig) -> str:
        """The name of a worker. InvalidConfig when none could ever take it, NoCapacity when none can now.

        The caller reports the result of the start to `landed`."""
        ...

    def place_group(self, config: SandboxConfig, size: int, placement: Placement, whole: bool) -> list[str]:
        """Workers for up to `size` equal sandboxes, in the order of a group; with `whole` for all of them or none.
        Errors and the report to `landed` are those of `place`."""
        ...

    def landed(self, worker: str, gpus: float = 0.0) -> None:
        """One that was placed there is started now, or will never be."""
        ...


@dataclass(frozen=True)
class MachineEnd:
    """Why a reserved machine ended."""

    cause: Cause
    reason: str


class Reservations(Protocol):
    """A cluster's own scheduler, which decides where a sandbox goes while it starts, and may take its time.

    exclusive: what is set aside for a sandbox is a worker of its own, which ends with it.
    """

    exclusive: bool

    def check(self, config: SandboxConfig) -> None:
        """Raise what no time could change: InvalidConfig, Unsupported."""
        ...

    def failures(self) -> Mapping[str, MachineEnd]:
        """By the names of exclusive workers: those whose machine has ended for good, until they are released."""
        ...

    async def reserve(self, sandbox_id: str, config: SandboxConfig, worker: str | None = None) -> str:
        """Set aside what it takes, on that worker if one is named: the name of the worker where that is. The same id
        again is the same reservation.
        InvalidConfig, NoCapacity. One that is cancelled leaves nothing behind."""
        ...

    async def release(self, sandbox_id: str) -> None:
        """Give that back. Nothing happens when there is none."""
        ...

    async def held(self) -> set[str]:
        """Ids of sandboxes for which something is set aside."""
        ...
