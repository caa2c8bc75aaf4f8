"""What the control plane counts."""

from __future__ import annotations

from rock.telemetry.metrics import REGISTRY

CREATES = REGISTRY.counter(
    "rock_sandbox_creates_total", "Sandboxes asked for: running, failed or refused, with the code of the error",
    "outcome", "cause",
)  # fmt: skip
STARTS = REGISTRY.histogram("rock_sandbox_start_seconds", "From a pending record to a running sandbox", "outcome")
ENDS = REGISTRY.counter("rock_sandbox_ends_total", "Sandboxes that ended, by why", "cause")
