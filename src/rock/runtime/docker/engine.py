"""The container engine, over its HTTP socket: the few calls that sandboxes need, with our own errors.

The only file that knows aiodocker. Nothing is started with the engine's command line program.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rock import errors
from rock.runtime.docker.breaker import Breaker

T = TypeVar("T")
log = logging.getLogger(__name__)
DEFAULT_SOCKET = "/var/run/docker.sock"
_PATIENCE = 60.0  # seconds for one answer
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25  # seconds, doubled after each attempt
_OVERLOADED = (429, 500, 502, 503, 504)
_TELLING = (  # a 500 that will be the same the next time
    "storage-opt", "no such file", "executable file not found", "permission denied", "invalid", "not supported",
    "exec format error", "unknown or invalid runtime", "no space left", "read-only file system", "cannot run",
)  # fmt: skip
INSTALL = "pip install 'rock-sandbox[docker]'"


class EngineError(Exception):
    """What the engine answered: `status` of HTTP, 0 within a stream."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.strip()


@dataclass(frozen=True)
class Facts:
    """What an engine can do, as it tells itself."""

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
        """The facts of the engine's own account, which may lack anything."""
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
    """One engine. `host` is "unix:///path"; anything else is refused, as an engine elsewhere cannot see our files.

    Every call may raise Unavailable: nobody there, no answer in time, or too many failures just now.
    """

    def __init__(self, host: str = "", patience: float = _PATIENCE) -> None:
        self.host = host or f"unix://{DEFAULT_SOCKET}"
        self.breaker = Breaker()
        self._patience = patience
        self._client: Any = None
        self._facts: Facts | None = None

    @property
    def socket(self) -> str:
        """The path of its socket. Unsupported for an engine elsewhere."""
        path = self.host.removeprefix("unix://")
        if path == self.host or not path.startswith("/"):
            raise errors.Unsupported(f"the container engine at {self.host} is not on this machine",
                                     hint="run the rocklet on the engine's machine, and set DOCKER_HOST to its "
                                          "socket, like unix:///var/run/docker.sock")
        return path

    async def close(self) -> None:
        client, self._client = self._client, None
        self._facts = None
        if client is not None:
            await client.close()

    def _connected(self) -> Any:
        if self._client is None:
            try:
                import aiodocker
                import aiohttp
            except ImportError:
                raise errors.Unsupported("the docker runtime needs the package aiodocker", hint=INSTALL) from None
            path = self.socket
            if not os.path.exists(path):
                raise errors.Unavailable(f"no container engine listens on {path}",
                                         hint="start it, or set DOCKER_HOST to its socket")
            self._client = aiodocker.Docker(url=f"unix://{path}", timeout=aiohttp.ClientTimeout(total=self._patience))
        return self._client

    @property
    def known(self) -> Facts:
        """What was found out last."""
        return self._facts or Facts()

    async def facts(self, *, anew: bool = False) -> Facts:
        """What it can do; asked once, unless `anew`."""
        if self._facts is None or anew:
            self._facts = Facts.of(await self.call("info", lambda client: client.system.info()))
        return self._facts

    async def call(self, what: str, work: Callable[[Any], Awaitable[T]], *, again: bool = True) -> T:
        """Do something, several times where it does not go well for reasons that may pass.

        again: whether it may be repeated when nobody knows if it was done. EngineError for what it answers and means.
        """
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            self.breaker.refuse(what)
            try:
                result = await self._once(what, work)
            except errors.Unavailable:
                self.breaker.failed()
                if attempt == _ATTEMPTS or not again:
                    raise
            except EngineError as error:
                if error.status not in _OVERLOADED or any(word in error.message.lower() for word in _TELLING):
                    self.breaker.worked()
                    raise
                self.breaker.failed()
                if attempt == _ATTEMPTS or not again:
                    raise
            else:
                self.breaker.worked()
                return result
            log.info("the container engine did not %s; attempt %d", what, attempt)
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    async def _once(self, what: str, work: Callable[[Any], Awaitable[T]]) -> T:
        client = self._connected()
        import aiodocker
        import aiohttp

        try:
            return await work(client)
        except aiodocker.DockerError as error:
            raise EngineError(error.status, str(error.message)) from None
        except TimeoutError:
            raise errors.Unavailable(f"the container engine did not answer ({what}) in {self._patience:g} s",
                                     hint="it may be overloaded: start fewer at once, or try again later") from None
        except (aiohttp.ClientError, OSError) as error:
            raise errors.Unavailable(f"the container engine cannot be reached ({what}): {error}",
                                     hint=f"is it running, and may this user use {self.socket}?") from None

    # ---- containers ----

    async def create(self, name: str, config: dict[str, Any]) -> str:
        """The id of a new container of that name. One that a lost answer left behind is the one meant."""
        async def work(client: Any) -> str:
            import aiodocker

            try:
                return str((await client.containers.create(config, name=name)).id)
            except aiodocker.DockerError as error:
                if error.status == 409 and "already in use" in error.message:
                    return str((await client.containers.get(name)).id)
                raise

        return await self.call("create a container", work)

    async def start(self, id: str) -> None:
        await self.call("start a container", lambda client: client.containers.container(id).start())

    async def inspect(self, id: str) -> dict[str, Any] | None:
        """All about a container; None when there is none."""
        return await self._or_none("look at a container", lambda client: client.containers.container(id).show())

    async def kill(self, id: str) -> None:
        """SIGKILL; one that does not run is no error."""
        with _fine(404, 409):
            await self.call("kill a container", lambda client: client.containers.container(id).kill(signal="SIGKILL"))

    async def remove(self, id: str) -> None:
        """Remove a container with its volumes, whether it runs or not. Idempotent."""
        with _fine(404):
            await self.call("remove a container", lambda client: _remove(client, id))

    async def list(self, label: str) -> list[dict[str, Any]]:
        """Containers with a label, "name=value", running or not."""
        filters = {"label": [label]}
        found = await self.call("list containers", lambda client: client.containers.list(all=True, filters=filters))
        return [dict(container._container) for container in found]

    async def attach(self, id: str) -> Any:
        """A stream to the standard streams of a container: `read_out`, `write_in`, `close`."""
        async def work(client: Any) -> Any:
            stream = client.containers.container(id).attach(stdin=True, stdout=True, stderr=True, logs=False)
            await stream.__aenter__()
            return stream

        return await self.call("attach to a container", work, again=False)

    async def events(self, label: str, since: float) -> AsyncGenerator[dict[str, Any]]:
        """What happens to containers with a label, from a time on, until the connection ends. Unavailable."""
        filters = json.dumps({"type": ["container"], "label": [label]})
        client = self._connected()
        import aiohttp

        try:
            async with client._query("events", method="GET", timeout=aiohttp.ClientTimeout(sock_connect=10),
                                     params={"filters": filters, "since": f"{since:.9f}"}) as response:
                async for line in response.content:
                    with contextlib.suppress(ValueError):
                        event = json.loads(line)
                        if isinstance(event, dict):
                            yield event
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.Unavailable(f"the container engine's events ended: {error}") from None

    async def has_network(self, name: str) -> bool:
        return await self._or_none("look at a network", lambda c: c._query_json(f"networks/{name}")) is not None

    # ---- images ----

    async def image(self, name: str) -> dict[str, Any] | None:
        """All about an image that the engine has; None when it has none."""
        return await self._or_none("look at an image", lambda client: client.images.inspect(name))

    async def pull(self, name: str, login: tuple[str, str] | None) -> AsyncGenerator[dict[str, Any]]:
        """Have the engine pull an image, by its full name. EngineError with what the registry said."""
        client = self._connected()
        import aiodocker
        import aiohttp

        auth = {"username": login[0], "password": login[1]} if login else None
        try:
            async for step in client.images.pull(name, auth=auth, stream=True):
                yield step
        except aiodocker.DockerError as error:
            raise EngineError(error.status, str(error.message)) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.Unavailable(f"the container engine cannot be reached (pull): {error}") from None

    async def _or_none(self, what: str, work: Callable[[Any], Awaitable[dict[str, Any]]]) -> dict[str, Any] | None:
        try:
            return await self.call(what, work)
        except EngineError as error:
            if error.status == 404:
                return None
            raise


async def _remove(client: Any, id: str) -> None:
    import aiodocker

    try:
        await client.containers.container(id).delete(force=True, v=True)
    except aiodocker.DockerError as error:
        if error.status != 409 or "already in progress" not in error.message:
            raise
        while True:  # somebody else removes it: it is gone when the engine says so
            await asyncio.sleep(0.1)
            await client.containers.container(id).show()


@contextlib.contextmanager
def _fine(*statuses: int) -> Any:
    try:
        yield
    except EngineError as error:
        if error.status not in statuses:
            raise

