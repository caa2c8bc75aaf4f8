"""The live configuration of a server: read from a file or Nacos, or set over the API; stored as versions; applied here
and on every worker.

A change is validated as a whole. An invalid one changes nothing: the previous version stays in force, and the error is
in the log, in a metric and in `rock config show`. A version is stored before it is applied. The other servers of the
same store find it there; workers receive it from the servers that command them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import orjson
from pydantic import ValidationError

from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import Conflict, Forbidden, InvalidConfig, RockError, Unavailable, Unsupported
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, answer_model, failure
from rock.protocol.configuration import (
    Configuration,
    ConfigurationHistory,
    ConfigurationStatus,
    ConfigurationVersion,
    NodeConfiguration,
    SetConfiguration,
    WorkerConfiguration,
)
from rock.protocol.keys import caller_of
from rock.protocol.routes import ROUTES
from rock.protocol.wire import explain
from rock.rock_conf import yaml_document
from rock.store.base import Store
from rock.telemetry import set_log_level
from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.configuration")

NAMES = ("get_configuration", "list_configurations", "set_configuration")
_EVERY = 0.4  # seconds between two looks at the source and at the store
_PUSH_TIMEOUT = 10.0
_LARGEST = 1 << 20  # bytes of a source
_MOST_LISTED = 200
ERRORS = REGISTRY.counter("rock_configuration_errors_total", "Contents of the source of the configuration that were "
                          "rejected")  # fmt: skip
VERSION = REGISTRY.gauge("rock_configuration_version", "Version of the live configuration that this process applies")


# ---- sources ----

class Source(Protocol):
    """Where the configuration is written, when that is not the API."""

    name: str

    async def changed(self) -> bytes | None:
        """The content, when it has changed since the last call; None otherwise. Unavailable, InvalidConfig."""
        ...

    async def close(self) -> None: ...


class FileSource:
    """A YAML or JSON file: also one of a ConfigMap, which Kubernetes replaces by a symbolic link. optional: while it
    does not exist, the configuration is changed over the API."""

    def __init__(self, path: Path, optional: bool = False) -> None:
        self.name = str(path)
        self._path = path
        self._optional = optional
        self._seen: tuple[int, int, int] | None = None

    @property
    def exists(self) -> bool:
        return not self._optional or self._path.exists()

    async def changed(self) -> bytes | None:
        try:
            found = self._path.stat()
        except OSError as error:
            if self._optional:
                self._seen = None
                return None
            raise Unavailable(f"{self._path} cannot be read: {error.strerror}", hint="restore the file") from None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if mark == self._seen:
            return None
        if found.st_size > _LARGEST:
            self._seen = mark
            raise InvalidConfig(f"{self._path} has more than {_LARGEST} bytes", hint="remove what is no configuration")
        try:
            data = await asyncio.to_thread(self._path.read_bytes)
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be read: {error.strerror}", hint="restore the file") from None
        self._seen = mark
        return data

    async def close(self) -> None:
        return None


def parsed(data: bytes, name: str) -> Configuration:
    """The configuration of a document. InvalidConfig."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            document = yaml_document(data)
        except ValueError as error:
            raise InvalidConfig(f"{name} cannot be used: {error}", hint="correct the file, or write JSON") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise InvalidConfig(f"{name} holds no mapping", hint="docs/guides/configuration.md has an example")
    try:
        return Configuration.model_validate(document)
    except ValidationError as error:
        wrong = explain(error, Configuration)
        raise InvalidConfig(f"{name} is no configuration: {wrong.message}", hint=wrong.hint,
                            details=wrong.details) from None


# ---- the configuration of one server ----

