"""The rows of the native wire that trainers call thousands of times: bare, as a framework would cost 0.7 ms a call."""

from __future__ import annotations

from rock.admin.service import Service
from rock.protocol.env import OpenEnv
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.protocol.sandbox import CommitRequest, SandboxConfig
from rock.wire.asgi import Answer, App, Receive, Request, Router, Scope, Send, answer_model

_LONGEST_WAIT = 3600.0  # seconds
NAMES = ("create_sandbox", "get_sandbox", "stop_sandbox", "restart_sandbox", "archive_sandbox", "commit_sandbox",
         "get_commit", "open_env")  # fmt: skip


class Sandboxes:
    """Handlers by route name."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def over(self, rest: App) -> App:
        """These rows, and `rest` for all others."""
        router = Router("sandboxes")
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            mine = scope["type"] == "http" and router.match(scope["method"], scope["path"]) is not None
            await (router if mine else rest)(scope, receive, send)

        return app

    async def create_sandbox(self, request: Request) -> Answer:
        wait = _wait(request)
        config = await request.model(SandboxConfig)
        return answer_model(await self._service.create(config, _key(request), wait), 201)

    async def get_sandbox(self, request: Request) -> Answer:
        look = {"touch": request.flag("touch"), "usage": request.flag("usage")}
        return answer_model(await self._service.get(request.path["sandbox_id"], wait=_wait(request), **look))

    async def stop_sandbox(self, request: Request) -> Answer:
        return answer_model(await self._service.stop(request.path["sandbox_id"]))

    async def restart_sandbox(self, request: Request) -> Answer:
        return answer_model(
            await self._service.kept.restart(request.path["sandbox_id"], _key(request), _wait(request))
        )

    async def archive_sandbox(self, request: Request) -> Answer:
        return answer_model(
            await self._service.archive.archive(request.path["sandbox_id"], _key(request), _wait(request))
        )

    async def commit_sandbox(self, request: Request) -> Answer:
        wait = _wait(request)
        wish = await request.model(CommitRequest)
        return answer_model(await self._service.commits.commit(request.path["sandbox_id"], wish, wait))

    async def get_commit(self, request: Request) -> Answer:
        return answer_model(await self._service.commits.status(request.path["sandbox_id"], _wait(request)))

    async def open_env(self, request: Request) -> Answer:
        wait = _wait(request)
        wish = await request.model(OpenEnv)
        return answer_model(await self._service.open_env(wish, wait, _key(request)), 201)


def _wait(request: Request) -> float:
    return request.number("wait", 0.0, high=_LONGEST_WAIT)


def _key(request: Request) -> str | None:
    return request.header(IDEMPOTENCY_KEY.encode())
