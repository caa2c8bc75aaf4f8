"""API keys: made, told once, known by their digests, revoked.

A key that was seen is remembered for `_FRESH` seconds: as long as it may take until a key that another process revoked
is refused here. One that is revoked here is refused at once.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from rock.errors import Conflict
from rock.protocol.keys import Caller, CreateKey, KeyInfo, NewKey, digest_of
from rock.store.base import Store

_FRESH = 2.0  # seconds
_REMEMBERED = 10_000


class Keys:
    """The keys of a store. guarded: whether the server asks for a key at all."""

    def __init__(self, store: Store, guarded: bool) -> None:
        self._store = store
        self._guarded = guarded
        self._seen: OrderedDict[str, tuple[float, Caller, str]] = OrderedDict()  # until, caller, id; by digest
        self.on_revoked: list[Callable[[str], None]] = []

    async def check_guarded(self) -> None:
        """Conflict when there are keys, and this server would let everybody in: a key that was revoked too."""
        if not self._guarded and any(info.revoked_at is None for info in await self._store.keys()):
            raise Conflict(
                "there are API keys, and this server has none of its own: it would take everybody for its owner",
                hint="set ROCK_API_KEY",
            )

    async def create(self, wish: CreateKey) -> NewKey:
        """Make one. Conflict on a server without a key of its own."""
        if not self._guarded:
            raise Conflict("this server asks nobody for a key", hint="start it with ROCK_API_KEY: the owner's key")
        tenant = wish.tenant or f"t{secrets.token_hex(5)}"
        info = KeyInfo(id=secrets.token_hex(6), name=wish.name, tenant=tenant, scopes=wish.scopes, quota=wish.quota,
                       created_at=time.time())  # fmt: skip
        key = f"rock_{tenant}_{secrets.token_urlsafe(32)}"
        digest = digest_of(key.encode())
        assert digest is not None
        await self._store.add_key(digest, info)
        return NewKey(**info.model_dump(), key=key)

    async def list(self) -> list[KeyInfo]:
        return list(await self._store.keys())

    async def revoke(self, key_id: str) -> KeyInfo:
        """End it: requests with it are refused from now on, and what is open by it is cut. NotFound."""
        info = await self._store.revoke_key(key_id, time.time())
        for digest in [digest for digest, (_, _, known) in self._seen.items() if known == key_id]:
            del self._seen[digest]
        for listener in self.on_revoked:
            listener(key_id)
        return info

    async def is_tenant(self, name: str) -> bool:
        """Whether a key was ever made for it."""
        return any(info.tenant == name for info in await self._store.keys())

    async def caller(self, key: bytes) -> Caller | None:
        """Who has this key; None for one that is none, or no longer."""
        digest = digest_of(key)
        if digest is None:
            return None
        found = self._seen.get(digest)
        if found is not None and found[0] > time.monotonic():
            return found[1]
        info = await self._store.key_of(digest)
        if info is None or info.revoked_at is not None:
            self._seen.pop(digest, None)
            return None
        caller = Caller(info.tenant, frozenset(info.scopes), info.quota if info.quota.is_limit else None, info.id)
        self._seen[digest] = (time.monotonic() + _FRESH, caller, info.id)
        self._seen.move_to_end(digest)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return caller
