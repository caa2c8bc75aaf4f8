"""Sandboxes in the ROCK dialect: start, status, list, stop, delete, archive, commit; over admin/tenants.py."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rock.admin.api.rock_v1.envelope import (
    CODED,
    AboutSandbox,
    Asked,
    Name,
    Row,
    body_of,
    enveloped,
    query_id,
    query_number,
    text_of,
)
from rock.admin.tenants import TenantService, TenantServices
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unsupported, no_such_sandbox
from rock.http.asgi import Request, validate
from rock.protocol.keys import Access
from rock.protocol.sandbox import (
    Cause,
    CommitError,
    CommitPhase,
    CommitRequest,
    CommitStatus,
    Phase,
    SandboxConfig,
    SandboxInfo,
    State,
    parse_size,
)
from rock.store.base import Query, Record

log = logging.getLogger("rock.admin")

_NOBODYS_DISK = "50G"
# seconds: the client requests the status at once and then every three seconds, so waiting for a start is useful
_A_MOMENT = 1.0
_LONGEST_START = 85.0  # maximum seconds of the `start` that waits
_SAMPLE = 0.1  # seconds over which CPU usage is measured
_DEFAULT_MINUTES = 360.0
_MOST = 2000
_ACTIVE = (State.PENDING, State.RUNNING)


class StartRequest(Asked):
    """The request of a client. Idle timeouts are minutes, as fractions in clients up to 1.4."""

    image: Name
    image_os: str = "linux"
    auto_clear_time_minutes: float | None = Field(default=None, ge=0)
    auto_clear_time: float | None = Field(default=None, ge=0)
    startup_timeout: float | None = Field(default=None, gt=0)
    memory: str = "8g"
    cpus: float = 2.0
    limit_cpus: float | None = None
    num_gpus: float | None = None
    accelerator_type: str | None = None
    sandbox_id: Name | None = None
    registry_username: str | None = None
    registry_password: str | None = None
    use_kata_runtime: bool = False
    auto_archive_seconds: int | None = None
    auto_delete_seconds: int | None = None
    disk: str | None = None
    network: str | None = None

    def config(self, request: Request, network: str) -> SandboxConfig:
        """The same request as a SandboxConfig. network: of requests that name none. InvalidConfig names the wrong
        field."""
        fields = self.model_dump(exclude={"auto_clear_time_minutes", "auto_clear_time", "startup_timeout"})
        minutes = self.auto_clear_time_minutes or self.auto_clear_time or _DEFAULT_MINUTES
        fields["network"] = self.network or network
        fields["auto_clear_seconds"] = math.ceil(minutes * 60)
        fields["startup_timeout"] = min(self.startup_timeout or 600.0, 1800.0)
        for name in ("user_id", "experiment_id", "namespace", "cluster"):
            value = request.header(f"x-{name.replace('_', '-')}".encode())
            if value:
                fields[name] = value
        return validate(SandboxConfig, fields)


class Batch(Asked):
    sandbox_ids: list[str] = Field(max_length=_MOST)


class Sandboxes:
    """Handlers of sandboxes, by method and path."""

    def __init__(self, tenant_services: TenantServices, network: str) -> None:
        self._tenant_services = tenant_services
        self._network = network

    def _tenant_service(self, request: Request) -> TenantService:
        return self._tenant_services(request.scope)

    def routes(self) -> list[Row]:
        started = {**CODED, **START_FIELDS}
        return [
            ("POST", "/start_async", enveloped(self.start_async, "async start sandbox failed", started), Access.CREATE),
            ("POST", "/start", enveloped(self.start, "start sandbox failed", started), Access.CREATE),
            ("GET", "/get_status", enveloped(self.get_status, "get sandbox status failed", {**CODED, **FIELDS}),
             Access.READ),
            ("GET", "/is_alive", enveloped(self.is_alive, "get sandbox is alive failed"), Access.READ),
            ("GET", "/get_sandbox_statistics", enveloped(self.statistics, "get sandbox statistics failed"),
             Access.READ),
            ("POST", "/stop", enveloped(self.stop, "stop sandbox failed", CODED), Access.CREATE),
            ("POST", "/delete", enveloped(self.delete, "delete sandbox failed", CODED), Access.CREATE),
            ("POST", "/sandboxes/batch", enveloped(self.batch, "batch get sandbox status failed", CODED), Access.READ),
            ("GET", "/sandboxes", enveloped(self.list, "list sandboxes failed"), Access.READ),
            ("GET", "/get_token", enveloped(self.get_token, "get oss sts token failed"), Access.READ),
            ("POST", "/restart", enveloped(self.restart, "restart sandbox failed", started), Access.CREATE),
            ("POST", "/sandboxes/{sandbox_id}/restart",
             enveloped(self.restart, "restart sandbox failed", started), Access.CREATE),
            ("POST", "/sandboxes/{sandbox_id}/archive",
             enveloped(self.archive, "archive sandbox failed", CODED), Access.CREATE),
        ]  # fmt: skip

    # ---- start ----

    async def start_async(self, request: Request) -> dict[str, Any]:
        """Start; waits a moment, so that a client's first status request finds it running, or gets the reason of its
        failure."""
        return _started(await self._create(request, _A_MOMENT))

    async def start(self, request: Request) -> dict[str, Any]:
        """Start and wait until it runs."""
        return _started(await self._create(request, _LONGEST_START))

    async def _create(self, request: Request, wait: float) -> SandboxInfo:
        asked = await body_of(request, StartRequest)
        config = asked.config(request, self._network)
        # Newer clients send this disk size by default. It is not an explicit choice, and a sandbox with a disk of its
        # own cannot come from the warm pool and cannot be committed.
        if config.disk == _NOBODYS_DISK:
            config = config.model_copy(update={"disk": None})
        # ROCK ignores a disk limit that a host cannot enforce: it is null in the status then. A runtime without a
        # choice of networks, such as "process", provides its only one.
        tried = [config] if config.disk is None else [config, config.model_copy(update={"disk": None})]
        if asked.network is None:
            tried += [_without_network(one) for one in tried]
        for number, one in enumerate(tried):
            try:
                info = await self._tenant_service(request).create(one, None, wait)
            except Unsupported as error:
                if number == len(tried) - 1:
                    raise
                refused = error.message
                continue
            if number:
                log.warning("ROCK dialect: %s starts without a limit or network that was not asked for in so many "
                            "words: %s", info.sandbox_id, refused)  # fmt: skip
            return info
        raise AssertionError("there is always one to try")

    # ---- status ----

    async def get_status(self, request: Request) -> dict[str, Any]:
        """Counts as activity, as in ROCK: clients keep a sandbox alive by requesting its status."""
        sandbox_id = query_id(request)
        service, all_states = self._tenant_service(request), request.flag("include_all_states")
        found = await self._status(service, sandbox_id, all_states, wait=_A_MOMENT, touch=True)
        if found is None:
            raise no_such_sandbox(sandbox_id)
        return found

    async def _status(
        self,
        tenant_service: TenantService,
        sandbox_id: str,
        all_states: bool,
        *,
        wait: float = 0.0,
        touch: bool = False,
    ) -> dict[str, Any] | None:
        try:
            info = await tenant_service.get(sandbox_id, wait=wait, touch=touch)
            record = await tenant_service.load(sandbox_id)
        except NotFound:
            return None
        return status_of(record, info) if all_states or is_listed(info) else None

    async def is_alive(self, request: Request) -> dict[str, Any]:
        return await self.alive(request, query_id(request))

    async def alive(self, request: Request, sandbox_id: str) -> dict[str, Any]:
        """Whether a sandbox runs, in ROCK's format."""
        try:
            info = await self._tenant_service(request).get(sandbox_id, touch=True)
        except NotFound as error:
            return {"is_alive": False, "message": text_of(error)}
        return {"is_alive": info.is_alive, "message": (info.host_name if info.is_alive else info.reason) or ""}

    async def statistics(self, request: Request) -> dict[str, Any]:
        """Percent of the sandbox's limits; null is not measured here."""
        sandbox_id = query_id(request)
        tenant_service = self._tenant_service(request)
        first = await self._usage(tenant_service, sandbox_id)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(_SAMPLE)
        second = await self._usage(tenant_service, sandbox_id)
        passed = asyncio.get_running_loop().time() - began
        result: dict[str, Any] = dict.fromkeys(("cpu", "mem", "disk", "disk_log_percent", "disk_dind_percent", "net"))
        if first.usage and second.usage:
            if first.usage.cpu_seconds is not None and second.usage.cpu_seconds is not None:
                used = second.usage.cpu_seconds - first.usage.cpu_seconds
                result["cpu"] = round(100 * used / passed / second.cpus, 2)
            if second.usage.memory_bytes is not None:
                result["mem"] = round(100 * second.usage.memory_bytes / parse_size(second.memory), 2)
        return result

    async def _usage(self, tenant_service: TenantService, sandbox_id: str) -> SandboxInfo:
        info = await tenant_service.get(sandbox_id, usage=True)
        if not is_listed(info):
            raise no_such_sandbox(sandbox_id)
        return info

    async def batch(self, request: Request) -> dict[str, Any]:
        """The sandboxes that start or run, of the requested ids."""
        spec = await body_of(request, Batch)
        found = [
            await self._status(self._tenant_service(request), sandbox_id, False) for sandbox_id in spec.sandbox_ids
        ]
        return {**CODED, "statuses": [status for status in found if status and status["state"] in _ACTIVE]}

    async def list(self, request: Request) -> dict[str, Any]:
        """A page of those that start or run, newest first; any other query parameter is a field and its value."""
        page, size = query_number(request, "page", 1, 1 << 30), query_number(request, "page_size", 500, _MOST)
        wanted = {name: value for name, value in request.query.items() if name not in ("page", "page_size")}
        unknown = sorted(set(wanted) - set(FIELDS))
        if unknown:
            raise InvalidConfig(f"cannot list by {', '.join(unknown)}", hint=f"there are: {', '.join(FIELDS)}")
        items = [
            status
            for record in await self._tenant_service(request).records(Query(states=_ACTIVE, limit=1 << 30))
            if _matches(status := status_of(record, record.info), wanted)
        ]
        end = page * size
        return {"items": items[end - size : end], "total": len(items), "has_more": len(items) > end}

    async def get_token(self, request: Request) -> None:
        """There is no object storage: clients then upload to the server."""
        return

    # ---- stop and delete ----

    async def stop(self, request: Request) -> str:
        """Stop it; a sandbox that ended or never existed counts as stopped."""
        sandbox_id = (await body_of(request, AboutSandbox)).sandbox_id
        try:
            await self._tenant_service(request).stop(sandbox_id)
        except NotFound:
            pass
        return f"{sandbox_id} stopped"

    async def delete(self, request: Request) -> str:
        """Delete a stopped one. A missing one counts as deleted, because clients retry."""
        sandbox_id = (await body_of(request, AboutSandbox)).sandbox_id
        try:
            await self._tenant_service(request).delete(sandbox_id)
        except NotFound:
            pass
        except Conflict:
            state = (await self._tenant_service(request).load(sandbox_id)).state
            raise Conflict(f"Sandbox {sandbox_id} cannot be deleted: current state is '{state}', must be stopped or "
                           "archived first", sandbox_id=sandbox_id, hint="stop it first") from None
        return f"{sandbox_id} deleted"

    # ---- restart and archive ----

    async def restart(self, request: Request) -> dict[str, Any]:
        """Start a stopped or archived one again from its files; waits a moment, as `start_async` does."""
        sandbox_id = request.path.get("sandbox_id") or (await body_of(request, AboutSandbox)).sandbox_id
        try:
            return _started(await self._tenant_service(request).restart(sandbox_id, wait=_A_MOMENT))
        except Conflict as error:
            raise await self._refused(request, sandbox_id, "restarted", error) from None

    async def archive(self, request: Request) -> str:
        """Begin to archive its files; the status reports the progress."""
        sandbox_id = request.path["sandbox_id"]
        try:
            await self._tenant_service(request).archive(sandbox_id)
        except Conflict as error:
            raise await self._refused(request, sandbox_id, "archived", error) from None
        return f"{sandbox_id} archiving"

    async def _refused(self, request: Request, sandbox_id: str, what: str, error: Conflict) -> Conflict:
        """The error with ROCK's text, followed by ours."""
        state = state_of((await self._tenant_service(request).load(sandbox_id)).info)
        return Conflict(
            f"Sandbox {sandbox_id} cannot be {what}: current state is '{state}'; {error.message}",
            sandbox_id=sandbox_id,
            hint=error.hint,
        )


