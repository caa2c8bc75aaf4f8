"""Whether more sandboxes fit a quota: pure. A store asks inside the transaction that adds them."""

from __future__ import annotations

from dataclasses import dataclass

from rock.errors import QuotaExceeded
from rock.protocol.keys import Quota
from rock.protocol.sandbox import SandboxConfig, State

COUNTED = (State.PENDING, State.RUNNING, State.STOPPING)  # states in which a sandbox takes of its tenant's quota
WINDOW = 60.0  # seconds
_SOMETHING_STOPS = 5.0  # seconds to wait when only a stop makes room


@dataclass(frozen=True)
class Used:
    """What a tenant has now. starts: within the window; oldest: seconds since the first of them."""

    sandboxes: int = 0
    cpus: float = 0.0
    memory: int = 0
    starts: int = 0
    oldest: float = 0.0


def cpus_of(config: SandboxConfig) -> float:
    """What it counts as: a share that may grow to a cap is that cap."""
    return max(config.cpus, config.limit_cpus or 0.0)


def check(quota: Quota, used: Used, config: SandboxConfig, count: int = 1) -> None:
    """Raise QuotaExceeded when `count` of them do not fit."""
    wanted = (
        ("sandboxes", quota.sandboxes, used.sandboxes, count),
        ("cpus", quota.cpus, used.cpus, cpus_of(config) * count),
        ("bytes of memory", quota.memory_bytes, used.memory, config.memory_bytes * count),
    )
    for what, limit, have, more in wanted:
        if limit is not None and have + more > limit * (1 + 1e-9):
            raise QuotaExceeded(
                f"the quota of this key is {limit:g} {what} at once; {have:g} are in use and {more:g} were asked for",
                hint="stop some first",
                details={"quota": what, "limit": limit, "used": have, "retry_after": _SOMETHING_STOPS},
            )
    limit = quota.creates_per_minute
    if limit is not None and used.starts + count > limit:
        wait = max(0.0, WINDOW - used.oldest) if limit else WINDOW
        raise QuotaExceeded(
            f"the quota of this key is {limit} starts a minute",
            hint=f"ask again in {wait:.0f} s",
            details={"quota": "creates_per_minute", "limit": limit, "used": used.starts, "retry_after": wait},
        )


def fitting(quota: Quota, used: Used, config: SandboxConfig, count: int) -> int:
    """How many of `count` fit. QuotaExceeded when none does."""
    check(quota, used, config)
    least, most = 1, count
    while least < most:
        middle = (least + most + 1) // 2
        try:
            check(quota, used, config, middle)
        except QuotaExceeded:
            most = middle - 1
        else:
            least = middle
    return least
