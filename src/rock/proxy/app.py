"""The entry point of the data plane: finds the worker of a sandbox, checks the tenant, and forwards the request.

With the worker in this process, the request is passed to its ASGI application unchanged: no copy, no second parse.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

from rock.errors import (
    DiskFull,
    Exited,
    Expired,
    Lost,
    NotHere,
    OutOfMemory,
    RockError,
    StartFailed,
    Unavailable,
    Unsupported,
    no_such_route,
    no_such_sandbox,
)
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, deny, failure
from rock.protocol.keys import caller_of
from rock.protocol.routes import BUILD, ERROR_CODE, OUTAGE, PREFIX, ROUTES, is_data
from rock.protocol.sandbox import Cause, SandboxInfo, State
from rock.proxy.recording import Recorder, remember
from rock.store.base import Record, Store

_NOT_HERE = (ERROR_CODE.encode(), NotHere.code.encode())  # a program inside may respond with 421 too


__all__ = ["Proxy", "is_data", "tell"]


class Proxy:
    """Routes by sandbox id. workers: the current ASGI applications by worker name. local: the one in this process.

    The worker of a sandbox changes only when the sandbox is restored from the archive. The worker is therefore cached
    until it reports that it does not have the sandbox, or is gone; requests to known sandboxes need no store access.

    A tenant's key accesses only sandboxes of its tenant. The tenant of a sandbox never changes (see admin/tenants.py),
    so it is read once.
    """

    def __init__(
        self, store: Store, workers: Mapping[str, App], local: str | None = None, builder: str | None = None
    ) -> None:  # fmt: skip
        """builder: the worker that builds images, if all share its images and it is not in this process."""
        self._store = store
        self._workers = workers
        self._local = None if local is None else workers[local]
        self._builder = builder or ""
        self._placed: OrderedDict[str, str] = OrderedDict()  # workers by id
        self._owned: OrderedDict[str, str] = OrderedDict()  # tenants by id
        # access rights are checked here: a remote worker receives our key, not the caller's
        self._recorder = Recorder(store)
        self._rows = Router("data")
        for route in ROUTES.values():
            if route.plane == "data":
                self._rows.add(route, _elsewhere)

    def noted(self, record: Record) -> None:
        """A record was saved in this process: its first request reads no store."""
        if record.state is State.RUNNING:
            self._recorder.noted(record)
            if record.tenant:
                remember(self._owned, record.id, record.tenant)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._serve(scope, receive, send)
        except RockError as error:  # of the store; nothing has been sent
            await _refuse(scope, send, error)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = caller_of(scope).tenant  # images belong to all tenants and depend on the access rights of the key
        if tenant is not None and scope["path"] != BUILD and not await self._owns(tenant, _sandbox_id(scope)):
            await _refuse(scope, send, no_such_sandbox(_sandbox_id(scope)))
            return
        sandbox_id = _sandbox_id(scope)
        if scope["path"] != BUILD and await self._recorder.records(sandbox_id):
            self._check(scope)
            await self._recorder(scope, receive, send, sandbox_id, self._pass)
            return
        await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._local is None or (len(self._workers) > 1 and scope["path"] != BUILD):
            await self._forward(scope, receive, send)
            return
        # With one worker, which knows its sandboxes, the store is read only for unknown ones.
        held = _Held(send)
        await self._local(scope, receive, held)
        if held.held:
            await _refuse(scope, send, await self._explain(_sandbox_id(scope)))

    async def _owns(self, tenant: str, sandbox_id: str) -> bool:
        known = self._owned.get(sandbox_id)
        if known is None:
            record = await self._store.get(sandbox_id)
            if record is None or record.tenant != tenant:
                return False
            remember(self._owned, sandbox_id, tenant)
            return True
        return known == tenant

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == BUILD and self._builder in self._workers:
            await self._workers[self._builder](scope, receive, send)
            return
        if scope["path"] == BUILD:
            await failure(Unsupported("images are built where there is one worker", hint="ask a worker")).send(send)
            return
        sandbox_id = _sandbox_id(scope)
        self._check(scope)
        worker = await self._worker_of(sandbox_id)
        held = _Held(send)
        await worker(scope, receive, held)
        if held.held:
            self._placed.pop(sandbox_id, None)
            await _refuse(scope, send, await self._explain(sandbox_id))

    def _check(self, scope: Scope) -> None:
        """Forbidden for a missing access right; NotFound for an unknown route."""
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"]
        found = self._rows.match(method, scope["path"])
        if found is None:
            raise no_such_route(scope["path"], method)
        caller_of(scope).require(found[2].access)

    async def _worker_of(self, sandbox_id: str) -> App:
        """The worker of a sandbox. NotFound, Unavailable; Lost for a sandbox that was lost with its worker."""
        worker = self._workers.get(self._placed.get(sandbox_id, ""))
        if worker is not None:
            return worker
        self._placed.pop(sandbox_id, None)
        record = await self._store.get(sandbox_id)
        if record is None:
            raise no_such_sandbox(sandbox_id)
        if record.info.cause is Cause.LOST:
            raise tell(record.info)
        name = record.info.worker or ""
        worker = self._workers.get(name)
        if worker is None:
            if record.info.cause is not None:
                raise tell(record.info)
            raise Unavailable(f"worker {name} of sandbox {sandbox_id} is not there now", sandbox_id=sandbox_id,
                              hint="retry", details=OUTAGE)  # fmt: skip
        if record.state is State.RUNNING:
            remember(self._placed, sandbox_id, name)
        return worker

    async def _explain(self, sandbox_id: str) -> RockError:
        """A worker does not have the sandbox: returns the error that describes its end."""
        record = await self._store.get(sandbox_id)
        if record is None:
            return no_such_sandbox(sandbox_id)
        return tell(record.info)


async def _elsewhere(request: Request) -> Answer:
    raise AssertionError("a worker answers this")


class _Held:
    """Forwards a response, but holds back that of a worker which does not have the sandbox."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.held = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message.get("status") == NotHere.status and _NOT_HERE in message["headers"]:
            self.held = True
        if not self.held:
            await self._send(message)


