"""Messages between the admin and a rocklet, and lists that the server answers with."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

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
