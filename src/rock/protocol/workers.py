"""Workers that join: what a rocklet tells of itself, what it is answered, and what is known of all of them.

A worker has an epoch: a number that grows each time it comes back after it was taken for lost, or gave up by itself.
What was commanded in one epoch is refused in the next. Times are durations in seconds, each measured by one machine's
own monotonic clock; no clock time of one machine is compared with another's. docs/decisions/0019-workers.md.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, field_validator

from rock.errors import Unsupported
from rock.protocol.action import Answer
from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import Wire

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
RESERVED = "local"  # the worker in the server's own process


class JoinWorker(Wire):
    """A rocklet that wants to be a worker.

    url: where servers reach it. holder: a random text that it keeps in its home: who the machine is, whatever its name.
    epoch: the last that it had; 0 for none. fresh: it has given that up, and has no sandboxes of it.
    """

    name: str = Field(pattern=NAME_PATTERN)
    url: str = Field(max_length=1000, pattern=r"^https?://[^\s/]+$")
    holder: str = Field(min_length=16, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    epoch: int = Field(default=0, ge=0, lt=1 << 62)
    fresh: bool = False
    version: str = Field(default="", max_length=64)
    status: NodeStatus

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value == RESERVED:
            raise ValueError(f"{value!r} is the name of a server's own worker")
        return value


class Beat(Wire):
    """A heartbeat: I am here, in this epoch, and this is what I have."""

    holder: str = Field(min_length=16, max_length=64)
    epoch: int = Field(ge=1, lt=1 << 62)
    status: NodeStatus


class WorkerLease(Answer):
    """What a worker is answered. seconds: how long after the moment it sent what this answers it may take new
    sandboxes. stop: how long after that moment one with the policy "stop" ends its sandboxes; 0 from an older server:
    the same as seconds. beat: seconds from one heartbeat to the next."""

    name: str
    epoch: int
    seconds: float
    stop: float = 0.0
    beat: float
    draining: bool = False


class WorkerState(StrEnum):
    """ready: takes sandboxes. draining: keeps those it has. unreachable: no heartbeat for longer than its lease; it
    gets no sandboxes, and those that it has are expected back. lost: no heartbeat for longer than the grace period."""

    READY = "ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    LOST = "lost"


class WorkerInfo(Answer):
    """A worker as it is remembered. beat: grows with each heartbeat. age: seconds since the last one, to look at.
    url: "" for the server's own."""

    name: str
    url: str = ""
    state: WorkerState = WorkerState.READY
    epoch: int = 0
    beat: int = 0
    draining: bool = False
    version: str = ""
    age: float = 0.0
    holder: str = Field(default="", exclude=True)
    status: NodeStatus | None = None

    @property
    def is_lost(self) -> bool:
        return self.state is WorkerState.LOST


class WorkerList(Answer):
    items: list[WorkerInfo]


class Lease(Answer):
    """How long workers may be silent, in seconds. `fence` after its last heartbeat a worker gets no new sandboxes, and
    takes none; `stop` after it one with the policy "stop" ends its sandboxes; `lost` after it the worker is declared
    lost. A worker counts from when it sent a heartbeat, a server from when it saw that, which is later."""

    beat: float
    fence: float
    stop: float
    lost: float

    @classmethod
    def of(cls, seconds: float, grace: float = 0.0) -> Lease:
        """The numbers that follow from the length of a lease and of the grace period (0: 60 s, or 6 leases where that
        is more). Unsupported for a lease below 2 s, and for a grace period below 1.2 leases."""
        if not 2.0 <= seconds <= 3600.0:
            raise Unsupported(f"ROCK_WORKER_LEASE={seconds:g}: a lease has 2 to 3600 seconds", hint="10 is usual")
        lost = grace or max(60.0, 6 * seconds)
        if not 1.2 * seconds <= lost <= 86400.0:
            raise Unsupported(f"ROCK_WORKER_GRACE={lost:g}: the grace period has at least 1.2 leases, here "
                              f"{1.2 * seconds:g} s, and at most a day", hint="60 is usual")  # fmt: skip
        return cls(beat=seconds * 0.2, fence=seconds * 0.8, stop=max(seconds * 0.8, lost * 2 / 3), lost=lost)
