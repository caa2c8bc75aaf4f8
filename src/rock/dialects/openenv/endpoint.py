"""The routes of OpenEnv: /openenv/{environment id}/... for every environment of the server.

    WS    /ws[?session_id=]   /mcp
    GET   /health  /metadata  /schema  /state  /openapi.json  /list_environments  /{name}/splits
    POST  /reset  /step  /mcp  /{name}/tasks  /{name}/num_tasks  /{name}/task  /{name}/task_range

POST /reset and /step are single requests, each with an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rock.dialects import environments
from rock.dialects.api import lasting_api_of, limited_body
from rock.dialects.environments import Kind
from rock.dialects.openenv import rpc
from rock.dialects.openenv.episode import task_ids
from rock.dialects.openenv.messages import (
    LONGEST,
    Failure,
    StepRequest,
    dumps,
    metadata,
    openapi,
    parsed,
    schemas,
    validated,
)
from rock.dialects.openenv.sessions import Episodes, SessionTable
from rock.dialects.openenv.socket import EpisodeSocket
from rock.errors import InvalidConfig, NotFound, Unsupported
from rock.http.asgi import Answer, App, Found, Handler, Receive, Request, Send, SocketHandler
from rock.protocol.keys import Access, caller_of
from rock.protocol.route import Route

PREFIX = "/openenv/"
_SPLITS = ({"name": "train", "type": "train"},)


class OpenEnvEndpoint:
    """The routes. api: the application that serves the native API."""

    def __init__(self, api: App) -> None:
        self._api = api
        self._sessions = SessionTable()
        get, post = Access.READ, Access.RUN
        self._rows: dict[tuple[str, str], tuple[Handler | SocketHandler, Access]] = {
            ("GET", "health"): (self.health, get), ("GET", "metadata"): (self.metadata, get),
            ("GET", "schema"): (self.schema, get), ("GET", "state"): (self.state, get),
            ("GET", "openapi.json"): (self.openapi, get), ("GET", "list_environments"): (self.names, get),
            ("POST", "reset"): (self.reset, post), ("POST", "step"): (self.step, post),
            ("POST", "mcp"): (self.rpc, post), ("WEBSOCKET", "ws"): (self.socket, post),
            ("WEBSOCKET", "mcp"): (self.socket, post),
        }  # fmt: skip
        self._task_rows: dict[tuple[str, str], tuple[Handler, Access]] = {
            ("GET", "splits"): (self.splits, get), ("POST", "tasks"): (self._of_tasks(_tasks), post),
            ("POST", "num_tasks"): (self._of_tasks(_num_tasks), post), ("POST", "task"): (self._of_tasks(_task), post),
            ("POST", "task_range"): (self._of_tasks(_task_range), post),
        }  # fmt: skip

    def match(self, method: str, path: str) -> Found | None:
        """The handler of a request. The id of an environment may have slashes, so the end of the path names the
        route."""
        if not path.startswith(PREFIX):
            return None
        rest, _, last = path.removeprefix(PREFIX).rpartition("/")
        found: tuple[Any, Access] | None = self._rows.get((method, last))
        values = {"env_id": rest}
        if found is None:
            found = self._task_rows.get((method, last))
            env_id, _, name = rest.rpartition("/")
            values = {"env_id": env_id, "name": name}
        if found is None or not values["env_id"]:
            return None
        return found[0], values, Route(f"openenv_{last}", method, path, "control", "OpenEnv", access=found[1])

    async def close(self) -> None:
        """Sockets end with their connections."""

    def _episodes(self, request: Request) -> Episodes:
        caller = caller_of(request.scope)
        return Episodes(self._sessions, lasting_api_of(self._api, request), caller.owner, request.path["env_id"])

    async def _kind(self, request: Request) -> Kind:
        return await environments.kind_of(lasting_api_of(self._api, request), request.path["env_id"])

    # ---- sockets ----

    async def socket(self, request: Request, receive: Receive, send: Send) -> None:
        """NotFound, as the response to the handshake, for an unknown environment."""
        await self._kind(request)
        only_rpc = request.scope["path"].endswith("/mcp")
        session_id = None if only_rpc else request.query.get("session_id")
        await EpisodeSocket(self._episodes(request), session_id, receive, send, only_rpc).serve()

    # ---- descriptions ----

    async def health(self, request: Request) -> Answer:
        await self._kind(request)
        return _answer({"status": "healthy"})

    async def metadata(self, request: Request) -> Answer:
        return _answer(metadata(request.path["env_id"], (await self._kind(request)).about))

    async def schema(self, request: Request) -> Answer:
        return _answer(schemas((await self._kind(request)).protocol))

    async def state(self, request: Request) -> Answer:
        """The state of an environment without an episode."""
        await self._kind(request)
        return _answer(self._episodes(request).one_off().state)

    async def openapi(self, request: Request) -> Answer:
        await self._kind(request)
        return _answer(openapi(request.path["env_id"]))

    async def names(self, request: Request) -> Answer:
        await self._kind(request)
        return _answer([request.path["env_id"].rpartition("/")[2]])

    # ---- single requests ----

    async def reset(self, request: Request) -> Answer:
        episode = self._episodes(request).one_off()
        try:
            return _answer(await episode.reset(await _body(request)))
        except Failure as error:
            return _failed(error)
        finally:
            await episode.close()

    async def step(self, request: Request) -> Answer:
        """A step of a new episode."""
        try:
            spec: StepRequest = validated(StepRequest, await _body(request))
            if spec.timeout_s is not None:
                raise Unsupported("timeout_s is not supported for a single step", hint="use the WebSocket /ws")
            episode = self._episodes(request).one_off()
            try:
                await episode.reset({})
                return _answer(await episode.step(spec.action))
            finally:
                await episode.close()
        except Failure as error:
            return _failed(error)

    async def rpc(self, request: Request) -> Answer:
        """JSON-RPC; errors of it are responses with status 200."""
        await self._kind(request)
        data = await limited_body(request, LONGEST)
        try:
            message: Any = parsed(data)
        except Failure as error:
            return _answer(rpc.error(None, rpc.PARSE_ERROR, error.message))
        return _answer(await rpc.response(message, self._episodes(request), None))

    # ---- tasks ----

    async def splits(self, request: Request) -> Answer:
        await self._suite(request)
        return _answer(_SPLITS)

    async def _suite(self, request: Request) -> Kind:
        """NotFound for another name; Unsupported for an environment without tasks."""
        kind, name = await self._kind(request), request.path["name"]
        if name.lower() not in (kind.env_id.lower(), request.path["env_id"].rpartition("/")[2].lower()):
            raise NotFound(f"{name[:100]!r} is not the environment of this path",
                           hint="use the name that /list_environments returns")
        if kind.protocol != "task":
            raise Unsupported(f"{kind.env_id} has no tasks", hint="use a task suite, like task:bfcl")
        return kind

    def _of_tasks(self, work: Callable[[list[str], dict[str, Any]], dict[str, Any]]) -> Handler:
        async def reply(request: Request) -> Answer:
            try:
                body = await _body(request)
                kind = await self._suite(request)
                split = body.get("split")
                if not isinstance(split, str):
                    raise InvalidConfig("the body has no split", hint='send {"split": "train"}')
                ids = await task_ids(lasting_api_of(self._api, request), kind, split)
                return _answer({**work(ids, body), **({"env_name": kind.env_id} if work is _tasks else {})})
            except Failure as error:
                return _failed(error)

        return reply


async def _body(request: Request) -> dict[str, Any]:
    data = await limited_body(request, LONGEST)
    return parsed(data) if data else {}


def _tasks(ids: list[str], body: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": [{"task_id": task_id} for task_id in ids]}


def _num_tasks(ids: list[str], body: dict[str, Any]) -> dict[str, Any]:
    return {"num_tasks": len(ids)}


def _task(ids: list[str], body: dict[str, Any]) -> dict[str, Any]:
    index = body.get("index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(ids):
        raise InvalidConfig(f"there is no task with index {str(index)[:40]}",
                            hint=f"use an index from 0 to {len(ids) - 1}")
    return {"task": {"task_id": ids[index], "index": index}}


def _task_range(ids: list[str], body: dict[str, Any]) -> dict[str, Any]:
    ends = body.get("start"), body.get("stop")
    if any(end is not None and (not isinstance(end, int) or isinstance(end, bool)) for end in ends):
        raise InvalidConfig("start and stop are not integers", hint='send {"split": "train", "start": 0, "stop": 10}')
    chosen = range(len(ids))[slice(*ends)]
    return {"tasks": [{"task_id": ids[index], "index": index} for index in chosen]}


def _answer(value: Any, status: int = 200) -> Answer:
    return Answer(dumps(value), status)


def _failed(error: Failure) -> Answer:
    return _answer({"detail": error.message, **error.to_wire()["data"]}, error.status)
