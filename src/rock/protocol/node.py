"""Messages between the admin and a rocklet: sandboxes of a node, events, images, workers and their leases."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

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
    parse_size,
)
from rock.protocol.wire import Wire

MOST_CREATES = 500  # sandboxes in one request of an admin to a worker


class NodeSandbox(Answer):
    """A sandbox as its rocklet reports it. `idle_seconds`: since the last activity; 0 while a request is in progress.

    paused: its processes are stopped for a while. kept: it is stopped, and its files are retained. environments: of a
    sandbox that hosts them, the number of existing ones, and the number made since its rocklet started.
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
    paused: bool = False
    environments: tuple[int, int] | None = None


class NodeCreates(Wire):
    """Sandboxes that one request creates: the id of each, and the index of its config in `configs`, each a
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
    """The description of an archived sandbox for a worker: the first of the frames that `node_unpack` takes."""

    config: SandboxConfig
    files: ArchivedFiles


class NodeCommit(Wire):
    """Make an image of a sandbox, from at most `limit` bytes of files, and push it on request. tenant: of the request;
    "" is the server's owner."""

    image_tag: str
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    push: bool = False
    public_registries: bool = False
    limit: int = Field(default=1 << 40, ge=0)
    tenant: str = ""


class NodeImage(Answer):
    """An image that was made. size: bytes of the files of all its layers. pushed: digest of its manifest, when it was
    pushed.

    Errors have `details["stage"]`: login, commit or push.
    """

    name: str
    digest: str
    size: int
    pushed: str | None = None


class NodeInventory(Answer):
    """`sandboxes` that run, and ids of stopped ones whose files are `kept`."""

    sandboxes: list[NodeSandbox] = Field(default_factory=list)
    kept: list[str] = Field(default_factory=list)


class NodeEvent(Answer):
    """A sandbox ended by itself, at a time. `number` grows by one per event, from 1 at the start of the rocklet."""

    number: int
    sandbox_id: str
    cause: Cause
    reason: str
    at: float


class NodeEvents(Answer):
    """`boot` identifies this run of the rocklet: when it changes, numbers start again."""

    boot: str = ""
    events: list[NodeEvent] = Field(default_factory=list)


class NodeStatus(Answer):
    """Resources of a worker: cores, total and free bytes of memory, current and maximum number of sandboxes. load:
    programs that run or wait for a core, averaged over the last minute. images: names of some images on its disk, the
    last used first. memory_pressure: percent of the last ten seconds in which a process waited for memory; None where
    the kernel does not report it. accelerators: kinds of its `gpus`. fetching: progress of the images that sandboxes
    wait for, by name. evacuate: this machine will end, and its sandboxes are to be archived. direct_port: of a
    process of the server's machine, for direct requests."""

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
    evacuate: bool = False
    direct_port: int = Field(default=0, ge=0, le=65535)


class WorkerImage(Wire):
    """The requested image. wait: seconds for building or pulling it where it is missing."""

    image: str = Field(min_length=1, max_length=8192)
    wait: float = Field(default=0.0, ge=0, le=3600)


class ImageState(Answer):
    """The state of an image on a worker. is_ready: it exists. digest: of it, or of its layer with packages, which are
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
    """`next`: the offset of the next page; None at the end."""

    items: list[FileInfo]
    next: int | None = None


class EnvList(Answer):
    items: list[dict[str, Any]]


# ---- volumes ----


class CreateVolume(Wire):
    """A request for a volume. name: unique among the volumes of the tenant. size: limit of its files, like 10g; it is
    measured every few seconds. worker: the worker that has it; None lets the server choose."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    size: str = "10g"
    worker: str | None = None

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        if parse_size(value, "size") < 1 << 20:
            raise ValueError(f"Invalid size: {value} (a volume has at least 1m)")
        return value


class VolumeInfo(Answer):
    """A volume. size: limit of its files in bytes. state: "creating" and "deleting" until its worker has done it.
    created_at: seconds since the epoch. tenant: of the key that created it; "" is the server's owner."""

    name: str
    volume_id: str
    worker: str
    size: int
    state: Literal["creating", "ready", "deleting"] = "ready"
    created_at: float = 0.0
    tenant: str = ""


class VolumeList(Answer):
    items: list[VolumeInfo]


class NodeVolume(Wire):
    """A volume as its worker stores it. size: limit in bytes. name, tenant: for a server that lost its store."""

    name: str = Field(max_length=63)
    tenant: str = Field(default="", max_length=64)
    size: int = Field(ge=1, lt=1 << 60)