async def _refuse(scope: Scope, send: Send, error: RockError) -> None:
    await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))


def _sandbox_id(scope: Scope) -> str:
    return str(scope["path"])[len(PREFIX) :].partition("/")[0]


def tell(info: SandboxInfo) -> RockError:
    """The error for a request to a sandbox that does not exist yet, or that ended."""
    if info.state in (State.ARCHIVING, State.ARCHIVED, State.DELETED):
        hint = "restart it: its files are in the archive" if info.state is State.ARCHIVED else None
        return Expired(f"sandbox {info.sandbox_id} is {info.state.value}", sandbox_id=info.sandbox_id, hint=hint)
    if info.cause is None:
        starts = info.state is State.PENDING
        missing = f"sandbox {info.sandbox_id} is not found on its worker now"
        return Unavailable(f"sandbox {info.sandbox_id} has not started yet" if starts else missing,
                           sandbox_id=info.sandbox_id, hint="retry", details=None if starts else OUTAGE)
    kinds: dict[Cause, type[RockError]] = {
        Cause.OUT_OF_MEMORY: OutOfMemory,
        Cause.DISK_FULL: DiskFull,
        Cause.LOST: Lost,
        Cause.EXITED: Exited,
        Cause.START_FAILED: StartFailed,
    }
    kind = kinds.get(info.cause, Expired)
    return kind(
        f"sandbox {info.sandbox_id} is gone: {info.reason or info.cause}",
        sandbox_id=info.sandbox_id,
        hint="restart it: its files are kept" if info.kept else None,
        details={"cause": info.cause.value, "stopped_at": info.stopped_at},
    )
