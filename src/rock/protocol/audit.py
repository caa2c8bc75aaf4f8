"""Messages of the audit log: which key performed which control-plane call that changes something.

An entry names the route, not the body: configurations may contain secrets.
"""

from __future__ import annotations

from rock.protocol.action import Answer


class AuditEntry(Answer):
    """One call. number: grows with each entry. at: seconds since the epoch. tenant, key_id: of the key; both "" for the
    server's owner. action: the name of the route in protocol/rows.py, `rock:CALL` for calls of ROCK's dialect, or login
    and logout of the web page. target: the id or name of the changed resource; "" where the call failed before it had
    one. status: of the HTTP response; 0 where the connection ended first. address: of the client."""

    number: int = 0
    at: float
    tenant: str = ""
    key_id: str = ""
    action: str
    target: str = ""
    status: int = 0
    request_id: str = ""
    address: str = ""


class AuditList(Answer):
    """`next`: the `before` of the next page; None at the end."""

    items: list[AuditEntry]
    next: int | None = None
