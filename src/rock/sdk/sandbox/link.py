"""What every part of a `Sandbox` shares: the transport, the id, and a call by the name of its route."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel

from rock import errors, settings
from rock.protocol.keys import tenant_of
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import BaseConfig, Cause, SandboxConfig, SandboxInfo
from rock.sdk import primitives
from rock.sdk.http import query_string
from rock.sdk.transport import ANSWER_TIMEOUT, Transport

M = TypeVar("M", bound=BaseModel)

LATE = 0.5  # seconds after the time of a call in which a silent worker may still answer
CLEAN_UP = 15.0  # seconds for the request that undoes another
PAGE = 500  # sandboxes of one request
SLACK = 30.0  # seconds for an answer to come after the time that the server itself was given


_BY_CAUSE: dict[Cause, type[errors.SandboxError]] = {
    Cause.OUT_OF_MEMORY: errors.OutOfMemory,
    Cause.DISK_FULL: errors.DiskFull,
    Cause.LOST: errors.Lost,
    Cause.EXITED: errors.Exited,
    Cause.START_FAILED: errors.StartFailed,
}


@lru_cache(maxsize=4096)
def path(name: str, sandbox_id: str, session: str = "", process_id: str = "") -> str:
    """The path of a route."""
    return ROUTES[name].url(sandbox_id=sandbox_id, session=session, process_id=process_id)


def headers_of(config: BaseConfig) -> dict[str, str]:
    """What a request of the config's owner carries, its key included."""
    given = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    return {**given, **_everywhere(), **_extra(config)}


def _everywhere() -> dict[str, str]:
    """Headers of every client, which a Transport adds by itself."""
    try:
        return {name.lower(): value for name, value in settings.extra_headers().items()}
    except ValueError as error:
        raise errors.InvalidConfig(
            f"ROCK_EXTRA_HEADERS is wrong: {error}", hint="set it to a JSON object of header names and values"
        ) from None


def _extra(config: BaseConfig) -> dict[str, str]:
    headers = {name.lower(): value for name, value in config.extra_headers.items()}
    if config.xrl_authorization:
        headers["xrl-authorization"] = f"Bearer {config.xrl_authorization}"
    return headers


def new_id(config: BaseConfig) -> str:
    """A name for a sandbox that nobody else has: what a tenant names has to begin with the tenant's own name."""
    tenants = (tenant_of(value.encode("utf-8", "replace")) for value in headers_of(config).values())
    tenant = next(filter(None, tenants), None)
    return f"{tenant}-{os.urandom(8).hex()}" if tenant else os.urandom(8).hex()


def transport_of(config: BaseConfig) -> Transport:
    """How to reach the server that a config names."""
    return Transport(config.base_url, config.api_key, _extra(config), reconnect_timeout=config.reconnect_timeout)


def parse(model: type[M], data: Any) -> M:
    """An answer as its model; what a newer server adds is left out. ServerError when it does not fit."""
    if not isinstance(data, dict):
        raise errors.ServerError(f"malformed answer: {str(data)[:80]!r} is not a {model.__name__}")
    try:
        fields = model.model_fields
        return model.model_validate({k: v for k, v in data.items() if k in fields})
    except ValueError as error:
        raise errors.ServerError(f"malformed answer: not a {model.__name__}: {error}") from None


def end_of(info: SandboxInfo) -> errors.RockError:
    """The error that stands for a sandbox which does not run any more."""
    if info.error:
        body = info.error if isinstance(info.error.get("error"), dict) else {"error": info.error}
        return errors.from_wire(body)
    kind = _BY_CAUSE.get(info.cause, errors.Expired) if info.cause else errors.SandboxError
    reason = info.reason or f"it is {info.state.value}"
    return kind(f"sandbox {info.sandbox_id} does not run: {reason}", sandbox_id=info.sandbox_id)


async def list_sandboxes(
    transport: Transport, states: str | Iterable[str] | None, limit: int | None, filters: Mapping[str, object]
) -> list[SandboxInfo]:
    """Sandboxes, newest first; all when `limit` is None."""
    joined = states if isinstance(states, str) or states is None else ",".join(states)
    found: list[SandboxInfo] = []
    after: str | None = None
    while limit is None or len(found) < limit:
        size = PAGE if limit is None else min(PAGE, limit - len(found))
        query: dict[str, object] = {"state": joined, "limit": size, "after": after, **filters}
        page = await transport.json("GET", ROUTES["list_sandboxes"].path + query_string(query))
        found += [parse(SandboxInfo, item) for item in page["items"]]
        after = page.get("next")
        if after is None:
            break
    return found


class Link(primitives.Face):
    """A sandbox as an address: `config`, `sandbox_id`, and calls to it."""

    config: SandboxConfig

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.sandbox_id: str | None = None
        self.host_name: str | None = None
        self.host_ip: str | None = None
        self.cluster: str = config.cluster
        self._transport = transport_of(config)

    @property
    def url(self) -> str:
        """The server's base URL. Setting it turns this sandbox to another server."""
        return self._transport.url

    @url.setter
    def url(self, value: str) -> None:
        self.config = self.config.model_copy(update={"base_url": value})
        self._transport = transport_of(self.config)

    def _id(self) -> str:
        if self.sandbox_id is None:
            raise errors.InvalidConfig("the sandbox was not started", hint=self._missing())
        return self.sandbox_id

    def _missing(self) -> str:
        given = self.config.sandbox_id
        if given is None:
            return "call start(), or use `async with`"
        return f"call start() to create it, or use Sandbox.connect({given!r}) if it exists"

    def _path(self, name: str, /, session: str = "", process_id: str = "", **query: object) -> str:
        return path(name, self._id(), session, process_id) + query_string(query)

    async def _call(
        self,
        name: str,
        target: str,
        body: Any = None,
        *,
        wait: float | None = 0.0,
        key: str | None = None,
    ) -> Any:
        """Call a route. `wait`: seconds that the server may take on purpose; None is no limit. Where a worker
        takes the call and is silent, it is not tried again once that time is over."""
        timeout = None if wait is None else wait + (SLACK if wait else ANSWER_TIMEOUT)
        limit = wait + LATE if wait else None
        return await self._transport.json(ROUTES[name].method, target, body, timeout=timeout, key=key, limit=limit)

    async def _info(self, name: str, target: str, body: Any = None, **options: Any) -> SandboxInfo:
        return self._known(parse(SandboxInfo, await self._call(name, target, body, **options)))

    def _known(self, info: SandboxInfo) -> SandboxInfo:
        self.host_name, self.host_ip = info.host_name, info.host_ip
        self.cluster = info.cluster or self.cluster
        return info
