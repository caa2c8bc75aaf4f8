"""Upstreams: model servers by name and tenant, with their keys, and the calls to them.

The table is in upstreams.json of the gateway's folder (mode 0600). A key leaves the server only in the request header
of the upstream's dialect. Upstreams of the server's owner are shared: a tenant without one of that name uses it.

A tenant's key may only define upstreams on public addresses: otherwise it could send requests to services that only the
server reaches. The addresses are checked at each connection, after the name was resolved.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig, NotFound
from rock.gateway.dialects import DIALECTS, Dialect, ErrorKind
from rock.host import atomic_file
from rock.http.client import Address, ConnectFailed, Headers, Interrupted, Pool, Response
from rock.protocol.runs import UpstreamInfo, UpstreamSpec

log = logging.getLogger("rock.gateway")

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_PAUSE = 60.0  # seconds
_ERROR_BODY = 1 << 20  # bytes
_HIDDEN = b"***"
_JSON: Headers = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]


class UpstreamFailed(Exception):
    """No response of the upstream was received. kind: of the dialect's error. status, body: of its last response, in
    the dialect of the upstream; 0 when there was none."""

    def __init__(
        self, kind: ErrorKind, message: str, status: int = 0, body: bytes = b"", retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.status = status
        self.body = body
        self.retry_after = retry_after


@dataclass
class Attempts:
    """The number of requests that were sent for one call."""

    count: int = 0


class Upstream:
    """One model server. public_only: requests to private addresses are refused."""

    def __init__(self, name: str, tenant: str, spec: UpstreamSpec, created_at: float, public_only: bool) -> None:
        self.name = name
        self.tenant = tenant
        self.spec = spec
        self.created_at = created_at
        self.public_only = public_only
        self.dialect: Dialect = DIALECTS[spec.dialect]
        key = spec.key.get_secret_value() if spec.key is not None else ""
        self._secrets = [value.encode() for value in (key, *(v.get_secret_value() for v in spec.headers.values()))
                         if len(value) >= 4]  # fmt: skip
        given = {**(self.dialect.auth_headers(key) if key else {}),
                 **{name: value.get_secret_value() for name, value in spec.headers.items()}}  # fmt: skip
        self._headers: Headers = [(name.lower().encode(), value.encode()) for name, value in given.items()]
        allows = is_public if public_only else None
        self._pools = [Pool(url, limit=spec.connections, allows=allows) for url in spec.urls]
        self._chosen: dict[str, int] = {}  # place of a run's pool, where it is not the usual one

    @property
    def info(self) -> UpstreamInfo:
        spec = self.spec
        return UpstreamInfo(
            name=self.name, urls=spec.urls, dialect=spec.dialect, headers=sorted(spec.headers), models=spec.models,
            has_key=bool(spec.key is not None and spec.key.get_secret_value()), token_fields=spec.token_fields,
            retries=spec.retries, backoff=spec.backoff, timeout=spec.timeout, connections=spec.connections,
            prices=spec.prices, weight_version=spec.weight_version, created_at=self.created_at, tenant=self.tenant,
        )  # fmt: skip

    def model_for(self, model: str) -> str:
        """The name of a model at the upstream."""
        return self.spec.models.get(model) or self.spec.models.get("*") or model

    def hidden(self, data: bytes) -> bytes:
        """Data of the upstream without its key: an upstream may repeat it, for example in an error."""
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _HIDDEN)
        return data

    @contextlib.asynccontextmanager
    async def call(
        self, run_id: str, path: str, body: bytes, extra: Headers, attempts: Attempts
    ) -> AsyncIterator[Response]:
        """A response with a status below 300; errors before it are retried. UpstreamFailed."""
        failure: UpstreamFailed | None = None
        for attempt in range(self.spec.retries + 1):
            if attempt:
                await asyncio.sleep(self._pause(attempt, failure))
            attempts.count += 1
            place = self._place(run_id)
            pool = self._pools[place]
            target = _joined(pool.path, path)
            headers = [*_JSON, *extra, *self._headers]
            try:
                response = await pool.send("POST", target, headers, body, timeout=self.spec.timeout)
            except ConnectFailed as error:
                self._chosen[run_id] = (place + 1) % len(self._pools)
                failure = UpstreamFailed("upstream", f"upstream {self.name} is not reached: {error}")
                continue
            except Interrupted as error:
                self._chosen[run_id] = (place + 1) % len(self._pools)
                kind: ErrorKind = "timeout" if error.timed_out else "upstream"
                failure = UpstreamFailed(kind, f"upstream {self.name} sent no response: {error}")
                continue
            async with response:
                if response.status < 300:
                    yield response
                    return
                failure = await self._failed(response)
            if failure.status not in RETRYABLE:
                break
        assert failure is not None
        raise failure

    async def _failed(self, response: Response) -> UpstreamFailed:
        try:
            body = self.hidden(await response.body(_ERROR_BODY))
        except Interrupted:
            body = b""
        status = response.status
        if status in (401, 403):  # it concerns our key, not that of the agent
            return UpstreamFailed("upstream", f"upstream {self.name} refused the key of the gateway: status {status}")
        kind: ErrorKind = "overloaded" if status in (429, 503, 529) else "timeout" if status in (408, 504) else \
            "upstream" if status >= 500 or status < 400 else "bad_request"
        return UpstreamFailed(kind, f"upstream {self.name} responded with status {status}",
                              status if status >= 400 else 0, body, _seconds(response.header(b"retry-after")))

    def _pause(self, attempt: int, failure: UpstreamFailed | None) -> float:
        pause: float = self.spec.backoff * 2 ** (attempt - 1)
        wanted = 0.0 if failure is None else failure.retry_after
        return min(max(pause * random.uniform(0.75, 1.25), wanted), _LONGEST_PAUSE)

    def _place(self, run_id: str) -> int:
        """The pool of a run: the same one while it works, for the prefix cache of the model server."""
        found = self._chosen.get(run_id)
        return zlib.crc32(run_id.encode()) % len(self._pools) if found is None else found

    def forget(self, run_id: str) -> None:
        """The run has ended."""
        self._chosen.pop(run_id, None)

    def retire(self) -> None:
        """Close its connections as soon as no call uses them: it was replaced or deleted."""
        for pool in self._pools:
            pool.retire()

    async def close(self) -> None:
        for pool in self._pools:
            await pool.close()


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    return address.is_global and not address.is_multicast


def _joined(base: str, path: str) -> str:
    """The path of a request: an address may end with the first part of the dialect's path, as /v1 does."""
    first = "/" + path.lstrip("/").partition("/")[0]
    return base + (path[len(first):] if base.endswith(first) else path)