class LiveConfiguration:
    """The configuration that this process applies. source: None when it is changed over the API alone. leads: whether
    this server stores the versions of the source; a reader applies what it finds in the store."""

    def __init__(self, store: Store, workers: WorkerRegistry, source: Source | None, leads: bool) -> None:
        self._store = store
        self._workers = workers
        self._source = source
        self._leads = leads
        self.current = Configuration()
        self.version = 0
        self._at: float | None = None
        self._from = "api"
        self._error = ""
        self._invalid = ""  # why the source's content is not applied
        self._pending: Configuration | None = None  # content of the source that is not stored yet
        self.checks: list[Callable[[Configuration], None]] = []  # raise for what this server cannot apply
        self.on_change: list[Callable[[Configuration], None]] = []
        self._confirmed: dict[str, WorkerConfiguration] = {}
        self._pushes: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        workers.on_ready.append(self._forget)
        workers.on_change.append(self._forget)

    def _forget(self, worker: str) -> None:
        """The worker may be another process now."""
        self._confirmed.pop(worker, None)

    @property
    def _external(self) -> Source | None:
        """The source, unless it is a file that does not exist yet."""
        source = self._source
        return None if isinstance(source, FileSource) and not source.exists else source

    async def open(self) -> None:
        """Apply the last version, or the source's content. InvalidConfig when the first content is invalid."""
        await self._follow()
        try:
            await self._read()
        except RockError:
            if self.version == 0 and self._external is not None:
                raise
        self._task = asyncio.create_task(self._watch(), name="configuration")

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._pushes.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None
        if self._source is not None:
            await self._source.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            try:
                with contextlib.suppress(RockError):  # logged
                    await self._read()
                with contextlib.suppress(RockError):  # the store is away: the configuration stays
                    await self._follow()
                self._push()
            except Exception:  # such as a version of a later release that this one cannot read
                log.exception("the configuration stays; trying again")

    async def _read(self) -> None:
        """Store the source's content as a version when it has changed."""
        if self._source is None or not self._leads:
            return
        try:
            try:
                data = await self._source.changed()
                if data is not None:
                    self._invalid, self._pending = "", None
                    found = parsed(data, self._source.name)
                    self._check(found)
                    self._pending = found
            except (InvalidConfig, Unsupported) as error:
                self._invalid, self._pending = error.message, None
            if self._invalid:  # until the content changes
                raise InvalidConfig(self._invalid, hint="correct it; the previous version stays in force")
            if self._pending is not None:  # it stays pending while the store is away
                if self._pending != self.current:
                    await self._stored(self._pending, self._source.name, "")
                self._pending = None
        except RockError as error:
            if error.message != self._error:
                log.error("the configuration is not changed: %s", error.message)
                ERRORS.of().add()
            self._error = error.message
            raise
        self._error = ""

    def _check(self, configuration: Configuration) -> None:
        """InvalidConfig, Unsupported."""
        for check in self.checks:
            check(configuration)

    async def _stored(self, configuration: Configuration, source: str, author: str) -> None:
        version = ConfigurationVersion(version=self.version + 1, at=time.time(), source=source, author=author,
                                       configuration=configuration)
        await self._store.configurations.add(version)
        self._apply(version)

    async def _follow(self) -> None:
        """Apply the last version of the store when it is newer."""
        configurations = self._store.configurations
        if await configurations.number() > self.version:
            self._apply((await configurations.list(1))[0])

    def _apply(self, version: ConfigurationVersion) -> None:
        self.current, self.version = version.configuration, version.version
        self._at, self._from = version.at, version.source
        self._confirmed = {}
        VERSION.of().set(version.version)
        set_log_level(version.configuration.log.level)
        for listener in self.on_change:
            listener(version.configuration)
        log.info("configuration: version %d from %s", version.version, version.source)
        self._push()

    # ---- workers ----

    def _push(self) -> None:
        """Send the version to the workers that have not confirmed it."""
        if self.version == 0 or not self._leads:
            return
        for name, worker in self._workers.items():
            known = self._confirmed.get(name)
            if name not in self._pushes and (known is None or known.version != self.version):
                task = asyncio.create_task(self._sent(name, worker), name=f"configuration of {name}")
                self._pushes[name] = task
                task.add_done_callback(lambda _, name=name: self._pushes.pop(name, None))  # type: ignore[misc]

    async def _sent(self, name: str, worker: Worker) -> None:
        spec = NodeConfiguration(version=self.version, at=self._at or 0.0, configuration=self.current)
        try:
            async with asyncio.timeout(_PUSH_TIMEOUT):
                done = await worker.configure(spec)
        except TimeoutError:
            error = f"no response within {_PUSH_TIMEOUT:g} s"
        except RockError as raised:
            error = raised.message
        else:
            self._confirmed[name] = WorkerConfiguration(worker=name, version=done.version)
            return
        known = self._confirmed.get(name)
        if known is None or known.error != error:
            log.warning("worker %s does not have version %d of the configuration: %s", name, spec.version, error)
        self._confirmed[name] = WorkerConfiguration(worker=name, error=error)

    # ---- routes ----

    def status(self) -> ConfigurationStatus:
        external = self._external
        workers = [self._confirmed.get(name, WorkerConfiguration(worker=name)) for name in self._workers]
        return ConfigurationStatus(
            version=self.version, at=self._at, source="api" if external is None else external.name,
            writable=external is None, error=self._error, configuration=self.current,
            workers=workers if self.version else [],
        )  # fmt: skip

    async def get_configuration(self, request: Request) -> Answer:
        """The live configuration that this server applies."""
        return answer_model(self.status())

    async def list_configurations(self, request: Request) -> Answer:
        """Versions, newest first."""
        limit = request.integer("limit", 20, low=1, high=_MOST_LISTED)
        before = request.integer("before", 0) if "before" in request.query else None
        return answer_model(ConfigurationHistory(items=list(await self._store.configurations.list(limit, before))))

    async def set_configuration(self, request: Request) -> Answer:
        """Replace the whole configuration. Conflict when it is based on an older version, or has another source."""
        spec = await request.model(SetConfiguration)
        external = self._external
        if external is not None:
            raise Conflict(f"the configuration is read from {external.name}", hint="change it there")
        await self._follow()
        if spec.expected is not None and spec.expected != self.version:
            raise Conflict(f"version {spec.expected} is not the current one, which is {self.version}",
                           hint="read the current one, and repeat the change")
        self._check(spec.configuration)
        if not spec.check and spec.configuration != self.current:
            caller = caller_of(request.scope)
            await self._stored(spec.configuration, "api", f"{caller.owner or 'owner'} {caller.key_id}".strip())
        return answer_model(self.status())

    def add_to(self, router: Router) -> None:
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))

    # ---- features ----

    def over(self, app: App) -> App:
        """Reject new operations of features that are off; nothing else costs a comparison."""

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            features = self.current.features
            if features and scope["type"] == "http" and scope["method"] in ("POST", "PUT"):
                for name, on in features.items():
                    if not on and _FEATURES[name].fullmatch(scope["path"]):
                        error = Forbidden(f"{name} is switched off on this server",
                                          hint=f"its owner can switch it on: rock config set features.{name}=true")
                        await failure(error).send(send)
                        return
            await app(scope, receive, send)

        return checked


