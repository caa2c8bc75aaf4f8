"""The models of a sandbox: `SandboxConfig` (the request), `SandboxInfo` (the state), and the types in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from rock import settings
from rock.protocol import egress
from rock.protocol.mounts import AGENT_PATTERN as AGENT_PATTERN
from rock.protocol.mounts import AGENTS as AGENTS
from rock.protocol.mounts import MOST_MOUNTS as MOST_MOUNTS
from rock.protocol.mounts import NAME_PATTERN as NAME_PATTERN
from rock.protocol.mounts import HostMount as HostMount
from rock.protocol.mounts import VolumeMount as VolumeMount
from rock.protocol.mounts import check_targets as check_targets
from rock.protocol.mounts import mount_target as mount_target
from rock.protocol.wire import Inside, Wire, html_table

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)
_UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LONGEST = 1 << 32  # seconds: beyond any practical use, and small enough to be added to a time
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"


@lru_cache(maxsize=1024)
def parse_size(text: str, what: str = "memory") -> int:
    """Bytes of "512m", "8g", "1.5GiB" or "1048576" (units are powers of 1024). ValueError names the text."""
    match = _SIZE.match(text)
    value = float(match[1]) * _UNIT[match[2].lower()] if match else 0.0
    if not match or value < 1 or value >= 1 << 60:
        raise ValueError(f"Invalid {what} size: {text} (write it like 512m or 8g)")
    return int(value)


def _plain(kind: type[Word]) -> type[Word]:
    """An enum whose members' `value` costs one attribute access. Python's own is a function call, and each model that
    is stored or sent reads it for each enum value: a twentieth of the server's cost of a burst of creates."""
    type.__setattr__(kind, "value", property(attrgetter("_value_")))
    return kind


Word = TypeVar("Word", bound=StrEnum)


@_plain
class State(StrEnum):
    """The state of a sandbox; admin/sandboxes/lifecycle.py shows the transitions."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ARCHIVING = "archiving"
    ARCHIVED = "archived"
    DELETED = "deleted"


@_plain
class Cause(StrEnum):
    """Why a sandbox no longer runs; its record stores it."""

    USER = "stopped_by_user"
    IDLE = "idle"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"  # its files exceeded their limit
    START_FAILED = "start_failed"
    EXITED = "exited"  # its pid 1 ended by itself, possibly by code inside
    LOST = "lost"  # its machine, or the service that runs its sandboxes, was lost
    DRAINED = "drained"  # its machine leaves: its files are archived, and a restart continues on another machine


@_plain
class Isolation(StrEnum):
    """Isolation level of a sandbox, weakest first. All but the last two share the host's kernel."""

    NONE = "none"  # a plain process
    LANDLOCK = "landlock"  # Landlock, seccomp and rlimits; no namespaces
    USERNS_SHARED_PROC = "userns-shared-proc"  # user namespaces, without a /proc of its own
    USERNS = "userns"  # user, pid, mount, net, ipc, uts namespaces, as an ordinary user
    NAMESPACES = "namespaces"  # like `userns`, but made by root: idmapped layers, a uid range and cgroups of its own
    CONTAINER = "container"  # of a container engine
    GVISOR = "gvisor"
    MICROVM = "microvm"

    @property
    def rank(self) -> int:
        """Its position in this order."""
        return _RANKS[self]


_RANKS = {level: rank for rank, level in enumerate(Isolation)}


class BaseConfig(Wire):
    """How to reach the server. These fields are not sent. reconnect_timeout: seconds for which a request is retried
    while the server is unavailable; None is ROCK_RECONNECT_TIMEOUT, 0 disables retries."""

    base_url: str = Field(default_factory=settings.base_url, exclude=True)
    api_key: str | None = Field(default_factory=settings.api_key, exclude=True, repr=False)
    xrl_authorization: str | None = Field(default=None, exclude=True, repr=False)
    extra_headers: dict[str, str] = Field(default_factory=dict, exclude=True)
    reconnect_timeout: float | None = Field(default=None, ge=0, le=3600, exclude=True)


TEMPLATE_LABEL = "rock.kubernetes.template"  # of a sandbox that is a pod: the name of its template


