"""What is asked for and what there is: `SandboxConfig`, `SandboxInfo` and the words in them."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rock import settings

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)
_UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"


def parse_size(text: str, what: str = "memory") -> int:
    """Bytes of "512m", "8g", "1.5GiB" or "1048576" (units are powers of 1024). ValueError names the text."""
    match = _SIZE.match(text)
    value = float(match[1]) * _UNIT[match[2].lower()] if match else 0.0
    if not match or value < 1 or value >= 1 << 60:
        raise ValueError(f"Invalid {what} size: {text} (write it like 512m or 8g)")
    return int(value)


class State(StrEnum):
    """Where a sandbox is in its life; the moves between them are drawn in admin/lifecycle.py."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ARCHIVING = "archiving"
    ARCHIVED = "archived"
    DELETED = "deleted"


class Cause(StrEnum):
    """Why a sandbox is no longer running: what its tombstone says."""

    USER = "stopped_by_user"
    IDLE = "idle"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    START_FAILED = "start_failed"
    EXITED = "exited"
    LOST = "lost"


class Isolation(StrEnum):
    """How far a sandbox is from its host, weakest first. All of them share the host's kernel."""

    NONE = "none"  # a plain process
    LANDLOCK = "landlock"  # Landlock, seccomp and rlimits; no namespaces
    USERNS_SHARED_PROC = "userns-shared-proc"  # user namespaces, without a /proc of its own
    USERNS = "userns"  # user, pid, mount, net, ipc, uts namespaces, as an ordinary user
    NAMESPACES = "namespaces"  # the same made by root: idmapped layers, a uid range and cgroups of its own
    CONTAINER = "container"  # a container engine's
    GVISOR = "gvisor"
    MICROVM = "microvm"


class Wire(BaseModel):
    """Base of everything that travels: unknown keys are refused, because a misspelt key must not pass in silence."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class BaseConfig(Wire):
    """How to reach the server. None of it travels."""

    base_url: str = Field(default_factory=settings.base_url, exclude=True)
    api_key: str | None = Field(default_factory=settings.api_key, exclude=True, repr=False)
    xrl_authorization: str | None = Field(default=None, exclude=True, repr=False)
    extra_headers: dict[str, str] = Field(default_factory=dict, exclude=True)


class SandboxConfig(BaseConfig):
    """A sandbox to be: what the user writes is what travels.

    image: "host" (this machine's own system, read-only) or the name of an image in the server's store.
    memory, cpus: limits; they may be overcommitted. limit_cpus: a hard cap, when cpus is only the usual share.
    pids: most processes and threads at once. disk: size limit of what is written; None is no limit.
    auto_clear_seconds: idle time after which it is stopped; 0 is never. Idle is without a call under way: a background
        process alone does not keep a sandbox. timeout: seconds from its start after which it
        is stopped in any case; None is never.
    auto_delete_seconds: how long the files of a stopped one are kept, so that it can be restarted or archived: seconds
        from its stop. None and 0 keep nothing: its files go with its stop.
    auto_archive_seconds: keep the files too, and bring them to the server's archive so many seconds after the stop.
        Excludes auto_delete_seconds.
    startup_timeout: seconds that a start may take.
    network: "none" (its own, with loopback), "nat" or "host".
    runtime: name of the runtime; None is the server's default.
    minimum_isolation: refuse to start with anything weaker.
    env: environment of all that runs inside. labels: the user's own words, to list by.
    sandbox_id: a name of your own choice; taken already is a Conflict.
    """

    image: str = Field(default="python:3.11", min_length=1)
    image_os: str = "linux"
    memory: str = "8g"
    cpus: float = Field(default=2.0, gt=0)
    limit_cpus: float | None = Field(default=None, gt=0)
    pids: int = Field(default=4096, ge=16, le=1_000_000)
    disk: str | None = None
    auto_clear_seconds: int = Field(default=300, ge=0)
    auto_archive_seconds: int | None = Field(default=None, ge=0)
    auto_delete_seconds: int | None = Field(default=None, ge=0)
    timeout: float | None = Field(default=None, gt=0)
    startup_timeout: float = Field(default=180.0, gt=0)
    network: Literal["none", "nat", "host"] = "none"
    runtime: str | None = None
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
    use_kata_runtime: bool = False
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
        if value is not None:
            parse_size(value, "disk")
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

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)

    @property
    def keeps_files(self) -> bool:
        """Whether what it wrote outlives its stop."""
        return bool(self.auto_delete_seconds) or self.auto_archive_seconds is not None


class SandboxGroupConfig(SandboxConfig):
    """`size` equal sandboxes, started `start_concurrency` at once, each tried up to `start_retry_times` times."""

    size: int = Field(default=2, ge=1)
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


class CommitRequest(Wire):
    """Make an image of a sandbox: `image_tag` is its name. `push`: to the registry that is named there, with this
    login, which is forgotten afterwards."""

    image_tag: str = Field(min_length=1, max_length=400)
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    push: bool = False


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
