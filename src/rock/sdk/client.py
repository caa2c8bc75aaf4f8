"""A server as a whole: what runs there, and its state. For one sandbox see `Sandbox`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import orjson
from pydantic import ValidationError

from rock import settings
from rock.errors import InvalidConfig, ServerError, StartFailed, from_wire
from rock.protocol.configuration import (
    Configuration,
    ConfigurationHistory,
    ConfigurationStatus,
    ConfigurationVersion,
    SetConfiguration,
)
from rock.protocol.env import AddEnv, BuildEnv, EnvAbout
from rock.protocol.images import BuildRequest, BuiltImage
from rock.protocol.keys import AuditEntry, AuditList, CreateKey, KeyInfo, KeyList, NewKey
from rock.protocol.node import EnvList, ServerInfo, VolumeInfo, VolumeList, WorkerInfo, WorkerList
from rock.protocol.pools import PoolInfo, PoolList
from rock.protocol.routes import ROUTES, STREAM_TYPE, Frame, FrameParser
from rock.protocol.sandbox import SandboxInfo, UpdateSandbox
from rock.protocol.snapshots import SnapshotInfo, SnapshotList
from rock.protocol.wire import explain
from rock.sdk import primitives
from rock.sdk.archive import FileSource, Incoming
from rock.sdk.context import ContextSource, read_context
from rock.sdk.http import query_string
from rock.sdk.jobs import Jobs
from rock.sdk.sandbox.link import list_sandboxes, parse, path
from rock.sdk.sandbox.runs import Runs, Upstreams
from rock.sdk.transport import Transport

STOP_TIMEOUT = 120.0
TRANSFER_TIMEOUT = 600.0  # seconds of silence


class SandboxChange(TypedDict, total=False):
    """Fields of a sandbox that can be changed."""

    name: str | None
    labels: dict[str, str]
    timeout: float | None


class Client(primitives.Face):
    """A server, by its base URL and key; ROCK_BASE_URL and ROCK_API_KEY where they are not given. reconnect_timeout:
    seconds for which a call is tried again while the server is away; None is ROCK_RECONNECT_TIMEOUT, 0 is not at
    all. runs, upstreams: of the model gateway."""

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, *, reconnect_timeout: float | None = None
    ) -> None:
        self.transport = Transport(
            base_url or settings.base_url(), api_key or settings.api_key(), reconnect_timeout=reconnect_timeout
        )
        self.jobs = Jobs(self.transport)
        self.runs = Runs(self.transport)
        self.upstreams = Upstreams(self.transport)

    async def list_sandboxes(
        self, states: str | Iterable[str] | None = None, *, limit: int | None = None, **filters: str
    ) -> list[SandboxInfo]:
        """Sandboxes, newest first; all when `limit` is None.

        states: names of states, as a list or joined by commas. filters: equality on `user_id`, `experiment_id`,
        `namespace`, `image`, ...; `label="key=value"`.
        """
        return await list_sandboxes(self.transport, states, limit, filters)

    async def get_sandbox(self, sandbox_id: str, *, usage: bool = False) -> SandboxInfo:
        """One sandbox, a stopped one too. NotFound. `usage`: measure what it uses."""
        target = path("get_sandbox", sandbox_id) + query_string({"usage": usage or None})
        return parse(SandboxInfo, await self.transport.json("GET", target))

    async def update_sandbox(self, sandbox_id: str, **fields: Unpack[SandboxChange]) -> SandboxInfo:
        """Change the name or the labels of a sandbox in any state: `name=None` removes the name, `labels` replaces all
        labels. `timeout`: seconds from now after which it is stopped in any case; None is never. NotFound; Conflict
        when another sandbox that has not ended has the name, and for a timeout of one that does not run."""
        body = UpdateSandbox(**fields).model_dump(include=set(fields))
        return parse(SandboxInfo, await self.transport.json("PATCH", path("update_sandbox", sandbox_id), body))

    async def stop_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """Stop it; a stopped one stays as it is. NotFound."""
        return parse(
            SandboxInfo,
            await self.transport.json("POST", path("stop_sandbox", sandbox_id), timeout=STOP_TIMEOUT),
        )

    async def pause_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """Stop its processes until it is resumed; it has no idle timeout meanwhile. NotFound, Conflict, Unsupported."""
        return parse(SandboxInfo, await self.transport.json("POST", path("pause_sandbox", sandbox_id)))

    async def resume_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """Continue a paused one. NotFound, Conflict."""
        return parse(SandboxInfo, await self.transport.json("POST", path("resume_sandbox", sandbox_id)))

    async def restart_sandbox(self, sandbox_id: str, wait: float = 60.0) -> SandboxInfo:
        """Start a stopped or archived one again over its kept files, waiting up to `wait` seconds. NotFound, Conflict,
        and what a start raises."""
        target = path("restart_sandbox", sandbox_id) + query_string({"wait": wait})
        key = os.urandom(16).hex()
        return parse(SandboxInfo, await self.transport.json("POST", target, timeout=wait + STOP_TIMEOUT, key=key))

    async def archive_sandbox(self, sandbox_id: str, wait: float = 600.0) -> SandboxInfo:
        """Bring the kept files of a stopped one to the archive, waiting up to `wait` seconds. NotFound, Conflict."""
        target = path("archive_sandbox", sandbox_id) + query_string({"wait": wait})
        return parse(SandboxInfo, await self.transport.json("POST", target, timeout=wait + STOP_TIMEOUT))

    async def delete_sandbox(self, sandbox_id: str, *, force: bool = False) -> SandboxInfo:
        """Forget a stopped one and its files; with `force` it is stopped first. NotFound, Conflict."""
        target = path("delete_sandbox", sandbox_id) + query_string({"force": force or None})
        return parse(SandboxInfo, await self.transport.json("DELETE", target, timeout=STOP_TIMEOUT))

    async def create_volume(self, name: str, size: str = "10g", *, worker: str | None = None) -> VolumeInfo:
        """Create a volume: a folder on one worker that sandboxes mount by its name (`SandboxConfig.volumes`), and that
        outlives them. size: limit of its files. worker: its worker; None lets the server choose. Conflict when the name
        is taken; InvalidConfig, NotFound, Unavailable."""
        body = {"name": name, "size": size, "worker": worker}
        key = os.urandom(16).hex()
        return parse(VolumeInfo, await self.transport.json("POST", ROUTES["create_volume"].path, body, key=key))

    async def list_volumes(self) -> list[VolumeInfo]:
        """Volumes, oldest first; for the owner of the server those of all tenants."""
        return parse(VolumeList, await self.transport.json("GET", ROUTES["list_volumes"].path)).items

    async def get_volume(self, name: str, *, tenant: str | None = None) -> VolumeInfo:
        """A volume by its name. tenant: its tenant, for the owner of the server. NotFound."""
        target = ROUTES["get_volume"].url(volume=name) + query_string({"tenant": tenant})
        return parse(VolumeInfo, await self.transport.json("GET", target))

    async def delete_volume(self, name: str, *, tenant: str | None = None) -> VolumeInfo:
        """Delete a volume and its files. tenant: as of `get_volume`. NotFound; Conflict while a sandbox uses it."""
        target = ROUTES["delete_volume"].url(volume=name) + query_string({"tenant": tenant})
        return parse(VolumeInfo, await self.transport.json("DELETE", target, timeout=STOP_TIMEOUT))

    async def list_snapshots(self, sandbox_id: str | None = None) -> list[SnapshotInfo]:
        """Snapshots, oldest first; for the owner of the server those of all tenants. sandbox_id: of which they were
        taken."""
        target = ROUTES["list_snapshots"].path + query_string({"sandbox": sandbox_id})
        return parse(SnapshotList, await self.transport.json("GET", target)).items

    async def get_snapshot(self, snapshot: str, *, tenant: str | None = None) -> SnapshotInfo:
        """A snapshot by its id or name, with the sandboxes that run on it. NotFound."""
        target = ROUTES["get_snapshot"].url(snapshot=snapshot) + query_string({"tenant": tenant})
        return parse(SnapshotInfo, await self.transport.json("GET", target))

    async def delete_snapshot(self, snapshot: str, *, tenant: str | None = None) -> SnapshotInfo:
        """Delete a snapshot; its files stay while sandboxes or other snapshots use them. NotFound."""
        target = ROUTES["delete_snapshot"].url(snapshot=snapshot) + query_string({"tenant": tenant})
        return parse(SnapshotInfo, await self.transport.json("DELETE", target, timeout=STOP_TIMEOUT))

    async def export_snapshot(self, snapshot: str, path: str | os.PathLike[str], *, tenant: str | None = None) -> None:
        """Write a snapshot to a local tar: its files and the state of its shells, without the memory of processes. The
        file is replaced at once, when all has arrived. NotFound, Unsupported."""
        target = ROUTES["export_snapshot"].url(snapshot=snapshot) + query_string({"tenant": tenant})
        async with await self.transport.open("GET", target, timeout=TRANSFER_TIMEOUT) as answer:
            incoming = await primitives.in_thread(Incoming, path)
            try:
                async for part in answer:
                    await primitives.in_thread(incoming.write, part)
                await primitives.in_thread(incoming.keep)
            except BaseException:
                incoming.drop()
                raise

    async def import_snapshot(self, path: str | os.PathLike[str], *, name: str | None = None,
                              worker: str | None = None, ttl_seconds: float | None = None) -> SnapshotInfo:
        """Create a snapshot from an exported one, also of another server; its image has to be on the worker.
        InvalidConfig, ImageError, Conflict, StorageFull."""
        query = query_string({"name": name, "worker": worker, "ttl_seconds": ttl_seconds})
        answer = await self.transport.json_raw("POST", ROUTES["import_snapshot"].path + query, FileSource(path),
                                               timeout=TRANSFER_TIMEOUT, content_type="application/x-tar")  # fmt: skip
        return parse(SnapshotInfo, answer)

    async def set_pool(self, name: str, *, image: str | None = None, snapshot: str | None = None, memory: str = "8g",
                       network: Literal["none", "nat"] = "none", minimum: int = 1, maximum: int = 8,
                       tenant: str | None = None) -> PoolInfo:
        """Define a warm pool of an image or a snapshot, or replace its definition. memory, network: of the sandboxes
        that will use it. minimum, maximum: number of unclaimed sandboxes on each worker; between them it follows the
        recent demand. InvalidConfig, NotFound, QuotaExceeded."""
        body = {"image": image, "snapshot": snapshot, "memory": memory, "network": network, "minimum": minimum,
                "maximum": maximum}
        target = ROUTES["set_pool"].url(pool=name) + query_string({"tenant": tenant})
        return parse(PoolInfo, await self.transport.json("PUT", target, body))

    async def list_pools(self) -> list[PoolInfo]:
        """Warm pools with their states, by name; for the owner of the server those of all tenants."""
        return parse(PoolList, await self.transport.json("GET", ROUTES["list_pools"].path)).items

    async def delete_pool(self, name: str, *, tenant: str | None = None) -> PoolInfo:
        """Delete a warm pool; its unclaimed sandboxes end. NotFound."""
        target = ROUTES["delete_pool"].url(pool=name) + query_string({"tenant": tenant})
        return parse(PoolInfo, await self.transport.json("DELETE", target))

    async def list_envs(self) -> list[dict[str, Any]]:
        """Environments that can be made."""
        return parse(EnvList, await self.transport.json("GET", ROUTES["list_envs"].path)).items

    async def about_env(self, env_id: str) -> EnvAbout:
        """What is known of an environment: an id, or a registered name, with @VERSION for an older one. NotFound."""
        target = ROUTES["about_env"].path + query_string({"id": env_id})
        return parse(EnvAbout, await self.transport.json("GET", target))

    async def add_env(self, spec: AddEnv) -> EnvAbout:
        """Register an environment under a name; a new version where it differs. InvalidConfig, NotFound."""
        body = spec.model_dump(mode="json")
        return parse(EnvAbout, await self.transport.json("POST", ROUTES["add_env"].path, body))

    async def build_env(self, spec: BuildEnv, *, timeout: float = 1200.0) -> EnvAbout:
        """Install ahead what an environment needs, on every worker. ImageError with pip's last lines; StartFailed when
        that takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            wait = min(20.0, max(0.1, deadline - time.monotonic()))
            target = ROUTES["build_env"].path + query_string({"wait": wait})
            answer = await self.transport.json("POST", target, spec.model_dump(mode="json"), timeout=wait + 60)
            about = parse(EnvAbout, answer)
            if about.is_ready:
                return about
            if time.monotonic() > deadline:
                raise StartFailed(f"{spec.env_id} was not built within {timeout:g} seconds", hint="ask again")

    async def build_image(
        self,
        context: str | os.PathLike[str],
        image_tag: str,
        *,
        dockerfile: str | os.PathLike[str] | None = None,
        silence: float = 3600.0,
        progress: Callable[[str], object] | None = None,
        **fields: Any,
    ) -> BuiltImage:
        """Build the Dockerfile of a folder, which is sent without what .dockerignore leaves out, and give it a name.

        dockerfile: another file than the folder's. progress: called with each piece of output. silence: seconds that
        the server may say nothing. fields: of BuildRequest, as `target`, `build_args`, `network`. InvalidConfig and
        Unsupported for the Dockerfile, CommandFailed for a RUN, each with its line; ImageError.
        """
        text, ignored = await primitives.in_thread(read_context, context, dockerfile)
        try:
            spec = BuildRequest(image_tag=image_tag, dockerfile=text, **fields)
        except ValidationError as error:
            raise InvalidConfig(f"the build has a wrong option: {explain(error, BuildRequest).message}",
                                hint="BuildRequest documents the options") from None  # fmt: skip
        source = ContextSource(context, spec, ignored)
        row, parser = ROUTES["build_image"], FrameParser()
        opened = await self.transport.open(row.method, row.path, source, timeout=silence, content_type=STREAM_TYPE)
        async with opened as answer:
            async for data in answer:
                for kind, payload in parser.feed(data):
                    if kind is Frame.RESULT:
                        return BuiltImage.model_validate_json(payload)
                    if kind is Frame.ERROR:
                        raise from_wire(orjson.loads(payload))
                    if progress is not None:
                        progress(payload.decode("utf-8", "replace"))
        raise ServerError("the server ended its answer before the image was built")

    async def create_key(self, spec: CreateKey) -> NewKey:
        """Make an API key; its `key` is told here and never again. Forbidden, Conflict."""
        body = spec.model_dump(mode="json")
        return parse(NewKey, await self.transport.json("POST", ROUTES["create_key"].path, body, repeats=False))

    async def list_keys(self) -> list[KeyInfo]:
        """API keys, revoked ones too, oldest first. Forbidden."""
        return parse(KeyList, await self.transport.json("GET", ROUTES["list_keys"].path)).items

    async def revoke_key(self, key_id: str) -> KeyInfo:
        """End a key at once, for direct requests to running sandboxes within 20 seconds; its tenant's sandboxes stay.
        NotFound, Forbidden."""
        target = ROUTES["revoke_key"].url(key_id=key_id)
        return parse(KeyInfo, await self.transport.json("DELETE", target))

    async def get_configuration(self) -> ConfigurationStatus:
        """The live configuration that the server applies. Forbidden."""
        return parse(ConfigurationStatus, await self.transport.json("GET", ROUTES["get_configuration"].path))

    async def list_configurations(self, limit: int = 20) -> list[ConfigurationVersion]:
        """Versions of the live configuration, newest first. limit: from 1 to 200. Forbidden, InvalidConfig."""
        target = ROUTES["list_configurations"].path + query_string({"limit": limit})
        return parse(ConfigurationHistory, await self.transport.json("GET", target)).items

    async def set_configuration(
        self, configuration: Configuration, *, expected: int | None = None, check: bool = False
    ) -> ConfigurationStatus:
        """Replace the live configuration. expected: the version that it is based on. check: only validate it.
        Conflict when there is a newer version, or the configuration is read from a file; Forbidden."""
        spec = SetConfiguration(configuration=configuration, expected=expected, check=check)
        row = ROUTES["set_configuration"]
        return parse(ConfigurationStatus, await self.transport.json(row.method, row.path, spec.model_dump(mode="json")))

    async def audit(self, *, tenant: str | None = None, key_id: str | None = None, action: str | None = None,
                    target: str | None = None, since: float | None = None, until: float | None = None,
                    limit: int = 500) -> list[AuditEntry]:
        """Entries of the audit log, newest first. since, until: seconds since the epoch. limit: maximum number of
        entries; InvalidConfig below 1."""
        if limit < 1:
            raise InvalidConfig(f"limit={limit} is below 1", hint="leave it out, or give a number from 1")
        found: list[AuditEntry] = []
        before: int | None = None
        while len(found) < limit:
            target_path = ROUTES["list_audit"].path + query_string({
                "tenant": tenant, "key_id": key_id, "action": action, "target": target, "since": since, "until": until,
                "limit": min(limit - len(found), 2000), "before": before,
            })  # fmt: skip
            page = parse(AuditList, await self.transport.json("GET", target_path))
            found += page.items
            before = page.next
            if before is None:
                break
        return found

    async def page_link(self) -> str:
        """The path and fragment of a link that signs in to the web page with this client's key: once, within a
        minute. Without a key it is the path of the page."""
        return str((await self.transport.json("POST", "/ui/api/link", repeats=False))["path"])

    async def list_workers(self) -> list[WorkerInfo]:
        """The machines that sandboxes are on, lost ones too. Forbidden."""
        return parse(WorkerList, await self.transport.json("GET", ROUTES["list_workers"].path)).items

    async def drain_worker(self, name: str, draining: bool = True, *, archive: bool = False) -> WorkerInfo:
        """Whether a worker that joined gets no more sandboxes; it keeps those that it has. archive: sandboxes that
        retain their files are stopped and archived, and can be restarted on another worker. NotFound, Unsupported."""
        row = ROUTES["drain_worker" if draining else "undrain_worker"]
        target = row.url(worker=name) + query_string({"archive": (archive and draining) or None})
        return parse(WorkerInfo, await self.transport.json("POST", target))

    async def remove_worker(self, name: str, *, force: bool = False) -> WorkerInfo:
        """Forget a worker that is lost; with `force` it is taken for lost first, and its sandboxes are over. NotFound,
        Conflict."""
        target = ROUTES["remove_worker"].url(worker=name) + query_string({"force": force or None})
        return parse(WorkerInfo, await self.transport.json("DELETE", target))

    async def server_info(self) -> ServerInfo:
        """Version, isolation and capacity."""
        return parse(ServerInfo, await self.transport.json("GET", ROUTES["server_info"].path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
