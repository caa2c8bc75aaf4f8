"""A client of the Kubernetes API server: create, get, delete, patch, and list with watch.

    Api.list ──► pages of 500, and the resourceVersion of the list
    Api.watch ──► events after a resourceVersion; Expired (410) when it is too old: list again

A token bucket bounds the requests of a process. 429 and 5xx are repeated after the pause that the server requests, for
idempotent requests only. A watch takes one token, whatever its length.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unavailable
from rock.http.client import ConnectFailed, Headers, Interrupted, Pool, Response
from rock.kubernetes.access import Access

log = logging.getLogger("rock.kubernetes")

PAGE = 500  # objects of one page of a list
_WITHIN = 30.0  # timeout in seconds of a response
_WATCH = 240  # seconds after which the API server ends a watch
_SILENT = 300.0  # seconds without an event or bookmark after which a watch is given up
_LARGEST = 64 << 20  # maximum bytes of a response
_LONGEST_EVENT = 4 << 20
_TRIES = 5
_LONGEST_PAUSE = 10.0
Object = dict[str, Any]


class Expired(Exception):
    """410: the resourceVersion of a watch, or the token of a page, is too old."""


class TokenBucket:
    """`rate` requests per second, after a burst of twice as many."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._most = max(1.0, 2 * rate)
        self._tokens = self._most
        self._at = time.monotonic()
        self._turn = asyncio.Lock()  # requests pass in the order in which they came

    async def take(self) -> None:
        async with self._turn:
            now = time.monotonic()
            self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens < 1:
                await asyncio.sleep((1 - self._tokens) / self._rate)
                self._tokens, self._at = 1.0, time.monotonic()
            self._tokens -= 1


def path_of(resource: str, namespace: str, name: str = "", group: str = "v1") -> str:
    """The path of a namespaced resource. group: "v1", or GROUP/VERSION."""
    root = "/api/v1" if group == "v1" else f"/apis/{group}"
    tail = f"/{quote(name, safe='')}" if name else ""
    return f"{root}/namespaces/{quote(namespace, safe='')}/{resource}{tail}"


