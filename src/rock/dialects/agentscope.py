"""The sandbox manager of AgentScope, below /agentscope: TrainingSandbox, BFCLSandbox and APPWorldSandbox with
`base_url`.

A client calls POST /NAME with a JSON object of arguments, where NAME is a method of its SandboxManager, and reads
"data" of the response. It does not raise for an error status: it logs the error and continues with a text as the
result. A failed creation therefore has the status 200, no data and the error, which lets the client raise.

A sandbox belongs to one client. Calls of tools are requests to the routes of training sets (admin/api/agentscope.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from rock.admin.api.agentscope import PREFIX as TRAINING
from rock.dialects import environments
from rock.dialects.api import LocalApi, api_of, check_path, limited_body
from rock.errors import InvalidConfig, NotFound, RockError, StartFailed, Unavailable, Unsupported
from rock.http.asgi import Answer, App, Found, Handler, Request, Router, answer, call, parsed
from rock.protocol.env import LEASED
from rock.protocol.keys import Access, caller_of
from rock.protocol.route import Route
from rock.protocol.sandbox import State

log = logging.getLogger("rock.dialects")

PREFIX = "/agentscope/"
_BODY = 16 << 20  # bytes
_IDLE = 1800  # seconds without a request after which a sandbox is stopped
_TYPE, _SESSION = "rock.agentscope.type", "rock.agentscope.session"  # labels of the sandboxes
_LONGEST_LABEL = 200
_CALLS = {"create_instance": "create", "get_task_ids": "get_env_profile", "get_env_profile": "get_env_profile",
          "step": "step", "evaluate": "evaluate", "release_instance": "release"}  # fmt: skip
_STATES = {State.PENDING.value: "warm", State.RUNNING.value: "running"}

Arguments = dict[str, Any]
Work = Callable[[Request, LocalApi, Arguments], Awaitable[Any]]


class AgentScopeEndpoint:
    """The routes of the manager. api: the application that serves the native API and the training routes."""

    def __init__(self, api: App) -> None:
        self._api = api
        self._router = Router("agentscope")
        for name, work, access in (
            ("create_from_pool", self._create, Access.CREATE), ("create", self._create, Access.CREATE),
            ("release", self._release, Access.CREATE), ("cleanup", self._cleanup, Access.CREATE),
            ("call_tool", self._call_tool, Access.RUN), ("list_tools", self._list_tools, Access.RUN),
            ("get_info", self._info, Access.READ), ("get_status", self._status, Access.READ),
            ("check_health", self._check_health, Access.READ), ("start", _unsupported("start"), Access.READ),
            ("stop", _unsupported("stop"), Access.READ),
            ("add_mcp_servers", _unsupported("add_mcp_servers"), Access.READ),
            ("get_session_mapping", self._of_session, Access.READ),
            ("list_session_keys", self._sessions, Access.READ),
        ):  # fmt: skip
            for path in (name, f"{name}_async"):
                row = Route(f"agentscope_{path}", "POST", PREFIX + path, "control", "AgentScope", access=access)
                self._router.add(row, self._handler(name, work))
        for path in ("health", "healthz"):
            row = Route(f"agentscope_{path}", "GET", PREFIX + path, "control", "AgentScope", access=Access.READ)
            self._router.add(row, _healthy)

    def match(self, method: str, path: str) -> Found | None:
        """The handler of a request."""
        return self._router.match(method, path)

    async def close(self) -> None:
        """No effect: each request ends by itself."""

    def _handler(self, name: str, work: Work) -> Handler:
        async def reply(request: Request) -> Answer:
            data = await limited_body(request, _BODY)
            try:
                given = parsed(data)
                if not isinstance(given, dict):
                    raise InvalidConfig("the body is not a JSON object", hint="send the arguments by name")
                return answer({"data": await work(request, api_of(self._api, request), given)})
            except RockError as error:
                text = f"Error in {name}: {error}"
                if name in ("create", "create_from_pool"):
                    log.warning("AgentScope: %s", text)
                    return answer({"data": None, "detail": text, **error.to_wire()})
                return answer({"detail": text, **error.to_wire()}, error.status)

        return reply

    # ---- sandboxes ----

    async def _create(self, request: Request, api: LocalApi, given: Arguments) -> str:
        """Create a sandbox of a training set, and wait until it runs: its id."""
        _check(given, "sandbox_type", "meta", "mount_dir", "storage_path", "environment")
        for name in ("mount_dir", "storage_path", "environment"):
            if given.get(name):
                raise Unsupported(f"{name} is not supported: the sandbox has no files of the server",
                                  hint=f"leave {name} out")
        kind = await self._kind(api, given.get("sandbox_type"))
        meta = given.get("meta") or {}
        session = meta.get("session_ctx_id") if isinstance(meta, dict) else None
        labels = {LEASED: "1", _TYPE: kind.env_id}
        if session is not None:
            if not isinstance(session, str) or not 0 < len(session) <= _LONGEST_LABEL:
                raise InvalidConfig("meta.session_ctx_id is not a text of at most 200 characters", hint="shorten it")
            labels[_SESSION] = session
        config = {"image": "host", "memory": "4g", "cpus": 1.0, "auto_clear_seconds": _IDLE, "labels": labels}
        body = {**kind.open, "exclusive": True, "config": config}
        key = f"agentscope-{session}" if session is not None and session.isascii() and session.isalnum() else None
        made = await api.json("open_env", body, query={"wait": environments.START_WAIT}, key=key)
        sandbox_id = str(made["sandbox_id"])
        if made["state"] == State.PENDING:
            raise Unavailable(f"sandbox {sandbox_id} has not started in time", hint="create it again")
        if made["state"] != State.RUNNING:
            raise StartFailed(f"sandbox {sandbox_id} did not start: {made.get('reason') or made['state']}",
                              sandbox_id=sandbox_id, hint="the log of the server has the cause")
        return sandbox_id

    async def _kind(self, api: LocalApi, name: Any) -> environments.Kind:
        """The training set of a type. Unsupported for any other type."""
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum() or len(name) > 64:
            raise InvalidConfig(f"sandbox_type={str(name)[:80]!r} is no type", hint="use appworld or bfcl")
        try:
            return await environments.kind_of(api, f"task:{name}")
        except NotFound as error:
            raise Unsupported(f"sandboxes of type {name!r} are not available here, only those of training sets",
                              hint=error.hint or "use appworld or bfcl") from None

    async def _release(self, request: Request, api: LocalApi, given: Arguments) -> bool:
        """Stop a sandbox. One that ended before is released."""
        sandbox_id = _identity(given)
        try:
            await self._loaded(api, sandbox_id)
            await api.bytes("stop_sandbox", sandbox_id=sandbox_id)
        except NotFound:
            return False
        return True

    async def _cleanup(self, request: Request, api: LocalApi, given: Arguments) -> bool:
        """Stop all sandboxes that the tenant created by this dialect."""
        for item in await self._mine(api):
            await api.bytes("stop_sandbox", sandbox_id=item["sandbox_id"])
        return True

    async def _mine(self, api: LocalApi, **labels: str) -> list[dict[str, Any]]:
        query: dict[str, str | int] = {"state": "pending,running", "limit": 2000}
        for name, value in labels.items():
            query["label"] = f"{name}={value}"
        found = (await api.json("list_sandboxes", query=query))["items"]
        return [item for item in found if _TYPE in item["labels"]]

    async def _of_session(self, request: Request, api: LocalApi, given: Arguments) -> list[str]:
        session = given.get("session_ctx_id", given.get("args"))
        if not isinstance(session, str) or len(session) > _LONGEST_LABEL:
            raise InvalidConfig("session_ctx_id is missing", hint="send the id of a session")
        return [item["sandbox_id"] for item in await self._mine(api, **{_SESSION: session})]

    async def _sessions(self, request: Request, api: LocalApi, given: Arguments) -> list[str]:
        return sorted({item["labels"][_SESSION] for item in await self._mine(api) if _SESSION in item["labels"]})

    async def _loaded(self, api: LocalApi, sandbox_id: str) -> dict[str, Any]:
        """The info of a sandbox of a training set. NotFound for any other one."""
        info = await api.json("get_sandbox", sandbox_id=sandbox_id)
        if not str(info["image"]).startswith("rock.local/env/set-"):
            raise NotFound(f"sandbox {sandbox_id} has no training set", sandbox_id=sandbox_id,
                           hint="use a sandbox that create_from_pool returned")
        assert isinstance(info, dict)
        return info

    async def _info(self, request: Request, api: LocalApi, given: Arguments) -> dict[str, Any]:
        """The record of a container. `url` is an address for AgentScope's client of training sandboxes."""
        sandbox_id = _identity(given)
        info = await self._loaded(api, sandbox_id)
        session = info["labels"].get(_SESSION)
        host = request.header(b"host") or "127.0.0.1"
        return {
            "session_id": sandbox_id, "container_id": sandbox_id, "container_name": info.get("name") or sandbox_id,
            "url": f"{request.scope.get('scheme', 'http')}://{host}{TRAINING.format(box=sandbox_id)}", "ports": [],
            "mount_dir": None, "storage_path": None, "runtime_token": None, "version": info["image"],
            "meta": {"session_ctx_id": session}, "timeout": None, "state": _STATES.get(info["state"], "released"),
            "sandbox_type": info["labels"].get(_TYPE), "session_ctx_id": session,
        }  # fmt: skip

    async def _status(self, request: Request, api: LocalApi, given: Arguments) -> str:
        """As a container engine names it."""
        info = await self._loaded(api, _identity(given))
        return {"pending": "created", "running": "running"}.get(info["state"], "exited")

    async def _check_health(self, request: Request, api: LocalApi, given: Arguments) -> bool:
        return bool((await self._loaded(api, _identity(given)))["state"] == State.RUNNING)

    # ---- tools ----

    async def _call_tool(self, request: Request, api: LocalApi, given: Arguments) -> Any:
        _check(given, "identity", "tool_name", "arguments")
        arguments = given.get("arguments")
        name = given.get("tool_name")
        if not isinstance(name, str) or name not in _CALLS:
            raise NotFound(f"there is no tool {str(name)[:80]!r}", hint=f"there are {', '.join(_CALLS)}")
        if not isinstance(arguments, dict):
            raise InvalidConfig(f"the arguments of {name} are not an object", hint="send the arguments by name")
        return await self._training(request, _identity(given), _CALLS[name], arguments)

    async def _list_tools(self, request: Request, api: LocalApi, given: Arguments) -> Any:
        """The tools of an instance; None without one, because a training set has no tools of its own."""
        sandbox_id = _identity(given)
        await self._loaded(api, sandbox_id)
        if given.get("instance_id") is None:
            return None
        return await self._training(request, sandbox_id, "get_info", given)

    async def _training(self, request: Request, sandbox_id: str, route: str, given: Arguments) -> Any:
        """A request to the training routes: its data, or for a release whether there was an instance."""
        check_path({"sandbox_id": sandbox_id})
        messages = given.get("action") if route == "step" else given.get("messages")
        params = given.get("params") or {}
        if route == "get_env_profile":
            params = {"split": given.get("split", "train"), **(params if isinstance(params, dict) else {})}
        body = {"messages": messages or {}, "params": params}
        body |= {name: given[name] for name in ("env_type", "task_id", "instance_id") if given.get(name) is not None}
        status, reply = await call(
            self._api, "POST", f"{TRAINING.format(box=sandbox_id)}/{route}", body=orjson.dumps(body),
            caller=caller_of(request.scope), client=request.client,
        )  # fmt: skip
        found = orjson.loads(reply)
        if status < 400:
            return found["success"] if route == "release" else found["data"]
        raise _error_of(found, status)


