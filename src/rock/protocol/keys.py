"""API keys: the caller of a request, the access rights of a key, the quota of its tenant, and the audit log.

A key is `rock_TENANT_SECRET`. The server stores only SHA-256 of the whole key. A fast digest is sufficient: the secret
is 256 random bits, so a dictionary attack is not possible, and the digest is computed for every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from rock.errors import Forbidden
from rock.protocol.sandbox import parse_size
from rock.protocol.wire import Wire

TENANT_PATTERN = r"^[a-z][a-z0-9]{0,31}$"
CALLER = "rock.caller"  # in an ASGI scope: a Caller
GRANTED = "rock.granted"  # in an ASGI scope: a Caller that a dialect has authenticated by a credential of its own
_KEY = re.compile(rb"rock_([a-z][a-z0-9]{0,31})_[A-Za-z0-9_-]{43}")


class Access(StrEnum):
    """Access rights that routes require. A key has those it was given; the server's own key has all.

    open: no key. read: view, including files and logs. run: act inside sandboxes. create: create, stop, restart,
    archive and delete them. images: change resources that all tenants share: images and registered environments. admin:
    keys, workers, and sandboxes without isolation or on the server's own network. worker: join as a worker; cannot be
    given to a key.
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
    """Limits of a tenant for all its sandboxes that start, run or stop at the same time; None: no limit.

    creates_per_minute: starts, including restarts, within any 60 seconds.
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
    """A request for a key. tenant: the tenant of the key; a new tenant when omitted. Several keys of a tenant see the
    same sandboxes."""

    name: str = Field(min_length=1, max_length=100)
    tenant: str | None = Field(default=None, pattern=TENANT_PATTERN)
    scopes: list[Access] = Field(default_factory=lambda: list(USUAL), max_length=10)
    quota: Quota = Field(default_factory=Quota)

    @field_validator("scopes")
    @classmethod
    def _scopes(cls, value: list[Access]) -> list[Access]:
        if not value or Access.OPEN in value or Access.WORKER in value:
            raise ValueError("a key has some of read, run, create, images and admin")
        return sorted({*value, Access.READ}, key=list(Access).index)  # every right includes read


class KeyInfo(Wire):
    """A key as the server stores it. Times are seconds since the epoch."""

    id: str
    name: str
    tenant: str
    scopes: list[Access]
    quota: Quota
    created_at: float
    revoked_at: float | None = None


class NewKey(KeyInfo):
    """`key` is returned only once."""

    key: str = Field(repr=False)


class KeyList(Wire):
    items: list[KeyInfo]


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. tenant: None is the server's owner, who sees all tenants. worker: the only worker as
    which its key may join; "" is any."""

    tenant: str | None
    scopes: frozenset[Access]
    quota: Quota | None = None
    key_id: str = ""
    worker: str = ""

    @property
    def owner(self) -> str:
        """The owner as stored in records."""
        return self.tenant or ""

    def require(self, access: Access) -> None:
        """Raise Forbidden when its key lacks that access right."""
        if access not in self.scopes and access is not Access.OPEN:
            raise Forbidden(
                f"this key may not do that: it has {', '.join(sorted(self.scopes))}, not {access.value}",
                hint="ask the server's owner for a key with that scope",
            )


OPERATOR = Caller(None, frozenset(Access))
WORKER = Caller("", frozenset({Access.WORKER}))
NOBODY = Caller("", frozenset())  # a request without a key, on an open route


# ---- keys of sandbox pods ----
#
# Code in a sandbox may read the environment of the rocklet of its pod. The key there joins as the worker of this pod
# only, and is known to no other rocklet.

POD_PREFIX = "rock-sandbox-"  # of the names of pods, and of their workers
_POD_KEY = re.compile(rb"pod\.(rock-sandbox-[a-z0-9-]{1,50})\.[0-9a-f]{64}")


def pod_key(worker_key: str, name: str) -> str:
    """The key of the rocklet in the pod of that name."""
    return f"pod.{name}.{hmac.new(worker_key.encode(), f'rock pod {name}'.encode(), 'sha256').hexdigest()}"


def pod_of(key: bytes, worker_key: bytes) -> str | None:
    """The pod whose key this is; None for any other key."""
    found = _POD_KEY.fullmatch(key)
    if found is None or not worker_key:
        return None
    name = found[1].decode()
    return name if hmac.compare_digest(key, pod_key(worker_key.decode(), name).encode()) else None


def caller_of(scope: Any) -> Caller:
    """The caller of the request of an ASGI scope. A scope without a caller is rejected, because it was not
    authenticated."""
    caller = scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise RuntimeError("a request without a caller")
    return caller


def tenant_of(key: bytes) -> str | None:
    """The tenant that a key names; None when it does not have the format of a tenant's key. The key may be invalid."""
    found = _KEY.fullmatch(key.removeprefix(b"Bearer "))
    return found[1].decode() if found else None


def digest_of(key: bytes) -> str | None:
    """The digest by which a key is stored; None for other formats."""
    return hashlib.sha256(key).hexdigest() if _KEY.fullmatch(key) else None


# ---- audit log ----
#
# Which key performed which control-plane call that changes something. An entry names the route and has no body of a
# request, which may contain secrets.


class AuditEntry(Wire):
    """One call. number: grows with each entry. at: seconds since the epoch. tenant, key_id: of the key; both "" for the
    server's owner. action: the name of the route in protocol/rows.py, `rock:CALL` and `e2b:CALL` for calls of dialects,
    or login and logout of the web page. target: the id or name of the changed resource; "" where the call failed before
    it had one. status: of the HTTP response; 0 where the connection ended first. address: of the client."""

    model_config = ConfigDict(extra="ignore")  # fields of a newer server are ignored

    number: int = 0
    at: float
    tenant: str = ""
    key_id: str = ""
    action: str
    target: str = ""
    status: int = 0
    request_id: str = ""
    address: str = ""


class AuditList(Wire):
    """`next`: the `before` of the next page; None at the end."""

    model_config = ConfigDict(extra="ignore")

    items: list[AuditEntry]
    next: int | None = None
