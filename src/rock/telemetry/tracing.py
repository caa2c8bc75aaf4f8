"""Spans of a trace, for an optional tracer. Without a tracer nothing is made, and what a caller sent is passed on.

    a call of the SDK ──► the request at a server ──► (the request at its rocklet) ──► the command or process

Each names the one before it as its parent, by a W3C `traceparent`: a header between processes, the variable TRACEPARENT
in the environment of what is executed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from rock.telemetry.context import CURRENT, Context, new_id

Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool


class Span(Protocol):
    """Something that is being done. traceparent: what is begun by it has this for its parent."""

    traceparent: str

    def tell(self, name: str, value: Value) -> None: ...

    def end(self, error: str = "") -> None:
        """It is over. error: what went wrong."""
        ...


class Tracer(Protocol):
    """What makes spans, and brings them to where they are looked at."""

    def start(self, name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Value]) -> Span: ...


_tracers: list[Tracer] = []  # the one in use is the last


def use(tracer: Tracer) -> None:
    """Have spans made by it, until it is dropped."""
    _tracers.append(tracer)


def drop(tracer: Tracer) -> None:
    if tracer in _tracers:
        _tracers.remove(tracer)


def tracer() -> Tracer | None:
    return _tracers[-1] if _tracers else None


@contextlib.contextmanager
def span(name: str, attributes: Mapping[str, Value] | None = None) -> Iterator[Span | None]:
    """A span around what is done within, as a part of what is being done now; None without a tracer."""
    made_by, outer = tracer(), CURRENT.get()
    if made_by is None:
        yield None
        return
    inner = Context(outer.request_id if outer else new_id(), outer.traceparent if outer else None)
    if outer is not None:
        inner.sandbox_id, inner.tenant, inner.route = outer.sandbox_id, outer.tenant, outer.route
    made = made_by.start(name, "internal", inner.traceparent, attributes or {})
    inner.traceparent = made.traceparent
    token = CURRENT.set(inner)
    try:
        yield made
    except BaseException as error:
        made.end(f"{type(error).__name__}: {error}")
        raise
    else:
        made.end()
    finally:
        CURRENT.reset(token)


def environment() -> dict[str, str]:
    """What a process that is started now should have in its environment to go on with the trace."""
    context = CURRENT.get()
    return {} if context is None or context.traceparent is None else {"TRACEPARENT": context.traceparent}
