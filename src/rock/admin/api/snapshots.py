"""Routes of the snapshots, recordings and warm pools of a tenant; those of a sandbox are in sandboxes.py."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from rock.admin.tenants import TenantServices
from rock.protocol.pools import PoolInfo, PoolList, SetPool
from rock.protocol.recordings import RecordedEntries, RecordingInfo, RepeatRecording
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import NAME_PATTERN
from rock.protocol.snapshots import SnapshotInfo, SnapshotList


def _row(name: str, model: type[BaseModel], tag: str = "snapshots") -> dict[str, Any]:
    row = ROUTES[name]
    return {"path": row.path, "summary": row.summary, "response_model": model, "tags": [tag]}


def _json(model: BaseModel) -> Response:
    return Response(orjson.dumps(model.model_dump(mode="json")), media_type="application/json")


def add_routes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.get(**_row("list_snapshots", SnapshotList))
    async def list_snapshots(request: Request, sandbox: str | None = None) -> Response:
        """Snapshots, oldest first; for the server's owner those of all tenants. `sandbox`: of which they were taken."""
        return _json(SnapshotList(items=list(await tenant_services(request.scope).list_snapshots(sandbox))))

    @app.get(**_row("get_snapshot", SnapshotInfo))
    async def get_snapshot(request: Request, snapshot: str, tenant: str = "") -> Response:
        """A snapshot by its id or name, with the sandboxes that run on it. `tenant`: its tenant, for the server's owner
        alone."""
        return _json(await tenant_services(request.scope).get_snapshot(snapshot, tenant))

    @app.get(ROUTES["export_snapshot"].path, summary=ROUTES["export_snapshot"].summary, tags=["snapshots"],
             response_class=StreamingResponse)
    async def export_snapshot(request: Request, snapshot: str, tenant: str = "") -> StreamingResponse:
        """A snapshot as a tar, for an import. `tenant`: as of get_snapshot."""
        stream = await tenant_services(request.scope).export_snapshot(snapshot, tenant)
        return StreamingResponse(stream, media_type="application/x-tar")

    @app.post(**_row("import_snapshot", SnapshotInfo))
    async def import_snapshot(
        request: Request, name: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
        worker: Annotated[str | None, Query(max_length=128)] = None,
        ttl_seconds: Annotated[float | None, Query(gt=0, le=10 * 365 * 86400)] = None,
    ) -> Response:  # fmt: skip
        """Create a snapshot from an exported one. `worker`: where; by default the server chooses."""
        service = tenant_services(request.scope)
        return _json(await service.import_snapshot(name, worker, ttl_seconds, request.stream()))

    @app.delete(**_row("delete_snapshot", SnapshotInfo))
    async def delete_snapshot(request: Request, snapshot: str, tenant: str = "") -> Response:
        """Delete a snapshot. `tenant`: as of get_snapshot."""
        return _json(await tenant_services(request.scope).delete_snapshot(snapshot, tenant))


def add_pool_routes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.get(**_row("list_pools", PoolList, "pools"))
    async def list_pools(request: Request) -> Response:
        """Pools with their states, by name; for the server's owner those of all tenants."""
        return _json(PoolList(items=list(await tenant_services(request.scope).list_pools())))

    @app.put(**_row("set_pool", PoolInfo, "pools"))
    async def set_pool(request: Request, pool: str, spec: SetPool, tenant: str = "") -> Response:
        """Define a pool, or replace its definition. `tenant`: its tenant, for the server's owner alone."""
        return _json(await tenant_services(request.scope).set_pool(pool, spec, tenant))

    @app.delete(**_row("delete_pool", PoolInfo, "pools"))
    async def delete_pool(request: Request, pool: str, tenant: str = "") -> Response:
        """Delete a pool and its unclaimed sandboxes. `tenant`: as of set_pool."""
        return _json(await tenant_services(request.scope).delete_pool(pool, tenant))


def add_recording_routes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.get(**_row("get_recording", RecordingInfo, "recordings"))
    async def get_recording(request: Request, sandbox_id: str) -> Response:
        """The recording of a sandbox with record=True, also after its end."""
        return _json(await tenant_services(request.scope).recording(sandbox_id))

    @app.get(**_row("list_recorded", RecordedEntries, "recordings"))
    async def list_recorded(
        request: Request, sandbox_id: str, after: Annotated[int, Query(ge=0, le=1 << 53)] = 0
    ) -> Response:
        """Entries in order, those above `after`."""
        return _json(await tenant_services(request.scope).recorded(sandbox_id, after))

    @app.put(**_row("repeat_recording", RecordingInfo, "recordings"))
    async def repeat_recording(request: Request, sandbox_id: str, spec: RepeatRecording) -> Response:
        """Answer the clients of a sandbox from a recording as long as they repeat its requests in order."""
        return _json(await tenant_services(request.scope).repeat_recording(sandbox_id, spec.source))
