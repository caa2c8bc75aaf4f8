"""What the registry of environments is asked and what it tells; the same classes for both faces of the SDK."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from rock import settings


@dataclass
class EnvHubClientConfig:
    """Where the registry is: ROCK_ENVHUB_BASE_URL unless given."""

    base_url: str = field(default_factory=settings.envhub_url)


@dataclass
class RockEnvInfo:
    """A registered environment. create_at, update_at: ISO 8601 in UTC; the registry sets them."""

    env_name: str
    image: str
    owner: str = ""
    create_at: str = ""
    update_at: str = ""
    description: str = ""
    tags: list[str] = field(default_factory=list)
    extra_spec: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """An answer of the registry; what a newer one adds is left out. TypeError when a name or image is missing."""
        names = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})
