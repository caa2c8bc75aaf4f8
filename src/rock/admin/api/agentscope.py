"""The HTTP routes of AgentScope's training sandbox, for existing AgentScope clients.

    /apis/training/{box}/healthz
    /apis/training/{box}/get_env_profile, create, step, evaluate, get_info, release

box: the id of a sandbox with a training set, or the name of a set, which selects one sandbox that all requests with
that name share. Responses are {"success", "data"}, errors {"detail"}: 400 for a wrong request, 422 for an invalid body,
404 for an unknown box, 500 for any other error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rock.admin.api.rock_v1.envelope import DataPlane, Failed, is_id
from rock.admin.tenants import TenantServices
from rock.envhub import datasets
from rock.errors import ClientError, CommandTimeout, InvalidConfig, NotFound, RockError, Unavailable
from rock.http.asgi import Answer, App, Handler, Receive, Request, Router, Scope, Send, answer
from rock.protocol.env import (
    IDLE,
    NAMED,
    STEP_TIMEOUT,
    EnvInfo,
    OpenEnv,
    StepResult,
    created,
    new_instance_id,
    overdue,
    stepped,
)
from rock.protocol.keys import Access
from rock.protocol.route import Route
from rock.protocol.sandbox import SandboxInfo, State

PREFIX = "/apis/training/{box}"
_LONGEST_START = 90.0  # seconds: clients wait 100 for the health check
_EMPTY = orjson.dumps({})


class Body(BaseModel):
    """The one body of all routes; each reads the fields that it needs. messages: of /step the agent's message."""

    model_config = ConfigDict(extra="ignore")

    env_type: str | None = None
    task_id: str | None = None
    instance_id: str | None = None
    messages: dict[str, Any] | list[Any] = Field(default_factory=dict)
    params: dict[str, Any] = Field(default_factory=dict)


class _NoBox(Exception):
    """The box does not exist or does not run."""


