"""The live configuration: what the owner of a server changes without a restart, and the messages about it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rock.protocol.keys import TENANT_PATTERN, Quota
from rock.protocol.sandbox import TEMPLATE_LABEL, SandboxConfig, parse_size
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


class PodPool(Wire):
    """Warm pods of a template, where each sandbox is a pod. size: of those that no sandbox has claimed. A sandbox
    of the same template, image and GPUs with at most these cpus and memory, and without a disk limit, claims one."""

    template: str = Field(default="default", min_length=1, max_length=253)
    image: str
    cpus: float = Field(default=2.0, gt=0)
    memory: str = "8g"
    num_gpus: float | None = Field(default=None, ge=0)
    accelerator_type: str | None = None
    size: int = Field(ge=0, le=1000)

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.config()
        return self

    def config(self) -> SandboxConfig:
        """The largest sandbox that claims a pod of it."""
        return SandboxConfig(image=self.image, cpus=self.cpus, memory=self.memory, num_gpus=self.num_gpus,
                             accelerator_type=self.accelerator_type, labels={TEMPLATE_LABEL: self.template})


class PoolRules(Wire):
    """size: warm sandboxes for each recently used image, on each worker; None is the worker's ROCK_POOL_SIZE. budget:
    most unclaimed sandboxes of all defined pools together, on each worker. pods: of servers whose sandboxes are
    pods."""

    size: int | None = Field(default=None, ge=0, le=1000)
    budget: int = Field(default=64, ge=0, le=100_000)
    pods: list[PodPool] = Field(default_factory=list, max_length=100)


class TemplateRule(Wire):
    """image: a pattern of full image names, as "docker.io/library/python:*". min_gpus, max_gpus: of the requested GPUs.
    accelerator_types: one of them is requested; None is any, also none."""

    image: str = Field(default="*", min_length=1, max_length=400)
    min_gpus: float | None = Field(default=None, ge=0)
    max_gpus: float | None = Field(default=None, ge=0)
    accelerator_types: list[str] | None = Field(default=None, max_length=100)
    template: str = Field(min_length=1, max_length=253)

    def matches(self, config: SandboxConfig) -> bool:
        gpus = config.num_gpus or 0.0
        return (
            (self.min_gpus is None or gpus >= self.min_gpus) and (self.max_gpus is None or gpus <= self.max_gpus)
            and (self.accelerator_types is None or config.accelerator_type in self.accelerator_types)
            and fnmatchcase(full_name(config.image), self.image)
        )  # fmt: skip


class TemplateLimit(Wire):
    """The largest sandbox of a pod template; None is no limit."""

    cpus: float | None = Field(default=None, gt=0)
    memory: str | None = None
    num_gpus: float | None = Field(default=None, ge=0)

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    def exceeded(self, config: SandboxConfig) -> str:
        """The limit that a sandbox exceeds, as "4 cpus"; "" for none."""
        if self.cpus is not None and config.cpus > self.cpus:
            return f"{self.cpus:g} cpus"
        if self.memory is not None and config.memory_bytes > parse_size(self.memory):
            return f"{self.memory} of memory"
        if self.num_gpus is not None and (config.num_gpus or 0.0) > self.num_gpus:
            return f"{self.num_gpus:g} GPUs"
        return ""


class TemplateRules(Wire):
    """Pod templates, where each sandbox is a pod. rules: the first one that matches selects the template of a sandbox
    that names none. allowed: templates that keys without the scope admin may name; None is all. limits: by template."""

    rules: list[TemplateRule] = Field(default_factory=list, max_length=_MOST)
    allowed: list[str] | None = Field(default=None, max_length=_MOST)
    limits: dict[str, TemplateLimit] = Field(default_factory=dict, max_length=_MOST)

    def names(self) -> set[str]:
        """All templates that it names."""
        return {*(rule.template for rule in self.rules), *(self.allowed or ()), *self.limits}

    def selected(self, config: SandboxConfig) -> str:
        """The template of a sandbox."""
        named = config.labels.get(TEMPLATE_LABEL)
        return named or next((rule.template for rule in self.rules if rule.matches(config)), "default")


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
    templates: TemplateRules = Field(default_factory=TemplateRules)
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
