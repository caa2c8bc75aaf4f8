"""The management routes of the gateway: runs, calls, pull mode, upstreams; rows of protocol/rows.py."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import orjson

from rock.errors import Conflict, InvalidConfig
from rock.gateway import pull
from rock.gateway.call import RecordedCall
from rock.gateway.dialects import DIALECTS, DialectError
from rock.gateway.endpoint import Endpoint
from rock.gateway.export import export
from rock.gateway.runs import Call, Run, request_of, restored
from rock.gateway.service import Gateway, may_use_private_addresses
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, answer_model
from rock.protocol.keys import caller_of
from rock.protocol.routes import IDEMPOTENCY_KEY
from rock.protocol.rows import ENDPOINT, NDJSON, gateway_rows
from rock.protocol.runs import (
    NAME_PATTERN,
    AnswerCall,
    CallInfo,
    CallList,
    EndRun,
    RunSpec,
    UpdateRun,
    UpstreamList,
    UpstreamSpec,
)

_LONGEST_WAIT = 600.0  # seconds
_MOST_LISTED = 1000
_PAGE_BYTES = 64 << 20
NAMES = ("put_upstream", "list_upstreams", "delete_upstream", "create_run", "list_runs", "get_run", "update_run",
         "list_calls", "get_call", "next_call", "answer_call", "end_run", "get_trajectory", "delete_run")  # fmt: skip


class GatewayRoutes:
    """Handlers by route name. check_sandbox: raises NotFound for a sandbox that the caller does not own."""

    def __init__(self, gateway: Gateway, check_sandbox: Callable[[Scope, str], Awaitable[None]]) -> None:
        self._gateway = gateway
        self._check_sandbox = check_sandbox
        self.endpoint: App = Endpoint(gateway)
        self._router = Router("gateway")
        rows = {row.name: row for row in gateway_rows()}
        for name in NAMES:
            self._router.add(rows[name], getattr(self, name))

    def before_authentication(self, rest: App) -> App:
        """The endpoint of agents, in front of authentication, and `rest` for all other paths."""
        endpoint = self.endpoint

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            inside = scope["type"] != "lifespan" and scope["path"].startswith(ENDPOINT + "/")
            await (endpoint if inside or scope.get("path") == ENDPOINT else rest)(scope, receive, send)

        return app

    def over(self, rest: App) -> App:
        """The management routes, behind authentication, and `rest` for all other paths."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            found = self._router.match(scope["method"], scope["path"]) if scope["type"] == "http" else None
            await (rest(scope, receive, send) if found is None else self._router.serve(found, scope, receive, send))

        return app

    def _run(self, request: Request) -> Run:
        return self._gateway.find(caller_of(request.scope), request.path["run"])

    def _call(self, request: Request, run: Run) -> Call:
        text = request.path["number"]
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InvalidConfig(f"{text[:40]!r} is not the number of a call", hint="calls are numbered from 1 on")
        return run.call(int(text))

    # ---- upstreams ----

    async def put_upstream(self, request: Request) -> Answer:
        name = request.path["upstream"]
        if not re.fullmatch(NAME_PATTERN, name):
            raise InvalidConfig(f"{name[:100]!r} is not a name of an upstream",
                                hint="use letters, digits, '.', '_' and '-'; at most 63 characters")
        spec = await request.model(UpstreamSpec)
        caller = caller_of(request.scope)
        private = may_use_private_addresses(caller)
        return answer_model(self._gateway.upstreams.put(caller.owner, name, spec, public_only=not private))

    async def list_upstreams(self, request: Request) -> Answer:
        return answer_model(UpstreamList(items=self._gateway.upstreams.list(caller_of(request.scope).tenant)))

    async def delete_upstream(self, request: Request) -> Answer:
        caller = caller_of(request.scope)
        owner = request.query.get("tenant", "") if caller.tenant is None else caller.owner
        return answer_model(self._gateway.upstreams.delete(owner, request.path["upstream"]))

    # ---- runs ----

    async def create_run(self, request: Request) -> Answer:
        spec = await request.model(RunSpec)
        if spec.sandbox is not None:
            await self._check_sandbox(request.scope, spec.sandbox)
        host = request.header(b"host") or "127.0.0.1"
        scheme = "https" if request.scope.get("scheme") in ("https", "wss") else "http"
        key = request.header(IDEMPOTENCY_KEY.encode())
        info = await self._gateway.create(caller_of(request.scope), spec, key, f"{scheme}://{host}")
        return answer_model(info, 201)

    async def list_runs(self, request: Request) -> Answer:
        filters: dict[str, Any] = {name: request.query[name] for name in ("state", "sandbox", "upstream", "name")
                                   if request.query.get(name)}  # fmt: skip
        if filters.get("state") not in (None, "active", "ended"):
            raise InvalidConfig(f"query state={filters['state'][:40]!r} is no state of a run", hint="active or ended")
        filters["tags"] = _tags(request)
        limit = request.integer("limit", 100, low=1, high=_MOST_LISTED)
        after = request.query.get("after") or None
        return answer_model(self._gateway.list(caller_of(request.scope), limit=limit, after=after, **filters))

    async def get_run(self, request: Request) -> Answer:
        return answer_model(self._run(request).info)

    async def update_run(self, request: Request) -> Answer:
        run = self._run(request)
        return answer_model(self._gateway.update(run, await request.model(UpdateRun)))

    async def end_run(self, request: Request) -> Answer:
        run = self._run(request)
        return answer_model(await self._gateway.end(run, await request.model(EndRun)))

    async def delete_run(self, request: Request) -> Answer:
        return answer_model(await self._gateway.delete(self._run(request), request.flag("force")))

    # ---- calls ----

    async def list_calls(self, request: Request) -> Answer:
        run, bodies = self._run(request), request.flag("bodies")
        after = request.integer("after", 0)
        limit = request.integer("limit", 100, low=1, high=_MOST_LISTED)
        if run.counts.calls:
            run.call(1)  # reads the index of an ended run
        rest = run.calls[after:]
        if bodies:
            items = await asyncio.to_thread(_page, run, rest[:limit], request.query.get("dialect"))
        else:
            items = [run.describe(call) for call in rest[:limit]]
        more = len(rest) > len(items)
        return answer_model(CallList.made(items=items, after=items[-1].number if more else None))

    async def get_call(self, request: Request) -> Answer:
        run = self._run(request)
        call = self._call(request, run)
        exchange = self._gateway.exchange(run, call)
        if exchange is not None and call.pending and (wait := request.number("wait", 0, high=_LONGEST_WAIT)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await exchange.live.ended()
        return answer_model(_converted(run.describe(call, True), request.query.get("dialect"), run, call))

    async def next_call(self, request: Request) -> Answer:
        run = self._run(request)
        if not run.spec.pull:
            raise Conflict(f"run {run.id} is not in pull mode", hint="create the run with pull=true")
        after = request.integer("after", 0)
        found = await pull.next_call(run, after, request.number("wait", 0, high=_LONGEST_WAIT))
        if found.call is not None:
            call = run.call(found.call.number)
            found = found.model_copy(
                update={"call": _converted(found.call, request.query.get("dialect"), run, call)})
        return answer_model(found)

    async def answer_call(self, request: Request) -> Answer:
        run = self._run(request)
        call = self._call(request, run)
        exchange = self._gateway.exchange(run, call)
        if (request.header(b"content-type") or "").partition(";")[0].strip() == NDJSON:
            dialect = request.query.get("dialect") or call.dialect
            _known(dialect)
            lines = pull.lines_of(request.chunks())
            return answer_model(await pull.answer_stream(run, exchange, call, dialect, lines))
        return answer_model(await pull.answer(run, exchange, call, await request.model(AnswerCall)))

    async def get_trajectory(self, request: Request) -> Answer:
        run = self._run(request)
        kind = request.query.get("format") or "atif"
        if kind not in ("atif", "openai", "chains", "rock"):
            raise InvalidConfig(f"query format={kind[:40]!r} is no format", hint="atif, openai, chains or rock")
        return Answer(await asyncio.to_thread(_exported, kind, run))


def _page(run: Run, calls: list[Call], dialect: str | None) -> list[CallInfo]:
    """Calls with their bodies, up to a number of bytes. In a thread."""
    items: list[CallInfo] = []
    size = 0
    cache: dict[int, dict[str, Any]] = {}
    for call in calls:
        items.append(_converted(run.describe(call, True, cache), dialect, run, call))
        size += len(orjson.dumps([items[-1].request, items[-1].response]))
        if size > _PAGE_BYTES:
            break
    return items


def _exported(kind: str, run: Run) -> bytes:
    """In a thread: a run may have thousands of calls."""
    calls: list[RecordedCall] = list(run.recorded())
    return orjson.dumps(export(kind, calls, run.info))


def _known(dialect: str) -> None:
    if dialect not in DIALECTS:
        raise InvalidConfig(f"query dialect={dialect[:40]!r} is no dialect", hint=", ".join(DIALECTS))


def _tags(request: Request) -> dict[str, str]:
    found = {}
    raw: bytes = request.scope.get("query_string", b"")
    for name, value in parse_qsl(raw.decode("latin-1"), keep_blank_values=True):
        if name == "tag":
            key, separator, text = value.partition("=")
            if not separator or not key:
                raise InvalidConfig(f"query tag={value[:80]!r} is not NAME=VALUE", hint="as in tag=task=sort")
            found[key] = text
    return found


def _converted(info: CallInfo, dialect: str | None, run: Run, call: Call) -> CallInfo:
    """The call with its bodies in another dialect."""
    if not dialect or dialect == call.dialect or info.request is None:
        if dialect:
            _known(dialect)
        return info
    _known(dialect)
    target = DIALECTS[dialect]
    try:
        request = request_of(call, info.request)
        info.__dict__["request"] = target.render_request(request, stream=call.stream, token_fields=False)
        if info.response is not None:
            parsed = DIALECTS[call.dialect].parse_response(info.response)
            parsed = restored(parsed, run.tokens(call), call.weight_version)
            info.__dict__["response"] = target.render_response(parsed, request)
    except DialectError as error:
        raise InvalidConfig(f"call {call.number} cannot be converted to {dialect}: {error}",
                            hint=f"read it in its own dialect, {call.dialect}") from None
    info.__dict__["dialect"] = dialect
    return info

