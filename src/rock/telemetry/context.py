"""What is being done now, and for whom. A request's context goes with every task that its work starts."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
_SANE = re.compile(rb"[A-Za-z0-9._:/+=~@-]{1,128}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Context:
    """One request. route: the name of its row of the wire. traceparent: the span that what is begun now belongs to, as
    W3C writes it, or none. What a caller may choose is bounded by who fills this in."""

    __slots__ = ("request_id", "route", "sandbox_id", "tenant", "traceparent")

    def __init__(self, request_id: str, traceparent: str | None = None) -> None:
        self.request_id = request_id
        self.traceparent = traceparent
        self.sandbox_id = ""
        self.tenant = ""
        self.route = ""


CURRENT: ContextVar[Context | None] = ContextVar("rock.request", default=None)


def new_id() -> str:
    """An id for a request that came without one: 64 random bits, of which nothing depends."""
    return f"{random.getrandbits(64):016x}"


def sane_id(value: bytes) -> str | None:
    """The id that a caller gave its request; None when it is none that could stand in a line of a log."""
    return value.decode("ascii") if _SANE.fullmatch(value) else None


def sane_traceparent(value: str) -> str | None:
    """A `traceparent` of version 00; None for what is none."""
    return value if _TRACEPARENT.fullmatch(value) else None