def _error_of(found: dict[str, Any], status: int) -> RockError:
    """The error of a training route: its text, and a class with its status."""
    detail = found.get("detail", found.get("error", {}).get("message"))
    if not isinstance(detail, str):
        detail = orjson.dumps(detail).decode()
    if status == 404:
        return NotFound(detail, hint="create a sandbox with create_from_pool")
    return InvalidConfig(detail, hint="correct the arguments of the tool") if status < 500 else RockError(detail)


def _identity(given: Arguments) -> str:
    """The id of a sandbox. Some methods of the client send it as `args`. InvalidConfig."""
    found = given.get("identity", given.get("args"))
    if not isinstance(found, str) or not found:
        raise InvalidConfig("identity is missing", hint="send the id that create_from_pool returned")
    return found


def _check(given: Arguments, *names: str) -> None:
    """InvalidConfig for an unknown argument."""
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise InvalidConfig(f"unknown arguments: {', '.join(unknown)[:200]}",
                            hint=f"the arguments are {', '.join(names)}")


def _unsupported(name: str) -> Work:
    async def work(request: Request, api: LocalApi, given: Arguments) -> Any:
        raise Unsupported(f"{name} is not supported for sandboxes of training sets",
                          hint="create another sandbox, or release this one")

    return work


async def _healthy(request: Request) -> Answer:
    return answer({"status": "healthy"})
