"""Each command of a sandbox, as metrics and traces tell of it."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Literal

from rock.protocol.sandbox import SandboxConfig
from rock.telemetry import tracing
from rock.telemetry.metrics import REGISTRY

SECONDS = REGISTRY.histogram("rock_command_seconds", "From a command's arrival at its sandbox to its end", "kind")
_SERIES = {kind: SECONDS.of(kind) for kind in ("session", "program", "background")}
_LONGEST = 256


class command:
    """Context of one command, or of the start of one in the background, for metrics and traces. What it starts finds
    the span in its environment."""

    __slots__ = ("_began", "_kind", "_span")

    def __init__(
        self, kind: Literal["session", "program", "background"], sandbox_id: str, config: SandboxConfig
    ) -> None:
        self._kind = kind
        self._span: contextlib.AbstractContextManager[object] | None = None
        if tracing.tracer() is not None:
            said: dict[str, tracing.Value] = {"rock.sandbox_id": sandbox_id, "rock.image": config.image[:_LONGEST]}
            said |= {f"rock.label.{name[:_LONGEST]}": value[:_LONGEST] for name, value in config.labels.items()}
            self._span = tracing.span(kind, said)
        self._began = time.perf_counter()

    def __enter__(self) -> None:
        if self._span is not None:
            self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._span is not None:
                self._span.__exit__(kind, error, trace)
        finally:
            _SERIES[self._kind].observe(time.perf_counter() - self._began)
