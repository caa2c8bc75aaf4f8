"""Folders from outside in a sandbox: volumes and host folders."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, field_validator

from rock.protocol.wire import Inside

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
MOST_MOUNTS = 16  # volumes and host folders of one sandbox
_LONGEST_PATH = 1024
_CLOSED = ("/proc", "/sys", "/dev")
AGENTS = "/opt/rock/agents"  # one folder for each agent
AGENT_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class VolumeMount(Inside):
    """A volume in a sandbox. name: of a volume of the tenant. target: the absolute path at which it is mounted; a
    missing folder is created. read_only: rejects writes.

    volume_id, worker: set by the server; values of a client are replaced.
    """

    name: str = Field(pattern=NAME_PATTERN)
    target: str
    read_only: bool = False
    volume_id: str | None = None
    worker: str | None = None

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return mount_target(value)


class HostMount(Inside):
    """A folder of the worker in a sandbox, always read-only. source: an absolute path in a folder of ROCK_HOST_MOUNTS,
    without symbolic links. target: as of VolumeMount."""

    source: str
    target: str

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        return _plain_path(value, "source")

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return mount_target(value)


def _plain_path(text: str, what: str) -> str:
    """An absolute path without "." and ".." parts and without repeated slashes. ValueError."""
    parts = text.split("/")
    if not text.startswith("/") or len(text.encode("utf-8", "surrogateescape")) > _LONGEST_PATH or "\0" in text:
        raise ValueError(f"{what}={text[:100]!r} is not an absolute path of at most {_LONGEST_PATH} bytes")
    if "." in parts or ".." in parts:
        raise ValueError(f"{what}={text[:100]!r} has a part \".\" or \"..\": write the path without it")
    return "/" + "/".join(filter(None, parts))


def mount_target(text: str) -> str:
    """The normalized path of a mount. ValueError for /, /proc, /sys, /dev and what is below the last three."""
    target = _plain_path(text, "target")
    if target == "/" or any(_is_below(target, closed) for closed in _CLOSED):
        raise ValueError(f"target={target!r}: nothing can be mounted there; choose another folder, like /data")
    return target


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def check_targets(targets: Iterable[str]) -> None:
    """Raise ValueError for too many targets, and for one that is equal to another or below it."""
    ordered = sorted(target + "/" for target in targets)
    if len(ordered) > MOST_MOUNTS:
        raise ValueError(f"{len(ordered)} volumes and mounts: a sandbox has at most {MOST_MOUNTS}")
    for index, target in enumerate(ordered[1:]):
        if target.startswith(ordered[index]):
            raise ValueError(f"target={target[:-1]!r} is {ordered[index][:-1]!r} or below it: choose separate folders")
