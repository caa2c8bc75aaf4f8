"""Composition of the control plane: store, scheduler, workers, service, reconciler, API."""

from __future__ import annotations

from rock.admin.api import native
from rock.admin.api.rock_v1 import RockV1
from rock.admin.api.sandboxes import Sandboxes
from rock.admin.api.training import Training
from rock.admin.reconciler import Reconciler
from rock.admin.service import Service
from rock.admin.worker import Worker
from rock.envhub.catalogue import Catalogue
from rock.scheduler.local import LocalScheduler
from rock.settings import Settings
from rock.store.base import Store
from rock.wire.asgi import App


class Admin:
    """The control plane of one process. `app` serves once `open` has returned.

    data: the data plane, for the ROCK dialect, which has both planes behind one address.
    """

    def __init__(
        self, settings: Settings, store: Store, workers: dict[str, Worker], roles: list[str], data: App
    ) -> None:
        self.service = Service(store, LocalScheduler(), workers)
        self.reconciler = Reconciler(self.service)
        self.catalogue = Catalogue(settings.home / "envhub.sqlite")
        own = Sandboxes(self.service).over(native.build(self.service, settings, roles))
        rock = RockV1(self.service, data, self.catalogue).over(own)
        self.app: App = Training(self.service, data).over(rock)
        self._store = store

    async def open(self) -> None:
        """Open the store and settle what a former run left."""
        await self._store.open()
        await self.catalogue.open()
        await self.reconciler.start()

    async def close(self) -> None:
        await self.reconciler.close()
        await self.service.close()
        await self.catalogue.close()
        await self._store.close()
