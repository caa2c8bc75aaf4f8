"""The hot routes of the native API, without a framework, which would cost 0.7 ms per request."""

from __future__ import annotations

from urllib.parse import parse_qsl

from rock.admin.api.bare import About, Heartbeats
from rock.admin.audit import Audit
from rock.admin.configuration import LiveConfiguration
from rock.admin.tenants import TenantService, TenantServices
from rock.errors import InvalidConfig
from rock.http.asgi import Answer, App, Configs, Receive, Request, Router, Scope, Send, answer_model
from rock.protocol.action import GroupRequest
from rock.protocol.env import OpenEnv
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.protocol.sandbox import CommitRequest, State, UpdateSandbox
from rock.protocol.snapshots import CheckpointRequest, ForkRequest, RollbackRequest
from rock.store.base import Query

_LONGEST_WAIT = 3600.0  # seconds
_MOST_LISTED = 2000
_EQUAL = ("user_id", "experiment_id", "namespace", "image", "runtime", "worker", "cause", "name")
NAMES = ("create_sandbox", "list_sandboxes", "get_sandbox", "update_sandbox", "stop_sandbox",
         "pause_sandbox", "resume_sandbox", "checkpoint_sandbox", "rollback_sandbox", "fork_sandbox",
         "forkable_sandbox", "direct_access", "restart_sandbox", "archive_sandbox", "commit_sandbox", "get_commit",
         "open_env", "create_group", "get_group", "stop_group")  # fmt: skip


class Sandboxes:
    """Handlers by route name."""

    def __init__(self, tenant_services: TenantServices) -> None:
        self._tenant_services = tenant_services
        self._configs = Configs()

    def over(self, rest: App, about: About, heartbeats: Heartbeats, *others: Audit | LiveConfiguration) -> App:
        """These routes and those of `about`, `heartbeats` and `others`, and `rest` for all others."""
        router = Router("sandboxes")
        about.add_to(router)
        heartbeats.add_to(router)
        for more in others:
            more.add_to(router)
        for name in NAMES:
            router.add(ROUTES[name], getattr(self, name))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            kind = scope["type"]
            method = scope["method"] if kind == "http" else "WEBSOCKET"
            found = router.match(method, scope["path"]) if kind != "lifespan" else None
            await (rest(scope, receive, send) if found is None else router.serve(found, scope, receive, send))

        return app

    def _tenant_service(self, request: Request) -> TenantService:
        return self._tenant_services(request.scope)

    async def create_sandbox(self, request: Request) -> Answer:
        wait = _wait(request)
        config, chosen = self._configs.read_named(await request.body())
        return answer_model(await self._tenant_service(request).create(config, _key(request), wait, chosen), 201)

    async def list_sandboxes(self, request: Request) -> Answer:
        limit = request.integer("limit", 500, low=1, high=_MOST_LISTED)
        query = listing(request.scope.get("query_string", b""), limit)
        return answer_model(await self._tenant_service(request).list(query, request.flag("history")))

    async def get_sandbox(self, request: Request) -> Answer:
        look = {"touch": request.flag("touch"), "usage": request.flag("usage")}
        return answer_model(
            await self._tenant_service(request).get(request.path["sandbox_id"], wait=_wait(request), **look)
        )

    async def update_sandbox(self, request: Request) -> Answer:
        change = await request.model(UpdateSandbox)
        return answer_model(await self._tenant_service(request).update(request.path["sandbox_id"], change))

    async def stop_sandbox(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).stop(request.path["sandbox_id"]))

    async def pause_sandbox(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).pause(request.path["sandbox_id"]))

    async def resume_sandbox(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).resume(request.path["sandbox_id"]))

    async def checkpoint_sandbox(self, request: Request) -> Answer:
        spec = await request.model(CheckpointRequest)
        made = await self._tenant_service(request).checkpoint(request.path["sandbox_id"], spec, _key(request))
        return answer_model(made, 201)

    async def forkable_sandbox(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).forkable(request.path["sandbox_id"]))

    async def direct_access(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).direct(request.path["sandbox_id"]))

    async def rollback_sandbox(self, request: Request) -> Answer:
        spec = await request.model(RollbackRequest)
        return answer_model(await self._tenant_service(request).rollback(request.path["sandbox_id"], spec.snapshot))

    async def fork_sandbox(self, request: Request) -> Answer:
        spec = await request.model(ForkRequest)
        made = await self._tenant_service(request).fork(request.path["sandbox_id"], spec, _key(request))
        return answer_model(made, 201)

    async def restart_sandbox(self, request: Request) -> Answer:
        return answer_model(
            await self._tenant_service(request).restart(request.path["sandbox_id"], _key(request), _wait(request))
        )

    async def archive_sandbox(self, request: Request) -> Answer:
        return answer_model(
            await self._tenant_service(request).archive(request.path["sandbox_id"], _key(request), _wait(request))
        )

    async def commit_sandbox(self, request: Request) -> Answer:
        wait = _wait(request)
        spec = await request.model(CommitRequest)
        return answer_model(await self._tenant_service(request).commit(request.path["sandbox_id"], spec, wait))

    async def get_commit(self, request: Request) -> Answer:
        return answer_model(
            await self._tenant_service(request).commit_status(request.path["sandbox_id"], _wait(request))
        )

    async def create_group(self, request: Request) -> Answer:
        wait = _wait(request)
        spec = await request.model(GroupRequest)
        return answer_model(await self._tenant_service(request).create_group(spec, _key(request), wait), 201)

    async def get_group(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).get_group(request.path["group_id"], _wait(request)))

    async def stop_group(self, request: Request) -> Answer:
        return answer_model(await self._tenant_service(request).stop_group(request.path["group_id"]))

    async def open_env(self, request: Request) -> Answer:
        wait = _wait(request)
        spec = await request.model(OpenEnv)
        return answer_model(await self._tenant_service(request).open_env(spec, wait, _key(request)), 201)


def _wait(request: Request) -> float:
    return request.number("wait", 0.0, high=_LONGEST_WAIT)


def _key(request: Request) -> str | None:
    return request.header(IDEMPOTENCY_KEY.encode())


def listing(raw: bytes, limit: int) -> Query:
    """The query for records in a query string. InvalidConfig."""
    states: list[State] = []
    labels: dict[str, str] = {}
    fields: dict[str, str] = {}
    for name, value in parse_qsl(raw.decode("latin-1"), keep_blank_values=True):
        if name == "state":
            states += [_state(text) for text in value.split(",")]
        elif name == "label":
            key, _, text = value.partition("=")
            labels[key] = text
        elif name in _EQUAL:
            fields[name] = value
        elif name not in ("limit", "after", "history"):
            raise InvalidConfig(f"the query parameter {name!r} is unknown",
                                hint=f"use label=KEY=VALUE, {', '.join(_EQUAL)}, limit, after or history")
    page: tuple[float, str] | None = None
    after = next((value for name, value in parse_qsl(raw.decode("latin-1")) if name == "after"), "")
    if after:
        time_text, _, sandbox_id = after.partition(":")
        try:
            page = float(time_text), sandbox_id
        except ValueError:
            raise InvalidConfig(f"after={after!r} is not the `next` of an earlier page",
                                hint="leave after out for the first page, then pass `next` of each page "
                                     "unchanged") from None
    return Query(states=states, fields=fields, labels=labels, limit=limit, after=page)


def _state(text: str) -> State:
    try:
        return State(text)
    except ValueError:
        raise InvalidConfig(f"no such state: {text!r}", hint=", ".join(State)) from None