class SandboxConfig(BaseConfig, Inside):
    """The configuration of a new sandbox; the wire format has the same fields.

    image: "host" (this machine's own system, read-only) or the name of an image in the server's store.
    memory, cpus: limits; they may be overcommitted. limit_cpus: a hard limit, when cpus is only the usual share.
    pids: maximum number of processes and threads. disk: size limit of written files; None is no limit. inodes: maximum
    number of files, with a disk limit; None is one per 16 KiB of it. nofile: maximum number of open files of a process.
    shm_size: size of /dev/shm, at most half of the memory; None is up to a quarter.
    auto_clear_seconds: idle timeout after which it is stopped; 0 is never. A sandbox is idle when no request is in
    progress: a background process alone does not keep it alive. timeout: seconds from its start after which it is
    stopped in any case; None is never. on_timeout: None stops it at that time, "pause" pauses it, as soon as no request
    is in progress, and a paused sandbox has no timeout. auto_pause: seconds without a request after which its processes
    are stopped, until the next request. Its idle timeout continues meanwhile.
    auto_delete_seconds: retention of the files of a stopped sandbox, for a restart or archiving: seconds from its stop.
    With None and 0 the files are deleted when it stops.
    auto_archive_seconds: retain the files too, and move them to the server's archive so many seconds after the stop.
    Excludes auto_delete_seconds.
    startup_timeout: seconds that a start may take.
    network: "none" (its own, with loopback), "nat" (public addresses, by TCP), "host" or, for runtime "docker" alone,
    "bridge" (the engine's own network, which reaches all destinations of that machine).
    egress: the only allowed destinations, as in protocol/egress.py: "example.com", "*.example.org:443",
    "203.0.113.0/24:22", "*". None is every public address. It requires network "nat", which it implies.
    runtime: name of the runtime; None is the server's default. oci_runtime: the OCI runtime of a container, for runtime
    "docker" alone; use_kata_runtime is "kata".
    isolation: exactly this level; where no runtime is named, it selects the one that provides it. minimum_isolation:
    reject a start with a weaker level.
    env: environment of all programs inside. labels: the user's own key-value pairs, for filtering lists.
    public_registries: pull only from public addresses, and from registries that the owner of the server has listed; set
    for each tenant.
    volumes, mounts: see VolumeMount and HostMount. They are not retained, archived or committed with the sandbox.
    snapshot: id or name of a snapshot from which it starts; its image is the snapshot's. The server replaces a name by
    the id. snapshot_worker: set by the server. record: record all requests that change it, with their results.
    agents: names of recipes whose programs are mounted read-only at /opt/rock/agents/NAME; the worker installs missing
    ones (docs/guides/agents.md).
    name: a name for people, of up to 63 letters, digits and "_.-". It is unique among the tenant's sandboxes that are
    pending, running or stopping (else Conflict), and free again afterwards.
    sandbox_id: an id of your own choice; an id in use is a Conflict, also after the end of its sandbox.
    """

    # JSON has no infinity: it would be stored as null, and the record could not be read again.
    model_config = ConfigDict(allow_inf_nan=False)

    image: str = Field(default="python:3.11", min_length=1)
    image_os: str = "linux"
    memory: str = "8g"
    cpus: float = Field(default=2.0, gt=0)
    limit_cpus: float | None = Field(default=None, gt=0)
    pids: int = Field(default=4096, ge=16, le=1_000_000)
    disk: str | None = None
    inodes: int | None = Field(default=None, ge=256, le=1 << 32)
    nofile: int | None = Field(default=None, ge=16, le=1 << 20)
    shm_size: str | None = None
    auto_clear_seconds: int = Field(default=300, ge=0, le=_LONGEST)
    auto_archive_seconds: int | None = Field(default=None, ge=0, le=_LONGEST)
    auto_delete_seconds: int | None = Field(default=None, ge=0, le=_LONGEST)
    timeout: float | None = Field(default=None, gt=0, le=_LONGEST)
    on_timeout: Literal["pause"] | None = None
    auto_pause: float | None = Field(default=None, ge=0.1, le=_LONGEST)
    startup_timeout: float = Field(default=180.0, gt=0, le=_LONGEST)
    network: Literal["none", "nat", "bridge", "host"] = "none"
    egress: list[str] | None = Field(default=None, max_length=egress.MOST_ENTRIES)
    volumes: list[VolumeMount] | None = None
    mounts: list[HostMount] | None = None
    agents: list[Annotated[str, Field(pattern=AGENT_PATTERN)]] | None = Field(default=None, max_length=MOST_MOUNTS)
    snapshot: str | None = Field(default=None, min_length=1, max_length=64)
    snapshot_worker: str | None = None
    record: bool | None = None
    runtime: str | None = None
    isolation: Isolation | None = None
    minimum_isolation: Isolation = Isolation.NONE
    env: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    user_id: str | None = None
    experiment_id: str | None = None
    namespace: str | None = None
    cluster: str = "default"
    route_key: str | None = None
    pull: Literal["missing", "always", "never"] = "missing"
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    public_registries: bool = False
    use_kata_runtime: bool = False
    oci_runtime: Literal["runc", "runsc", "kata"] | None = None
    num_gpus: float | None = Field(default=None, ge=0)
    accelerator_type: str | None = None
    sandbox_id: str | None = Field(default=None, pattern=ID_PATTERN)
    name: str | None = Field(default=None, pattern=NAME_PATTERN)

    @field_validator("image")
    @classmethod
    def _image(cls, value: str) -> str:
        value = value.strip()
        if not value:
            raise ValueError("image: String should have at least 1 character")
        return value

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if parse_size(value) < 8 << 20:
            raise ValueError(f"Invalid memory size: {value} (a sandbox needs at least 8m)")
        return value

    @field_validator("disk")
    @classmethod
    def _disk(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value, "disk") < 4 << 20:
            raise ValueError(f"Invalid disk size: {value} (a disk has at least 4m)")
        return value

    @field_validator("shm_size")
    @classmethod
    def _shm_size(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value, "shm_size") < 64 << 10:
            raise ValueError(f"Invalid shm_size: {value} (it has at least 64k)")
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not name or "=" in name or "\0" in name or "\0" in text:
                raise ValueError(f"Invalid environment variable: {name!r}")
        return value

    @model_validator(mode="after")
    def _one_after_stop(self) -> Self:
        if self.auto_archive_seconds is not None and self.auto_delete_seconds is not None:
            raise ValueError("auto_archive_seconds and auto_delete_seconds exclude each other")
        if self.record and self.keeps_files:
            raise ValueError("record: files of a recorded sandbox cannot be retained; a replay restores them")
        return self

    @field_validator("egress")
    @classmethod
    def _egress(cls, value: list[str] | None) -> list[str] | None:
        for entry in value or ():
            egress.parse(entry)
        return value

    @model_validator(mode="after")
    def _egress_needs_nat(self) -> Self:
        if self.egress is not None and self.network != "nat":
            if "network" in self.model_fields_set:
                raise ValueError(f'egress cannot be enforced in network "{self.network}": use "nat"')
            self.__dict__["network"] = "nat"  # an attribute assignment would call this validator again
            self.__pydantic_fields_set__.add("network")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.has_mounts:
            mounts = [mount.target for mount in (*(self.volumes or ()), *(self.mounts or ()))]
            check_targets([*mounts, *(f"{AGENTS}/{name}" for name in self.agents or ())])
        if self.inodes is not None and self.disk is None:
            raise ValueError("inodes: it is a limit of a disk with a size; give disk too")
        if self.shm_size is not None and self.shm_bytes * 2 > self.memory_bytes:
            raise ValueError(f"shm_size {self.shm_size} is over half of the memory, {self.memory}, that it is part of")
        if self.isolation is not None and self.isolation.rank < self.minimum_isolation.rank:
            raise ValueError(
                f"isolation {self.isolation.value} is weaker than minimum_isolation {self.minimum_isolation.value}"
            )
        return self

    @property
    def unchosen(self) -> set[str]:
        """Fields to omit when the config is stored or forwarded: a default network would otherwise return as an
        explicit choice."""
        return {"network"} - self.model_fields_set

    @property
    def has_mounts(self) -> bool:
        """Whether folders of the worker are mounted: volumes, host folders or agents."""
        return bool(self.volumes or self.mounts or self.agents)

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return parse_size(self.memory)

    @property
    def disk_bytes(self) -> int:
        """Disk limit in bytes; 0 is no limit."""
        return parse_size(self.disk, "disk") if self.disk is not None else 0

    @property
    def disk_inodes(self) -> int:
        """Maximum number of files on a disk with a limit."""
        return self.inodes if self.inodes is not None else max(1024, self.disk_bytes >> 14)

    @property
    def shm_bytes(self) -> int:
        """Size of /dev/shm in bytes; 0 is the default of the runtime."""
        return parse_size(self.shm_size, "shm_size") if self.shm_size is not None else 0

    @property
    def keeps_files(self) -> bool:
        """Whether the written files are retained after its stop."""
        return bool(self.auto_delete_seconds) or self.auto_archive_seconds is not None


