"""A call as a part of a trace: of the one that the program is in by its own use of OpenTelemetry, else, with
ROCK_TRACE, of one that begins here. Without either nothing is made, and nothing of OpenTelemetry is imported."""

from __future__ import annotations

import atexit
import os
import sys
from functools import cache

from rock import settings
from rock.protocol.routes import name_of
from rock.telemetry import tracing
from rock.telemetry.context import CURRENT, REQUEST_ID, TRACEPARENT


class Call:
    """headers: lines that go with the request."""

    __slots__ = ("_span", "headers")

    def __init__(self, headers: dict[str, str], span: tracing.Span | None = None) -> None:
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._span = span

    def end(self, status: int, error: str = "") -> None:
        """Answered with a status, or with none for a reason."""
        if self._span is not None:
            self._span.tell("http.response.status_code", status)
            self._span.end(error or (f"status {status}" if status >= 400 else ""))


def begin(method: str, target: str, wanted: bool) -> Call | None:
    """What a request is a part of; None for nothing, which is the usual. wanted: see ROCK_TRACE."""
    context = CURRENT.get()
    if context is not None:  # a server's own, made for the sake of a request to it
        headers = {REQUEST_ID: context.request_id}
        return Call(headers if context.traceparent is None else {**headers, TRACEPARENT: context.traceparent})
    within = "opentelemetry.sdk.trace" in sys.modules
    return _begin(method, target, wanted) if wanted or within else None


def _begin(method: str, target: str, wanted: bool) -> Call | None:
    path = target.partition("?")[0]
    said: dict[str, tracing.Value] = {"http.request.method": method, "url.path": path}
    name = f"rock {name_of(method, path) or method}"
    span: tracing.Span
    if "opentelemetry.sdk.trace" in sys.modules:
        from rock.telemetry import otel

        if otel.current() is not None:
            span = otel.follow(name, said)
            return Call({TRACEPARENT: span.traceparent}, span)
    if not wanted:
        return None
    tracer = _own()
    if tracer is None:
        return Call({TRACEPARENT: f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"})
    span = tracer.start(name, "client", None, said)
    return Call({TRACEPARENT: span.traceparent}, span)


@cache
def _own() -> tracing.Tracer | None:
    """What brings this process's spans to where the settings say, if they do and it is installed."""
    endpoint, text = settings.otel()
    if not endpoint:
        return None
    try:
        from rock.telemetry.otel import Export
    except ImportError:
        return None
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    export = Export(endpoint, {name.strip(): value.strip() for name, _, value in pairs}, "rock-sdk")
    atexit.register(export.close)
    return export
