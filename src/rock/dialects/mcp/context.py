"""The context of a tool call: the API of its caller, and the session with its own sandbox."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from rock.dialects.api import Api
from rock.errors import InvalidConfig, NotFound, RockError, SandboxError, StartFailed, Unavailable
from rock.protocol.sandbox import SandboxConfig, State

LABEL = "rock.mcp.session"  # label of the sandboxes of a session: its id
START_WAIT = 180.0  # seconds for the start of a sandbox
IDLE = 1800  # seconds without a request after which a sandbox of this dialect is stopped


@dataclass
class Session:
    """The state of one client. sandbox_id: the sandbox of calls that name none; it is created by the first one, from
    `config`. is_given: it existed before the session and outlives it."""

    owner: str
    config: SandboxConfig
    id: str = field(default_factory=lambda: os.urandom(16).hex())
    sandbox_id: str | None = None
    is_given: bool = False
    used_at: float = 0.0
    running: dict[str | int, asyncio.Task[Any]] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    number: int = 0  # of the next sandbox that is created for it
    has_created: bool = False

    async def sandbox(self, create: Callable[[SandboxConfig, str], Awaitable[str]]) -> str:
        """The id of its sandbox. A repetition after a canceled start finds the same sandbox by its key."""
        async with self.lock:
            if self.sandbox_id is None:
                config = self.config.model_copy(update={"labels": {**self.config.labels, LABEL: self.id}})
                self.has_created = True
                try:
                    self.sandbox_id = await create(config, f"mcp-{self.id}-{self.number}")
                except StartFailed:
                    self.number += 1
                    raise
                self.number += 1
            return self.sandbox_id

    def cancel(self, request_id: Any) -> None:
        """Cancel a request in progress; no effect for any other id."""
        task = self.running.get(request_id) if isinstance(request_id, str | int) else None
        if task is not None:
            task.cancel()

    async def close(self, api: Api) -> None:
        """Cancel its requests, and stop the sandbox that was created for it."""
        for task in list(self.running.values()):
            task.cancel()
        async with self.lock:
            self.sandbox_id = None
            if not self.has_created:
                return
            query = {"label": f"{LABEL}={self.id}", "state": "pending,running"}
            for item in (await api.json("list_sandboxes", query=query))["items"]:
                try:
                    await api.bytes("stop_sandbox", sandbox_id=item["sandbox_id"])
                except (NotFound, SandboxError):
                    pass  # it ended before


@dataclass(frozen=True)
class ToolContext:
    """base_url: the address of the server, for URLs in results."""

    api: Api
    session: Session | None
    base_url: str

    async def sandbox(self, given: str | None) -> str:
        """The id of the sandbox that a call uses. The first call of a session without one creates it."""
        if given is not None:
            return given
        session = self.session
        if session is None:
            raise InvalidConfig("the call names no sandbox, and this connection has no session",
                                hint="call sandbox_create, and pass its sandbox_id")
        return await session.sandbox(self.create)

    async def create(self, config: SandboxConfig, key: str | None = None) -> str:
        """Create a sandbox, and wait until it runs."""
        body = config.model_dump(mode="json", include=config.model_fields_set)
        made = await self.api.json("create_sandbox", body, query={"wait": START_WAIT}, key=key)
        if made["state"] == State.RUNNING:
            return str(made["sandbox_id"])
        if made["state"] == State.PENDING:
            raise Unavailable(f"sandbox {made['sandbox_id']} has not started within {START_WAIT:g} s",
                              sandbox_id=made["sandbox_id"], hint="repeat the call with this sandbox_id")
        raise StartFailed(f"the sandbox did not start: {made.get('reason') or made['state']}",
                          sandbox_id=made["sandbox_id"], hint="change the image or the limits, and repeat the call")

    async def json(self, route: str, body: Any = b"", *, given: str | None, **more: Any) -> Any:
        """A request to the sandbox of a call, with a JSON response."""
        sandbox_id = await self.sandbox(given)
        try:
            return await self.api.json(route, body, sandbox_id=sandbox_id, **more)
        except RockError as error:
            raise self._ended(sandbox_id, error) from None

    async def bytes(self, route: str, body: Any = b"", *, given: str | None, **more: Any) -> bytes:
        sandbox_id = await self.sandbox(given)
        try:
            return await self.api.bytes(route, body, sandbox_id=sandbox_id, **more)
        except RockError as error:
            raise self._ended(sandbox_id, error) from None

    def _ended(self, sandbox_id: str, error: RockError) -> RockError:
        """The error of a request. When the sandbox of the session has ended, the next call creates another one; this
        call fails, because the files of the former sandbox are gone."""
        session = self.session
        ended = isinstance(error, SandboxError) or error.message == f"Sandbox {sandbox_id} not found"
        if ended and session is not None and session.sandbox_id == sandbox_id and not session.is_given:
            session.sandbox_id = None
            error.hint = "the next call without sandbox_id uses a new sandbox, without the files of this one"
        return error