_FEATURES: Mapping[str, re.Pattern[str]] = {
    "archive": re.compile(r"/v1/sandboxes/[^/]+/archive"),
    "commits": re.compile(r"/v1/sandboxes/[^/]+/commit|/apis/envs/sandbox/v1/commit"),
    "gateway": re.compile(r"/v1/runs"),
    "image_builds": re.compile(r"/v1/images/build|/v1/envs/build"),
    "jobs": re.compile(r"/v1/jobs"),
    "snapshots": re.compile(r"/v1/sandboxes/[^/]+/(?:checkpoint|fork|rollback)"),
    "volumes": re.compile(r"/v1/volumes"),
}


def source_of(setting: str, home: Path) -> Source | None:
    """The source from ROCK_LIVE_CONFIG: a file, nacos://..., or "api"; empty is config.yaml in the home, which may not
    exist. InvalidConfig."""
    if setting == "api":
        return None
    if setting.startswith(("nacos://", "nacos+https://")):
        from rock.admin.nacos import NacosSource  # an HTTP client, which a file does not need

        return NacosSource.parse(setting)
    if "://" in setting:
        raise InvalidConfig("ROCK_LIVE_CONFIG names no known source",
                            hint="set it to a file, nacos://HOST:PORT/DATA_ID, or api")
    if setting:
        return FileSource(Path(setting).expanduser().absolute())
    return FileSource(home / "config.yaml", optional=True)