class Training:
    """The routes, over the service of a tenant and the data plane."""

    def __init__(self, tenant_services: TenantServices, data: App) -> None:
        self._tenant_services = tenant_services
        self._data = DataPlane(data)
        self._router = Router("training")
        self._add("GET", "/healthz", self._healthz)
        for path, work in (
            ("get_env_profile", self._profile), ("create", self._create), ("step", self._step),
            ("evaluate", self._evaluate), ("get_info", self._get_info), ("release", self._release),
        ):  # fmt: skip
            self._add("POST", f"/{path}", work)

    def _add(self, method: str, path: str, work: Callable[[Request, str, str, Body], Awaitable[Any]]) -> None:
        access = Access.READ if method == "GET" else Access.RUN
        route = Route(f"training{path}", method, PREFIX + path, "control", "AgentScope", access=access)
        self._router.add(route, self._handler(work))

    def over(self, rest: App) -> App:
        """These routes, and `rest` for all other paths."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and self._router.match(scope["method"], scope["path"]) is not None:
                await self._router(scope, receive, send)
            else:
                await rest(scope, receive, send)

        return app

    def _handler(self, work: Callable[[Request, str, str, Body], Awaitable[Any]]) -> Handler:
        async def reply(request: Request) -> Answer:
            try:
                raw = await request.body() if request.scope["method"] == "POST" else _EMPTY
                body = Body.model_validate(orjson.loads(raw))
            except orjson.JSONDecodeError as error:
                where = {"type": "json_invalid", "loc": ["body", error.pos], "msg": "JSON decode error"}
                return answer({"detail": [where]}, 422)
            except ValidationError as error:
                wrong = error.errors(include_url=False, include_input=False, include_context=False)
                return answer({"detail": [{**item, "loc": ["body", *item["loc"]]} for item in wrong]}, 422)
            try:
                sandbox_id, env_type = await self._box(request, request.path["box"])
                return answer(await work(request, sandbox_id, env_type, body))
            except _NoBox as error:
                return answer({"detail": str(error)}, 404)
            except Failed as error:  # it ended between two requests
                return answer({"detail": str(error)}, 404)
            except ClientError as error:
                return answer({"detail": error.message}, 400)
            except RockError as error:
                return answer({"detail": str(error)}, 500)

        return reply

    async def _box(self, request: Request, box: str) -> tuple[str, str]:
        """The sandbox of a box and its set."""
        try:
            dataset = datasets.find(box)
        except NotFound:
            return box, await self._set_of(request, box)
        host = await self._hosted(request, dataset.name)
        if host.state is State.PENDING:
            raise Unavailable(f"the sandbox for {dataset.name} has not started yet", hint="ask again")
        if host.state is not State.RUNNING:
            raise Unavailable(f"the sandbox for {dataset.name} failed to start: {host.reason}",
                              hint="call it again to start a new one; if it fails again, the log of the server has the "
                                   "cause")
        return host.sandbox_id, dataset.name

    async def _hosted(self, request: Request, name: str) -> SandboxInfo:
        """The tenant's own sandbox of a set; concurrent requests share one."""
        tenant_service = self._tenant_services(request.scope)
        tenant_service.caller.require(Access.CREATE)
        return await tenant_service.open_env(OpenEnv(env_id=name, protocol="task"), _LONGEST_START)

    async def _set_of(self, request: Request, sandbox_id: str) -> str:
        try:
            if not is_id(sandbox_id):
                raise NotFound(f"invalid id of a sandbox: {sandbox_id!r}", hint="create a box first, and pass its id")
            record = await self._tenant_services(request.scope).load(sandbox_id)
            dataset = datasets.of_image(record.info.image)
        except NotFound as error:
            sets = ", ".join(datasets.names())
            raise _NoBox(f"{error.message}; a box is the id of a sandbox, or one of {sets}") from None
        if dataset is None:
            raise _NoBox(f"sandbox {sandbox_id} has no training set")
        return dataset.name

    # ---- routes ----

    async def _healthz(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        return "OK"

    async def _profile(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        _same(body, env_type)
        split = body.params.get("split", "train")
        made = await self._make(request, box, env_type, {})
        asked = {"what": "profile", "arguments": [split, body.params]}
        try:
            found = await self._data.json(request, "call_env", box, asked, env=str(made.env))
        finally:
            await self._data.bytes(request, "close_env", box, env=str(made.env))
        return _data(found["result"])

    async def _create(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        _same(body, env_type)
        if body.task_id is None:
            raise InvalidConfig("the field task_id is missing",
                                hint="pass the id of a task; get_env_profile returns them")
        name = body.instance_id or new_instance_id()
        spec = {"task_id": body.task_id, "params": body.params}
        made = await self._make(request, box, env_type, spec, name=name, idle=IDLE, begin=True)
        return _data(created(made, name, body.task_id))

    async def _step(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        asked = {"action": {"action": body.messages, "params": body.params}}
        try:
            found = await self._data.json(request, "step_env", box, asked, env=_named(body))
        except CommandTimeout as error:
            return _data(overdue(error))
        return _data(stepped(StepResult.model_validate(found)))

    async def _evaluate(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        return await self._call(request, box, body, "evaluate")

    async def _get_info(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        return await self._call(request, box, body, "tools")

    async def _release(self, request: Request, box: str, env_type: str, body: Body) -> Any:
        try:
            await self._data.bytes(request, "close_env", box, env=_named(body))
        except NotFound:
            return {"success": False, "data": None}
        return {"success": True, "data": None}

    # ---- requests to the sandbox ----

    async def _make(self, request: Request, box: str, env_type: str, kwargs: dict[str, Any], **more: Any) -> EnvInfo:
        spec = {"env_id": env_type, "protocol": "task", "kwargs": kwargs, "timeout": STEP_TIMEOUT, **more}
        return EnvInfo.model_validate(await self._data.json(request, "make_env", box, spec))

    async def _call(self, request: Request, box: str, body: Body, what: str) -> Any:
        asked = {"what": what, "arguments": [body.messages or None, body.params]}
        found = await self._data.json(request, "call_env", box, asked, env=_named(body))
        return _data(found["result"])


def _data(value: Any) -> dict[str, Any]:
    return {"success": True, "data": value}


def _named(body: Body) -> str:
    """The path segment of an instance."""
    if not body.instance_id or "/" in body.instance_id:
        raise InvalidConfig(f"Instance {body.instance_id} not found!",
                            hint="create the instance first, and pass the instance_id of the reply without a slash")
    return NAMED + body.instance_id


def _same(body: Body, env_type: str) -> None:
    if body.env_type is not None and datasets.find(body.env_type).name != env_type:
        raise InvalidConfig(f"the box has the training set {env_type!r}, not {body.env_type!r}",
                            hint=f"set env_type={env_type!r}, or use a box of the other set")
