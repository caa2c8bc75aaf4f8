"""The rows by which workers join and send heartbeats. Bare: a lease must not wait for an import or a framework."""

from __future__ import annotations

from rock.admin.fleet import Fleet
from rock.protocol.routes import ROUTES
from rock.protocol.workers import Beat, JoinWorker
from rock.wire.asgi import Answer, Request, Router, answer_model

NAMES = ("join_worker", "beat_worker")


class Beats:
    """Handlers by route name."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def add_to(self, router: Router) -> None:
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))

    async def join_worker(self, request: Request) -> Answer:
        """A rocklet joins, or comes back."""
        return answer_model(await self._fleet.join(await request.model(JoinWorker)))

    async def beat_worker(self, request: Request) -> Answer:
        """Its heartbeat; a Conflict says that its epoch is over."""
        return answer_model(await self._fleet.beat(request.path["worker"], await request.model(Beat)))
