"""What is asked for and what there is: `SandboxConfig`, `SandboxInfo` and the words in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from operator import attrgetter
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rock import settings
from rock.protocol import egress

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)
_UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LONGEST = 1 << 32  # seconds: beyond any use, and well within what can be added to a time
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
    """Its members' `value` at the cost of an attribute. Python's own is a function's call, and is asked for by each
    model that is written down or sent, for each word in it: a twentieth of what a burst of creates costs the server."""
    type.__setattr__(kind, "value", property(attrgetter("_value_")))
    return kind


Word = TypeVar("Word", bound=StrEnum)


@_plain
class State(StrEnum):
    """Where a sandbox is in its life; the moves between them are drawn in admin/sandboxes/lifecycle.py."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ARCHIVING = "archiving"
    ARCHIVED = "archived"
    DELETED = "deleted"


@_plain
class Cause(StrEnum):
    """Why a sandbox is no longer running: what its tombstone says."""

    USER = "stopped_by_user"
    IDLE = "idle"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"  # its files took more than it may have
    START_FAILED = "start_failed"
    EXITED = "exited"  # its pid 1 ended by itself; code inside may have caused it
    LOST = "lost"  # its machine, or what runs sandboxes on it


@_plain
class Isolation(StrEnum):
    """How far a sandbox is from its host, weakest first. All but the last two share the host's kernel."""

    NONE = "none"  # a plain process
    LANDLOCK = "landlock"  # Landlock, seccomp and rlimits; no namespaces
    USERNS_SHARED_PROC = "userns-shared-proc"  # user namespaces, without a /proc of its own
    USERNS = "userns"  # user, pid, mount, net, ipc, uts namespaces, as an ordinary user
    NAMESPACES = "namespaces"  # the same made by root: idmapped layers, a uid range and cgroups of its own
    CONTAINER = "container"  # a container engine's
    GVISOR = "gvisor"
    MICROVM = "microvm"

    @property
    def rank(self) -> int:
        """Its place in this order."""
        return list(Isolation).index(self)


class Wire(BaseModel):
    """Base of everything that travels: unknown keys are refused, because a misspelt key must not pass in silence."""

    # Deferred: what checks a message is made when the first one comes. All of them at once are a third of a start.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, defer_build=True)


class Inside(Wire):
    """Base of messages whose strings reach an operating system, as paths, words or names: none has a NUL character.
    texts: fields that may have one."""

    texts: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _no_nul(self) -> Self:
        values, texts = self.__dict__, self.texts
        for name in self.__pydantic_fields_set__:
            value = values[name]
            if ("\0" in value if type(value) is str else _has_nul(value)) and name not in texts:
                raise ValueError(f"{name}: a NUL character cannot be in it")
        return self


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(part) for row in value.items() for part in row)
    return isinstance(value, list | tuple) and any(map(_has_nul, value))


class BaseConfig(Wire):
    """How to reach the server. None of it travels. reconnect_timeout: seconds for which a call is tried again while the
    server is away; None is ROCK_RECONNECT_TIMEOUT, 0 is not at all."""

    base_url: str = Field(default_factory=settings.base_url, exclude=True)
    api_key: str | None = Field(default_factory=settings.api_key, exclude=True, repr=False)
    xrl_authorization: str | None = Field(default=None, exclude=True, repr=False)
    extra_headers: dict[str, str] = Field(default_factory=dict, exclude=True)
    reconnect_timeout: float | None = Field(default=None, ge=0, le=3600, exclude=True)


