"""Messages between the admin and a rocklet, and lists that the server answers with."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from rock.errors import Unsupported
from rock.protocol.action import Answer, FileInfo, ProcessInfo, SessionInfo
from rock.protocol.sandbox import (
    ID_PATTERN,
    ArchivedFiles,
    Cause,
    Isolation,
    Phase,
    SandboxConfig,
    SandboxInfo,
    Usage,
    Wire,
)

MOST_CREATES = 500  # sandboxes in one request of an admin to a worker


class NodeSandbox(Answer):
    """A sandbox as its rocklet sees it. `idle_seconds`: since the last activity; 0 while something runs in it.

    kept: it does not run, and its files are there. environments: of a sandbox that hosts them, how many there are now,
    and how many were made since its rocklet started.
    """

    sandbox_id: str
    alive: bool = False
    idle_seconds: float = 0.0
    isolation: Isolation | None = None
    enforced: dict[str, str] = Field(default_factory=dict)
    runtime: str = ""
    phases: dict[str, Phase] = Field(default_factory=dict)
    cause: Cause | None = None
    reason: str | None = None
    usage: Usage | None = None
    kept: bool = False
    environments: tuple[int, int] | None = None


class NodeCreates(Wire):
    """Sandboxes that one request asks for: the id of each, and the place of its config in `configs`, each a
    SandboxConfig."""

    configs: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_CREATES)
    sandboxes: list[tuple[Annotated[str, Field(pattern=ID_PATTERN)], int]] = Field(
        min_length=1, max_length=MOST_CREATES
    )

    @model_validator(mode="after")
    def _there(self) -> Self:
        if any(not 0 <= place < len(self.configs) for _, place in self.sandboxes):
            raise ValueError("sandboxes: one has a config that is not there")
        return self


class NodeFiles(Answer):
    """How an archived sandbox comes to a worker: the head of the frames that `node_unpack` takes."""

    config: SandboxConfig
    files: ArchivedFiles


class NodeCommit(Wire):
    """Make an image of a sandbox, from at most `limit` bytes of files, and push it if that is asked for. tenant: who
    asks for it; "" is the server's owner."""

    image_tag: str
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    push: bool = False
    public_registries: bool = False
    limit: int = Field(default=1 << 40, ge=0)
    tenant: str = ""


class NodeImage(Answer):
    """An image that was made. size: bytes of the files of all its layers. pushed: digest of its manifest, when it was.

    Errors have `details["stage"]`: login, commit or push."""

    name: str
    digest: str
    size: int
    pushed: str | None = None


class NodeInventory(Answer):
    """`sandboxes` that run, and ids of those that do not and whose files are `kept`."""

    sandboxes: list[NodeSandbox] = Field(default_factory=list)
    kept: list[str] = Field(default_factory=list)


class NodeEvent(Answer):
    """A sandbox ended by itself, at a time. `number` grows by one an event, from 1 at the start of the rocklet."""

    number: int
    sandbox_id: str
    cause: Cause
    reason: str
    at: float


class NodeEvents(Answer):
    """`boot` names this run of the rocklet: when it changes, numbers start again."""

    boot: str = ""
    events: list[NodeEvent] = Field(default_factory=list)


class NodeStatus(Answer):
    """What a worker has: cores, bytes of memory in all and free, sandboxes now and at most. load: programs that run or
    wait for a core, in the mean of the last minute. images: names of some that are on its disk, the last used first.
    memory_pressure: percent of the last ten seconds in which something there waited for memory; None where the kernel
    does not tell. accelerators: kinds of its `gpus`. fetching: words on how far the images are that sandboxes wait for
    there, by name."""

    host_name: str
    host_ip: str
    runtime: str
    isolation: Isolation
    enforced: dict[str, str] = Field(default_factory=dict)
    cpus: int
    memory_total: int
    memory_free: int
    sandboxes: int
    sandbox_limit: int
    boot: str = ""
    load: float = 0.0
    images: list[str] = Field(default_factory=list, max_length=1000)
    fetching: dict[str, str] = Field(default_factory=dict, max_length=1000)
    memory_pressure: float | None = None
    gpus: int = 0
    gpus_free: int = 0
    accelerators: list[str] = Field(default_factory=list, max_length=64)


class WorkerImage(Wire):
    """Which image is asked for. wait: seconds that are spent on building or pulling it where it is not there."""

    image: str = Field(min_length=1, max_length=8192)
    wait: float = Field(default=0.0, ge=0, le=3600)


class ImageState(Answer):
    """An image as a worker has it. is_ready: it is there. digest: of it, or of its layer with packages, which are
    listed as "name version"."""

    image: str
    is_ready: bool
    digest: str | None = None
    packages: list[str] = Field(default_factory=list)


class ServerInfo(Answer):
    version: str
    home: str
    roles: list[str]
    workers: list[NodeStatus] = Field(default_factory=list)
    sandboxes: dict[str, int] = Field(default_factory=dict)
    started_at: float = 0.0
    pid: int = 0


class SandboxList(Answer):
    items: list[SandboxInfo]
    next: str | None = None


class SessionList(Answer):
    items: list[SessionInfo]


class ProcessList(Answer):
    items: list[ProcessInfo]


class FileList(Answer):
    """`next`: the offset to go on at; None at the end."""

    items: list[FileInfo]
    next: int | None = None


class EnvList(Answer):
    items: list[dict[str, Any]]


# ---- workers ----
#
# Workers that join: what a rocklet tells of itself, what it is answered, and what is known of all of them.
#
# A worker has an epoch: a number that grows each time it comes back after it was taken for lost, or gave up by itself.
# What was commanded in one epoch is refused in the next. Times are durations in seconds, each measured by one machine's
# own monotonic clock; no clock time of one machine is compared with another's. docs/decisions/0019-workers.md.

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
