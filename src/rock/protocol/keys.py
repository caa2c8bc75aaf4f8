"""Keys: who calls, what a key may do, and how much its tenant may have.

A key is `rock_TENANT_SECRET`. The server keeps SHA-256 of the whole key and nothing it could be made of again. A fast
digest is right here: the secret is 256 random bits, so there is no dictionary that a slow one would protect from, and
it is computed with every request.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import Field, field_validator

from rock.errors import Forbidden
from rock.protocol.sandbox import Wire, parse_size

TENANT_PATTERN = r"^[a-z][a-z0-9]{0,31}$"
CALLER = "rock.caller"  # in an ASGI scope: a Caller
_KEY = re.compile(rb"rock_([a-z][a-z0-9]{0,31})_[A-Za-z0-9_-]{43}")


class Access(StrEnum):
    """What a route takes. A key has those it was given; the server's own key has all.

    open: no key. read: look, files and logs included. run: act inside sandboxes. create: make, stop, restart, archive
    and delete them. images: change what all tenants share, which is images and registered environments. admin: keys,
    workers, and sandboxes without isolation or on the server's own network. worker: join as one; for
    no key that is made.
    """

    OPEN = "open"
    READ = "read"
    RUN = "run"
    CREATE = "create"
    IMAGES = "images"
    ADMIN = "admin"
    WORKER = "worker"


USUAL = (Access.READ, Access.RUN, Access.CREATE)


class Quota(Wire):
    """How much the tenant of a key may have at once, all its sandboxes that start, run or stop; None: no limit.

    creates_per_minute: starts, restarts included, within any 60 seconds.
    """

    sandboxes: int | None = Field(default=None, ge=0, le=1_000_000)
    cpus: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    memory: str | None = None
    creates_per_minute: int | None = Field(default=None, ge=0, le=100_000)

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_size(self.memory)

    @property
    def is_limit(self) -> bool:
        return any(value is not None for value in (self.sandboxes, self.cpus, self.memory, self.creates_per_minute))


class CreateKey(Wire):
    """A key to be. tenant: whose sandboxes it is for; a new tenant unless one is named. Several keys of a tenant see
    the same sandboxes."""

    name: str = Field(min_length=1, max_length=100)
    tenant: str | None = Field(default=None, pattern=TENANT_PATTERN)
    scopes: list[Access] = Field(default_factory=lambda: list(USUAL), max_length=10)
    quota: Quota = Field(default_factory=Quota)

    @field_validator("scopes")
    @classmethod
    def _scopes(cls, value: list[Access]) -> list[Access]:
        if not value or Access.OPEN in value or Access.WORKER in value:
            raise ValueError("a key has some of read, run, create, images and admin")
        return sorted({*value, Access.READ}, key=list(Access).index)  # whoever acts may look


class KeyInfo(Wire):
    """A key as the server remembers it. Times are seconds since the epoch."""

    id: str
    name: str
    tenant: str
    scopes: list[Access]
    quota: Quota
    created_at: float
    revoked_at: float | None = None


class NewKey(KeyInfo):
    """`key` is told this once."""

    key: str = Field(repr=False)


class KeyList(Wire):
    items: list[KeyInfo]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. tenant: None is the server's owner, to whom nothing is hidden."""

    tenant: str | None
    scopes: frozenset[Access]
    quota: Quota | None = None
    key_id: str = ""

    @property
    def owner(self) -> str:
        """What records say of whose they are."""
        return self.tenant or ""

    def require(self, access: Access) -> None:
        """Raise Forbidden when its key is not for that."""
        if access not in self.scopes and access is not Access.OPEN:
            raise Forbidden(
                f"this key may not do that: it has {', '.join(sorted(self.scopes))}, not {access.value}",
                hint="ask the server's owner for a key with that scope",
            )


OPERATOR = Caller(None, frozenset(Access))
WORKER = Caller("", frozenset({Access.WORKER}))
NOBODY = Caller("", frozenset())  # without a key, on a route that is open


def caller_of(scope: Any) -> Caller:
    """Who sent the request of an ASGI scope. One that nobody was asked about is refused: it came past the door."""
    caller = scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise RuntimeError("a request without a caller")
    return caller


def tenant_of(key: bytes) -> str | None:
    """Which tenant a key says it is of; None for what is no tenant's key. It may be no key at all."""
    found = _KEY.fullmatch(key.removeprefix(b"Bearer "))
    return found[1].decode() if found else None


def digest_of(key: bytes) -> str | None:
    """What a key is known by; None for what is no key of ours."""
    return hashlib.sha256(key).hexdigest() if _KEY.fullmatch(key) else None