def _without_network(config: SandboxConfig) -> SandboxConfig:
    """The config with the default network of its runtime."""
    plain = {name: getattr(config, name) for name in config.model_fields_set - {"network"}}
    return SandboxConfig.model_validate(plain)


def _started(info: SandboxInfo) -> dict[str, Any]:
    about = {"sandbox_id": info.sandbox_id, "host_name": info.host_name, "host_ip": info.host_ip}
    return {**CODED, **START_FIELDS, **about}


def _matches(status: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(str(status[name]) == value for name, value in wanted.items())


# ---- commits ----
#
# Commits of sandboxes to images: started, and polled until they are done.

_BREAKS = re.compile("[\\x00\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")


def _one_line(text: str) -> str:
    if _BREAKS.search(text):
        raise ValueError("it must not have line separators or NUL")
    return text


class CommitBody(AboutSandbox):
    """The request of a client. An empty user name counts as none."""

    image_tag: Annotated[Name, AfterValidator(_one_line)]
    username: str
    password: str


class Commits:
    """Handlers, by method and path."""

    def __init__(self, tenant_services: TenantServices) -> None:
        self._tenant_services = tenant_services

    def routes(self) -> list[Row]:
        return [
            ("POST", "/commit", enveloped(self.commit, "commit sandbox failed", CODED), Access.IMAGES),
            ("GET", "/commit/{sandbox_id}", enveloped(self.status, "get commit status failed", CODED), Access.READ),
        ]

    async def commit(self, request: Request) -> dict[str, Any]:
        """Start a commit. An image name with a registry is pushed there with the given login; any other stays local."""
        spec = await body_of(request, CommitBody)
        fields = {"image_tag": spec.image_tag, "push": bool(spec.username) and _names_registry(spec.image_tag),
                  "registry_username": spec.username or None, "registry_password": spec.password or None}  # fmt: skip
        try:
            return _told(
                await self._tenant_services(request.scope).commit(spec.sandbox_id, validate(CommitRequest, fields))
            )
        except NotFound as error:
            raise _worded(CommitError.SANDBOX_NOT_FOUND, error) from None
        except Conflict as error:
            raise _worded(CommitError.COMMIT_CONFLICT, error) from None

    async def status(self, request: Request) -> dict[str, Any]:
        try:
            return _told(await self._tenant_services(request.scope).commit_status(request.path["sandbox_id"]))
        except NotFound as error:
            raise _worded(error.details.get("commit", CommitError.SANDBOX_NOT_FOUND), error) from None


def _told(status: CommitStatus) -> dict[str, Any]:
    """A CommitStatusResponse."""
    error = (status.error or {}).get("error", {})
    text = " ".join(filter(None, (error.get("message"), f"({error['hint']})" if error.get("hint") else "")))
    ended = {CommitPhase.SUCCEEDED: 0, CommitPhase.FAILED: 1}
    return {
        "sandbox_id": status.sandbox_id,
        "image_tag": status.image_tag,
        "phase": status.phase.value,
        "started_at": time_of(status.started_at),
        "completed_at": time_of(status.completed_at),
        "exit_code": ended.get(status.phase),
        "failed_stage": status.failed_stage,
        "error_code": status.error_code,
        "error_message": text or None,
    }


def _worded(code: str, error: RockError) -> RockError:
    """The same text, prefixed with ROCK's term."""
    return type(error)(f"{code}: {error.message}", sandbox_id=error.sandbox_id, hint=error.hint)


def _names_registry(tag: str) -> bool:
    first, slash, _ = tag.partition("/")
    return bool(slash) and (first == "localhost" or any(mark in first for mark in ".:"))


# ---- format of a status ----
#
# The status of a sandbox in the format of ROCK's clients.

# Versions of components of ROCK that some clients read.
_GATEWAY, _REX = "0.0.45", "1.2.17"
_EVENTS = {"launched": "alive", "ended": "stop"}  # events that have other names in ROCK
_ON_DISK = "use cached image, skip image pull"

FIELDS: dict[str, Any] = dict.fromkeys(
    (
        "sandbox_id", "status", "state", "is_alive", "port_mapping", "host_name", "host_ip", "image", "user_id",
        "experiment_id", "namespace", "gateway_version", "swe_rex_version", "cpus", "memory", "num_gpus",
        "accelerator_type", "disk", "disk_limit_rootfs", "create_time", "start_time", "stop_time", "archive_time",
        "delete_time", "auto_stop_time", "auto_archive_time", "auto_delete_time", "state_history",
    )
)  # fmt: skip
"""Fields of a status, for the result of a failure."""

START_FIELDS: dict[str, Any] = dict.fromkeys(
    ("sandbox_id", "host_name", "host_ip", "cpus", "memory", "disk", "disk_limit_rootfs")
)


def is_listed(info: SandboxInfo) -> bool:
    """Whether lists without a state filter contain it. They include one whose start failed, so that clients read the
    reason."""
    return info.state in (State.PENDING, State.RUNNING) or info.cause is Cause.START_FAILED


def status_of(record: Record, info: SandboxInfo) -> dict[str, Any]:
    """`info`: of the record, with the current report of its worker."""
    config, state = record.config, state_of(info)
    return {
        **FIELDS,
        "sandbox_id": info.sandbox_id,
        "status": _phases(info),
        "state": state,
        "is_alive": info.is_alive,
        "port_mapping": {},
        "host_name": info.host_name,
        "host_ip": info.host_ip,
        "image": info.image,
        "user_id": info.user_id or "default",
        "experiment_id": info.experiment_id or "default",
        "namespace": info.namespace or "default",
        "gateway_version": _GATEWAY,
        "swe_rex_version": _REX,
        "cpus": info.cpus,
        "memory": info.memory,
        "num_gpus": config.num_gpus,
        "accelerator_type": config.accelerator_type,
        "disk": config.disk,
        "disk_limit_rootfs": config.disk,
        "create_time": time_of(info.created_at),
        "start_time": time_of(info.started_at),
        "stop_time": time_of(info.stopped_at),
        "archive_time": time_of(info.archived_at),
        "delete_time": time_of(info.deleted_at or info.stopped_at) if state == "deleted" else None,
        "auto_stop_time": time_of(info.auto_stop_at),
        "auto_archive_time": time_of(info.auto_archive_at),
        "auto_delete_time": time_of(info.auto_delete_at),
        "state_history": _history(info),
    }


def state_of(info: SandboxInfo) -> str:
    """ROCK's name of the state. A stopped sandbox without files is deleted in ROCK's terms."""
    if info.state is State.STOPPING:
        return "stopped"
    if info.state is State.STOPPED:
        return "stopped" if info.kept or info.cause is Cause.START_FAILED else "deleted"
    return info.state.value


def time_of(seconds: float | None) -> str | None:
    """A time in the format of the dialect."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _phases(info: SandboxInfo) -> dict[str, Any]:
    """Never null: clients read it while they wait for the start. Includes the archive phases during archive and
    restore."""
    phases = _start_phases(info)
    archive = info.phases.get("archive")
    if info.archive is not None and info.state in (State.PENDING, State.STOPPING):
        phases["image_archive"] = _phase("running", "restore running")
    elif archive is not None:
        phases["image_archive"] = _phase(archive.status, archive.message, archive)
    elif info.state is State.ARCHIVED and info.error:
        phases["image_archive"] = _phase("failed", info.reason or "the restore failed")
    return phases


def _start_phases(info: SandboxInfo) -> dict[str, Any]:
    image, run = info.phases.get("image"), info.phases.get("sandbox")
    if info.cause is Cause.START_FAILED:
        message = info.reason or "the start failed"
        of_image = (info.error or {}).get("error", {}).get("code") == "image_error"
        if of_image:
            text = f"Failed to pull image {info.image}: {message}"  # tools of ROCK's users search for this text
            return {"image_pull": _phase("failed", text), "docker_run": _phase("waiting", "waiting")}
        return {"image_pull": _phase("success", _ON_DISK), "docker_run": _phase("failed", message)}
    if info.state is State.PENDING:
        told = image.message if image is not None else "image pull running"
        return {"image_pull": _phase("running", told, image), "docker_run": _phase("waiting", "waiting")}
    return {
        "image_pull": _phase("success", _ON_DISK, image),
        "docker_run": _phase("success", "docker run success", run),
    }


def _phase(status: str, message: str, told: Phase | None = None) -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "started_at": time_of(told.started_at) if told else None,
        "completed_at": time_of(told.completed_at) if told else None,
    }


def _history(info: SandboxInfo) -> list[dict[str, Any]]:
    """ROCK has no state between the stop request and the end, so the requested state is reported."""
    return [
        {
            "from_state": step.from_state.value,
            "to_state": "stopped" if step.to_state is State.STOPPING else step.to_state.value,
            "event": _EVENTS.get(step.event, step.event),
            "timestamp": time_of(step.timestamp),
        }
        for step in info.state_history
        if step.from_state is not State.STOPPING
    ]
