"""Warm pools on the wire: sandboxes of an image or a snapshot that are created before they are requested (decision
57)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rock.protocol.action import Answer
from rock.protocol.sandbox import NAME_PATTERN, SandboxConfig
from rock.protocol.wire import Wire

MOST_MEMBERS = 1000
MOST_OF_TENANT = 100  # pools
BUDGET = 64  # default of the live configuration

PoolName = Annotated[str, Field(pattern=NAME_PATTERN)]


class SetPool(Wire):
    """Define a pool, or replace its definition. image, snapshot: one of them. memory, network: of the sandboxes that
    will use it: a sandbox comes from the pool if its network is the same, and its /dev/shm has the same size. minimum,
    maximum: number of unclaimed sandboxes on each worker, or on the worker of the snapshot; between them it follows the
    recent demand."""

    image: str | None = Field(default=None, min_length=1, max_length=512)
    snapshot: str | None = Field(default=None, min_length=1, max_length=64)
    memory: str = Field(default="8g", max_length=32)
    network: Literal["none", "nat"] = "none"
    minimum: int = Field(default=1, ge=0, le=MOST_MEMBERS)
    maximum: int = Field(default=8, ge=1, le=MOST_MEMBERS)

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if (self.image is None) == (self.snapshot is None):
            raise ValueError("a pool has an image or a snapshot; give one of them")
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self

    def config(self) -> SandboxConfig:
        """The config of its members. ValidationError."""
        source = {"snapshot": self.snapshot} if self.image is None else {"image": self.image}
        return SandboxConfig.model_validate({**source, "memory": self.memory, "network": self.network})


class PoolInfo(Answer):
    """A pool, and its state on all workers together. ready: unclaimed sandboxes. target: the number that there should
    be. hits, misses: creates that got one, and that did not, since the pool was defined or its worker started.
    hit_rate: None without a claim. errors: why sandboxes were not made, by worker. snapshot: its id."""

    name: str
    tenant: str = ""
    image: str = ""
    snapshot: str | None = None
    memory: str = ""
    network: str = "none"
    minimum: int = 0
    maximum: int = 0
    created_at: float = 0.0
    ready: int = 0
    target: int = 0
    hits: int = 0
    misses: int = 0
    hit_rate: float | None = None
    errors: dict[str, str] = Field(default_factory=dict)


class PoolList(Answer):
    items: list[PoolInfo]


# ---- in the store ----


class StoredPool(Wire):
    """A definition. config: of its members, with the id, the image and the worker of its snapshot."""

    tenant: str
    name: str
    created_at: float
    config: SandboxConfig
    minimum: int
    maximum: int

    @property
    def id(self) -> str:
        """Its name among the pools of all tenants."""
        return f"{self.tenant}/{self.name}" if self.tenant else self.name

    def stored(self) -> str:
        """The encoding for the store, which `model_validate_json` reads."""
        return self.model_dump_json(exclude={"config": self.config.unchosen}, exclude_none=True)


# ---- node plane ----


class NodePool(Wire):
    """A pool for a worker. pool: its tenant and name."""

    pool: str = Field(max_length=200)
    config: SandboxConfig
    minimum: int = Field(ge=0, le=MOST_MEMBERS)
    maximum: int = Field(ge=1, le=MOST_MEMBERS)


class NodePools(Wire):
    """All pools of a worker, which together have at most `budget` unclaimed sandboxes."""

    pools: list[NodePool] = Field(default_factory=list, max_length=10_000)
    budget: int = Field(default=BUDGET, ge=0, le=100_000)


class NodePoolState(Answer):
    """As of PoolInfo."""

    ready: int = 0
    target: int = 0
    hits: int = 0
    misses: int = 0
    error: str = ""


class NodePoolStates(Answer):
    """The pools of a worker, by tenant and name."""

    pools: dict[str, NodePoolState] = Field(default_factory=dict)
