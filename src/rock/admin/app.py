"""Composition of the control plane: store, scheduler, workers, service, reconciler, API."""

from __future__ import annotations

from rock.admin.api import native
from rock.admin.api.sandboxes import Sandboxes
from rock.admin.reconciler import Reconciler
from rock.admin.service import Service
from rock.admin.worker import Worker
from rock.scheduler.local import LocalScheduler
from rock.settings import Settings
from rock.store.base import Store
from rock.wire.asgi import App


class Admin:
    """The control plane of one process. `app` serves once `open` has returned."""

    def __init__(self, settings: Settings, store: Store, workers: dict[str, Worker], roles: list[str]) -> None:
        self.service = Service(store, LocalScheduler(), workers)
        self.reconciler = Reconciler(self.service)
        self.app: App = Sandboxes(self.service).over(native.build(self.service, settings, roles))
        self._store = store

    async def open(self) -> None:
        """Open the store and settle what a former run left."""
        await self._store.open()
        await self.reconciler.start()

    async def close(self) -> None:
        await self.reconciler.close()
        await self.service.close()
        await self._store.close()
