"""Client of a container engine: the API calls that sandboxes need, a circuit breaker, and the mapping of errors.

It uses the engine's HTTP socket and never starts the engine's command line program. `Breaker` pauses calls to an engine
that fails repeatedly. `engine_errors` and `refusal` translate the engine's errors.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
import urllib.parse
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.docker import http

T = TypeVar("T")
log = logging.getLogger(__name__)
DEFAULT_SOCKET = "/var/run/docker.sock"
_PATIENCE = 60.0  # seconds for one response
_COMMIT_PATIENCE = 600.0  # seconds
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25  # seconds, doubled after each attempt
_OVERLOADED = (429, 500, 502, 503, 504)
_TELLING = (  # messages of a 500 that a retry does not change
    "storage-opt", "no such file", "executable file not found", "permission denied", "invalid", "not supported",
    "exec format error", "unknown or invalid runtime", "no space left", "read-only file system", "cannot run",
)  # fmt: skip


class EngineError(Exception):
    """An error response of the engine: HTTP `status`, or 0 within a stream."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.strip()


@dataclass(frozen=True)
class Facts:
    """The features that an engine reports."""

    version: str = ""
    driver: str = ""
    backing: str = ""  # file system under its storage
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    default_runtime: str = "runc"
    security: tuple[str, ...] = ()  # "seccomp", "userns", "rootless", "apparmor", ...
    cgroups: int = 1
    memory: bool = True
    cpus: bool = True
    pids: bool = True
    live_restore: bool = False
    bridge: bool = True

    @classmethod
    def of(cls, info: dict[str, Any]) -> Facts:
        """Parse the engine's report, in which any field may be missing."""
        status = {str(row[0]): str(row[1]) for row in info.get("DriverStatus") or () if len(row) > 1}
        words = (part for text in info.get("SecurityOptions") or () for part in str(text).split(","))
        runtimes = info.get("Runtimes") or {}
        return cls(
            version=str(info.get("ServerVersion", "")), driver=str(info.get("Driver", "")),
            backing=status.get("Backing Filesystem", ""),
            runtimes={str(name): dict(entry or {}) for name, entry in runtimes.items()},
            default_runtime=str(info.get("DefaultRuntime") or "runc"),
            security=tuple(word.removeprefix("name=") for word in words if word.startswith("name=")),
            cgroups=2 if str(info.get("CgroupVersion")) == "2" else 1, memory=bool(info.get("MemoryLimit")),
            cpus=bool(info.get("CpuCfsQuota")), pids=bool(info.get("PidsLimit")),
            live_restore=bool(info.get("LiveRestoreEnabled")),
            bridge="bridge" in ((info.get("Plugins") or {}).get("Network") or ()),
        )  # fmt: skip


