"""The lifecycle of a sandbox as a pure function: (state, event) -> (state, effects), and the info after each step.

From       Event             To         Effects
pending    launched          running    schedule
pending    launch_failed     stopped    release, schedule
pending    restore_failed    archived   release, schedule
pending    stop              stopping   release
pending    ended             stopped    release, schedule
running    launched          running    schedule
running    stop              stopping   release
running    ended             stopped    release, schedule
stopping   stop              stopping   release
stopping   launched          stopping   release
stopping   launch_failed     stopped    release, schedule
stopping   restore_failed    archived   release, schedule
stopping   ended             stopped    release, schedule
stopping   destroyed         stopped    schedule
stopped    stop              stopped    -
stopped    ended             stopped    -
stopped    launched          stopped    release
stopped    launch_failed     stopped    -
stopped    destroyed         stopped    -
stopped    restart           pending    launch
stopped    archive           archiving  archive
stopped    delete            deleted    forget
archiving  stop              archiving  -
archiving  ended             archiving  -
archiving  destroyed         archiving  -
archiving  archive           archiving  archive
archiving  archive_done      archived   release, schedule
archiving  archive_failed    stopped    schedule
archived   stop              archived   -
archived   ended             archived   -
archived   destroyed         archived   -
archived   launched          archived   release
archived   restore_failed    archived   -
archived   archive           archived   -
archived   restore           pending    launch
archived   delete            deleted    forget
deleted    stop              deleted    -
deleted    ended             deleted    -
deleted    destroyed         deleted    -
deleted    delete            deleted    forget

Any other combination is a Conflict. Only restart, restore and failures lead back to an earlier state. A sandbox that
was stopped while it started is released when the start completes. The release ends the sandbox on its worker, which
retains the files if the config requests that. A test compares this table with the code.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

from rock.errors import Conflict
from rock.protocol.node import NodeSandbox, NodeStatus
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State, StateChange
from rock.store.base import Record


class Event(StrEnum):
    LAUNCHED = "launched"
    LAUNCH_FAILED = "launch_failed"
    STOP = "stop"
    ENDED = "ended"
    DESTROYED = "destroyed"
    RESTART = "restart"
    ARCHIVE = "archive"
    ARCHIVE_DONE = "archive_done"
    ARCHIVE_FAILED = "archive_failed"
    RESTORE = "restore"
    RESTORE_FAILED = "restore_failed"
    DELETE = "delete"


class Effect(StrEnum):
    """An effect of a step, executed after the new state is saved. Effects are idempotent."""

    LAUNCH = "launch"
    SCHEDULE = "schedule"
    RELEASE = "release"
    ARCHIVE = "archive"
    FORGET = "forget"


_S, _E, _F = State, Event, Effect
_ENDED = (_F.RELEASE, _F.SCHEDULE)

TRANSITIONS: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (_S.PENDING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.PENDING, _E.LAUNCH_FAILED): (_S.STOPPED, _ENDED),
    (_S.PENDING, _E.RESTORE_FAILED): (_S.ARCHIVED, _ENDED),
    (_S.PENDING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.PENDING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.RUNNING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.RUNNING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.RUNNING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.STOPPING, _E.LAUNCHED): (_S.STOPPING, (_F.RELEASE,)),
    (_S.STOPPING, _E.LAUNCH_FAILED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.RESTORE_FAILED): (_S.ARCHIVED, _ENDED),
    (_S.STOPPING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.DESTROYED): (_S.STOPPED, (_F.SCHEDULE,)),
    (_S.STOPPED, _E.STOP): (_S.STOPPED, ()),
    (_S.STOPPED, _E.ENDED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.LAUNCHED): (_S.STOPPED, (_F.RELEASE,)),
    (_S.STOPPED, _E.LAUNCH_FAILED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.DESTROYED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.RESTART): (_S.PENDING, (_F.LAUNCH,)),
    (_S.STOPPED, _E.ARCHIVE): (_S.ARCHIVING, (_F.ARCHIVE,)),
    (_S.STOPPED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
    (_S.ARCHIVING, _E.STOP): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.ENDED): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.DESTROYED): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.ARCHIVE): (_S.ARCHIVING, (_F.ARCHIVE,)),
    (_S.ARCHIVING, _E.ARCHIVE_DONE): (_S.ARCHIVED, _ENDED),
    (_S.ARCHIVING, _E.ARCHIVE_FAILED): (_S.STOPPED, (_F.SCHEDULE,)),
    (_S.ARCHIVED, _E.STOP): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.ENDED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.DESTROYED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.LAUNCHED): (_S.ARCHIVED, (_F.RELEASE,)),
    (_S.ARCHIVED, _E.RESTORE_FAILED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.ARCHIVE): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.RESTORE): (_S.PENDING, (_F.LAUNCH,)),
    (_S.ARCHIVED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
    (_S.DELETED, _E.STOP): (_S.DELETED, ()),
    (_S.DELETED, _E.ENDED): (_S.DELETED, ()),
    (_S.DELETED, _E.DESTROYED): (_S.DELETED, ()),
    (_S.DELETED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
}

_HINTS = {Event.DELETE: "stop it first", Event.RESTART: "stop it first", Event.ARCHIVE: "stop it first"}


def step(state: State, event: Event, sandbox_id: str = "") -> tuple[State, tuple[Effect, ...]]:
    """The next state and the effects. Raises Conflict for an event that is invalid in this state."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        hint = _HINTS.get(event) if state in (State.PENDING, State.RUNNING) else None
        raise Conflict(
            f"sandbox {sandbox_id} cannot take {event.value!r}: its state is {state.value!r}",
            sandbox_id=sandbox_id or None,
            hint=hint,
        ) from None


