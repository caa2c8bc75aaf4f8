"""The live configuration: what the owner of a server changes without a restart, and the messages about it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rock.protocol.keys import TENANT_PATTERN, Quota
from rock.protocol.wire import Wire

_REGISTRY = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?|\[[0-9a-fA-F:.]{2,45}\](?::[0-9]{1,5})?")
_PREFIX = re.compile(r"[A-Za-z0-9.:_-]{1,253}/[A-Za-z0-9._/:@-]{0,400}")
LABEL = "label."
_TAG = r"^(?:tenant|experiment|user|image|worker|label\.[A-Za-z0-9._/-]{1,63})$"
_MOST = 1000  # entries of a list or a mapping

Feature = Literal["archive", "commits", "gateway", "image_builds", "jobs", "snapshots", "volumes"]
Level = Literal["debug", "info", "warning", "error"]


def _registry(name: str) -> str:
    if not _REGISTRY.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no registry; write HOST or HOST:PORT")
    return name


class QuotaRules(Wire):
    """default: of tenants whose keys have no quota. tenants: replaces the quota of all keys of a tenant."""

    default: Quota | None = None
    tenants: dict[Annotated[str, Field(pattern=TENANT_PATTERN)], Quota] = Field(default_factory=dict, max_length=_MOST)


class RewriteRule(Wire):
    """Images whose full name begins with `match` get `replace` in its place. The full name of "python:3.11" is
    "docker.io/library/python:3.11"."""

    match: str
    replace: str

    @field_validator("match", "replace")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not _PREFIX.fullmatch(value):
            raise ValueError(f"{value[:80]!r} is no prefix of full image names; it begins with a registry, as "
                             "docker.io/library/")
        return value


class ImageRules(Wire):
    """rewrite: the first rule that matches applies. mirrors: by registry, tried first. insecure_registries: contacted
    without TLS. private_registries: on private addresses, for tenants. All are added to the settings of a server."""

    rewrite: list[RewriteRule] = Field(default_factory=list, max_length=_MOST)
    mirrors: dict[str, list[str]] = Field(default_factory=dict, max_length=_MOST)
    insecure_registries: list[str] = Field(default_factory=list, max_length=_MOST)
    private_registries: list[str] = Field(default_factory=list, max_length=_MOST)

    @field_validator("mirrors")
    @classmethod
    def _mirrors(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, mirrors in value.items():
            for registry in (name, *mirrors[:_MOST]):
                _registry(registry)
        return value

    @field_validator("insecure_registries", "private_registries")
    @classmethod
    def _registries(cls, value: list[str]) -> list[str]:
        return [_registry(name) for name in value]


class PoolRules(Wire):
    """size: warm sandboxes for each recently used image, on each worker; None is the worker's ROCK_POOL_SIZE. budget:
    most unclaimed sandboxes of all defined pools together, on each worker."""

    size: int | None = Field(default=None, ge=0, le=1000)
    budget: int = Field(default=64, ge=0, le=100_000)


class NetworkRules(Wire):
    """allowed: networks that keys without the scope admin may request; None is both."""

    allowed: list[Literal["none", "nat"]] | None = Field(default=None, max_length=2)


class MetricRules(Wire):
    """tags: what the metrics rock_tagged_* are counted by: tenant, experiment, user, image, worker, or label.NAME."""

    tags: list[Annotated[str, Field(pattern=_TAG)]] = Field(default_factory=list, max_length=10)


class LogRules(Wire):
    """level: of every process of the server; None is its ROCK_LOG_LEVEL."""

    level: Level | None = None


class Configuration(Wire):
    """A whole live configuration; an omitted part has its default. features: False rejects new operations of it."""

    quotas: QuotaRules = Field(default_factory=QuotaRules)
    images: ImageRules = Field(default_factory=ImageRules)
    pools: PoolRules = Field(default_factory=PoolRules)
    networks: NetworkRules = Field(default_factory=NetworkRules)
    log: LogRules = Field(default_factory=LogRules)
    metrics: MetricRules = Field(default_factory=MetricRules)
    features: dict[Feature, bool] = Field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The parts that differ from the default, as plain data."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def rewritten(self, image: str) -> str:
        """The image to use for an image."""
        if not self.images.rewrite or image == "host":
            return image
        name = full_name(image)
        for rule in self.images.rewrite:
            if name.startswith(rule.match):
                return rule.replace + name.removeprefix(rule.match)
        return image


def full_name(image: str) -> str:
    """An image name with its registry."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"docker.io/{image}" if slash else f"docker.io/library/{image}"


class ConfigurationVersion(Wire):
    """A version in the history. at: seconds since the epoch. source: the file, the Nacos entry, or "api". author: the
    tenant and the id of the key, of a change over the API."""

    version: int
    at: float
    source: str
    author: str = ""
    configuration: Configuration


class WorkerConfiguration(Wire):
    """The version that a worker applied; None while it has not confirmed one. error: why not."""

    worker: str
    version: int | None = None
    error: str = ""


class ConfigurationStatus(Wire):
    """The configuration that a server applies. source: where it is changed. error: why the source's newest content is
    not applied. workers: as the responding server knows them."""

    version: int = 0
    at: float | None = None
    source: str = "api"
    writable: bool = True
    error: str = ""
    configuration: Configuration = Field(default_factory=Configuration)
    workers: list[WorkerConfiguration] = Field(default_factory=list)


class ConfigurationHistory(Wire):
    """Versions, newest first."""

    items: list[ConfigurationVersion]


class SetConfiguration(Wire):
    """Replace the whole configuration. expected: the version that it is based on; Conflict when there is a newer one.
    None replaces any. check: only validate."""

    configuration: Configuration
    expected: int | None = Field(default=None, ge=0)
    check: bool = False


class NodeConfiguration(Wire):
    """What a worker applies."""

    version: int
    at: float
    configuration: Configuration