class NodeVolumes(Answer):
    """The volumes of a worker, by id."""

    volumes: dict[str, NodeVolume] = Field(default_factory=dict)


# ---- workers ----
#
# A worker has an epoch: a number that grows each time it returns after it was declared lost, or gave up its sandboxes
# itself. Commands of one epoch are rejected in the next. Times are durations in seconds, each measured by one machine's
# own monotonic clock; clock times of different machines are never compared. docs/decisions/0019-workers.md.

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
EVACUATION = "evacuation"  # the phase of a sandbox that cannot be archived when its worker is drained
RESERVED = "local"  # the worker in the server's own process
PROCESS = "process://"  # the scheme of the rocklet processes of the server's machine (cli/serve/processes.py)
_OF_PROCESS = re.compile(r"local(-[0-9]+)?")


class JoinWorker(Wire):
    """A request of a rocklet to become a worker.

    url: where servers reach it; tunnel://NAME for one that opens tunnels to them; process://SECRET for a process that
    the server has started. holder: a random text that it stores
    in its home: the identity of the machine, independent of its name. epoch: the last that it had; 0 for none. fresh:
    it has given up that epoch, and has no sandboxes of it.
    """

    name: str = Field(pattern=NAME_PATTERN)
    url: str = Field(max_length=1000, pattern=r"^(?:https?|tunnel|process)://[^\s/]+$")
    holder: str = Field(min_length=16, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    epoch: int = Field(default=0, ge=0, lt=1 << 62)
    fresh: bool = False
    version: str = Field(default="", max_length=64)
    status: NodeStatus

    @model_validator(mode="after")
    def _reserved(self) -> JoinWorker:
        if (_OF_PROCESS.fullmatch(self.name) is not None) != self.url.startswith(PROCESS):
            raise ValueError(f"{RESERVED!r} and {RESERVED}-NUMBER are the names of a server's own workers")
        return self


class Beat(Wire):
    """A heartbeat: the worker's epoch and its resources."""

    holder: str = Field(min_length=16, max_length=64)
    epoch: int = Field(ge=1, lt=1 << 62)
    status: NodeStatus


class WorkerLease(Answer):
    """The response to a worker. seconds: how long after it sent the request the worker may accept new sandboxes. stop:
    how long after that moment a worker with the policy "stop" ends its sandboxes; 0 from an older server: the same as
    seconds. beat: seconds from one heartbeat to the next."""

    name: str
    epoch: int
    seconds: float
    stop: float = 0.0
    beat: float
    draining: bool = False


class WorkerState(StrEnum):
    """ready: accepts sandboxes. draining: retains its current ones. unreachable: no heartbeat for longer than its
    lease; it gets no sandboxes, and its current ones are expected back. lost: no heartbeat for longer than the grace
    period."""

    READY = "ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    LOST = "lost"


class WorkerInfo(Answer):
    """A worker as stored. beat: grows with each heartbeat. age: seconds since the last one, for display only. url: ""
    for the server's own. evacuating: it is drained, and its sandboxes are stopped and archived."""

    name: str
    url: str = ""
    state: WorkerState = WorkerState.READY
    epoch: int = 0
    beat: int = 0
    draining: bool = False
    evacuating: bool = False
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
    """Time limits for silent workers, in seconds. `fence` after its last heartbeat a worker gets no new sandboxes, and
    accepts none; `stop` after it a worker with the policy "stop" ends its sandboxes; `lost` after it the worker is
    declared lost. A worker counts from the moment it sent a heartbeat, a server from the moment it saw that heartbeat,
    which is later."""

    beat: float
    fence: float
    stop: float
    lost: float

    @classmethod
    def of(cls, seconds: float, grace: float = 0.0) -> Lease:
        """The limits that follow from the length of a lease and of the grace period (0: 60 s, or 6 leases where that is
        more). Unsupported for a lease below 2 s, and for a grace period below 1.2 leases."""
        if not 2.0 <= seconds <= 3600.0:
            raise Unsupported(f"ROCK_WORKER_LEASE={seconds:g}: a lease has 2 to 3600 seconds", hint="10 is usual")
        lost = grace or max(60.0, 6 * seconds)
        if not 1.2 * seconds <= lost <= 86400.0:
            raise Unsupported(f"ROCK_WORKER_GRACE={lost:g}: the grace period has at least 1.2 leases, here "
                              f"{1.2 * seconds:g} s, and at most a day", hint="60 is usual")  # fmt: skip
        return cls(beat=seconds * 0.2, fence=seconds * 0.8, stop=max(seconds * 0.8, lost * 2 / 3), lost=lost)
