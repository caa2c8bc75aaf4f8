"""Snapshots of running sandboxes on the wire: checkpoint, rollback, fork (decision 45)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rock.protocol.action import Answer, GroupInfo
from rock.protocol.sandbox import NAME_PATTERN
from rock.protocol.wire import Wire

Memory = Literal["auto", "files", "session", "processes"]
Level = Literal["files", "session", "processes"]
Mechanism = Literal["auto", "switch", "copy"]
MOST_CHILDREN = 1000
_LONGEST = 10 * 365 * 86400


class CheckpointRequest(Wire):
    """A request for a snapshot of a running sandbox.

    memory: what is taken beside the files; a named level is refused where it is not possible, "auto" is the best level
    that is possible, which the response states. files: how files are taken; "auto" is "switch" where that is possible,
    else "copy". name: unique among the tenant's snapshots. wait: seconds to wait for running commands; then it is a
    Conflict. ttl_seconds: retention after the last use; None is the server's default.
    """

    memory: Memory = "auto"
    files: Mechanism = "auto"
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    wait: float = Field(default=5.0, ge=0, le=600)
    ttl_seconds: float | None = Field(default=None, gt=0, le=_LONGEST)


class ForkRequest(CheckpointRequest):
    """A checkpoint, and `count` sandboxes that start from it with the config of the original.

    start: seconds to wait for the starts. changes: fields of SandboxConfig that differ in the children, such as env,
    labels, auto_clear_seconds; image, runtime and volumes cannot differ. best_effort: start as many as fit, as in a
    group.
    """

    count: int = Field(default=1, ge=1, le=MOST_CHILDREN)
    start: float = Field(default=60.0, ge=0, le=3600)
    changes: dict[str, Any] = Field(default_factory=dict)
    best_effort: bool = False


class RollbackRequest(Wire):
    """snapshot: id or name of a snapshot of the tenant, on the worker of the sandbox."""

    snapshot: str = Field(min_length=1, max_length=64)


class SnapshotInfo(Answer):
    """A snapshot.

    sandbox_id: of which it was taken. parent: the snapshot on which that sandbox ran at the time. image: its image.
    memory, files: the level and the mechanism. bytes: size of its own layer; None while it is not measured. layers:
    number of its layers above the image. paused_ms: how long processes were stopped. left_out: what existed and is not
    in it, one sentence each. created_at, used_at: seconds since the epoch. ttl_seconds: retention after `used_at`.
    users: sandboxes that run on it. state: "creating" and "deleting" until its worker has done it.
    """

    snapshot_id: str
    name: str | None = None
    tenant: str = ""
    worker: str = ""
    sandbox_id: str = ""
    parent: str | None = None
    image: str = ""
    state: Literal["creating", "ready", "deleting"] = "ready"
    memory: Level = "files"
    files: Literal["switch", "copy", "import"] = "switch"
    bytes: int | None = None
    layers: int = 1
    paused_ms: float = 0.0
    left_out: list[str] = Field(default_factory=list)
    created_at: float = 0.0
    used_at: float = 0.0
    ttl_seconds: float = 3600.0
    users: list[str] = Field(default_factory=list)


class SnapshotList(Answer):
    items: list[SnapshotInfo]


class ForkResult(Answer):
    """The snapshot of a fork, and its children."""

    snapshot: SnapshotInfo
    group: GroupInfo


class Forkable(Answer):
    """What a checkpoint with memory="auto" would take at this moment. memory: the level. reasons: against a better one,
    each with the process, the descriptor and what it is."""

    memory: Level = "files"
    reasons: list[str] = Field(default_factory=list)


# ---- node plane ----


class NodeForkable(Forkable):
    """`Forkable` as a worker answers."""



class NodeCheckpoint(Wire):
    """A checkpoint for a worker. name, tenant: for a server that lost its store."""

    snapshot_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    tenant: str = Field(default="", max_length=64)
    name: str | None = Field(default=None, max_length=64)
    memory: Memory = "auto"
    files: Mechanism = "auto"
    wait: float = Field(default=5.0, ge=0, le=600)


class NodeRollback(Wire):
    snapshot_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class NodeImport(Wire):
    """An import on a worker; name, tenant: as of NodeCheckpoint."""

    tenant: str = Field(default="", max_length=64)
    name: str | None = Field(default=None, max_length=64)


class NodeSnapshot(Answer):
    """A snapshot as its worker stores it. hidden: it was deleted and is still used. users: sandboxes of this worker
    that run on it or are retained."""

    snapshot_id: str
    sandbox_id: str = ""
    parent: str | None = None
    tenant: str = ""
    name: str | None = None
    image: str = ""
    memory: Level = "files"
    files: Literal["switch", "copy", "import"] = "switch"
    bytes: int | None = None
    layers: int = 1
    paused_ms: float = 0.0
    left_out: list[str] = Field(default_factory=list)
    created_at: float = 0.0
    hidden: bool = False
    users: list[str] = Field(default_factory=list)


class NodeSnapshots(Answer):
    """The snapshots of a worker, by id."""

    snapshots: dict[str, NodeSnapshot] = Field(default_factory=dict)
