"""Sessions of MCP clients over HTTP, in the memory of one server. A client whose session is unknown opens another."""

from __future__ import annotations

import time
from collections import OrderedDict

from rock.dialects.mcp.context import IDLE, Session
from rock.dialects.mcp.sandboxes import IMAGE
from rock.errors import InvalidConfig, QuotaExceeded, Unsupported
from rock.http.asgi import validate
from rock.protocol.sandbox import SandboxConfig

FIELDS = ("image", "memory", "cpus", "network")
FORGOTTEN = 3600.0  # seconds without a request after which a session is forgotten; its sandbox is stopped before
MOST, MOST_OF_ONE = 10_000, 256  # sessions in total, and of one tenant


class Sessions:
    """Sessions by id, least recently used first."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Session] = OrderedDict()

    def add(self, session: Session) -> None:
        """QuotaExceeded for a tenant with too many sessions."""
        self._expire()
        own = sum(known.owner == session.owner for known in self._known.values())
        if own >= MOST_OF_ONE or len(self._known) >= MOST:
            raise QuotaExceeded(f"there are {own} MCP sessions of this key's tenant, of at most {MOST_OF_ONE}",
                                hint="end sessions with DELETE, or wait until unused ones are forgotten",
                                details={"retry_after": 60})
        session.used_at = time.monotonic()
        self._known[session.id] = session

    def find(self, session_id: str, owner: str) -> Session | None:
        """The session of this id, if it belongs to this tenant."""
        self._expire()
        session = self._known.get(session_id)
        if session is None or session.owner != owner:
            return None
        session.used_at = time.monotonic()
        self._known.move_to_end(session_id)
        return session

    def remove(self, session: Session) -> None:
        self._known.pop(session.id, None)

    def _expire(self) -> None:
        limit = time.monotonic() - FORGOTTEN
        while self._known:
            session = next(iter(self._known.values()))
            if session.used_at > limit or session.running:
                return
            del self._known[session.id]


def session_of(owner: str, options: dict[str, str]) -> Session:
    """A session with the options of a query or a command line. InvalidConfig."""
    unknown = sorted(set(options) - {*FIELDS, "sandbox"})
    if unknown:
        raise InvalidConfig(f"unknown options of an MCP session: {', '.join(unknown)[:200]}",
                            hint=f"the options are sandbox, {', '.join(FIELDS)}")
    sandbox_id = options.get("sandbox")
    if sandbox_id is not None and len(options) > 1:
        raise InvalidConfig("sandbox names an existing sandbox, so its other options cannot be set",
                            hint=f"leave {', '.join(name for name in FIELDS if name in options)} out")
    fields = {"image": IMAGE, "memory": "2g", "auto_clear_seconds": IDLE,
              **{name: options[name] for name in FIELDS if name in options}}  # fmt: skip
    if fields.get("network") not in (None, "none", "nat"):
        raise Unsupported(f"network={fields['network']!r} is not available for an MCP session", hint="use none or nat")
    config = validate(SandboxConfig, fields)
    return Session(owner, config, sandbox_id=sandbox_id, is_given=sandbox_id is not None)