class Api:
    """The API server of one cluster. qps: requests per second.

    Errors: Conflict (409), NotFound (404), InvalidConfig (other refusals), Unavailable (no response, 429, 5xx). Their
    details have `status`, and `reason` of the API server.
    """

    def __init__(self, access: Access, qps: float = 50.0) -> None:
        self._access = access
        self._bucket = TokenBucket(qps)
        self._pool: Pool | None = None
        self._authorities: str | None = None
        self._retired: list[Pool] = []
        self.requests: dict[str, int] = {}  # sent requests by method

    async def close(self) -> None:
        """Close all connections."""
        for pool in (self._pool, *self._retired):
            if pool is not None:
                await pool.close()
        self._pool, self._retired, self._authorities = None, [], None

    # ---- objects ----

    async def create(self, path: str, body: Object) -> Object:
        """Create an object. Conflict when the name exists. Unavailable may mean that it was created."""
        return await self._json("POST", path, body=body, tries=1)

    async def get(self, path: str, tries: int = _TRIES) -> Object:
        return await self._json("GET", path, tries=tries)

    async def delete(self, path: str, uid: str, grace: int | None = None, version: str = "") -> None:
        """Delete the object with this uid; nothing happens when it is gone. Conflict when another one has its name, or
        when it is not of this resourceVersion any more."""
        wanted = {"uid": uid, **({"resourceVersion": version} if version else {})}
        body: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": wanted}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        with contextlib.suppress(NotFound):
            await self._json("DELETE", path, body=body)

    async def patch(self, path: str, body: Object) -> Object:
        """Change fields by a JSON merge patch."""
        return await self._json("PATCH", path, body=body, kind="application/merge-patch+json")

    async def list(self, path: str, selector: str = "") -> tuple[list[Object], str]:
        """All objects, page by page, and the resourceVersion from which a watch continues. Unavailable."""
        for _ in range(_TRIES):
            found: list[Object] = []
            token = ""
            try:
                while True:
                    query = {"limit": str(PAGE), "labelSelector": selector, "continue": token}
                    page = await self._json("GET", path, {key: value for key, value in query.items() if value})
                    items, meta = page.get("items"), page.get("metadata")
                    if not isinstance(items, list) or not isinstance(meta, dict):
                        raise Unavailable("the API server sent an invalid list", hint="check its address")
                    found += [item for item in items if isinstance(item, dict)]
                    token = str(meta.get("continue") or "")
                    if not token:
                        return found, str(meta.get("resourceVersion") or "")
            except Expired:  # of the token of a page: the list begins again
                continue
        raise Unavailable("the list expired repeatedly while it was read", hint="retry")

    async def watch(self, path: str, version: str, selector: str = "") -> AsyncGenerator[tuple[str, Object]]:
        """Events (type, object) after a version, bookmarks included, until the server ends the watch. Expired,
        Unavailable."""
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true",
                 "timeoutSeconds": str(_WATCH), **({"labelSelector": selector} if selector else {})}  # fmt: skip
        await self._bucket.take()
        response = await self._send("GET", path, query, b"", "", _SILENT)
        async with response:
            if response.status != 200:
                raise await _refusal(response)
            buffer = bytearray()
            try:
                async with contextlib.aclosing(response.pieces()) as pieces:
                    async for piece in pieces:
                        buffer += piece
                        *lines, rest = bytes(buffer).split(b"\n")
                        buffer = bytearray(rest)
                        if len(buffer) > _LONGEST_EVENT:
                            raise Unavailable("an event of a watch is too long", hint="retry")
                        for line in lines:
                            if line.strip():
                                yield _event(line)
            except Interrupted as error:
                raise Unavailable(f"the watch broke: {error}", hint="retry") from None

    # ---- requests ----

    async def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Object | None = None,
        tries: int = _TRIES, kind: str = "application/json",
    ) -> Object:  # fmt: skip
        data = b"" if body is None else orjson.dumps(body)
        for left in reversed(range(tries)):
            await self._bucket.take()
            pause = 0.0
            try:
                async with await self._send(method, path, query or {}, data, kind, _WITHIN) as response:
                    if response.status < 300:
                        found = orjson.loads(await response.body(_LARGEST) or b"{}")
                        return found if isinstance(found, dict) else {}
                    if response.status == 401:
                        self._access.refused()
                    pause = _pause(response)
                    error = await _refusal(response)
            except (Interrupted, orjson.JSONDecodeError) as broken:
                error = Unavailable(f"the API server did not respond completely: {broken}", hint="retry")
            except Unavailable as raised:
                error = raised
            again = isinstance(error, Unavailable) or error.details.get("status") == 401
            if not left or not again:
                raise error
            await asyncio.sleep(pause or min(_LONGEST_PAUSE, 0.2 * 2 ** (tries - left)) * random.uniform(0.5, 1))
        raise AssertionError("the last try returns or raises")

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, kind: str, timeout: float
    ) -> Response:
        """Unavailable when there is no response."""
        headers: Headers = [(b"accept", b"application/json"), (b"user-agent", b"rock")]
        if kind and body:
            headers.append((b"content-type", kind.encode()))
        token = self._access.bearer()
        if token:
            headers.append((b"authorization", b"Bearer " + token.encode()))
        pool = self._current()
        self.requests[method] = self.requests.get(method, 0) + 1
        target = pool.path + path + (f"?{urlencode(query)}" if query else "")
        try:
            return await pool.send(method, target, headers, body, timeout=timeout)
        except ConnectFailed as error:
            raise Unavailable(f"the API server {self._access.server} is not reached: {error}", hint="retry",
                              details={"unsent": True}) from None  # fmt: skip
        except Interrupted as error:
            raise Unavailable(f"the API server did not respond: {error}", hint="retry") from None

    def _current(self) -> Pool:
        """The pool with the certificate authorities of now."""
        authorities = self._access.authorities()
        if self._pool is None or authorities != self._authorities:
            if self._pool is not None:
                self._pool.retire()
                self._retired.append(self._pool)
            self._pool = Pool(self._access.server, tls=self._access.tls(authorities))
            self._authorities = authorities
        return self._pool


def _event(line: bytes) -> tuple[str, Object]:
    """Expired, Unavailable."""
    try:
        event = orjson.loads(line)
        kind, found = event["type"], event["object"]
        if not isinstance(kind, str) or not isinstance(found, dict):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise Unavailable("the API server sent an invalid event", hint="retry") from None
    if kind == "ERROR":
        if found.get("code") == 410:
            raise Expired
        raise Unavailable(f"the watch ended: {str(found.get('message'))[:300]}", hint="retry")
    return kind, found


def _pause(response: Response) -> float:
    """Seconds that the server asks to wait."""
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(response.header(b"retry-after") or 0)))
    except ValueError:
        return 0.0


async def _refusal(response: Response) -> RockError:
    """The error of a response. Expired."""
    status = response.status
    try:
        found = orjson.loads(await response.body(_LARGEST))
    except (Interrupted, orjson.JSONDecodeError):
        found = {}
    found = found if isinstance(found, dict) else {}
    message = str(found.get("message") or f"HTTP {status}")[:1000]
    details = {"status": status, "reason": str(found.get("reason") or "")}
    if status == 410:
        raise Expired
    if status == 404:
        return NotFound(message, hint="check the namespace and the name", details=details)
    if status == 409:
        return Conflict(message, hint="read the object again", details=details)
    if status == 429 or status >= 500:
        return Unavailable(f"the API server refused for now: {message}", hint="retry", details=details)
    hint = "check the Role and the token of the server" if status in (401, 403) else "check the pod template"
    return InvalidConfig(f"the API server refused the request: {message}", hint=hint, details=details)