def _seconds(text: str | None) -> float:
    try:
        return min(max(0.0, float(text or 0)), _LONGEST_PAUSE)
    except ValueError:
        return 0.0


class Upstreams:
    """The table of upstreams, in a file."""

    def __init__(self, file: Path, changed: Callable[..., None]) -> None:
        self._file = file
        self._changed = changed
        self._table: dict[tuple[str, str], Upstream] = {}

    def load(self) -> None:
        """Read the file. OSError; atomic_file.Damaged."""
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return
        for row in atomic_file.parsed(data)["upstreams"]:
            spec = UpstreamSpec.model_validate(row["spec"])
            self._table[row["tenant"], row["name"]] = Upstream(row["name"], row["tenant"], spec, row["created_at"],
                                                               row["public_only"])  # fmt: skip

    def _save(self, table: Mapping[tuple[str, str], Upstream]) -> None:
        rows = [{"name": u.name, "tenant": u.tenant, "created_at": u.created_at, "public_only": u.public_only,
                 "spec": _with_secrets(u.spec)} for u in table.values()]  # fmt: skip
        atomic_file.replace(self._file, atomic_file.summed(json.dumps({"upstreams": rows})))
        self._changed(self._file, self._file.parent)

    def put(self, tenant: str, name: str, spec: UpstreamSpec, *, public_only: bool) -> UpstreamInfo:
        """Define or replace an upstream. InvalidConfig."""
        before = self._table.get((tenant, name))
        if spec.key is None and before is not None:
            if sorted(spec.urls) != sorted(before.spec.urls) and before.spec.key is not None:
                raise InvalidConfig(f"the addresses of upstream {name} change, and its key is not given",
                                    hint='give `key` again, or key="" for none')
            spec = spec.model_copy(update={"key": before.spec.key})
        made = Upstream(name, tenant, spec, before.created_at if before is not None else time.time(), public_only)
        table = {**self._table, (tenant, name): made}
        self._save(table)
        self._table = table
        if before is not None:
            before.retire()
        return made.info

    def list(self, tenant: str | None) -> list[UpstreamInfo]:
        """The upstreams of a tenant, and shared ones without their addresses; None is all tenants."""
        rows = [u.info for (owner, _), u in sorted(self._table.items()) if tenant is None or owner in ("", tenant)]
        hidden: dict[str, Any] = {"urls": [], "headers": []}
        return [row if tenant in (None, row.tenant) else row.model_copy(update=hidden) for row in rows]

    def find(self, tenant: str, name: str) -> Upstream:
        """The upstream of a tenant, or the shared one. NotFound."""
        found = self._table.get((tenant, name)) or self._table.get(("", name))
        if found is None:
            raise NotFound(f"there is no upstream {name}", hint="rock upstream ls")
        return found

    def delete(self, tenant: str, name: str) -> UpstreamInfo:
        """Delete an upstream. Calls in progress complete. NotFound."""
        if (tenant, name) not in self._table:
            raise NotFound(f"there is no upstream {name}", hint="rock upstream ls")
        table = dict(self._table)
        removed = table.pop((tenant, name))
        self._save(table)
        self._table = table
        removed.retire()
        return removed.info

    async def close(self) -> None:
        for upstream in self._table.values():
            await upstream.close()


def _with_secrets(spec: UpstreamSpec) -> dict[str, Any]:
    row = spec.model_dump(mode="json")
    row["key"] = spec.key.get_secret_value() if spec.key is not None else None
    row["headers"] = {name: value.get_secret_value() for name, value in spec.headers.items()}
    return row
