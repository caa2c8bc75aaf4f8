"""Routes of snapshots: checkpoint, rollback, fork, and the snapshots of a tenant."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from rock.admin.tenants import TenantServices
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.protocol.sandbox import SandboxInfo
from rock.protocol.snapshots import (
    CheckpointRequest,
    ForkRequest,
    ForkResult,
    RollbackRequest,
    SnapshotInfo,
    SnapshotList,
)


def _row(name: str, model: type[BaseModel], status: int = 200) -> dict[str, Any]:
    row = ROUTES[name]
    return {"path": row.path, "summary": row.summary, "response_model": model, "tags": ["snapshots"],
            "status_code": status}  # fmt: skip


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(orjson.dumps(model.model_dump(mode="json")), status, media_type="application/json")


def add_routes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.post(**_row("checkpoint_sandbox", SnapshotInfo, 201))
    async def checkpoint_sandbox(request: Request, sandbox_id: str, body: CheckpointRequest) -> Response:
        """Take a snapshot of a running sandbox; the same idempotency key returns the same snapshot. `left_out` lists
        what is not in it."""
        key = request.headers.get(IDEMPOTENCY_KEY)
        return _json(await tenant_services(request.scope).checkpoint(sandbox_id, body, key), 201)

    @app.post(**_row("rollback_sandbox", SandboxInfo))
    async def rollback_sandbox(request: Request, sandbox_id: str, body: RollbackRequest) -> Response:
        """Return a running sandbox to a snapshot: its processes end, and its sessions are opened again."""
        return _json(await tenant_services(request.scope).rollback(sandbox_id, body.snapshot))

    @app.post(**_row("fork_sandbox", ForkResult, 201))
    async def fork_sandbox(request: Request, sandbox_id: str, body: ForkRequest) -> Response:
        """Take one snapshot and start `count` sandboxes from it; the same idempotency key returns the same group."""
        key = request.headers.get(IDEMPOTENCY_KEY)
        return _json(await tenant_services(request.scope).fork(sandbox_id, body, key), 201)

    @app.get(**_row("list_snapshots", SnapshotList))
    async def list_snapshots(request: Request, sandbox: str | None = None) -> Response:
        """Snapshots, oldest first; for the server's owner those of all tenants. `sandbox`: of which they were taken."""
        return _json(SnapshotList(items=list(await tenant_services(request.scope).list_snapshots(sandbox))))

    @app.get(**_row("get_snapshot", SnapshotInfo))
    async def get_snapshot(request: Request, snapshot: str, tenant: str = "") -> Response:
        """A snapshot by its id or name, with the sandboxes that run on it. `tenant`: its tenant, for the server's owner
        alone."""
        return _json(await tenant_services(request.scope).get_snapshot(snapshot, tenant))

    @app.delete(**_row("delete_snapshot", SnapshotInfo))
    async def delete_snapshot(request: Request, snapshot: str, tenant: str = "") -> Response:
        """Delete a snapshot. `tenant`: as of get_snapshot."""
        return _json(await tenant_services(request.scope).delete_snapshot(snapshot, tenant))
