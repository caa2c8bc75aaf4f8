"""The control plane: sandboxes, snapshots, forks and measurements, over the service of a tenant."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, unquote

from rock.admin.sandboxes.lifecycle import deadline_of
from rock.admin.tenants import TenantService, TenantServices
from rock.dialects.e2b import state
from rock.dialects.e2b.builds import Builds, Template
from rock.dialects.e2b.programs import Programs
from rock.dialects.e2b.state import Options
from rock.dialects.e2b.tokens import Tokens
from rock.errors import Conflict, InvalidConfig, NotFound, SandboxError, Unsupported, no_such_sandbox
from rock.http.asgi import Answer, Request, answer, validate
from rock.protocol.keys import Access
from rock.protocol.routes import IDEMPOTENCY_KEY
from rock.protocol.sandbox import ID_PATTERN, NAME_PATTERN, SandboxInfo, State, UpdateSandbox
from rock.protocol.snapshots import CheckpointRequest, ForkRequest, SnapshotInfo
from rock.store.base import Query, Record

Row = tuple[str, str, Callable[[Request], Awaitable[Answer]], Access]
S = "/sandboxes/{sandbox_id}"
_ID = re.compile(ID_PATTERN)
_KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")
_LIMIT, _MOST_LISTED = 100, 1000
_MOST_SORTED = 20_000  # sandboxes of a tenant that are sorted for a list in ascending order
_START_WITHIN = 180.0  # seconds
_SNAPSHOT_TTL = 10 * 365 * 86400.0  # a snapshot of E2B exists until it is deleted
_BOTH = {"running", "paused"}
_SAMPLES = 2000
_PRECISION = 1e-6  # seconds: of times in responses, which clients send back
_NO_BODY = Answer(b"", 204)


class Control:
    """Handlers of the control plane."""

    def __init__(
        self, tenants: TenantServices, tokens: Tokens, programs: Programs, builds: Builds, options: Options
    ) -> None:
        self._tenants = tenants
        self._tokens = tokens
        self._programs = programs
        self._builds = builds
        self._options = options
        self._cpu: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (time, CPU seconds) of the last measurement

    def rows(self) -> list[Row]:
        create, read, images, builds = Access.CREATE, Access.READ, Access.IMAGES, self._builds
        return [
            ("POST", "/v2/sandboxes", self.create, create), ("POST", "/sandboxes", self.create, create),
            ("GET", "/v2/sandboxes", self.listing, read), ("GET", "/sandboxes", self.listing, read),
            ("GET", S, self.get, read), ("DELETE", S, self.kill, create),
            ("POST", S + "/timeout", self.set_timeout, create), ("POST", S + "/refreshes", self.refresh, create),
            ("POST", S + "/pause", self.pause, create), ("POST", S + "/connect", self.connect, create),
            ("POST", "/v2" + S + "/connect", self.connect, create), ("POST", S + "/resume", self.connect, create),
            ("POST", S + "/snapshots", self.snapshot, create), ("GET", "/snapshots", self.snapshots, read),
            ("DELETE", "/templates/{template}", self.delete_template, create),
            ("GET", "/templates/aliases/{alias}", self.alias, read),
            ("POST", S + "/fork", self.fork, create), ("GET", S + "/metrics", self.metrics, read),
            ("PUT", S + "/network", self.refused("changing the network of a running sandbox"), create),
            ("GET", S + "/logs", self.refused("reading logs of sandboxes"), read),
            ("GET", "/v2" + S + "/logs", self.refused("reading logs of sandboxes"), read),
            ("POST", "/v3/templates", builds.create, images),
            ("GET", "/templates/{template}/files/{hash}", builds.files, images),
            ("PUT", "/templates/{template}/files/{hash}", builds.upload, images),
            ("POST", "/v2/templates/{template}/builds/{build}", builds.start, images),
            ("GET", "/templates/{template}/builds/{build}/status", builds.status, read),
            *((method, path, self.refused("this operation on templates", "build templates with release 2 of the SDKs"),
               images) for method, path in (
                   ("POST", "/v2/templates"), ("POST", "/templates"), ("GET", "/templates"),
                   ("GET", "/templates/{template}"), ("PATCH", "/templates/{template}"),
                   ("POST", "/templates/{template}"), ("POST", "/templates/tags"), ("DELETE", "/templates/tags"),
                   ("GET", "/templates/{template}/tags"))),
            *((method, path, self.refused("managing volumes by this protocol", "create a volume with `rock volume "
               "create`, and mount it by volume_mounts"), create) for method, path in (
                   ("POST", "/volumes"), ("GET", "/volumes"), ("GET", "/volumes/{volume}"),
                   ("DELETE", "/volumes/{volume}"))),
            *((method, path, self.refused("storing secrets", "pass secrets by envs"), create) for method, path in (
                ("POST", "/secrets"), ("GET", "/secrets"), ("DELETE", "/secrets/{secret}"),
                ("PATCH", "/secrets/{secret}"))),
        ]  # fmt: skip

    def refused(self, what: str, hint: str = "") -> Callable[[Request], Awaitable[Answer]]:
        """A handler of an operation that the server does not have."""

        async def refuse(request: Request) -> Answer:
            raise Unsupported(f"{what} is not supported by this server",
                              hint=hint or "docs/integrations/e2b.md lists what is supported")

        return refuse

    def _tenant(self, request: Request) -> TenantService:
        return self._tenants(request.scope)

    async def _load(self, request: Request) -> Record:
        """The record of a sandbox that starts or runs. NotFound."""
        sandbox_id = request.path["sandbox_id"]
        if not _ID.match(sandbox_id):
            raise no_such_sandbox(sandbox_id[:128])
        record = await self._tenant(request).load(sandbox_id)
        if record.state not in (State.PENDING, State.RUNNING):
            raise no_such_sandbox(sandbox_id)
        return record

    def _view(self, request: Request, record: Record) -> dict[str, Any]:
        """The response to a create and a connect."""
        caller = self._tenant(request).caller
        return {
            "templateID": state.template_of(record), "sandboxID": record.id, "clientID": state.CLIENT,
            "envdVersion": state.ENVD_VERSION, "alias": state.template_of(record), "domain": self.domain(request),
            "envdAccessToken": self._tokens.access(record.id, caller),
            # SDKs of the code interpreter send it to port 49999, where they send no other credential.
            "trafficAccessToken": self._tokens.traffic(record.id, caller),
        }  # fmt: skip

    def domain(self, request: Request) -> str:
        """The domain below which ports have host names. Without one it is the name of this server, so that an SDK does
        not address a host of E2B."""
        return self._options.domain or request.header(b"host") or "localhost"

    # ---- create ----

    async def create(self, request: Request) -> Answer:
        spec = validate(state.NewSandbox, await request.json())
        key = request.header(IDEMPOTENCY_KEY.lower().encode())
        if key is not None and not _KEY.fullmatch(key):
            raise InvalidConfig("the header Idempotency-Key is not 1 to 255 letters, digits, '-' and '_'",
                                hint="use a UUID")  # fmt: skip
        tenant = self._tenant(request)
        image, snapshot, built = await self._template(tenant, spec.templateID)
        options = self._options
        if built is not None:
            options = replace(options, cpus=built.cpus or options.cpus, memory=built.memory or options.memory)
        config = state.config_of(spec, options, image, snapshot)
        info = await tenant.create(config, None if key is None else f"e2b {key}", _START_WITHIN)
        if info.state is not State.RUNNING:
            raise NotFound(f"sandbox {info.sandbox_id} of this Idempotency-Key is {info.state.value}",
                           hint="use another key for another sandbox")  # fmt: skip
        if built is not None and (built.start or built.ready):
            try:
                await self._builds.begin(built, info.sandbox_id, tenant.caller)
            except BaseException:
                await asyncio.shield(tenant.stop(info.sandbox_id))
                raise
        return answer(self._view(request, await tenant.load(info.sandbox_id)), 201)

    async def _template(self, tenant: TenantService, name: str) -> tuple[str, str | None, Template | None]:
        """(image, snapshot, template) of a name: of a template that was built, a snapshot by id or name, else an image
        by its name."""
        name = name.strip().removesuffix(":default")
        if not name or name in state.BASE:
            return self._options.image, None, None
        built = self._builds.find(tenant.caller, name)
        if built is not None:
            return self._builds.image_of(built, name), None, built
        if re.fullmatch(NAME_PATTERN, name):
            with contextlib.suppress(NotFound):
                found = await tenant.get_snapshot(name)
                return found.image, found.snapshot_id, None
        return name, None, None

    # ---- read ----

    async def get(self, request: Request) -> Answer:
        record = await self._load(request)
        config = record.config
        made = state.listed(record) | {
            "domain": self.domain(request),
            "envdAccessToken": self._tokens.access(record.id, self._tenant(request).caller),
            "allowInternetAccess": config.network != "none",
            "lifecycle": {"autoResume": bool(record.info.labels.get(state.RESUMES)),
                          "onTimeout": "pause" if config.on_timeout == "pause" else "kill"},
            "network": {"allowPublicTraffic": not record.info.labels.get(state.PRIVATE),
                        "allowOut": config.egress or [],
                        "denyOut": ["0.0.0.0/0"] if config.network == "none" or config.egress is not None else []},
        }  # fmt: skip
        return answer(made)

    async def listing(self, request: Request) -> Answer:
        query = _query(request)
        limit = request.integer("limit", _LIMIT, low=1, high=_MOST_LISTED)
        token = request.query.get("nextToken", "")
        newest_first = query.order != "asc"
        page: list[Record] = []
        async for record in self._found(self._tenant(request), query, _position(token) if token else None):
            page.append(record)
            if newest_first and len(page) > limit:
                break
            if len(page) > _MOST_SORTED:
                raise Unsupported(f"there are over {_MOST_SORTED} sandboxes to sort", hint="list them with order=desc")
        if not newest_first:
            page.reverse()
            if token:
                after = _position(token)
                page = [record for record in page if (record.info.created_at, record.id) > after]
        reply = answer([state.listed(record) for record in page[:limit]])
        if len(page) > limit:
            last = page[limit - 1]
            reply.headers.append((b"x-next-token", f"{last.info.created_at!r}:{last.id}".encode()))
        return reply

    async def _found(
        self, tenant: TenantService, query: _Query, after: tuple[float, str] | None
    ) -> AsyncIterator[Record]:
        """The sandboxes that match a query, newest first; after: the position at which a descending list continues."""
        position = after if query.order != "asc" else None
        while True:
            found = await tenant.records(Query((State.RUNNING,), labels=query.metadata, limit=_MOST_LISTED,
                                               after=position))  # fmt: skip
            for record in found:
                if query.matches(record):
                    yield record
            if len(found) < _MOST_LISTED:
                return
            position = found[-1].info.created_at, found[-1].id

    # ---- change ----

    async def kill(self, request: Request) -> Answer:
        record = await self._load(request)
        await self._tenant(request).stop(record.id)
        self._programs.forget(record.id)
        return _NO_BODY

    async def set_timeout(self, request: Request) -> Answer:
        spec = validate(state.Timeout, await request.json())
        record = await self._load(request)
        if record.info.paused_at is None:
            await self._tenant(request).update(record.id, UpdateSandbox(timeout=state.lasting(spec.timeout)))
        return _NO_BODY

    async def refresh(self, request: Request) -> Answer:
        spec = validate(state.Refresh, await request.json())
        record = await self._load(request)
        if record.info.paused_at is None:
            await self._extend(request, record, spec.duration)
        return _NO_BODY

    async def _extend(self, request: Request, record: Record, seconds: float) -> None:
        """Set the deadline unless it is later already."""
        deadline = deadline_of(record)
        if deadline is not None and deadline < time.time() + seconds:
            await self._tenant(request).update(record.id, UpdateSandbox(timeout=state.lasting(seconds)))

    async def pause(self, request: Request) -> Answer:
        spec = validate(state.Pause, await request.json())
        if spec.memory is False:
            raise Unsupported("a pause without memory is not supported: a paused sandbox keeps its processes",
                              hint="leave out memory, or create a snapshot and kill the sandbox")
        record = await self._load(request)
        if record.info.paused_at is not None:
            raise Conflict(f"sandbox {record.id} is already paused", hint="connect to it to resume it")
        tenant = self._tenant(request)
        try:
            await tenant.pause(record.id)
        except Conflict as error:  # a status of 409 would mean that it is paused already
            raise InvalidConfig(str(error), hint="close terminals and end requests first") from None
        await tenant.update(record.id, UpdateSandbox(timeout=None))
        return _NO_BODY

    async def connect(self, request: Request) -> Answer:
        spec = validate(state.Connect, await request.json())
        if spec.memory is False:
            raise Unsupported("a resume without memory (a reboot) is not supported", hint="leave out memory")
        record = await self._load(request)
        tenant = self._tenant(request)
        if record.info.paused_at is None:
            await self._extend(request, record, spec.timeout)
        else:
            await tenant.update(record.id, UpdateSandbox(timeout=state.lasting(spec.timeout)))
            await tenant.resume(record.id)
        return answer(self._view(request, await tenant.load(record.id)), 200 if record.info.paused_at is None else 201)

    async def wake(self, tenant: TenantService, record: Record) -> None:
        """Resume a sandbox that was paused, with the timeout of its create."""
        timeout = record.config.timeout or state.TIMEOUT
        await tenant.update(record.id, UpdateSandbox(timeout=state.lasting(timeout)))
        await tenant.resume(record.id)

    # ---- snapshots and forks ----

    async def snapshot(self, request: Request) -> Answer:
        spec = validate(state.Snapshot, await request.json())
        if spec.memory:
            raise Unsupported("a snapshot with memory is not supported: it has files, and the state of shells",
                              hint="leave out memory")  # fmt: skip
        if spec.name is not None and not re.fullmatch(NAME_PATTERN, spec.name):
            raise InvalidConfig(f"name={spec.name!r} is not a name of a snapshot", hint="use letters, digits and '_.-'")
        record = await self._load(request)
        wanted = CheckpointRequest(name=spec.name, ttl_seconds=_SNAPSHOT_TTL)
        return answer(_snapshot(await self._tenant(request).checkpoint(record.id, wanted, _own_key(request))), 201)

    async def snapshots(self, request: Request) -> Answer:
        limit = request.integer("limit", _LIMIT, low=1, high=_MOST_LISTED)
        found = await self._tenant(request).list_snapshots(request.query.get("sandboxID") or None)
        name, token = request.query.get("name"), request.query.get("nextToken", "")
        named = [one for one in found if one.state == "ready" and (not name or one.name == name)]
        if token:
            after = _position(token)
            named = [one for one in named if (one.created_at, one.snapshot_id) > after]
        reply = answer([_snapshot(one) for one in named[:limit]])
        if len(named) > limit:
            last = named[limit - 1]
            reply.headers.append((b"x-next-token", f"{last.created_at!r}:{last.snapshot_id}".encode()))
        return reply

    async def delete_template(self, request: Request) -> Answer:
        name = unquote(request.path["template"]).removesuffix(":default")
        if await self._builds.delete(self._tenant(request).caller, name):
            return _NO_BODY
        if not re.fullmatch(NAME_PATTERN, name):
            raise NotFound(f"template {name[:100]!r} not found", hint="only snapshots can be deleted here")
        await self._tenant(request).delete_snapshot(name)
        return _NO_BODY

    async def alias(self, request: Request) -> Answer:
        """Whether a template has this name: one that was built, a snapshot, or the default image."""
        name = unquote(request.path["alias"])
        if (built := self._builds.find(self._tenant(request).caller, name)) is not None:
            return answer({"templateID": built.id, "public": False})
        if name not in state.BASE:
            if not re.fullmatch(NAME_PATTERN, name):
                raise NotFound(f"template {name[:100]!r} not found", hint="use base, or a snapshot")
            name = (await self._tenant(request).get_snapshot(name)).snapshot_id
        return answer({"templateID": name, "public": name in state.BASE})

    async def fork(self, request: Request) -> Answer:
        spec = validate(state.Fork, await request.json())
        record = await self._load(request)
        tenant = self._tenant(request)
        wanted = ForkRequest(count=spec.count, changes={"timeout": state.lasting(spec.timeout)}, best_effort=True,
                             ttl_seconds=_START_WITHIN)  # fmt: skip
        made = await tenant.fork(record.id, wanted, _own_key(request))
        results: list[dict[str, Any]] = []
        for info in made.group.sandboxes:
            results.append({"sandbox": self._view(request, await tenant.load(info.sandbox_id))}
                           if info.state is State.RUNNING else {"error": _failed(info)})  # fmt: skip
        missing = {"code": 503, "message": "there is no capacity for this copy"}
        results += [{"error": missing}] * (spec.count - len(results))
        return answer(results, 201)

    # ---- measurements ----

    async def metrics(self, request: Request) -> Answer:
        """One measurement: that of now. The server keeps no series."""
        record = await self._load(request)
        return answer([await self.sample(self._tenant(request), record)])

    async def sample(self, tenant: TenantService, record: Record) -> dict[str, Any]:
        """The measurement of a sandbox now. CPU usage is the mean since the measurement before."""
        usage = (await tenant.get(record.id, usage=True)).usage
        if usage is None:
            raise SandboxError(f"sandbox {record.id} does not respond", sandbox_id=record.id, hint="retry")
        now, config = time.time(), record.config
        before = self._cpu.get(record.id, (record.info.started_at or now, 0.0))
        seconds = usage.cpu_seconds or 0.0
        share = max(0.0, seconds - before[1]) / max(now - before[0], 0.001) / config.cpus
        self._cpu[record.id] = now, seconds
        self._cpu.move_to_end(record.id)
        while len(self._cpu) > _SAMPLES:
            self._cpu.popitem(last=False)
        return {
            "timestamp": state.time_of(now), "timestampUnix": int(now), "cpuCount": max(1, round(config.cpus)),
            "cpuUsedPct": round(100 * share, 2), "memUsed": usage.memory_bytes or 0, "memTotal": config.memory_bytes,
            "memCache": 0, "diskUsed": usage.disk_bytes or 0, "diskTotal": config.disk_bytes,
        }  # fmt: skip


def _own_key(request: Request) -> str | None:
    key = request.header(IDEMPOTENCY_KEY.lower().encode())
    return None if key is None else f"e2b {key}"


def _snapshot(info: SnapshotInfo) -> dict[str, Any]:
    return {"snapshotID": info.snapshot_id, "names": [info.name] if info.name else []}


def _failed(info: SandboxInfo) -> dict[str, Any]:
    return {"code": 500, "message": info.reason or f"the copy is {info.state.value}"}


# ---- queries of lists ----


class _Query:
    """The filters of a list."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.states: set[str] = set()
        self.template = ""
        self.started_after: float | None = None
        self.order = "desc"

    def matches(self, record: Record) -> bool:
        info = record.info
        now = "running" if info.paused_at is None else "paused"
        if now not in (self.states or _BOTH) or (self.template and state.template_of(record) != self.template):
            return False
        return self.started_after is None or (info.started_at or 0.0) > self.started_after + _PRECISION


