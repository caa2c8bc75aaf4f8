"""Archives in a bucket of an S3-compatible service, with signature version 4; standard library only.

    PUT                       up to the size of a part
    POST ?uploads, PUT ?partNumber=N&uploadId=ID, POST ?uploadId=ID     above; an upload that fails is aborted
    GET, DELETE, GET ?list-type=2

A part is held in memory, so that it can be signed with its digest and sent again. Requests block, each in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import logging
import re
import ssl
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rock.errors import InvalidConfig, NotFound, RockError, ServerError, StorageFull, Unavailable
from rock.store.blobs import CHUNK, NO_ARCHIVE, check_name

log = logging.getLogger("rock.store")

_PART = 16 << 20
_MOST_PARTS = 10_000
_GROWS_AFTER = 1_000  # parts; the following ones are larger, because there may be at most 10,000
_TRIES = 5
_PAUSE = 0.2  # seconds; doubled with each attempt
_TIMEOUT = 60.0
_LONGEST_ANSWER = 8 << 20  # bytes of XML
_EMPTY = hashlib.sha256(b"").hexdigest()
S3_HINT = "check the service and the server's ROCK_ARCHIVE and ROCK_S3_* settings, then try again"  # of errors
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class Bucket:
    """A bucket: its address, and the credentials for signing. endpoint: "https://host[:port]"; prefix: before every
    name."""

    endpoint: str
    bucket: str
    prefix: str = ""
    region: str = "us-east-1"
    key: str = ""
    secret: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str, endpoint: str, region: str, key: str, secret: str) -> Bucket:
        """A bucket from "s3://BUCKET/PREFIX". InvalidConfig names the missing part."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        endpoint = endpoint or f"https://s3.{region}.amazonaws.com"
        parts = urllib.parse.urlsplit(endpoint)
        if not _BUCKET.fullmatch(bucket):
            raise InvalidConfig(f"ROCK_ARCHIVE={url}: {bucket!r} is no name of a bucket", hint="s3://BUCKET/PREFIX")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise InvalidConfig(f"ROCK_S3_ENDPOINT={endpoint} is no address", hint="https://HOST[:PORT]")
        if not key or not secret:
            raise InvalidConfig(f"ROCK_ARCHIVE={url} needs keys", hint="set ROCK_S3_KEY and ROCK_S3_SECRET")
        prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        return cls(endpoint.rstrip("/"), bucket, prefix, region, key, secret)


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # percent-encoded
    query: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @property
    def query_string(self) -> str:
        """The query string, sorted and encoded, as it is signed and sent."""
        pairs = sorted((_encoded(name), _encoded(value)) for name, value in self.query)
        return "&".join(f"{name}={value}" for name, value in pairs)


def _encoded(text: str, keep: str = "") -> str:
    return urllib.parse.quote(text, safe=f"-_.~{keep}")


