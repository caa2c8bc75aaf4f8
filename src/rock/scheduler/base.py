"""Which worker takes a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import SandboxConfig


class Scheduler(Protocol):
    def place(self, config: SandboxConfig, workers: Mapping[str, NodeStatus]) -> str:
        """The name of a worker. InvalidConfig when none could ever take it, NoCapacity when none can now."""
        ...
