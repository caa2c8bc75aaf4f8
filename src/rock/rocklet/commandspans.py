"""Each command of a sandbox, as metrics and traces tell of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from rock.protocol.sandbox import SandboxConfig
from rock.telemetry import tracing
from rock.telemetry.metrics import REGISTRY

SECONDS = REGISTRY.histogram("rock_command_seconds", "From a command's arrival at its sandbox to its end", "kind")
_SERIES = {kind: SECONDS.of(kind) for kind in ("session", "program", "background")}
_LONGEST = 256


@contextlib.contextmanager
def command(
    kind: Literal["session", "program", "background"], sandbox_id: str, config: SandboxConfig
) -> Iterator[None]:
    """Around one command, or the start of one in the background. What it starts finds the span in its environment."""
    began = time.perf_counter()
    try:
        if tracing.tracer() is None:
            yield
            return
        said: dict[str, tracing.Value] = {"rock.sandbox_id": sandbox_id, "rock.image": config.image[:_LONGEST]}
        said |= {f"rock.label.{name[:_LONGEST]}": value[:_LONGEST] for name, value in config.labels.items()}
        with tracing.span(kind, said):
            yield
    finally:
        _SERIES[kind].observe(time.perf_counter() - began)