class SandboxGroupConfig(SandboxConfig):
    """`size` equal sandboxes, created by one request. A transient error is retried, with `start_retry_times` attempts
    in total. start_concurrency: accepted for compatibility with ROCK and ignored; the workers determine the
    concurrency. mode, placement: as of GroupRequest."""

    size: int = Field(default=2, ge=1)
    mode: Literal["gang", "best_effort"] = "gang"
    placement: Literal["spread", "pack"] = "spread"
    start_concurrency: int = Field(default=2, ge=1)
    start_retry_times: int = Field(default=3, ge=1)


class Phase(Wire):
    """A phase of a start: `status` is waiting, running, success, failed or timeout."""

    status: Literal["waiting", "running", "success", "failed", "timeout"] = "waiting"
    message: str = ""
    started_at: float | None = None
    completed_at: float | None = None


class Usage(Wire):
    """Measured usage of one sandbox: bytes, CPU seconds since its start, and processes. auto_paused: whether it is
    paused by `auto_pause` now; swapped_bytes: memory that was swapped out then; not_swapped: the reason against it."""

    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None
    disk_bytes: int | None = None
    auto_paused: bool | None = None
    swapped_bytes: int | None = None
    not_swapped: str | None = None


class StateChange(Wire):
    """One state change of a sandbox. `key`: the idempotency key of the request that caused it, if it had one."""

    from_state: State
    to_state: State
    event: str
    timestamp: float
    key: str | None = None


