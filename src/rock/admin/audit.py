"""The audit log: which key performed which control-plane call that changes something.

Entries are collected in memory and written twice a second in one transaction, because a write of its own would double
the cost of a create. A crash of the server loses the entries of the last half second.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any

from rock.errors import InvalidConfig, RockError
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, answer_model
from rock.protocol.keys import AuditEntry, AuditList, Caller, caller_of
from rock.protocol.routes import ROUTES
from rock.store.access import AccessStore, AuditQuery
from rock.telemetry.context import CURRENT

log = logging.getLogger("rock.audit")

NAMES = ("list_audit",)
_EVERY = 0.5  # seconds
_PRUNE_EVERY = 3600.0
_DAY = 86400.0
_MOST_HELD = 20_000  # entries while the store is away
_LONGEST = 200  # characters of a target
_DIALECT = ("/apis/envs/sandbox/v1/", "/apis/v1/envs/gem/", "/apis/training/", "/env/")
_E2B = "/e2b/"
_WORKERS_OWN = ("join_worker", "beat_worker")
_TARGETS = ("sandbox_id", "group_id", "key_id", "worker", "volume")
_ANSWERED = re.compile(rb'"(?:sandbox_id|sandboxID|group_id|id|name)":"([^"\\]{1,200})"')
_FILTERS = ("tenant", "key_id", "action", "target")


class Audit:
    """The audit log of one server. days: retention; 0 keeps no log."""

    def __init__(self, access: Callable[[], AccessStore], days: float) -> None:
        self._access = access
        self._days = days
        self._held: deque[AuditEntry] = deque()
        self._lost = 0
        self._task: asyncio.Task[None] | None = None
        self._rows = Router("audit")
        for route in ROUTES.values():
            if route.plane == "control" and route.mutates and route.name not in _WORKERS_OWN:
                self._rows.add(route, _never)

    async def open(self) -> None:
        if self._days and self._task is None:
            self._task = asyncio.create_task(self._write(), name="audit log")

    async def close(self) -> None:
        """Write the held entries and end."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        await self._flush()

    # ---- recording ----

    def over(self, app: App) -> App:
        """Wrap an authenticated application."""
        if not self._days:
            return app

        async def audited(scope: Scope, receive: Receive, send: Send) -> None:
            named = self._named(scope) if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") else None
            if named is None:
                await app(scope, receive, send)
                return
            action, target = named
            status = 0

            async def tell(message: MutableMapping[str, Any]) -> None:
                nonlocal status, target
                if message["type"] == "http.response.start":
                    status = message["status"]
                elif not target and status < 400 and (found := _ANSWERED.search(message.get("body", b"")[:600])):
                    target = found[1].decode("utf-8", "replace")
                await send(message)

            try:
                await app(scope, receive, tell)
            finally:
                self.note(scope, caller_of(scope), action, status, target)

        return audited

    def _named(self, scope: Scope) -> tuple[str, str] | None:
        """(action, target) of a request; None for one that is not recorded."""
        path: str = scope["path"]
        found = self._rows.match(scope["method"], path)
        if found is not None:
            return found[2].name, next((found[1][name] for name in _TARGETS if name in found[1]), "")
        for prefix in _DIALECT:
            if path.startswith(prefix):
                return f"rock:{path.removeprefix(prefix)[:60]}", ""
        if path.startswith(_E2B) and not any(name == b"e2b-sandbox-id" for name, _ in scope["headers"]):
            parts = path.removeprefix(_E2B).removeprefix("v2/").split("/")
            return f"e2b:{'/'.join([parts[0], *parts[2:]])[:60]}", parts[1][:_LONGEST] if len(parts) > 1 else ""
        return None

    def note(self, scope: Scope, caller: Caller, action: str, status: int, target: str = "") -> None:
        """Add an entry."""
        if not self._days:
            return
        if len(self._held) >= _MOST_HELD:
            self._lost += 1
            return
        client, context = scope.get("client"), CURRENT.get()
        self._held.append(AuditEntry.made(
            at=time.time(), tenant=caller.owner, key_id=caller.key_id, action=action, target=target[:_LONGEST],
            status=status, request_id=context.request_id if context is not None else "",
            address=str(client[0]) if client else "",
        ))  # fmt: skip

    async def _write(self) -> None:
        pruned = 0.0
        while True:
            await asyncio.sleep(_EVERY)
            await self._flush()
            if time.monotonic() - pruned > _PRUNE_EVERY:
                pruned = time.monotonic()
                try:
                    await self._access().prune_entries(time.time() - self._days * _DAY)
                except RockError as error:
                    log.warning("old entries of the audit log were not removed: %s", error)

    async def _flush(self) -> None:
        if not self._held:
            return
        entries = list(self._held)
        try:
            await self._access().add_entries(entries)
        except RockError as error:
            log.warning("%d entries of the audit log wait for the store: %s", len(entries), error)
            return
        for _ in entries:
            self._held.popleft()
        if self._lost:
            log.error("the audit log lost %d entries while the store was away", self._lost)
            self._lost = 0

    # ---- reading ----

    async def list_audit(self, request: Request) -> Answer:
        """Entries, newest first; for a tenant's key those of its tenant."""
        for name in request.query:
            if name not in (*_FILTERS, "since", "until", "limit", "before"):
                raise InvalidConfig(f"the query parameter {name!r} is unknown",
                                    hint=f"use {', '.join(_FILTERS)}, since, until, limit or before")
        caller = caller_of(request.scope)
        fields = {name: request.query[name] for name in _FILTERS if name in request.query}
        if caller.tenant is not None:
            fields["tenant"] = caller.tenant
        limit = request.integer("limit", 500, low=1, high=2000)
        await self._flush()
        entries = list(await self._access().entries(AuditQuery(
            fields,
            request.number("since", 0.0) if "since" in request.query else None,
            request.number("until", 0.0) if "until" in request.query else None,
            request.integer("before", 0) if "before" in request.query else None,
            limit,
        )))  # fmt: skip
        return answer_model(AuditList(items=entries, next=entries[-1].number if len(entries) == limit else None))

    def add_to(self, router: Router) -> None:
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))


async def _never(request: Request) -> Answer:
    raise AssertionError("only matched, never called")
