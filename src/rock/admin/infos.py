"""What a `SandboxInfo` says at each step of a sandbox's life: pure."""

from __future__ import annotations

import time
from typing import Any

from rock.admin.lifecycle import Event
from rock.protocol.node import NodeSandbox, NodeStatus
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State, StateChange
from rock.store.base import Record

_MOST_STEPS = 100
_ARCHIVE_AGAIN = 60.0  # seconds after one that failed


def new_info(
    sandbox_id: str, config: SandboxConfig, worker: str | None, status: NodeStatus | None, tenant: str
) -> SandboxInfo:
    """worker, status: None while it is not decided where it goes."""
    info = _common(config, tenant).model_copy()
    info.__dict__.update(
        sandbox_id=sandbox_id,
        worker=worker,
        created_at=time.time(),
        host_name=status.host_name if status is not None else None,
        host_ip=status.host_ip if status is not None else None,
        labels=dict(config.labels),
        enforced={},
        phases={},
        state_history=[],
    )
    return info


_last: tuple[SandboxConfig, SandboxInfo] | None = None  # by identity


def _common(config: SandboxConfig, tenant: str) -> SandboxInfo:
    """What the infos of all that are made of a config have in common; a burst asks for one and the same."""
    global _last
    if _last is not None and _last[0] is config and _last[1].tenant == tenant:
        return _last[1]
    info = SandboxInfo(
        sandbox_id="",
        state=State.PENDING,
        image=config.image,
        memory=config.memory,
        cpus=config.cpus,
        network=config.network,
        egress=config.egress,
        user_id=config.user_id,
        experiment_id=config.experiment_id,
        cluster=config.cluster,
        namespace=config.namespace,
        labels={},
        worker=None,
        created_at=0.0,
        host_name=None,
        host_ip=None,
        tenant=tenant,
    )
    if config.registry_password is None:  # which is not remembered anywhere
        _last = config, info
    return info


def running(made: NodeSandbox) -> dict[str, Any]:
    """What a worker tells of a sandbox that it has started."""
    return {
        "isolation": made.isolation,
        "enforced": made.enforced,
        "runtime": made.runtime,
        "phases": made.phases,
        "started_at": time.time(),
    }


def seen(record: Record, found: NodeSandbox) -> SandboxInfo:
    """The record's info with what its worker says of it now."""
    last = time.time() - found.idle_seconds
    idle = record.config.auto_clear_seconds
    deadlines = [last + idle] if idle else []
    if record.config.timeout is not None and record.info.started_at is not None:
        deadlines.append(record.info.started_at + record.config.timeout)
    return record.info.model_copy(
        update={
            "is_alive": found.alive,
            "last_activity_at": last,
            "auto_stop_at": min(deadlines, default=None),
            "usage": found.usage,
        }
    )


def life_began(info: SandboxInfo) -> float:
    """When it was asked to start, the last time."""
    starts = (step.timestamp for step in reversed(info.state_history) if step.to_state is State.PENDING)
    return next(starts, info.created_at)


def stamped(record: Record, event: Event, state: State, key: str | None, fields: dict[str, Any]) -> Record:
    """The record in its next state. `fields` of its info win over what the step itself says."""
    info, now = record.info, time.time()
    stamp: dict[str, Any] = {"state": state, "is_alive": state is State.RUNNING}
    if state is not info.state:
        step = StateChange(from_state=info.state, to_state=state, event=event.value, timestamp=now, key=key)
        stamp["state_history"] = [*info.state_history[1 - _MOST_STEPS :], step]
    if info.state is State.RUNNING and state is not State.RUNNING:
        stamp["kept"] = record.config.keeps_files
    if state is State.RUNNING:
        stamp |= {"kept": False, "archive": None, "archived_at": None}
    elif state is State.PENDING:
        stamp |= _NEW_LIFE
    elif state in (State.STOPPED, State.ARCHIVED):
        stamp |= {"stopped_at": info.stopped_at or now}
    elif state is State.DELETED:
        stamp |= {"deleted_at": now, "auto_archive_at": None, "auto_delete_at": None}
    if state is State.ARCHIVED:
        stamp |= {"kept": False, "archived_at": info.archived_at or now}
    new = record.changed(**{**stamp, **fields})
    if state in (State.STOPPED, State.ARCHIVED):
        new = new.changed(**_deadlines(new, now if event is Event.ARCHIVE_FAILED else None))
    return new


_NEW_LIFE: dict[str, Any] = dict.fromkeys(
    ("cause", "reason", "error", "stopped_at", "auto_archive_at", "auto_delete_at", "usage"), None
) | {"phases": {}}


def _deadlines(record: Record, failed_at: float | None) -> dict[str, Any]:
    """When its kept files will be archived and deleted."""
    info, config = record.info, record.config
    at: dict[str, Any] = {"auto_archive_at": None, "auto_delete_at": None}
    if info.stopped_at is None or not (info.kept or info.archive):
        return at
    if config.auto_delete_seconds:
        at["auto_delete_at"] = info.stopped_at + config.auto_delete_seconds
    if config.auto_archive_seconds is not None and info.kept:
        due = info.stopped_at + config.auto_archive_seconds
        at["auto_archive_at"] = due if failed_at is None else max(due, failed_at + _ARCHIVE_AGAIN)
    return at


def files_lost(record: Record) -> dict[str, Any]:
    """What a tombstone says when the files that were to be kept are not there."""
    reason = f"{record.info.reason or 'it was stopped'}; its files are gone from its worker"
    return {"kept": False, "reason": reason, "auto_archive_at": None, "auto_delete_at": None}
