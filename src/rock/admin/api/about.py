"""What a server tells of itself. Bare rows, as probes and clients ask for them before anything else."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rock import __version__
from rock.admin.desk import Desks
from rock.admin.fleet import Fleet
from rock.protocol.keys import Access, caller_of
from rock.protocol.node import ServerInfo
from rock.protocol.routes import ROUTES
from rock.settings import Settings
from rock.wire.asgi import Answer, Request, Router, answer, answer_model

NAMES = ("server_info", "health")


class About:
    """Handlers by route name. roles: what the process serves."""

    def __init__(self, desks: Desks, fleet: Fleet, settings: Settings, roles: Sequence[str]) -> None:
        self._desks = desks
        self._fleet = fleet
        self._home = str(settings.home)
        self._roles = list(roles)
        self._started_at = time.time()

    def add_to(self, router: Router) -> None:
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))

    async def server_info(self, request: Request) -> Answer:
        """Version, isolation and capacity."""
        found = [info.status for info in await self._fleet.infos() if info.status is not None and not info.is_lost]
        owner = Access.ADMIN in caller_of(request.scope).scopes
        seen = found if owner else [status.model_copy(update={"images": []}) for status in found]  # others' names
        return answer_model(
            ServerInfo(
                version=__version__,
                home=self._home,
                roles=self._roles,
                workers=seen,
                sandboxes=await self._desks(request.scope).count(),
                started_at=self._started_at,
                pid=os.getpid(),
            )
        )

    async def health(self, _: Request) -> Answer:
        """Answers while the server serves."""
        return answer({"status": "ok", "version": __version__})
