"""Client of a registry (OCI distribution specification): manifests and blobs by digest, over HTTP, without a daemon.

Registry data is untrusted: digests and sizes are verified, credentials are sent only to the registry and to the token
service that it names over TLS, and a redirect from TLS to plain HTTP is rejected.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

from rock import settings
from rock.errors import ImageError, Unauthorized
from rock.images.registry import reach, rules
from rock.images.registry.logins import Login
from rock.images.registry.reference import HUB, Reference

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_HUB_ADDRESS = "registry-1.docker.io"
_CHUNK = 1 << 20
_LARGEST_MANIFEST = 4 << 20
_LARGEST_TOKEN = 1 << 20
_ATTEMPTS = 5
_LONGEST_WAIT = 120.0  # maximum seconds of a wait that a registry requests before a retry
_SLOW_AFTER, _SLOWEST = 60.0, 256  # seconds of the window, and minimum bytes per second in it
_REDIRECTS = 5
ALTERED = "try again; if it persists, the registry's data or a mirror of it is damaged"
_LOST = 3  # attempts of a request whose connection broke before the response
_BUSY = (429, 500, 502, 503, 504)
_CHALLENGE = re.compile(r'([a-z]+)="([^"]*)"')


class Registry:
    """The repository of `reference` in its registry. Blocking; thread-safe.

    mirror: another registry with the same repositories, used instead. Plain HTTP is used for registries on this
    machine's loopback, and for those in ROCK_INSECURE_REGISTRIES. With `reference.public_only` each connection, to this
    registry and to all that it refers to, is made to a public address, or to a registry that the owner listed.
    """

    def __init__(self, reference: Reference, login: Login | None = None, mirror: str | None = None) -> None:
        self.reference = reference
        self.domain = mirror or reference.domain
        self._login = login
        address = _HUB_ADDRESS if self.domain == HUB else self.domain
        plain = _is_loopback(address) or rules.is_insecure(self.domain)
        self._base = f"{'http' if plain else 'https'}://{address}/v2/{reference.repository}/"
        self._public_only = reference.public_only
        self._pool = self._pool_for(self._base)
        self._lock = threading.Lock()
        self._authorization: str | None = None

    def close(self) -> None:
        self._pool.clear()

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        """Raise ImageError for URLs that a proxy must not fetch; see reach.py."""
        if self._public_only and settings.proxy_for(url):
            parts = urlsplit(url)
            with contextlib.suppress(OSError):  # the name may be known to the proxy only
                reach.addresses_of(parts.hostname or "", parts.port or 443)
        return reach.pool_for(url, self._public_only)

    def log_in(self) -> None:
        """Verify the login. Unauthorized when it is rejected; ImageError when there is no such registry."""
        url = f"{self._base.partition('/v2/')[0]}/v2/"
        with contextlib.closing(self._send("GET", url, {}, None)) as answer:
            if answer.status != 401:
                return
            challenge = answer.headers.get("www-authenticate", "")
        try:
            self._log_in(challenge, push=True)
            with contextlib.closing(self._send("GET", url, {}, None)) as answer:
                self._expect(answer, (200, 404), "a login")
        except ImageError as error:
            raise Unauthorized(error.message, hint="are username and password right?") from None

    # ---- reading

    def manifest(self, what: str) -> tuple[bytes, str]:
        """(body, digest) of a tag's or a digest's manifest or index."""
        accept = {"accept": ", ".join((*INDEXES, *MANIFESTS))}
        response = self._asked("GET", f"manifests/{what}", accept)
        with contextlib.closing(response):
            body = response.read(_LARGEST_MANIFEST + 1)
        if len(body) > _LARGEST_MANIFEST:
            raise ImageError(f"{self._name(what)}: the manifest is larger than {_LARGEST_MANIFEST >> 20} MiB",
                             hint="check the image's name; a manifest has a few KiB")
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if what.startswith("sha256:") and what != digest:
            raise ImageError(f"{self._name(what)}: the registry sent a manifest with digest {digest}", hint=ALTERED)
        return body, digest

    def fetch(self, digest: str, size: int, target: Path, progress: Callable[[int], None]) -> None:
        """Download a blob of `size` bytes to `target`, resuming after a broken connection; ImageError when the content
        differs. progress: called with the number of received bytes."""
        seen = hashlib.sha256()
        done = 0
        problem = ""
        target.touch()  # an existing file already has the full size, which a reader may check
        with open(target, "r+b") as file:
            for attempt in range(_ATTEMPTS):
                if attempt:
                    time.sleep(min(2.0**attempt / 2, _LONGEST_WAIT))
                response = self._asked("GET", f"blobs/{digest}", {"range": f"bytes={done}-"} if done else {})
                with contextlib.closing(response):
                    if done and response.status != 206:  # the registry does not support ranges
                        file.seek(0)
                        seen, done = hashlib.sha256(), 0
                    try:
                        for chunk in _steadily(response, digest):
                            done += len(chunk)
                            if done > size:
                                raise ImageError(f"blob {digest} is longer than the manifest states", hint=ALTERED)
                            seen.update(chunk)
                            file.write(chunk)
                            progress(len(chunk))
                    except HTTPError as error:
                        problem = str(error)
                if done == size:
                    break
        if done != size:
            raise ImageError(f"blob {digest} of {self._name()} came only in part ({done} of {size} bytes): {problem}",
                             hint="try again")  # fmt: skip
        if f"sha256:{seen.hexdigest()}" != digest:
            raise ImageError(f"the content of blob {digest} of {self._name()} does not match its digest", hint=ALTERED)

    # ---- writing

    def has(self, digest: str) -> bool:
        with contextlib.closing(self._asked("HEAD", f"blobs/{digest}", {}, taken=(200, 404))) as response:
            return bool(response.status == 200)

    def mount(self, digest: str, source: str) -> bool:
        """Mount a blob from another repository of this registry; False when that fails for any reason."""
        path = f"blobs/uploads/?{urlencode({'mount': digest, 'from': source})}"
        try:
            with contextlib.closing(self._asked("POST", path, {}, taken=(201, 202), push=True)) as response:
                if response.status == 201:
                    return True
                location = urljoin(self._base, response.headers.get("location", ""))
            if _origin(location) == _origin(self._base):  # it started an upload instead
                self._send("DELETE", location, {}, None).close()
        except ImageError:
            pass
        return False

    def upload(self, digest: str, size: int, path: Path) -> None:
        """Upload a blob, unless the registry has it."""
        if self.has(digest):
            return
        with contextlib.closing(self._asked("POST", "blobs/uploads/", {}, taken=(202,), push=True)) as response:
            location = urljoin(self._base, response.headers.get("location", ""))
        if _origin(location) != _origin(self._base):
            raise ImageError(f"{self._name()}: the registry redirects the upload to another host",
                             hint="push to the host that the registry names, or correct the registry's external URL")
        mark = "&" if "?" in location else "?"
        headers = {"content-type": "application/octet-stream", "content-length": str(size)}
        with open(path, "rb") as file:
            answer = self._send("PUT", f"{location}{mark}{urlencode({'digest': digest})}", headers, _pieces(file))
        with contextlib.closing(answer):
            self._expect(answer, (201, 204), digest)

    def put_manifest(self, tag: str, body: bytes, media_type: str) -> None:
        """Upload a manifest, whose blobs are present, under a tag."""
        headers = {"content-type": media_type}
        answer = self._asked("PUT", f"manifests/{tag}", headers, taken=(201, 200), body=body, push=True)
        answer.close()

    # ---- requests

    def _asked(
        self, method: str, path: str, headers: Mapping[str, str], *, taken: tuple[int, ...] = (200, 206),
        body: bytes | None = None, push: bool = False,
    ) -> urllib3.BaseHTTPResponse:  # fmt: skip
        """The response, after a login if required and retries while the registry is busy. ImageError."""
        url = urljoin(self._base, path)
        asked_again = 0
        logged_in = False
        while True:
            answer = self._followed(method, url, headers, body)
            if answer.status == 401 and not logged_in:
                logged_in = True
                challenge = answer.headers.get("www-authenticate", "")
                answer.close()
                self._log_in(challenge, push)
                continue
            if answer.status in _BUSY and asked_again < _ATTEMPTS:
                wait = _retry_after(answer.headers.get("retry-after"), asked_again)
                if wait > _LONGEST_WAIT:
                    answer.close()
                    raise ImageError(f"registry {self.domain} will be there again for {self._name()} in {wait:.0f} s",
                                     hint="try again then; a login or a mirror may help")  # fmt: skip
                asked_again += 1
                answer.close()
                time.sleep(wait)
                continue
            try:
                self._expect(answer, taken, path)
            except BaseException:
                answer.close()
                raise
            return answer

    def _followed(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        for _ in range(_REDIRECTS):
            answer = self._send(method, url, headers, body)
            location = answer.headers.get("location")
            if answer.status not in (301, 302, 303, 307, 308) or not location:
                return answer
            answer.close()
            target = urljoin(url, location)
            if urlsplit(target).scheme != "https" and _origin(target) != _origin(self._base):
                raise ImageError(f"{self._name()}: the registry redirects to a connection without TLS",
                                 hint="use a registry that serves its data with https, or correct its external URL")
            url = target
        raise ImageError(f"{self._name()}: the registry redirects too often",
                         hint="check the configuration of the registry or of the proxy in front of it")

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None
    ) -> urllib3.BaseHTTPResponse:
        sent = {"user-agent": "rock", **headers}
        if self._authorization is not None and _origin(url) == _origin(self._base):
            sent["authorization"] = self._authorization
        for attempt in range(_LOST):
            try:
                return self._pool.request(method, url, headers=sent, body=body, preload_content=False, redirect=False,
                                          decode_content=False)  # fmt: skip
            except (ProtocolError, ReadTimeoutError) as error:
                if method not in ("GET", "HEAD") or attempt + 1 == _LOST:
                    raise self._unreachable(error) from None
                time.sleep(0.5 * 2.0**attempt)
            except reach.NearAddress:
                raise reach.near(urlsplit(url).netloc) from None
            except HTTPError as error:
                raise self._unreachable(error) from None
        raise AssertionError

    def _unreachable(self, error: Exception) -> ImageError:
        return ImageError(f"{self._name()}: registry {self.domain} cannot be reached: {_cause(error)}",
                          hint="is its name right, and is there a network? `rock image import` and `rock image "
                          "from-host` need none")  # fmt: skip

    def _expect(self, answer: urllib3.BaseHTTPResponse, taken: tuple[int, ...], what: str) -> None:
        if answer.status in taken:
            return
        reason = _reason(answer)
        name = self._name()
        if answer.status in (401, 403):
            whom = f"for {self._login.username}" if self._login else "without a login"
            raise ImageError(f"registry {self.domain} refuses {name} {whom}{reason}",
                             hint="`rock image login`, or registry_username and registry_password; and is the "
                             "name right?")  # fmt: skip
        if answer.status == 404:
            raise ImageError(f"registry {self.domain} has no {name}{reason}", hint="is its name right?")
        if answer.status == 429:
            raise ImageError(f"registry {self.domain} wants fewer requests for {name}{reason}",
                             hint="log in, or wait; a mirror helps")  # fmt: skip
        raise ImageError(f"registry {self.domain} answered HTTP {answer.status} for {what} of {name}{reason}",
                         hint="try again; if it persists, the log of the registry has the cause")

    def _name(self, what: str | None = None) -> str:
        return self.reference.familiar if what is None else f"{self.reference.repository} {what}"

    # ---- logging in

    def _log_in(self, challenge: str, push: bool) -> None:
        kind, _, rest = challenge.partition(" ")
        with self._lock:
            if kind.lower() == "basic" and self._login is not None:
                self._authorization = self._login.basic
            elif kind.lower() == "bearer":
                self._authorization = f"Bearer {self._token(dict(_CHALLENGE.findall(rest)), push)}"

    def _token(self, wanted: dict[str, str], push: bool) -> str:
        realm = wanted.get("realm", "")
        if urlsplit(realm).scheme != "https" and not (
            self._base.startswith("http:") and _is_loopback(urlsplit(realm).netloc)
        ):
            raise ImageError(f"registry {self.domain} has a token service without TLS",
                             hint="use a registry whose token service has an https URL")
        scope = f"repository:{self.reference.repository}:pull{',push' if push else ''}"
        query = {key: wanted[key] for key in ("service",) if key in wanted} | {"scope": scope}
        headers = {"user-agent": "rock"}
        if self._login is not None:
            headers["authorization"] = self._login.basic
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        try:
            answer = self._pool_for(realm).request("GET", url, headers=headers, redirect=False, preload_content=False)
            with contextlib.closing(answer):
                self._expect(answer, (200,), "a token")
                reply = json.loads(answer.read(_LARGEST_TOKEN))
        except reach.NearAddress:
            raise reach.near(urlsplit(realm).netloc) from None
        except (HTTPError, ValueError) as error:
            raise ImageError(f"the token service of {self.domain} failed: {_cause(error)}",
                             hint="try again, or check the login with `rock image login`") from None
        token = (reply.get("token") or reply.get("access_token")) if isinstance(reply, dict) else None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,65536}", token):
            raise ImageError(f"the token service of {self.domain} returned no valid token",
                             hint="check the login with `rock image login`")
        return token


def _is_loopback(address: str) -> bool:
    host = urlsplit(f"//{address}").hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _retry_after(header: str | None, attempt: int) -> float:
    """Seconds to wait: the registry's value, a number or a date, else an exponential backoff."""
    header = (header or "").strip()
    if re.fullmatch(r"\d{1,9}", header):
        return float(header)
    if header:
        with contextlib.suppress(ValueError, OverflowError):
            return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return min(0.5 * 2.0**attempt, _LONGEST_WAIT)


def _reason(answer: urllib3.BaseHTTPResponse) -> str:
    """A registry's error message, shortened."""
    try:
        rows = json.loads(answer.read(1 << 16))["errors"]
        return f" ({'; '.join(str(row.get('message', row.get('code')))[:200] for row in rows[:3])})"
    except (HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _cause(error: Exception) -> str:
    """The text of a connection error, without the representation of the connection."""
    reason = str(getattr(error, "reason", None) or error)
    return re.sub(r"^<?\w*Connection\([^)]*\)[^:]*: ", "", reason)[:300]


def _steadily(response: urllib3.BaseHTTPResponse, digest: str) -> Iterator[bytes]:
    """Yield a body. ImageError below the minimum rate: a registry must not block the server indefinitely."""
    came, since = 0, time.monotonic()
    while chunk := response.read1(_CHUNK):
        came += len(chunk)
        passed = time.monotonic() - since
        if passed > _SLOW_AFTER:
            if came < passed * _SLOWEST:
                raise ImageError(f"blob {digest} comes too slowly ({came} bytes in {passed:.0f} s)", hint="try again")
            came, since = 0, time.monotonic()
        yield chunk


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(_CHUNK):
        yield piece