class SandboxConfig(BaseConfig, Inside):
    """A sandbox to be: what the user writes is what travels.

    image: "host" (this machine's own system, read-only) or the name of an image in the server's store.
    memory, cpus: limits; they may be overcommitted. limit_cpus: a hard cap, when cpus is only the usual share.
    pids: most processes and threads at once. disk: size limit of what is written; None is no limit. inodes: most
        files, with a disk limit; None is one for 16 KiB of it. nofile: most open files of a process. shm_size: size of
        /dev/shm, at most half of the memory; None is up to a quarter.
    auto_clear_seconds: idle time after which it is stopped; 0 is never. Idle is without a call under way: a background
        process alone does not keep a sandbox. timeout: seconds from its start after which it
        is stopped in any case; None is never.
    auto_delete_seconds: how long the files of a stopped one are kept, so that it can be restarted or archived: seconds
        from its stop. None and 0 keep nothing: its files go with its stop.
    auto_archive_seconds: keep the files too, and bring them to the server's archive so many seconds after the stop.
        Excludes auto_delete_seconds.
    startup_timeout: seconds that a start may take.
    network: "none" (its own, with loopback), "nat" (public addresses, by TCP), "host" or, of runtime "docker" alone,
        "bridge" (the engine's own, which leads wherever that machine can reach).
    egress: where it may connect to, and nowhere else, as in protocol/egress.py: "example.com", "*.example.org:443",
        "203.0.113.0/24:22", "*". None is every public address. It goes with network "nat", which it implies.
    runtime: name of the runtime; None is the server's default. oci_runtime: what runs a container, of runtime "docker"
        alone; use_kata_runtime is "kata".
    isolation: exactly this level; where no runtime is named, it chooses the one that gives it. minimum_isolation:
        refuse to start with anything weaker.
    env: environment of all that runs inside. labels: the user's own words, to list by.
    public_registries: pull from public addresses alone, and from registries that the owner of the server has named; set
        for each tenant.
    sandbox_id: a name of your own choice; taken already is a Conflict.
    """

    # JSON has no infinity: a record of one would come back as null, and not be read again.
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
    startup_timeout: float = Field(default=180.0, gt=0, le=_LONGEST)
    network: Literal["none", "nat", "bridge", "host"] = "none"
    egress: list[str] | None = Field(default=None, max_length=egress.MOST_ENTRIES)
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
            self.__dict__["network"] = "nat"  # an assignment would come here again
            self.__pydantic_fields_set__.add("network")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.inodes is not None and self.disk is None:
            raise ValueError("inodes: it is a limit of a disk with a size; give disk too")
        if self.shm_size is not None and self.shm_bytes * 2 > self.memory_bytes:
            raise ValueError(f"shm_size {self.shm_size} is over half of the memory, {self.memory}, that it is part of")
        if self.isolation is not None and self.isolation.rank < self.minimum_isolation.rank:
            raise ValueError(f"isolation {self.isolation.value} is weaker than minimum_isolation "
                             f"{self.minimum_isolation.value}")
        return self

    @property
    def unchosen(self) -> set[str]:
        """What has to be left out where this is written down or passed on: a network that nobody chose would come
        back as one that somebody insists on."""
        return {"network"} - self.model_fields_set

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)

    @property
    def disk_bytes(self) -> int:
        """0 is no limit."""
        return parse_size(self.disk, "disk") if self.disk is not None else 0

    @property
    def disk_inodes(self) -> int:
        """Most files on a disk with a limit."""
        return self.inodes if self.inodes is not None else max(1024, self.disk_bytes >> 14)

    @property
    def shm_bytes(self) -> int:
        """0 is what the runtime gives."""
        return parse_size(self.shm_size, "shm_size") if self.shm_size is not None else 0

    @property
    def keeps_files(self) -> bool:
        """Whether what it wrote outlives its stop."""
        return bool(self.auto_delete_seconds) or self.auto_archive_seconds is not None


class SandboxGroupConfig(SandboxConfig):
    """`size` equal sandboxes, asked for by one request. An error that may pass is tried again, `start_retry_times` in
    all. start_concurrency: taken from programs that were written for ROCK; how many start at once is the workers' to
    say. mode, placement: as of GroupRequest."""

    size: int = Field(default=2, ge=1)
    mode: Literal["gang", "best_effort"] = "gang"
    placement: Literal["spread", "pack"] = "spread"
    start_concurrency: int = Field(default=2, ge=1)
    start_retry_times: int = Field(default=3, ge=1)


