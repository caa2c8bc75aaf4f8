"""The part of HTTP/1.1 that the SDK speaks, without I/O: addresses, heads of requests, and the reading of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

import orjson

from rock.errors import InvalidConfig, RockError, ServerError, Unavailable, from_wire
from rock.protocol.routes import SENT

HEAD_LIMIT = 64 << 10
LINE_LIMIT = 4 << 10


@dataclass(frozen=True)
class Address:
    """Where a server is: what a base URL says, taken apart. `path` has no slash at its end."""

    url: str
    host: str
    port: int
    tls: bool
    path: str
    unix: str = ""  # the path of a Unix socket, in place of host and port

    @classmethod
    def parse(cls, base_url: str) -> Address:
        """The address in "http://host:8080/some/path". InvalidConfig when it is not http or https, or has no host."""
        text = base_url.strip()
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidConfig(
                f"base_url {base_url!r} is not a URL: {error}", hint="use a URL like http://host:8080"
            ) from None
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise InvalidConfig(
                f"base_url {base_url!r} is not a URL like http://host:8080", hint="begin it with http:// or https://"
            )
        if parts.query or parts.fragment:
            raise InvalidConfig(f"base_url {base_url!r} must not have a query or a fragment", hint="remove them")
        tls = parts.scheme == "https"
        path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~-._")
        try:
            host.encode("idna" if not host.isascii() else "ascii")
        except UnicodeError:
            raise InvalidConfig(f"base_url {base_url!r} has an invalid host name", hint="correct it") from None
        if any(c.isspace() for c in text):
            raise InvalidConfig(f"base_url {base_url!r} contains a space", hint="remove it")
        return cls(text.rstrip("/"), host, port or (443 if tls else 80), tls, path)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode()
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def header_lines(headers: dict[str, str]) -> bytes:
    """Headers as they travel. InvalidConfig for a name or a value that could not be sent as one line."""
    lines = []
    for name, value in headers.items():
        if not name or not name.isascii() or any(c in name for c in " \t\r\n:") or any(c in value for c in "\r\n\0"):
            raise InvalidConfig(f"header {name!r} cannot be sent", hint="remove line breaks, colons and spaces")
        try:
            lines.append(f"{name}: {value}\r\n".encode("latin-1"))
        except UnicodeEncodeError:
            raise InvalidConfig(
                f"header {name!r} has characters that cannot be sent", hint="use Latin-1 only"
            ) from None
    return b"".join(lines)


def query_string(values: dict[str, object]) -> str:
    """`?a=1&b=x`: None is left out, booleans are 1 and 0, a list repeats its name; "" without values."""
    given = {k: int(v) if isinstance(v, bool) else v for k, v in values.items() if v is not None}
    return "?" + urlencode(given, doseq=True, quote_via=quote) if given else ""


class Source(Protocol):
    """A request body that is not held in memory. `chunks` starts anew at each call, so that a request can be resent."""

    @property
    def size(self) -> int | None:
        """Bytes in all, or None when that is not known beforehand."""

    def chunks(self) -> Iterator[bytes]: ...


class Answer:
    """One answer, read as its bytes come in.

    Give bytes to `feed`, and the end of the connection to `end`; `status` and `headers` (names in lower case) are set
    once the head is here; `take` hands out the body read so far; `done` tells its end. ServerError: not HTTP/1.x.
    """

    __slots__ = ("_buffer", "_chunked", "_closing", "_left", "_parts", "done", "headers", "received", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self.received = False
        self._buffer = b""
        self._parts: list[bytes] = []
        self._left: int | None = 0  # bytes of the body or of the chunk still to come; None: until the connection ends
        self._chunked = ""  # what of a chunk comes next: size, data, end, trailer
        self._closing = False

    @property
    def reusable(self) -> bool:
        """The connection may carry another request: the answer ended by itself and nothing came after it."""
        return self.done and not self._closing and not self._buffer

    def take(self) -> bytes:
        """The body read since the last call. A large one of an upgraded connection is a memoryview."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def complete(self, parts: list[bytes]) -> None:
        """All of the body, of a response that did not come as HTTP."""
        self._parts, self.received, self.done = parts, True, True

    def feed(self, data: bytes) -> None:
        self.received = True
        if self.done:
            self._closing = True  # more than was announced: this connection cannot be trusted again
            return
        if self.status == 0:
            self._buffer += data
            if not self._head():
                return
            data, self._buffer = self._buffer, b""
        if self._chunked:
            self._feed_chunked(data)
        else:
            self._feed_plain(data)

    def end(self) -> None:
        """The connection ended. Unavailable when the answer had not."""
        if self.status and self._left is None and not self.done:
            self.done = True
        elif not self.done:
            raise Unavailable("the connection ended in the middle of an answer", hint="try again", details=SENT)

    def _feed_plain(self, data: bytes) -> None:
        if self._left is None:
            self._parts.append(data)
            return
        if len(data) > self._left:
            self._closing = True
            data = data[: self._left]
        if data:
            self._parts.append(data)
            self._left -= len(data)
        self.done = self._left == 0

    def _feed_chunked(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        at = 0
        while not self.done:
            if self._chunked == "data":
                assert self._left is not None
                part = data[at : at + self._left]
                if not part:
                    break
                self._parts.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left == 0:
                    self._chunked = "end"
                continue
            stop = data.find(b"\r\n", at)
            if stop < 0:
                if len(data) - at > LINE_LIMIT:
                    raise ServerError("malformed answer: a line between chunks is too long")
                break
            self._chunk_line(data[at:stop])
            at = stop + 2
        self._buffer = data[at:]

    def _chunk_line(self, line: bytes) -> None:
        if self._chunked == "end":
            if line:
                raise ServerError("malformed answer: a chunk is longer than announced")
            self._chunked = "size"
        elif self._chunked == "size":
            digits = line.partition(b";")[0].strip()
            if not digits or len(digits) > 15 or digits.translate(None, b"0123456789abcdefABCDEF"):
                raise ServerError(f"malformed answer: {digits[:20]!r} is not the size of a chunk")
            self._left = int(digits, 16)
            self._chunked = "data" if self._left else "trailer"
        elif not line:  # the empty line after the trailers
            self.done = True

    def _head(self) -> bool:
        """Read the head out of the buffer; False while it is not complete. Interim (1xx) heads are skipped."""
        while True:
            buffer = self._buffer
            if not buffer.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(buffer):
                raise ServerError(f"malformed answer: it begins with {buffer[:40]!r}, which is not HTTP/1.x")
            stop = buffer.find(b"\r\n\r\n")
            if stop > HEAD_LIMIT or (stop < 0 and len(buffer) > HEAD_LIMIT):
                raise ServerError(f"malformed answer: its head is over {HEAD_LIMIT} bytes")
            if stop < 0:
                if b"\n\n" in buffer:
                    raise ServerError("malformed answer: its lines do not end in CR LF")
                return False
            first, *lines = buffer[:stop].decode("latin-1").split("\r\n")
            self._buffer = buffer[stop + 4 :]
            status = first[9:12]
            if len(first) < 12 or first[8] != " " or not status.isdecimal() or first[12:13] not in ("", " "):
                raise ServerError(f"malformed answer: {first[:80]!r} is not a status line")
            if status[0] != "1":
                break
            if status == "101":
                raise ServerError("malformed answer: the server changed the protocol unasked")
        self._framing(int(status), first, _headers(lines))
        return True

    def _framing(self, status: int, first: str, headers: dict[str, str]) -> None:
        connection = headers.get("connection", "").lower()
        self._closing = "close" in connection or (first[:8] == "HTTP/1.0" and "keep-alive" not in connection)
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if status in (204, 304):
            self._left, self.done = 0, True
        elif coding is not None:
            if coding.strip().lower() != "chunked":
                raise ServerError(f"malformed answer: transfer-encoding {coding!r} was not asked for")
            self._closing |= length is not None
            self._chunked = "size"
        elif length is not None:
            if not length.isdecimal() or not length.isascii() or len(length) > 18:
                raise ServerError(f"malformed answer: content-length {length[:40]!r}")
            self._left = int(length)
            self.done = self._left == 0
        else:
            self._left, self._closing = None, True
        self.status, self.headers = status, headers


def upgrade_headers(data: bytes) -> dict[str, str]:
    """The headers of a response that ends with its head. ServerError."""
    head, _, rest = data.partition(b"\r\n\r\n")
    if rest:
        raise ServerError("malformed answer: more than the head of an upgrade")
    return _headers(head.decode("latin-1").split("\r\n")[1:])


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name[0] in " \t" or name[-1] in " \t":
            raise ServerError(f"malformed answer: {line[:80]!r} is not a header")
        value = value.strip()
        if name == "content-length" and headers.get(name, value) != value:
            raise ServerError("malformed answer: two lengths")
        headers[name] = value
    return headers


def decode(raw: bytes) -> Any:
    """JSON of an answer; ServerError when it is none."""
    try:
        return orjson.loads(raw) if raw else None
    except orjson.JSONDecodeError:
        raise ServerError(f"malformed answer: {raw[:80]!r} is not JSON") from None


def failure(status: int, body: bytes, url: str) -> RockError:
    """The error that an answer stands for."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace")
    if status < 400:
        return ServerError(f"{url} answered with a redirection ({status}), which is not followed")
    return from_wire(content, status)
