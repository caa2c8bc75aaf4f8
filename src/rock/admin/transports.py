"""How requests get to a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar

FENCE: ContextVar[int | None] = ContextVar("fence", default=None)
"""The token of the lease by which a command is given; None for what a client asked for."""

Transport = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, path, query, body
# the same with a body as it comes, or one that is whole; what it gives is the status, then the answer as it comes
StreamTransport = Callable[[str, str, str, AsyncIterator[bytes] | None, bytes], AsyncGenerator[int | bytes]]
