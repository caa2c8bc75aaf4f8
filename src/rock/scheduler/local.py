"""A pure filter and score over what the workers report."""

from __future__ import annotations

from collections.abc import Mapping

from rock.errors import InvalidConfig, NoCapacity
from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import SandboxConfig


class LocalScheduler:
    """Places on the worker with the most memory free a sandbox. Limits may be overcommitted: only what is really free
    counts, and a sandbox larger than a whole machine is refused."""

    def place(self, config: SandboxConfig, workers: Mapping[str, NodeStatus]) -> str:
        if not workers:
            raise NoCapacity("no worker is known", hint="start one with: rocklet --join")
        fit = {n: w for n, w in workers.items() if config.memory_bytes <= w.memory_total and config.cpus <= w.cpus}
        if not fit:
            cpus = max(w.cpus for w in workers.values())
            memory = max(w.memory_total for w in workers.values()) / (1 << 30)
            if config.cpus > cpus:
                raise InvalidConfig(f"Requested CPUs {config.cpus} exceed the maximum allowed {cpus}")
            raise InvalidConfig(f"Requested memory {config.memory} exceeds the largest machine's {memory:.1f}g")
        free = {n: w for n, w in fit.items() if w.sandboxes < w.sandbox_limit}
        if not free:
            raise NoCapacity("every worker is at its limit of sandboxes", hint="stop some, or retry later")
        return max(free, key=lambda name: (free[name].memory_free / (1 + free[name].sandboxes), name))