# ---- infos ----
#
# The `SandboxInfo` after each step of the lifecycle. Pure.

_MOST_STEPS = 100
_ARCHIVE_AGAIN = 60.0  # seconds between a failed archiving and the next attempt


def new_info(
    sandbox_id: str, config: SandboxConfig, worker: str | None, status: NodeStatus | None, tenant: str
) -> SandboxInfo:
    """The info of a new sandbox. worker, status: None before placement."""
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
    """The fields that the infos of all sandboxes of one config share; the sandboxes of a burst usually share one
    config."""
    global _last
    if _last is not None and _last[0] is config and _last[1].tenant == tenant:
        return _last[1]
    info = SandboxInfo(
        sandbox_id="",
        name=config.name,
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
    if config.registry_password is None:  # a config with a registry password is never cached
        _last = config, info
    return info


def running(made: NodeSandbox) -> dict[str, Any]:
    """The fields that a worker reports for a sandbox that it has started."""
    return {
        "isolation": made.isolation,
        "enforced": made.enforced,
        "runtime": made.runtime,
        "phases": made.phases,
        "started_at": time.time(),
    }


def seen(record: Record, found: NodeSandbox) -> SandboxInfo:
    """The record's info with the current report of its worker."""
    last = time.time() - found.idle_seconds
    idle = None if found.paused else record.config.auto_clear_seconds
    deadlines = [last + idle] if idle else []
    if (deadline := deadline_of(record)) is not None:
        deadlines.append(deadline)
    return record.info.model_copy(
        update={
            "is_alive": found.alive,
            "last_activity_at": last,
            "auto_stop_at": min(deadlines, default=None),
            "usage": found.usage,
        }
    )


def deadline_of(record: Record) -> float | None:
    """The time at which a sandbox is stopped in any case; None is never, or not before its start."""
    info, timeout = record.info, record.config.timeout
    if info.deadline is not None:
        return info.deadline or None
    return None if timeout is None or info.started_at is None else info.started_at + timeout


def life_began(info: SandboxInfo) -> float:
    """Time of its last start request."""
    starts = (step.timestamp for step in reversed(info.state_history) if step.to_state is State.PENDING)
    return next(starts, info.created_at)


def stamped(record: Record, event: Event, state: State, key: str | None, fields: dict[str, Any]) -> Record:
    """The record in its next state. `fields` of its info override those that the step sets."""
    info, now = record.info, time.time()
    stamp: dict[str, Any] = {"state": state, "is_alive": state is State.RUNNING}
    if state is not info.state:
        step = StateChange.made(from_state=info.state, to_state=state, event=event.value, timestamp=now, key=key)
        stamp["state_history"] = [*info.state_history[1 - _MOST_STEPS :], step]
    if info.state is State.RUNNING and state is not State.RUNNING:
        stamp |= {"kept": record.config.keeps_files, "paused_at": None}
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
    ("cause", "reason", "error", "stopped_at", "auto_archive_at", "auto_delete_at", "usage", "deadline"), None
) | {"phases": {}}


def _deadlines(record: Record, failed_at: float | None) -> dict[str, Any]:
    """Times at which its retained files will be archived and deleted."""
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
    """The changes of the info of an ended sandbox whose retained files are missing."""
    reason = f"{record.info.reason or 'it was stopped'}; its files are gone from its worker"
    return {"kept": False, "reason": reason, "auto_archive_at": None, "auto_delete_at": None}
