"""Metrics of the duration of store operations, by operation."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rock.store.base import Store
from rock.telemetry.metrics import REGISTRY

_OPERATIONS = ("insert", "get", "by_key", "put", "delete", "list", "count", "tally", "prune", "key_of", "take_lease")
SECONDS = REGISTRY.histogram(
    "rock_store_seconds", "Time of an operation of the store", "operation",
    bounds=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
)  # fmt: skip


def timed(store: Store) -> Store:
    """The same store, with operations that are measured from now on."""
    for name in _OPERATIONS:
        setattr(store, name, _timed(getattr(store, name), name))
    return store


def _timed(work: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    series = SECONDS.of(name)

    @functools.wraps(work)
    async def measured(*args: Any, **given: Any) -> Any:
        began = time.perf_counter()
        try:
            return await work(*args, **given)
        finally:
            series.observe(time.perf_counter() - began)

    return measured
