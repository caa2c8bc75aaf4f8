"""Sessions that a client of OpenEnv creates over HTTP, in the memory of one server."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from rock.dialects.api import Api
from rock.dialects.environments import IDLE
from rock.dialects.openenv.episode import Episode
from rock.dialects.openenv.messages import CAPACITY_REACHED, SESSION_ERROR, VALIDATION_ERROR, Failure

MOST, MOST_OF_ONE = 10_000, 512  # sessions in total, and of one tenant


@dataclass
class HeldSession:
    """A session. attached: a socket uses it."""

    owner: str
    episode: Episode
    attached: bool = False


class SessionTable:
    """The sessions of all tenants, by id. An unused one is forgotten; its environment is closed by its idle timeout."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, HeldSession] = OrderedDict()

    def add(self, owner: str, episode: Episode) -> str:
        """Failure for a tenant with too many."""
        self._expire()
        own = sum(kept.owner == owner for kept in self._kept.values())
        if own >= MOST_OF_ONE or len(self._kept) >= MOST:
            raise Failure(CAPACITY_REACHED, f"there are {own} sessions, of at most {MOST_OF_ONE}",
                          {"active_sessions": own, "max_sessions": MOST_OF_ONE}, 429)
        session_id = secrets.token_hex(16)
        self._kept[session_id] = HeldSession(owner, episode)
        return session_id

    def find(self, owner: str, env_id: str, session_id: Any) -> HeldSession | None:
        self._expire()
        kept = self._kept.get(session_id) if isinstance(session_id, str) else None
        return kept if kept is not None and kept.owner == owner and kept.episode.env_id == env_id else None

    def remove(self, session_id: str) -> None:
        self._kept.pop(session_id, None)

    def _expire(self) -> None:
        limit = time.monotonic() - IDLE
        old = [name for name, kept in self._kept.items() if kept.episode.used_at < limit and not kept.attached]
        for name in old:
            del self._kept[name]


@dataclass(frozen=True)
class Episodes:
    """The sessions of one caller with one environment. api: outlives a request, so it has no client."""

    table: SessionTable
    api: Api
    owner: str
    env_id: str

    def one_off(self) -> Episode:
        return Episode(self.api, self.env_id)

    def create(self) -> str:
        return self.table.add(self.owner, self.one_off())

    def kept(self, session_id: Any) -> HeldSession:
        """Failure for an unknown session."""
        kept = self.table.find(self.owner, self.env_id, session_id)
        if kept is None:
            raise Failure(SESSION_ERROR, f"there is no session {str(session_id)[:64]!r}; it has ended, or the server "
                                         "has restarted")
        return kept

    def find(self, session_id: Any) -> Episode | None:
        """The episode of a session; None without an id. Failure for an unknown one."""
        return None if session_id is None else self.kept(session_id).episode

    async def close(self, session_id: Any) -> bool:
        """End a session and its environment. Failure."""
        if session_id is None:
            raise Failure(VALIDATION_ERROR, "session_id is missing")
        kept = self.kept(session_id)
        self.table.remove(session_id)
        await kept.episode.close()
        return True
