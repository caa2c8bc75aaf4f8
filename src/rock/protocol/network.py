"""What a sandbox connected to, or tried to."""

from __future__ import annotations

from pydantic import Field

from rock.protocol.action import Answer


class Connection(Answer):
    """One connection, or one DNS question that was refused. Times are seconds since the epoch.

    number: counts up from 1. protocol: "tls" or "http" where a name was looked for, "dns", else "tcp". host: the name,
    as the client said it or as it was found by DNS last. address, port: where it was meant to go. allowed: whether the
    policy allowed it; reason: why not, or why it failed or broke. sent, received: bytes, as the sandbox sees it.
    ended_at: None while it is open.
    """

    number: int
    at: float
    ended_at: float | None = None
    protocol: str = "tcp"
    host: str | None = None
    address: str = ""
    port: int = 0
    allowed: bool = False
    reason: str | None = None
    sent: int = 0
    received: int = 0


class ConnectionList(Answer):
    """The last connections of a sandbox, oldest first. total: of all; dropped: how many are no longer known."""

    items: list[Connection] = Field(default_factory=list)
    total: int = 0
    dropped: int = 0
