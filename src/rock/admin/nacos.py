"""A live configuration in Nacos, by its HTTP API (version 1, which Nacos 1.x and 2.x serve)."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import urllib3

from rock.errors import InvalidConfig, Unavailable

_EVERY = 0.8  # seconds between two requests
_LARGEST = 1 << 20  # bytes of a response
_LOGIN_AGAIN = 0.8  # share of the lifetime of a token after which it is renewed
_PARAMETERS = ("group", "namespace")


@dataclass(frozen=True)
class Entry:
    """The address of one configuration. url: of the server, with its context path."""

    url: str
    data_id: str
    group: str
    namespace: str
    user: str = ""
    password: str = field(default="", repr=False)


class NacosSource:
    """Reads an entry in a thread, at most once in 0.8 seconds. An entry that does not exist is an error, and changes
    nothing."""

    def __init__(self, entry: Entry) -> None:
        self.name = f"Nacos entry {entry.group}/{entry.data_id} at {urlsplit(entry.url).netloc}"
        self._entry = entry
        self._pool = urllib3.PoolManager(maxsize=1, retries=False, timeout=urllib3.Timeout(connect=3, read=5))
        self._seen: bytes | None = None
        self._next = 0.0
        self._token: tuple[str, float] | None = None  # and the time from which it is renewed

    @classmethod
    def parse(cls, text: str) -> NacosSource:
        """nacos://[USER:PASSWORD@]HOST:PORT/DATA_ID[?group=G&namespace=N]; nacos+https:// uses TLS. InvalidConfig."""
        try:
            parts = urlsplit(text)
            port = parts.port or 8848
        except ValueError as error:
            raise _invalid(str(error)) from None
        data_id = unquote(parts.path.strip("/"))
        given = parse_qs(parts.query)
        if not parts.hostname or not data_id or "/" in data_id:
            raise _invalid("it has no host or no data id")
        unknown = sorted(set(given) - set(_PARAMETERS))
        if unknown:
            raise _invalid(f"the parameter {unknown[0]!r} is unknown")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        scheme = "https" if parts.scheme == "nacos+https" else "http"
        return cls(Entry(f"{scheme}://{host}:{port}/nacos", data_id, given.get("group", ["DEFAULT_GROUP"])[0],
                         given.get("namespace", [""])[0], unquote(parts.username or ""),
                         unquote(parts.password or "")))  # fmt: skip

    async def changed(self) -> bytes | None:
        """The content, when it has changed since the last call; None otherwise. Unavailable."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + _EVERY
        data = await asyncio.to_thread(self._read)
        if data == self._seen:
            return None
        self._seen = data
        return data

    async def close(self) -> None:
        self._pool.clear()

    def _read(self) -> bytes:
        entry = self._entry
        query = {"dataId": entry.data_id, "group": entry.group}
        if entry.namespace:
            query["tenant"] = entry.namespace
        if entry.user:
            query["accessToken"] = self._login()
        status, data = self._request("GET", f"/v1/cs/configs?{urlencode(query)}")
        if status == 200:
            return data
        if status in (401, 403):
            self._token = None
            raise Unavailable(f"{self.name}: the server refuses the login (status {status})",
                              hint="check user and password in ROCK_LIVE_CONFIG")
        if status == 404:
            raise Unavailable(f"{self.name} does not exist", hint="publish it, or correct ROCK_LIVE_CONFIG")
        raise Unavailable(f"{self.name} cannot be read: status {status}", hint="check the Nacos server")

    def _login(self) -> str:
        if self._token is not None and time.monotonic() < self._token[1]:
            return self._token[0]
        fields = {"username": self._entry.user, "password": self._entry.password}
        status, data = self._request("POST", "/v1/auth/login", fields)
        try:
            answer: Any = json.loads(data) if status == 200 else {}
            token, seconds = str(answer["accessToken"]), float(answer.get("tokenTtl", 18000))
        except (ValueError, KeyError, TypeError):
            raise Unavailable(f"{self.name}: the login failed (status {status})",
                              hint="check user and password in ROCK_LIVE_CONFIG") from None
        self._token = token, time.monotonic() + _LOGIN_AGAIN * seconds
        return token

    def _request(self, method: str, path: str, fields: dict[str, str] | None = None) -> tuple[int, bytes]:
        body = None if fields is None else urlencode(fields).encode()
        headers = {} if fields is None else {"content-type": "application/x-www-form-urlencoded"}
        try:
            reply = self._pool.request(method, self._entry.url + path, body=body, headers=headers, redirect=False,
                                       preload_content=False)  # fmt: skip
            try:
                data = reply.read(_LARGEST + 1)
            finally:
                reply.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(f"{self.name} cannot be read: {type(error).__name__}",
                              hint="check the Nacos server and the network") from None
        if len(data) > _LARGEST:
            raise Unavailable(f"{self.name} has more than {_LARGEST} bytes", hint="remove what is no configuration")
        return reply.status, data


def _invalid(why: str) -> InvalidConfig:
    return InvalidConfig(f"ROCK_LIVE_CONFIG is no Nacos entry: {why}",
                         hint="nacos://HOST:PORT/DATA_ID?group=GROUP&namespace=NAMESPACE")