def _query(request: Request) -> _Query:
    """InvalidConfig."""
    found = _Query()
    raw: bytes = request.scope.get("query_string", b"")
    for name, value in parse_qsl(raw.decode("latin-1"), keep_blank_values=True):
        if name == "metadata":
            found.metadata |= {unquote(key): unquote(text) for key, text in parse_qsl(value, keep_blank_values=True)}
        elif name == "state":
            found.states |= set(filter(None, value.split(",")))
        elif name == "template":
            found.template = value
        elif name == "startedAfter":
            found.started_after = _time(value)
        elif name == "order":
            found.order = value
        elif name not in ("limit", "nextToken"):
            raise InvalidConfig(f"the query parameter {name[:40]!r} is unknown", hint="use metadata, state, template, "
                                "startedAfter, order, limit and nextToken")  # fmt: skip
    if found.states - _BOTH or found.order not in ("asc", "desc"):
        raise InvalidConfig("state is not running or paused, or order is not asc or desc", hint="correct the query")
    return found


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text.replace(" ", "+")).timestamp()
    except (ValueError, OverflowError):
        raise InvalidConfig(f"startedAfter={text[:40]!r} is not a time", hint="write it in RFC 3339") from None


def _position(token: str) -> tuple[float, str]:
    when, _, name = token.partition(":")
    try:
        return float(when), name
    except ValueError:
        raise InvalidConfig(f"nextToken={token[:80]!r} is not of an earlier page",
                            hint="pass x-next-token of the page before") from None


