"""Sandboxes in the terms of E2B: templates, deadlines, metadata and network rules. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rock.admin.sandboxes.lifecycle import deadline_of
from rock.errors import InvalidConfig, Unsupported
from rock.protocol.sandbox import SandboxConfig, VolumeMount, parse_size
from rock.store.base import Record

ENVD_VERSION = "0.5.7"  # the newest protocol whose features are all here; later ones have metadata of files
TIMEOUT = 300.0  # seconds of a sandbox whose client names no timeout
_LONGEST = 1 << 32
CLIENT = "rock"
OWN = "rock.e2b."  # prefix of labels that are not metadata
TEMPLATE, PRIVATE, RESUMES = OWN + "template", OWN + "private", OWN + "resumes"
BASE = ("base", "code-interpreter-v1")  # templates that are the server's default image
NEVER = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True)
class Options:
    """Settings of the dialect. image: of template "base". network: of sandboxes with internet access. memory, cpus: of
    each sandbox. domain: under which ports have host names, PORT-ID.DOMAIN; "" is none. folder: of templates."""

    image: str = "host"
    network: str = "nat"
    memory: str = "2g"
    cpus: float = 2.0
    domain: str = ""
    folder: Path = Path("e2b")


# ---- request bodies ----


class Body(BaseModel):
    """Base of request bodies: unknown fields are rejected, because an option must not be ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class Timeout(Body):
    timeout: float = Field(ge=0, le=_LONGEST)


class Refresh(Body):
    duration: float = Field(default=60, ge=0, le=_LONGEST)


class Connect(Body):
    timeout: float = Field(default=TIMEOUT, ge=0, le=_LONGEST)
    memory: bool | None = None
    autoPause: bool = False


class Pause(Body):
    memory: bool | None = None
    requireHealthyGuest: bool | None = None


class Snapshot(Body):
    name: str | None = Field(default=None, min_length=1, max_length=63)
    memory: bool | None = None


class Fork(Body):
    timeout: float = Field(default=TIMEOUT, ge=0, le=_LONGEST)
    count: int = Field(default=1, ge=1, le=100)


class Network(Body):
    allowPublicTraffic: bool | None = None
    allowOut: list[str] | None = None
    denyOut: list[str] | None = None
    dnsServers: list[str] | None = None
    egressProxy: Any = None
    maskRequestHost: str | None = None
    httpsPorts: list[int] | None = None
    rules: dict[str, Any] | None = None


class Mount(Body):
    name: str
    path: str


class AutoResume(Body):
    enabled: bool = False
    timeout: float | None = None


class NewSandbox(Body):
    templateID: str = Field(default="base", max_length=400)
    timeout: float = Field(default=TIMEOUT, ge=0, le=_LONGEST)
    metadata: dict[str, str] = Field(default_factory=dict)
    envVars: dict[str, str] = Field(default_factory=dict)
    autoPause: bool = False
    autoPauseMemory: bool | None = None
    autoResume: AutoResume | None = None
    secure: bool | None = None
    allow_internet_access: bool | None = None
    network: Network | None = None
    mcp: Any = None
    iam: Any = None
    volumeMounts: list[Mount] | None = None

    @field_validator("metadata", "envVars", mode="before")
    @classmethod
    def _missing(cls, value: Any) -> Any:
        return {} if value is None else value


# ---- create ----

_ALL = ("0.0.0.0/0", "::/0")


def _refuse(what: str, hint: str) -> Unsupported:
    return Unsupported(f"{what} is not supported by this server", hint=hint)


def config_of(spec: NewSandbox, options: Options, image: str, snapshot: str | None) -> SandboxConfig:
    """The config of a new sandbox. Unsupported names an option that the server does not have."""
    if spec.autoPause and spec.autoPauseMemory is False:
        raise _refuse("autoPauseMemory=false (a pause without memory)", "leave it out")
    resumes = spec.autoResume is not None and spec.autoResume.enabled
    if resumes and not spec.autoPause:
        raise InvalidConfig("autoResume is for sandboxes with autoPause", hint="set autoPause too, or leave it out")
    if spec.mcp:
        raise _refuse("mcp", "start the MCP server as a command in the sandbox")
    if spec.iam:
        raise _refuse("iam", "pass credentials by envs")
    for name in spec.metadata:
        if name.startswith(OWN):
            raise InvalidConfig(f"metadata key {name[:80]!r} is reserved: it begins with {OWN}", hint="rename it")
    network, egress = network_of(spec, options)
    labels = {**spec.metadata, TEMPLATE: spec.templateID}
    if spec.network is not None and spec.network.allowPublicTraffic is False:
        labels[PRIVATE] = "1"
    if resumes:
        labels[RESUMES] = "1"
    values: dict[str, Any] = {
        "image": image, "memory": options.memory, "cpus": options.cpus, "auto_clear_seconds": 0,
        "timeout": lasting(spec.timeout), "env": spec.envVars, "labels": labels, "network": network,
    }  # fmt: skip
    if spec.autoPause:
        values["on_timeout"] = "pause"
    if egress is not None:
        values["egress"] = egress
    if snapshot is not None:
        values["snapshot"] = snapshot
    if spec.volumeMounts:
        values["volumes"] = [VolumeMount(name=mount.name, target=mount.path) for mount in spec.volumeMounts]
    return SandboxConfig(**values)


def lasting(timeout: float) -> float:
    """The deadline of a timeout: one of 0 is over at once."""
    return max(timeout, 0.001)


def network_of(spec: NewSandbox, options: Options) -> tuple[str, list[str] | None]:
    """(network, egress rules) of a new sandbox."""
    rules = spec.network or Network()
    for name, hint in (
        ("dnsServers", "set ROCK_NETWORK_RESOLVERS of the server"), ("egressProxy", "set the proxy by envs"),
        ("maskRequestHost", "let the program accept the host of the request"), ("rules", "set headers in the program"),
        ("httpsPorts", "serve HTTP in the sandbox"),
    ):  # fmt: skip
        if getattr(rules, name):
            raise _refuse(f"network.{name}", hint)
    denied = set(rules.denyOut or ())
    if denied - set(_ALL):
        raise _refuse("network.denyOut with single addresses", "deny 0.0.0.0/0, and allow destinations by allowOut")
    if spec.allow_internet_access is False or denied:
        return ("nat", list(rules.allowOut)) if rules.allowOut else ("none", None)
    return options.network, None


# ---- views ----


def time_of(seconds: float | None) -> str:
    when = NEVER if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat().replace("+00:00", "Z")


def metadata_of(record: Record) -> dict[str, str]:
    return {name: value for name, value in record.info.labels.items() if not name.startswith(OWN)}


def template_of(record: Record) -> str:
    return record.info.labels.get(TEMPLATE) or record.info.image


def listed(record: Record) -> dict[str, Any]:
    """The fields of a sandbox in a list."""
    info, config = record.info, record.config
    return {
        "templateID": template_of(record), "alias": template_of(record), "sandboxID": record.id, "clientID": CLIENT,
        "startedAt": time_of(info.started_at or info.created_at), "endAt": time_of(deadline_of(record)),
        "cpuCount": max(1, math.ceil(config.cpus)), "memoryMB": parse_size(config.memory) >> 20,
        "diskSizeMB": config.disk_bytes >> 20, "metadata": metadata_of(record), "envdVersion": ENVD_VERSION,
        "state": "running" if info.paused_at is None else "paused",
        "volumeMounts": [{"name": mount.name, "path": mount.target} for mount in config.volumes or ()],
    }  # fmt: skip
