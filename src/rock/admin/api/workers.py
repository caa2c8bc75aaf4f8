"""Workers on the native wire: whoever owns the server lists, drains and removes them. Heartbeats are in beats.py."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from rock.admin.losses import bury
from rock.admin.service import Service
from rock.protocol.routes import ROUTES
from rock.protocol.workers import WorkerInfo, WorkerList


def add_routes(app: FastAPI, service: Service) -> None:
    fleet = service.workers

    def row(name: str, model: Any) -> dict[str, Any]:
        return {"path": ROUTES[name].path, "response_model": model, "tags": ["workers"]}

    @app.get(**row("list_workers", WorkerList))
    async def list_workers() -> WorkerList:
        """Workers, lost ones too."""
        return WorkerList(items=await fleet.infos())

    @app.post(**row("drain_worker", WorkerInfo))
    async def drain_worker(worker: str) -> WorkerInfo:
        """It keeps the sandboxes that it has, and gets no more."""
        return await fleet.drain(worker, True)

    @app.post(**row("undrain_worker", WorkerInfo))
    async def undrain_worker(worker: str) -> WorkerInfo:
        """It gets sandboxes again."""
        return await fleet.drain(worker, False)

    @app.delete(**row("remove_worker", WorkerInfo))
    async def remove_worker(worker: str, force: bool = False) -> WorkerInfo:
        """Forget a lost worker. `force`: take it for lost first, which ends its sandboxes."""
        info = await fleet.info(worker)
        if force and not info.is_lost:
            await fleet.lose(info, surely=True)
        if (await fleet.info(worker)).is_lost:
            await bury(service, worker)
        await fleet.remove(worker)
        return info