def signed(place: Bucket, request: Request, host: str, now: datetime) -> dict[str, str]:
    """The headers of a request, with its signature."""
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    day = stamp[:8]
    digest = hashlib.sha256(request.body).hexdigest() if request.body else _EMPTY
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    names = ";".join(sorted(headers))
    canonical = "\n".join((
        request.method, request.path, request.query_string,
        *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, digest,
    ))  # fmt: skip
    scope = f"{day}/{place.region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{place.secret}".encode()
    for word in (day, place.region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={place.key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**headers, "authorization": credential}


class S3Blobs:
    """A bucket as `Blobs`. part: bytes per upload part, at least 5 MiB."""

    def __init__(self, place: Bucket, part: int = _PART) -> None:
        self.place = place
        self._part = part
        self._base = urllib.parse.urlsplit(place.endpoint)
        self._tls = ssl.create_default_context() if self._base.scheme == "https" else None

    # ---- Blobs ----

    async def put(self, name: str, data: AsyncIterator[bytes]) -> None:
        key, buffer = self._key(name), bytearray()
        upload, tags, size = "", list[str](), self._part
        try:
            async for piece in data:
                buffer += piece
                while len(buffer) > size:
                    if not upload:
                        upload = await self._begin(key)
                    part = bytes(buffer[:size])
                    del buffer[:size]
                    tags.append(await self._send_part(key, upload, len(tags) + 1, part))
                    if len(tags) % _GROWS_AFTER == 0:
                        size *= 2
            if not upload:
                await self._ask(Request("PUT", key, body=bytes(buffer)))
                return
            tags.append(await self._send_part(key, upload, len(tags) + 1, bytes(buffer)))
            await self._complete(key, upload, tags)
        except BaseException:
            if upload:
                await asyncio.shield(self._abort(key, upload))
            raise

    async def get(self, name: str) -> AsyncGenerator[bytes]:
        try:
            connection, reply = await asyncio.to_thread(self._open, Request("GET", self._key(name)))
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{self.place.endpoint} does not respond: {error!r}", hint=S3_HINT) from None
        try:
            if reply.status == 404:
                raise NotFound(f"there is no archive {name}, or it was removed", hint=NO_ARCHIVE)
            if reply.status != 200:
                raise self._error_of(reply.status, await asyncio.to_thread(reply.read, _LONGEST_ANSWER))
            left = reply.length
            while part := await self._read(reply):
                left = None if left is None else left - len(part)
                yield part
            if left:
                raise Unavailable(f"{self.place.endpoint} closed the connection in the middle of an archive",
                                  hint=S3_HINT)
        finally:
            connection.close()

    async def delete(self, name: str) -> None:
        await self._ask(Request("DELETE", self._key(name)), missing=True)

    async def list(self) -> list[str]:
        names: list[str] = []
        token: str | None = None
        while True:
            query = [("list-type", "2"), ("prefix", self.place.prefix)]
            if token:
                query.append(("continuation-token", token))
            found = _xml(await self._ask(Request("GET", self._root, tuple(query))))
            for item in found.iter():
                if _tag(item) == "Key" and item.text:
                    names.append(item.text.removeprefix(self.place.prefix))
            token = _text(found, "NextContinuationToken")
            if not token:
                return sorted(names)

    async def close(self) -> None:
        return

    # ---- uploads in parts ----

    async def _begin(self, key: str) -> str:
        upload = _text(_xml(await self._ask(Request("POST", key, (("uploads", ""),)))), "UploadId")
        if not upload:
            raise ServerError(f"{self.place.endpoint} began an upload and did not name it")
        return upload

    async def _send_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        if number > _MOST_PARTS:
            raise ServerError("the archive is larger than a bucket takes")
        headers: dict[str, str] = {}
        query = (("partNumber", str(number)), ("uploadId", upload))
        await self._ask(Request("PUT", key, query, data), answered=headers)
        return headers.get("etag", "")

    async def _complete(self, key: str, upload: str, tags: Sequence[str]) -> None:
        root = ET.Element("CompleteMultipartUpload")
        for number, tag in enumerate(tags, 1):
            part = ET.SubElement(root, "Part")
            ET.SubElement(part, "PartNumber").text = str(number)
            ET.SubElement(part, "ETag").text = tag
        reply = await self._ask(Request("POST", key, (("uploadId", upload),), ET.tostring(root)))
        if _tag(_xml(reply)) == "Error":  # reported under status 200, because the error may occur late
            raise self._error_of(500, reply)

    async def _abort(self, key: str, upload: str) -> None:
        with suppress(RockError):
            await self._ask(Request("DELETE", key, (("uploadId", upload),)), missing=True)

    # ---- requests ----

    @property
    def _root(self) -> str:
        return f"{self._base.path}/{self.place.bucket}"

    def _key(self, name: str) -> str:
        return f"{self._root}/{_encoded(self.place.prefix + check_name(name), '/')}"

    async def _ask(
        self, request: Request, *, missing: bool = False, answered: dict[str, str] | None = None
    ) -> bytes:
        """The body of a response; transient errors are retried. missing: 404 is accepted. answered: receives the
        headers."""
        for attempt in range(_TRIES):
            try:
                status, headers, body = await asyncio.to_thread(self._exchange, request)
            except (OSError, http.client.HTTPException) as error:
                failure: RockError = Unavailable(f"{self.place.endpoint} does not respond: {error!r}", hint=S3_HINT)
            else:
                if status < 300 or (missing and status == 404):
                    if answered is not None:
                        answered.update(headers)
                    return body
                failure = self._error_of(status, body)
                if status < 500 and status != 429:
                    raise failure
            log.warning("%s %s: %s (try %d)", request.method, request.path, failure, attempt + 1)
            if attempt + 1 < _TRIES:
                await asyncio.sleep(_PAUSE * 2**attempt)
        raise failure

    def _exchange(self, request: Request) -> tuple[int, Mapping[str, str], bytes]:
        connection, reply = self._open(request)
        try:
            headers = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, headers, reply.read(_LONGEST_ANSWER)
        finally:
            connection.close()

    def _open(self, request: Request) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        host, port = self._base.hostname or "", self._base.port
        connection = (
            http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
        )
        try:
            target = request.path + (f"?{request.query_string}" if request.query else "")
            headers = signed(self.place, request, self._base.netloc.rpartition("@")[2], datetime.now(UTC))
            headers["content-length"] = str(len(request.body))
            connection.request(request.method, target, request.body, headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    async def _read(self, reply: http.client.HTTPResponse) -> bytes:
        try:
            return await asyncio.to_thread(reply.read, CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{self.place.endpoint} closed the connection in the middle of an archive: {error!r}",
                              hint=S3_HINT) from None

    def _error_of(self, status: int, body: bytes) -> RockError:
        """The ROCK error for a response, with the error code of the service."""
        code = message = ""
        with suppress(ServerError):
            found = _xml(body)
            code, message = _text(found, "Code") or "", _text(found, "Message") or ""
        text = f"bucket {self.place.bucket} at {self.place.endpoint}: HTTP {status} {code} {message[:200]}".rstrip()
        if status == 507 or code in ("QuotaExceeded", "EntityTooLarge", "XMinioStorageFull"):
            return StorageFull(text, hint="raise the quota of the bucket, or delete archives of sandboxes")
        if status >= 500 or status == 429:
            return Unavailable(text, hint=S3_HINT)
        return ServerError(text, hint="look at ROCK_ARCHIVE and ROCK_S3_* of the server")


def _xml(body: bytes) -> ET.Element:
    if b"<!DOCTYPE" in body[:4096] or b"<!ENTITY" in body:
        raise ServerError("a bucket's answer has a document type, which is refused")
    try:
        return ET.fromstring(body)
    except ET.ParseError as error:
        raise ServerError(f"a bucket's answer is not XML: {error}") from None


def _tag(item: ET.Element) -> str:
    return item.tag.rpartition("}")[2]


def _text(found: ET.Element, name: str) -> str | None:
    return next((item.text for item in found.iter() if _tag(item) == name), None)