class ArchivedFiles(Wire):
    """The files that a sandbox wrote, as one layer in the server's archive: `size` in bytes, `digest` "sha256:..." of
    the tar.

    image_digest: of the image below it, which a restore requires.
    """

    size: int
    digest: str
    image_digest: str


class UpdateSandbox(Inside):
    """Changes of a sandbox's record, in any state. Only the given fields change: a name of None removes the name, and
    labels replace all labels. Conflict when another sandbox that runs has the name. timeout: seconds from now, instead
    of the `timeout` of its config, until a restart; None is never. Conflict when it neither starts nor runs."""

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    labels: dict[str, str] = Field(default_factory=dict)
    timeout: float | None = Field(default=None, gt=0, le=_LONGEST, allow_inf_nan=False)


class CommitRequest(Inside):
    """Make an image of a sandbox: `image_tag` is its name. `push`: to the registry in that name, with this login, which
    is not stored. public_registries: see SandboxConfig."""

    image_tag: str = Field(min_length=1, max_length=400)
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    push: bool = False
    public_registries: bool = False


class CommitPhase(StrEnum):
    """The progress of a commit."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class CommitError(StrEnum):
    """Why a commit failed, in ROCK's terms."""

    SANDBOX_NOT_FOUND = "SANDBOX_NOT_FOUND"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    WORKER_UNREACHABLE = "WORKER_UNREACHABLE"
    SANDBOX_CONTAINER_NOT_FOUND = "SANDBOX_CONTAINER_NOT_FOUND"
    COMMIT_CONFLICT = "COMMIT_CONFLICT"
    DISPATCH_FAILED = "DISPATCH_FAILED"
    LOGIN_FAILED = "LOGIN_FAILED"
    COMMIT_FAILED = "COMMIT_FAILED"
    PUSH_FAILED = "PUSH_FAILED"
    PROCESS_LOST = "PROCESS_LOST"
    STATUS_NOT_FOUND = "STATUS_NOT_FOUND"