class Phase(Wire):
    """A step of a start: `status` is waiting, running, success, failed or timeout."""

    status: Literal["waiting", "running", "success", "failed", "timeout"] = "waiting"
    message: str = ""
    started_at: float | None = None
    completed_at: float | None = None


class Usage(Wire):
    """Measured use of one sandbox: bytes, CPU seconds since its start, and processes."""

    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None
    disk_bytes: int | None = None


class StateChange(Wire):
    """One step of a sandbox's life. `key`: the idempotency key of the request that asked for it, if it had one."""

    from_state: State
    to_state: State
    event: str
    timestamp: float
    key: str | None = None


class ArchivedFiles(Wire):
    """What a sandbox wrote, as one layer in the server's archive: `size` in bytes, `digest` "sha256:..." of the tar.

    image_digest: of the image below it, without which it is of no use.
    """

    size: int
    digest: str
    image_digest: str


class CommitRequest(Inside):
    """Make an image of a sandbox: `image_tag` is its name. `push`: to the registry that is named there, with this
    login, which is forgotten afterwards. public_registries: see SandboxConfig."""

    image_tag: str = Field(min_length=1, max_length=400)
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    push: bool = False
    public_registries: bool = False


class CommitPhase(StrEnum):
    """How far it is."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class CommitError(StrEnum):
    """Why there is no image, in ROCK's words."""

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
    """An image that is or was made of a sandbox. Times are seconds since the epoch.

    image_digest: of the image here; pushed_digest: of its manifest in the registry. failed_stage: login, commit, push,
    or dispatch, before a worker had it; error: what was raised, as it travels.
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

    enforced: how each limit is held on this host ("cgroup-v1", "cgroup-v2", "watched", "affinity", "rlimit", "none").
    cause, reason: why it is no longer running, as a word and as a sentence.
    kept: it does not run, and its files are on its worker: it can be restarted. archive: they are in the archive.
    commit: of the last image that was made of it.
    auto_stop_at, auto_archive_at, auto_delete_at: when that will happen by itself, as things are now.
    tenant: of the key that made it; "" is the server's owner.
    group: that it was made with; gang: all of that group start, or none.
    state_history: the last 100 steps, oldest first; lists leave it out unless asked.
    """

    model_config = ConfigDict(extra="ignore")  # of a newer server

    sandbox_id: str
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
    stopped_at: float | None = None
    last_activity_at: float | None = None
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


# ---- encoded ----
#
# Configs as JSON. One that many sandboxes have in common, as those of a burst or of a group, is encoded once.

_MOST = 256
T = TypeVar("T", str, bytes)
_travelling: dict[int, tuple[SandboxConfig, bytes]] = {}  # by identity, which is theirs for as long as they are here
_kept: dict[int, tuple[SandboxConfig, str]] = {}


def travelling(config: SandboxConfig) -> bytes:
    """As it is passed on to a worker."""
    return _encoded(_travelling, config, lambda: config.model_dump_json(exclude=config.unchosen).encode())


def kept(config: SandboxConfig) -> str:
    """As it is written down: without the registry's password, which is needed for one pull and never later, and
    without what is not set, which is half of it."""
    exclude = {"registry_password", *config.unchosen}
    return _encoded(_kept, config, lambda: config.model_dump_json(exclude=exclude, exclude_none=True))


def _encoded(known: dict[int, tuple[SandboxConfig, T]], config: SandboxConfig, encode: Callable[[], T]) -> T:
    if config.registry_password is not None:  # which is not remembered anywhere
        return encode()
    entry = known.get(id(config))
    if entry is None or entry[0] is not config:
        if len(known) >= _MOST:
            known.clear()
        entry = known[id(config)] = (config, encode())
    return entry[1]
