"""The status of a sandbox in the format of ROCK's clients."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rock.protocol.sandbox import Cause, Phase, SandboxInfo, State
from rock.store.base import Record

# Versions of components of ROCK that some clients read.
_GATEWAY, _REX = "0.0.45", "1.2.17"
_EVENTS = {"launched": "alive", "ended": "stop"}  # events that have other names in ROCK
_ON_DISK = "use cached image, skip image pull"

FIELDS: dict[str, Any] = dict.fromkeys(
    (
        "sandbox_id", "status", "state", "is_alive", "port_mapping", "host_name", "host_ip", "image", "user_id",
        "experiment_id", "namespace", "gateway_version", "swe_rex_version", "cpus", "memory", "num_gpus",
        "accelerator_type", "disk", "disk_limit_rootfs", "create_time", "start_time", "stop_time", "archive_time",
        "delete_time", "auto_stop_time", "auto_archive_time", "auto_delete_time", "state_history",
    )
)  # fmt: skip
"""Fields of a status, for the result of a failure."""

START_FIELDS: dict[str, Any] = dict.fromkeys(
    ("sandbox_id", "host_name", "host_ip", "cpus", "memory", "disk", "disk_limit_rootfs")
)


def is_listed(info: SandboxInfo) -> bool:
    """Whether lists without a state filter contain it. They include one whose start failed, so that clients read the
    reason."""
    return info.state in (State.PENDING, State.RUNNING) or info.cause is Cause.START_FAILED


def status_of(record: Record, info: SandboxInfo) -> dict[str, Any]:
    """`info`: of the record, with the current report of its worker."""
    config, state = record.config, state_of(info)
    return {
        **FIELDS,
        "sandbox_id": info.sandbox_id,
        "status": _phases(info),
        "state": state,
        "is_alive": info.is_alive,
        "port_mapping": {},
        "host_name": info.host_name,
        "host_ip": info.host_ip,
        "image": info.image,
        "user_id": info.user_id or "default",
        "experiment_id": info.experiment_id or "default",
        "namespace": info.namespace or "default",
        "gateway_version": _GATEWAY,
        "swe_rex_version": _REX,
        "cpus": info.cpus,
        "memory": info.memory,
        "num_gpus": config.num_gpus,
        "accelerator_type": config.accelerator_type,
        "disk": config.disk,
        "disk_limit_rootfs": config.disk,
        "create_time": time_of(info.created_at),
        "start_time": time_of(info.started_at),
        "stop_time": time_of(info.stopped_at),
        "archive_time": time_of(info.archived_at),
        "delete_time": time_of(info.deleted_at or info.stopped_at) if state == "deleted" else None,
        "auto_stop_time": time_of(info.auto_stop_at),
        "auto_archive_time": time_of(info.auto_archive_at),
        "auto_delete_time": time_of(info.auto_delete_at),
        "state_history": _history(info),
    }


def state_of(info: SandboxInfo) -> str:
    """ROCK's name of the state. A stopped sandbox without files is deleted in ROCK's terms."""
    if info.state is State.STOPPING:
        return "stopped"
    if info.state is State.STOPPED:
        return "stopped" if info.kept or info.cause is Cause.START_FAILED else "deleted"
    return info.state.value


def time_of(seconds: float | None) -> str | None:
    """A time in the format of the dialect."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _phases(info: SandboxInfo) -> dict[str, Any]:
    """Never null: clients read it while they wait for the start. Includes the archive phases during archive and
    restore."""
    phases = _start_phases(info)
    archive = info.phases.get("archive")
    if info.archive is not None and info.state in (State.PENDING, State.STOPPING):
        phases["image_archive"] = _phase("running", "restore running")
    elif archive is not None:
        phases["image_archive"] = _phase(archive.status, archive.message, archive)
    elif info.state is State.ARCHIVED and info.error:
        phases["image_archive"] = _phase("failed", info.reason or "the restore failed")
    return phases


def _start_phases(info: SandboxInfo) -> dict[str, Any]:
    image, run = info.phases.get("image"), info.phases.get("sandbox")
    if info.cause is Cause.START_FAILED:
        message = info.reason or "the start failed"
        of_image = (info.error or {}).get("error", {}).get("code") == "image_error"
        if of_image:
            text = f"Failed to pull image {info.image}: {message}"  # tools of ROCK's users search for this text
            return {"image_pull": _phase("failed", text), "docker_run": _phase("waiting", "waiting")}
        return {"image_pull": _phase("success", _ON_DISK), "docker_run": _phase("failed", message)}
    if info.state is State.PENDING:
        told = image.message if image is not None else "image pull running"
        return {"image_pull": _phase("running", told, image), "docker_run": _phase("waiting", "waiting")}
    return {
        "image_pull": _phase("success", _ON_DISK, image),
        "docker_run": _phase("success", "docker run success", run),
    }


def _phase(status: str, message: str, told: Phase | None = None) -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "started_at": time_of(told.started_at) if told else None,
        "completed_at": time_of(told.completed_at) if told else None,
    }


def _history(info: SandboxInfo) -> list[dict[str, Any]]:
    """ROCK has no state between the stop request and the end, so the requested state is reported."""
    return [
        {
            "from_state": step.from_state.value,
            "to_state": "stopped" if step.to_state is State.STOPPING else step.to_state.value,
            "event": _EVENTS.get(step.event, step.event),
            "timestamp": time_of(step.timestamp),
        }
        for step in info.state_history
        if step.from_state is not State.STOPPING
    ]
