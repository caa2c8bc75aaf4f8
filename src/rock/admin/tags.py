"""Metrics by tags that the owner of the server chooses: tenants, experiments, users, images and labels of sandboxes.

The live configuration names the tags (`metrics.tags`). Each tag has at most 100 values; further ones are counted as
"other", so that no client can make the metrics grow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rock.protocol.configuration import LABEL
from rock.protocol.sandbox import Cause, State
from rock.store.base import Record
from rock.telemetry.metrics import OTHER, REGISTRY

_MOST_VALUES = 100  # of one tag
_MOST_TAGS = 50  # that a process has ever counted
_LONGEST = 100  # characters of a value

CREATES = REGISTRY.counter(
    "rock_tagged_creates_total", "Starts of sandboxes by the configured tags", "tag", "value", "outcome"
)  # fmt: skip
SECONDS = REGISTRY.counter(
    "rock_tagged_sandbox_seconds_total", "Run time of ended sandboxes by the configured tags", "tag", "value"
)  # fmt: skip
CPU_SECONDS = REGISTRY.counter(
    "rock_tagged_cpu_seconds_total", "Requested CPUs times run time of ended sandboxes by the configured tags", "tag",
    "value",
)  # fmt: skip


class MetricTags:
    """Counts starts and run times for the tags that are configured now."""

    def __init__(self) -> None:
        self.tags: Sequence[str] = ()
        self._values: dict[str, set[str]] = {}

    def step(self, before: Record, after: Record) -> None:
        """Count a step of a sandbox: the end of a start, and the end of its run."""
        if not self.tags or before.state is after.state:
            return
        if before.state is State.PENDING and after.state is State.RUNNING:
            self._started(after, "running")
        elif before.state is State.PENDING and after.info.cause is Cause.START_FAILED:
            self._started(after, "failed")
        elif after.state is State.STOPPED and after.info.started_at is not None:
            self._stopped(after, after.info.started_at)

    def _started(self, record: Record, outcome: str) -> None:
        for tag, value in self._of(record):
            CREATES.of(tag, value, outcome).add()

    def _stopped(self, record: Record, began: float) -> None:
        seconds = max(0.0, (record.info.stopped_at or time.time()) - began)
        for tag, value in self._of(record):
            SECONDS.of(tag, value).add(seconds)
            CPU_SECONDS.of(tag, value).add(seconds * record.config.cpus)

    def _of(self, record: Record) -> list[tuple[str, str]]:
        return [(tag, self._bounded(tag, value)) for tag in self.tags if (value := value_of(record, tag))]

    def _bounded(self, tag: str, value: str) -> str:
        if tag not in self._values and len(self._values) >= _MOST_TAGS:
            return OTHER
        known = self._values.setdefault(tag, set())
        value = value[:_LONGEST]
        if value not in known:
            if len(known) >= _MOST_VALUES:
                return OTHER
            known.add(value)
        return value


def value_of(record: Record, tag: str) -> str:
    """The value of a tag for a sandbox; "" when it has none."""
    info = record.info
    if tag.startswith(LABEL):
        return info.labels.get(tag.removeprefix(LABEL), "")
    return {"tenant": record.tenant, "experiment": info.experiment_id, "user": info.user_id, "image": info.image,
            "worker": info.worker}.get(tag) or ""  # fmt: skip
