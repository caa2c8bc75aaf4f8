"""What an environment is before there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EnvSpec:
    """An environment that can be made.

    id: as its own package knows it. protocol: how it is spoken to inside. image: of the sandbox that hosts it.
    requirements: what pip installs for it. kwargs: given to it when it is made.
    note: what a user has to know, for example what it needs beyond a sandbox without a network.
    """

    id: str
    image: str
    requirements: tuple[str, ...]
    protocol: Literal["gem"] = "gem"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