class Engine:
    """One engine. `host` is "unix:///path"; other forms are rejected, because a remote engine cannot see local files.

    Every call may raise Unavailable (no connection, no response in time), NoCapacity (the circuit breaker is open) or
    EngineError (an error response).
    """

    def __init__(self, host: str = "", patience: float = _PATIENCE) -> None:
        self.host = host or f"unix://{DEFAULT_SOCKET}"
        self.breaker = Breaker()
        self._patience = patience
        self._facts: Facts | None = None

    @property
    def socket(self) -> str:
        """The path of the socket. Unsupported for a remote engine."""
        path = self.host.removeprefix("unix://")
        if path == self.host or not path.startswith("/"):
            raise errors.Unsupported(f"the container engine at {self.host} is not on this machine",
                                     hint="run the rocklet on the engine's machine, and set DOCKER_HOST to its "
                                          "socket, like unix:///var/run/docker.sock")
        return path

    @property
    def known(self) -> Facts:
        """The last known facts."""
        return self._facts or Facts()

    async def facts(self, *, anew: bool = False) -> Facts:
        """The features of the engine; cached, unless `anew`."""
        if self._facts is None or anew:
            self._facts = Facts.of(await self._json("tell about itself", "GET", "/info"))
        return self._facts

    # ---- requests ----

    async def _again(self, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """Retry an operation after transient errors."""
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            self.breaker.refuse(what)
            try:
                result = await work()
            except errors.Unavailable as error:
                self.breaker.failed(error.message)
                if attempt == _ATTEMPTS:
                    raise
            except EngineError as error:
                if error.status not in _OVERLOADED or any(word in error.message.lower() for word in _TELLING):
                    self.breaker.worked()
                    raise
                self.breaker.failed(error.message)
                if attempt == _ATTEMPTS:
                    raise
            except BaseException:
                self.breaker.undecided()
                raise
            else:
                self.breaker.worked()
                return result
            log.info("the container engine did not %s; attempt %d", what, attempt)
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    async def _json(self, what: str, method: str, path: str, body: Any = None, **query: str) -> Any:
        """Send one request and read the whole response; None when it is empty."""
        return await self._again(what, lambda: self._once(what, method, _target(path, query), body))

    async def _once(self, what: str, method: str, target: str, body: Any) -> Any:
        with _reached(what, self.host):
            async with asyncio.timeout(self._patience), self._asked(method, target, body) as answer:
                data = await answer.read()
        return _unpacked(data)

    @contextlib.asynccontextmanager
    async def _asked(self, method: str, target: str, body: Any = None, **headers: str) -> AsyncGenerator[http.Answer]:
        """Send one request; error responses raise."""
        data = b"" if body is None else json.dumps(body).encode()
        async with http.ask(self.socket, method, target, data, headers) as answer:
            if answer.status >= 400:
                found = _unpacked(await answer.read())
                message = found.get("message") if isinstance(found, dict) else None
                raise EngineError(answer.status, str(message or f"status {answer.status}"))
            yield answer

    async def _or_none(self, what: str, path: str) -> dict[str, Any] | None:
        try:
            found = await self._json(what, "GET", path)
        except EngineError as error:
            if error.status == 404:
                return None
            raise
        return found if isinstance(found, dict) else {}

    # ---- containers ----

    async def create(self, name: str, config: dict[str, Any]) -> str:
        """Create a container with that name and return its id. Adopts a container from an earlier attempt whose
        response was lost."""
        try:
            found = await self._json("create a container", "POST", "/containers/create", config, name=name)
        except EngineError as error:
            if error.status != 409 or "already in use" not in error.message:
                raise
            found = await self.inspect(name) or {}
        return str(found["Id"])

    async def start(self, id: str) -> None:
        """Start a container. A running container is no error."""
        await self._json("start a container", "POST", f"/containers/{id}/start")

    async def inspect(self, id: str) -> dict[str, Any] | None:
        """The details of a container; None when there is none."""
        return await self._or_none("look at a container", f"/containers/{id}/json")

    async def kill(self, id: str) -> None:
        """Send SIGKILL; a stopped container is no error."""
        with _fine(404, 409):
            await self._json("kill a container", "POST", f"/containers/{id}/kill", signal="SIGKILL")

    async def remove(self, id: str) -> None:
        """Remove a container with its volumes, running or not; returns when it is gone. Idempotent."""
        for _ in range(600):
            try:
                await self._json("remove a container", "DELETE", f"/containers/{id}", force="1", v="1")
                return
            except EngineError as error:
                if error.status == 404:
                    return
                if error.status != 409 or "in progress" not in error.message:
                    raise
                await asyncio.sleep(0.1)  # another client removes it

    async def attach(self, id: str) -> Attached:
        """A stream to the standard input and from the standard output of a container; the caller closes it."""
        target = _target(f"/containers/{id}/attach", {"stream": "1", "stdin": "1", "stdout": "1"})

        async def work() -> Attached:
            with _reached("attach to a container", self.host):
                async with asyncio.timeout(self._patience):
                    answer = await http.upgrade(self.socket, target)
            if isinstance(answer, http.Refused):
                raise EngineError(answer.status, answer.body.decode(errors="replace"))
            return Attached(answer)

        return await self._again("attach to a container", work)

    async def list(self, label: str) -> list[dict[str, Any]]:
        """Containers with a label, "name=value", running or not."""
        filters = json.dumps({"label": [label]})
        found = await self._json("list containers", "GET", "/containers/json", all="1", filters=filters)
        return [entry for entry in found or () if isinstance(entry, dict)]

    async def events(self, label: str, since: float) -> AsyncGenerator[dict[str, Any]]:
        """Yield events of containers with a label since a time, until the connection ends. Unavailable."""
        filters = json.dumps({"type": ["container"], "label": [label]})
        target = _target("/events", {"filters": filters, "since": f"{since:.9f}"})
        with _reached("tell events", self.host):
            async with self._asked("GET", target) as answer:
                async for line in answer.lines():
                    event = _unpacked(line)
                    if isinstance(event, dict):
                        yield event

    async def has_network(self, name: str) -> bool:
        return await self._or_none("look at a network", f"/networks/{name}") is not None

    # ---- images ----

    async def image(self, name: str) -> dict[str, Any] | None:
        """The details of an image in the engine; None when it is absent."""
        return await self._or_none("look at an image", f"/images/{urllib.parse.quote(name)}/json")

    async def load_image(self, name: str, tar: bytes) -> None:
        """Make an image of one layer, NAME:TAG. EngineError, Unavailable."""
        repo, _, tag = name.partition(":")
        target = _target("/images/create", {"fromSrc": "-", "repo": repo, "tag": tag})
        with _reached("make an image", self.host):
            headers = {"Content-Type": "application/x-tar"}
            async with asyncio.timeout(self._patience), http.ask(self.socket, "POST", target, tar, headers) as answer:
                data = await answer.read()
                if answer.status >= 400 or b"errorDetail" in data:
                    raise EngineError(answer.status, data[:300].decode(errors="replace"))

    async def remove_image(self, name: str, *, force: bool = True) -> None:
        """Remove an image; an absent one is no error. Without `force`, EngineError 409 when it is in use."""
        with _fine(404):
            await self._json("remove an image", "DELETE", f"/images/{urllib.parse.quote(name)}",
                             force="1" if force else "0")

    async def commit(self, container: str, repository: str, tag: str) -> str:
        """Make an image of a container, which is paused meanwhile; returns its id. EngineError, Unavailable."""
        target = _target("/commit", {"container": container, "repo": repository, "tag": tag, "pause": "1"})
        with _reached("commit a container", self.host):
            async with asyncio.timeout(_COMMIT_PATIENCE), self._asked("POST", target, {}) as answer:
                found = _unpacked(await answer.read())
        return str(found["Id"])

    async def pull(self, name: str, domain: str, login: tuple[str, str] | None) -> AsyncGenerator[dict[str, Any]]:
        """Have the engine pull an image by its full name. EngineError with the error of the registry at `domain`."""
        headers = {}
        if login is not None:
            auth = {"username": login[0], "password": login[1], "serveraddress": domain}
            headers["X-Registry-Auth"] = base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()
        target = _target("/images/create", {"fromImage": name})
        with _reached("pull an image", self.host):
            async with self._asked("POST", target, **headers) as answer:
                async for line in answer.lines():
                    step = _unpacked(line)
                    if not isinstance(step, dict):
                        continue
                    if "error" in step:
                        raise EngineError(0, str(step["error"]))
                    yield step


class Attached:
    """The standard streams of a container. The engine puts a header before each chunk of its output."""

    def __init__(self, stream: http.Upgraded) -> None:
        self._stream = stream
        self._rest = bytearray()
        self._left = 0  # remaining bytes of the current chunk
        self._ours = False  # whether the chunk is standard output
        self.write = stream.write
        self.close = stream.close

    async def read(self) -> bytes:
        """Read available standard output; empty at the end."""
        out = bytearray()
        while not out:
            data = await self._stream.read()
            if not data:
                return b""
            self._rest += data
            while self._rest:
                if self._left == 0:
                    if len(self._rest) < 8:
                        break
                    self._ours, self._left = self._rest[0] == 1, int.from_bytes(self._rest[4:8], "big")
                    del self._rest[:8]
                piece = self._rest[: self._left]
                self._left -= len(piece)
                del self._rest[: len(piece)]
                if self._ours:
                    out += piece
        return bytes(out)


def _target(path: str, query: dict[str, str]) -> str:
    return f"{path}?{urllib.parse.urlencode(query)}" if query else path


def _unpacked(data: bytes) -> Any:
    """Parse JSON; None when the text is invalid."""
    try:
        return json.loads(data) if data else None
    except ValueError:
        return None


@contextlib.contextmanager
def _reached(what: str, host: str) -> Iterator[None]:
    """Translate connection failures into project errors."""
    try:
        yield
    except TimeoutError:
        raise errors.Unavailable(f"the container engine did not {what} in time",
                                 hint="it may be overloaded: start fewer at once, or try again later") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise errors.Unavailable(f"no container engine listens on {host}",
                                 hint="start it, or set DOCKER_HOST to its socket") from None
    except PermissionError:
        raise errors.Unavailable(f"this user may not use the container engine at {host}",
                                 hint="add it to the group that owns the socket, or use a rootless engine") from None
    except (OSError, http.Broken) as error:
        raise errors.Unavailable(f"the container engine did not {what}: {error}",
                                 hint="see the engine's own log") from None


@contextlib.contextmanager
def _fine(*statuses: int) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        if error.status not in statuses:
            raise


# ---- circuit breaker ----

_MOST_FAILURES = 5
_REST = 5.0  # seconds, doubled after each failure of a probe
_LONGEST_REST = 60.0


class Breaker:
    """Circuit breaker: closed until `failures` in a row, then open for `rest` seconds, then half open for one probe
    call.

        closed ── failures ──► open ── rest ──► half open ── worked ──► closed
                                ▲                   └────── failed ──► open, for longer
    """

    def __init__(self, failures: int = _MOST_FAILURES, rest: float = _REST,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._first_rest = self._rest = rest
        self._clock = clock
        self._failures = 0
        self._cause = ""
        self._until: float | None = None
        self._looking_since: float | None = None

    def refuse(self, what: str) -> None:
        """Raise NoCapacity while open. Otherwise the caller proceeds and reports the outcome."""
        if self._until is None:
            return
        now = self._clock()
        left = self._until - now
        looking = self._looking_since is not None and now - self._looking_since < _LONGEST_REST
        if left > 0 or looking:
            raise errors.NoCapacity(
                f"no request is sent to the container engine, which failed {self._failures} times in a row: "
                f"{self._cause or what}",
                hint=f"try again in {max(1.0, left):.0f} s; see the engine's own log, and start fewer at once")
        self._looking_since = now

    def worked(self) -> None:
        """Record that the engine responded, with any status."""
        self._failures, self._until, self._looking_since = 0, None, None
        self._rest = self._first_rest

    def undecided(self) -> None:
        """Record that the call was cancelled before its outcome was known."""
        self._looking_since = None

    def failed(self, cause: str = "") -> None:
        """Record that the engine did not respond or reported an internal failure."""
        self._failures += 1
        self._cause = cause
        if self._looking_since is not None:
            self._looking_since = None
            self._rest = min(self._rest * 2, _LONGEST_REST)
            self._until = self._clock() + self._rest
        elif self._failures >= self._limit and self._until is None:
            self._until = self._clock() + self._rest


# ---- error translation ----

@contextlib.contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Translate errors of a start that the engine reports into project errors."""
    try:
        yield
    except EngineError as error:
        raise errors.Unavailable(f"the container engine refused ({what}): {error.message}",
                                 hint="see the engine's own log") from None


def refusal(error: EngineError, config: SandboxConfig) -> errors.RockError:
    """The reason for which the engine rejected a container."""
    text = error.message
    low = text.lower()
    if "storage-opt" in low or "quota" in low:
        return errors.Unsupported(f"the container engine cannot limit the disk to {config.disk}: {text}",
                                  hint="leave disk unset, or use the overlay2 driver on XFS with project quotas")
    if "no space left" in low:
        return errors.StorageFull(f"the container engine's disk is full: {text}",
                                  hint="free space on the engine's disk, for example with `docker system prune`")
    if "bind source path does not exist" in low or "ld.so" in low:
        return errors.Unsupported(f"the container engine does not see the files of this server: {text}",
                                  hint="run the rocklet on the engine's machine, not in a container")
    if error.status == 404 and "no such image" in low:
        return errors.ImageError(f"image {config.image} was removed from the container engine during the start",
                                 hint="start the sandbox again; the image is pulled then")
    return errors.StartFailed(f"the container engine failed to start the container: {text}",
                              hint="the engine's log has the cause, as in `journalctl -u docker`")