class CommitStatus(Wire):
    """The commit of a sandbox to an image, in progress or ended. Times are seconds since the epoch.

    image_digest: of the image here; pushed_digest: of its manifest in the registry. failed_stage: login, commit, push,
    or dispatch, before a worker had it; error: the exception, in wire format.
    """

    model_config = ConfigDict(extra="ignore")

    sandbox_id: str
    image_tag: str
    push: bool = False
    phase: CommitPhase
    started_at: float
    completed_at: float | None = None
    image_digest: str | None = None
    pushed_digest: str | None = None
    failed_stage: str | None = None
    error_code: CommitError | None = None
    error: dict[str, Any] | None = None


class SandboxInfo(Wire):
    """A sandbox as the server sees it. Times are seconds since the epoch, UTC.

    enforced: how each limit is enforced on this host ("cgroup-v1", "cgroup-v2", "watched", "affinity", "rlimit",
    "none").
    cause, reason: why it no longer runs, as an enum value and as a sentence.
    paused_at: time of the pause, while it is paused.
    kept: it is stopped, and its files are on its worker: it can be restarted. archive: the files are in the archive.
    commit: the last commit of it to an image.
    deadline: the time of its stop, where an update has replaced the timeout of its config; 0 is never.
    auto_stop_at, auto_archive_at, auto_delete_at: times of the automatic actions, as of now.
    tenant: of the key that made it; "" is the server's owner.
    group: the group that it was created with; gang: all of that group start, or none.
    state_history: the last 100 state changes, oldest first; lists omit it by default.
    """

    model_config = ConfigDict(extra="ignore")  # fields of a newer server are ignored

    def _repr_html_(self) -> str:
        return html_table({"sandbox": self.sandbox_id, "state": self.state.value, "image": self.image,
                           "worker": self.worker, "reason": self.reason})  # fmt: skip

    sandbox_id: str
    name: str | None = None
    state: State
    image: str
    version: int = 0
    is_alive: bool = False
    cause: Cause | None = None
    reason: str | None = None
    exit_code: int | None = None
    isolation: Isolation | None = None
    enforced: dict[str, str] = Field(default_factory=dict)
    runtime: str | None = None
    worker: str | None = None
    host_name: str | None = None
    host_ip: str | None = None
    memory: str = ""
    cpus: float = 0.0
    network: str = "none"
    egress: list[str] | None = None
    phases: dict[str, Phase] = Field(default_factory=dict)
    user_id: str | None = None
    experiment_id: str | None = None
    namespace: str | None = None
    cluster: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: float = 0.0
    started_at: float | None = None
    paused_at: float | None = None
    stopped_at: float | None = None
    last_activity_at: float | None = None
    deadline: float | None = None
    auto_stop_at: float | None = None
    auto_archive_at: float | None = None
    auto_delete_at: float | None = None
    archived_at: float | None = None
    deleted_at: float | None = None
    kept: bool = False
    archive: ArchivedFiles | None = None
    commit: CommitStatus | None = None
    state_history: list[StateChange] = Field(default_factory=list)
    usage: Usage | None = None
    error: dict[str, Any] | None = None
    tenant: str = ""
    group: str | None = None
    gang: bool = False


# ---- encoding ----
#
# Configs as JSON. A config that many sandboxes share, as in a burst or a group, is encoded once.

_MOST = 256
T = TypeVar("T", str, bytes)
_travelling: dict[int, tuple[SandboxConfig, bytes]] = {}  # by identity, while the config is referenced here
_kept: dict[int, tuple[SandboxConfig, str]] = {}


def travelling(config: SandboxConfig) -> bytes:
    """The encoding for a worker: without the name, which is the admin's, and without unset fields, which a worker of an
    older version may not have."""
    out = {"name", *config.unchosen}
    return _encoded(_travelling, config, lambda: config.model_dump_json(exclude=out, exclude_none=True).encode())


def kept(config: SandboxConfig) -> str:
    """The encoding for storage: without the registry password, which only one pull needs, and without unset fields,
    which are half of it."""
    exclude = {"registry_password", *config.unchosen}
    return _encoded(_kept, config, lambda: config.model_dump_json(exclude=exclude, exclude_none=True))


def _encoded(known: dict[int, tuple[SandboxConfig, T]], config: SandboxConfig, encode: Callable[[], T]) -> T:
    if config.registry_password is not None:  # it is never stored
        return encode()
    entry = known.get(id(config))
    if entry is None or entry[0] is not config:
        if len(known) >= _MOST:
            known.clear()
        entry = known[id(config)] = (config, encode())
    return entry[1]
