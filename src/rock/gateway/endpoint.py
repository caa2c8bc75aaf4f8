"""The model endpoint of agents: /gateway/v1/... in four dialects. The secret of a run is the only credential.

    find the dialect by the path ─► the run by its secret ─► parse ─► a retry joins its call, else
    check the budget ─► record the request ─► produce the response ─► send it as it is produced

Errors have the shape of the dialect. A retry is a request with the body of an earlier call and a sign that it is one: a
retry counter, the same idempotency key, or a first request that never got its response.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from hashlib import blake2b
from typing import Any

import orjson

from rock import faults
from rock.errors import RockError, no_such_route
from rock.gateway import budget
from rock.gateway.dialects import DIALECTS, Dialect, DialectError, ErrorKind
from rock.gateway.exchange import Exchange
from rock.gateway.live import JSON_TYPE, SSE_TYPE, Live
from rock.gateway.runs import Call, Run, request_of, restored
from rock.gateway.service import Gateway
from rock.gateway.upstreams import Upstream
from rock.http.asgi import Answer, Disconnected, Receive, Request, Scope, Send, failure, refuse_upgrade
from rock.http.client import Headers
from rock.http.peers import PEER
from rock.protocol.rows import ENDPOINT

_GEMINI = re.compile(r"/v1(?:beta|alpha)?/models/([^/:]+(?:/[^/:]+)*):([A-Za-z]+)")
_POSTS = {
    "/v1/chat/completions": ("openai-chat", "generate"), "/chat/completions": ("openai-chat", "generate"),
    "/v1/responses": ("openai-responses", "generate"), "/responses": ("openai-responses", "generate"),
    "/v1/messages": ("anthropic", "generate"), "/v1/messages/count_tokens": ("anthropic", "count"),
}  # fmt: skip
_METHODS = {"generateContent": ("generate", False), "streamGenerateContent": ("generate", True),
            "countTokens": ("count", False)}  # fmt: skip
_LARGE = 2 << 20  # bytes of a large body
_BODY_WITHIN = 120.0  # seconds for a body
_JOIN_WITHIN = 600.0  # seconds after the end of a call in which a retry repeats its response
_RETRY_COUNTERS = (b"x-stainless-retry-count", b"x-retry-count", b"x-rock-retry-count")
_IDEMPOTENCY = (b"idempotency-key", b"x-idempotency-key")
# Headers of the agent that belong to its dialect. All others stay here: they may identify the agent or its sandbox.
_PASSED = frozenset({b"anthropic-version", b"anthropic-beta", b"openai-beta"})


class Endpoint:
    """The ASGI application of the paths below /gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse_upgrade(scope, receive, send)
            return
        with contextlib.suppress(Disconnected):
            await self._serve(Request(scope, receive, {}), send)

    async def _serve(self, request: Request, send: Send) -> None:
        path = str(request.scope["path"])[len(ENDPOINT) :]
        method = request.scope["method"]
        if method == "GET" and request.header(b"upgrade") is not None:
            await Answer(b'{"error":{"message":"the gateway serves no WebSockets"}}', 426).send(send)
            return
        found = _route(path)
        name = found[0] if found is not None else _dialect_by_headers(request)
        dialect = DIALECTS[name]
        run = self._gateway.authenticated(_secret(request))
        if run is None:
            if method in ("GET", "HEAD") and path in ("", "/"):  # a probe of agents for the address itself
                await Answer(b"{}").send(send)
                return
            await _refuse(dialect, send, "unauthorized", "the secret of the run is missing or wrong")
            return
        peer = (request.scope.get("state") or {}).get(PEER)
        if peer is not None:
            peer.prove(f"run {run.tenant}", bool(run.tenant))
        if method in ("GET", "HEAD"):
            await self._get(run, path, request, send)
        elif found is None or method != "POST":
            await failure(no_such_route(request.scope["path"], method)).send(send)
        else:
            await self._post(run, dialect, *found[1:], request=request, send=send)

    # ---- models ----

    async def _get(self, run: Run, path: str, request: Request, send: Send) -> None:
        if path in ("", "/"):
            await Answer(b"{}").send(send)
            return
        match = re.fullmatch(r"/v1(beta)?/models(?:/(.+))?", path) or re.fullmatch(r"()/models(?:/(.+))?", path)
        if match is None:
            await failure(no_such_route(request.scope["path"], "GET")).send(send)
            return
        names = [match[2]] if match[2] else self._models(run)
        rows = [_model_row(name, bool(match[1])) for name in names]
        if match[2]:
            found: dict[str, Any] = rows[0]
        elif match[1]:
            found = {"models": rows}
        else:
            found = {"object": "list", "data": rows, "has_more": False, "first_id": names[0] if names else None,
                     "last_id": names[-1] if names else None}  # fmt: skip
        await Answer(orjson.dumps(found)).send(send)

    def _models(self, run: Run) -> list[str]:
        names = {run.spec.model} if run.spec.model else set(run.spec.models) - {"*"}
        if not names and run.spec.upstream is not None:
            with contextlib.suppress(RockError):
                names = set(self._gateway.upstreams.find(run.tenant, run.spec.upstream).spec.models) - {"*"}
        return sorted(names) or ["default"]

    # ---- calls ----

    async def _post(
        self, run: Run, dialect: Dialect, kind: str, model: str | None, stream: bool | None, *, request: Request,
        send: Send,
    ) -> None:  # fmt: skip
        try:
            raw = await _body(request, self._gateway.limits.body, run.large)
            body = orjson.loads(raw)
            if not isinstance(body, dict):
                raise DialectError("the body is not a JSON object")
            parsed = dialect.parse_request(body, model, stream)
            tokens = dialect.count_tokens(parsed) if kind == "count" else 0
        except orjson.JSONDecodeError as error:
            await _refuse(dialect, send, "bad_request", f"the body is not JSON: {error}")
            return
        except DialectError as error:
            await _refuse(dialect, send, "bad_request", str(error))
            return
        if run.state == "ended":
            run.counts.refused += 1
            await _refuse(dialect, send, "ended", f"run {run.id} has ended")
            return
        if kind == "count":
            await Answer(_count(dialect.name, tokens)).send(send)
            return
        named = (model or "").encode("utf-8", "surrogatepass")
        hash_ = blake2b(raw + b"\0" + named + (b"s" if parsed.stream else b""), digest_size=16)
        try:
            live, call = self._joined(run, request, hash_.hexdigest()) or self._begun(
                run, parsed, body, raw, hash_.hexdigest(), request
            )
            await faults.point("gateway.call.begun")
        except _Refused as refused:
            run.counts.refused += 1
            await _refuse(dialect, send, refused.kind, refused.message)
            return
        except RockError as error:
            await _refuse(dialect, send, "overloaded", error.message)
            return
        await self._deliver(run, call, live, request, send)

    def _begun(
        self, run: Run, parsed: Any, body: dict[str, Any], raw: bytes, hash_: str, request: Request
    ) -> tuple[Live, Call]:
        """A new call. _Refused; StorageFull, Unavailable."""
        problem = budget.refusal(run.spec.budget, run.counts, run.age)
        if problem is not None:
            raise _Refused("budget", problem)
        limits = self._gateway.limits
        if len(run.calls) >= limits.calls:
            raise _Refused("budget", f"the run has {limits.calls} calls, which is the limit of this server")
        if run.counts.running + run.counts.waiting >= limits.concurrent:
            raise _Refused("overloaded", f"the run has {limits.concurrent} concurrent calls, which is the limit")
        upstream: Upstream | None = None
        if run.spec.upstream is not None:
            with contextlib.suppress(RockError):
                upstream = self._gateway.upstreams.find(run.tenant, run.spec.upstream)
        model = _model_of(run, upstream, parsed.model)
        prices = run.spec.prices if run.spec.prices is not None else upstream.spec.prices if upstream else {}
        broken = next((c.number for c in reversed(run.calls) if c.hash == hash_ and not c.pending), None)
        again = broken is not None and run.calls[broken - 1].state in ("failed", "cancelled")
        call = run.begin(
            parsed, body, hash_, state="waiting" if run.spec.pull else "running", upstream_model=model,
            idempotency=_first(request, _IDEMPOTENCY), retry_of=broken if again else None,
        )  # fmt: skip
        exchange = Exchange(run, call, parsed, body, budget.price_of(prices, model))
        headers: Headers = [(name, value) for name, value in request.headers if name in _PASSED]
        self._gateway.start(run, call, exchange, raw, headers)
        return exchange.live, call

    def _joined(self, run: Run, request: Request, hash_: str) -> tuple[Live, Call] | None:
        """The call that this request repeats, with its response. StorageFull, Unavailable."""
        call = next((call for call in reversed(run.calls) if call.hash == hash_), None)
        if call is None:
            return None
        key = _first(request, _IDEMPOTENCY)
        marked = _first(request, _RETRY_COUNTERS) not in ("", "0") or (key != "" and key == call.idempotency)
        if call.pending:
            exchange = self._gateway.exchange(run, call)
            if exchange is None or exchange.live.broken or (exchange.live.followers and not marked):
                return None
            run.retried(call)
            return exchange.live, call
        if call.state != "done" or time.time() - (call.ended or 0) > _JOIN_WITHIN or (call.delivered and not marked):
            return None
        run.retried(call)
        live = call.live
        usable = live is not None and live.complete and not live.broken
        return live if live is not None and usable else _again(run, call), call

    async def _deliver(self, run: Run, call: Call, live: Live, request: Request, send: Send) -> None:
        """Send the response as it is produced, until its end or until the client disconnects."""
        live.followers += 1
        gone = asyncio.ensure_future(request.disconnected())
        sending = asyncio.ensure_future(_send(live, DIALECTS[call.dialect], send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not sending.cancelled() and sending.exception() is None:
                if call.state == "done":
                    with contextlib.suppress(RockError):
                        run.delivered(call)
                    call.live = None
            elif sending.done():
                sending.result()  # the connection is closed, so that the agent sees that the response broke
        finally:
            live.followers -= 1
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
            if call.pending and not live.followers and not self._gateway.closing:
                self._gateway.orphaned(run, call)


class _Refused(Exception):
    """No call begins. kind: of the dialect's error."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


async def _send(live: Live, dialect: Dialect, send: Send) -> None:
    await live.begun()
    if not live.status:
        await _refuse(dialect, send, "overloaded", "the server stops; repeat the request")
        return
    headers = [*live.headers, (b"cache-control", b"no-store")]
    stream = not live.complete or live.headers[0][1] == SSE_TYPE
    if not stream:
        headers.append((b"content-length", b"%d" % sum(map(len, live.parts))))
    await send({"type": "http.response.start", "status": live.status, "headers": headers})
    async with contextlib.aclosing(live.follow()) as parts:
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _again(run: Run, call: Call) -> Live:
    """The recorded response of a call, for a retry after a restart."""
    body = run.response(call)
    assert body is not None
    live = Live()
    if not call.stream:
        live.whole(200, orjson.dumps(body), JSON_TYPE)
        return live
    dialect = DIALECTS[call.dialect]
    renderer = dialect.stream_renderer(request_of(call, run.request(call)))
    response = restored(dialect.parse_response(body), run.tokens(call), call.weight_version)
    live.start(200, SSE_TYPE)
    live.send(renderer.begin())
    live.send(renderer.end(response))
    live.end()
    return live


def _route(path: str) -> tuple[str, str, str | None, bool | None] | None:
    """(dialect, kind, model and stream of the path) of a POST; None for an unknown path."""
    found = _POSTS.get(path.rstrip("/"))
    if found is not None:
        return *found, None, None
    match = _GEMINI.fullmatch(path)
    method = _METHODS.get(match[2]) if match is not None else None
    if match is None or method is None:
        return None
    return "gemini", method[0], match[1], method[1]


def _dialect_by_headers(request: Request) -> str:
    if request.header(b"x-goog-api-key") is not None or "key" in request.query:
        return "gemini"
    return "anthropic" if request.header(b"x-api-key") is not None else "openai-chat"


def _secret(request: Request) -> str:
    """The credential of a request, from any of the headers of the dialects."""
    bearer = request.header(b"authorization") or ""
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    for name in (b"x-api-key", b"x-goog-api-key"):
        if (value := request.header(name)) is not None:
            return value.strip()
    return request.query.get("key", "")


def _first(request: Request, names: tuple[bytes, ...]) -> str:
    return next((value for name in names if (value := request.header(name)) is not None), "")[:200]


async def _body(request: Request, limit: int, large: asyncio.Semaphore) -> bytes:
    """The body. DialectError above the limit, after too long a time, and for compressed bodies. large: bounds the
    concurrent large bodies of a run."""
    if (request.header(b"content-encoding") or "identity") != "identity":
        raise DialectError("compressed request bodies are not supported")
    if int(request.header(b"content-length") or 0) > limit:
        raise DialectError(f"the body is over {limit} bytes")
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_WITHIN), contextlib.AsyncExitStack() as stack:
            async for part in request.chunks():
                size += len(part)
                if size > limit:
                    raise DialectError(f"the body is over {limit} bytes")
                parts.append(part)
                if size > _LARGE > size - len(part):
                    await stack.enter_async_context(large)
    except TimeoutError:
        raise DialectError(f"the body did not arrive within {_BODY_WITHIN:g} s") from None
    return b"".join(parts)


async def _refuse(dialect: Dialect, send: Send, kind: ErrorKind, message: str) -> None:
    status, body = dialect.render_error(kind, message)
    final = kind not in ("overloaded", "timeout", "upstream")
    headers = [(b"x-should-retry", b"false" if final else b"true")]
    await Answer(orjson.dumps(body), status, headers=headers).send(send)


def _model_of(run: Run, upstream: Upstream | None, model: str) -> str:
    """The model of a call: pinned by the run, or mapped by the run and its upstream."""
    named = run.spec.model or run.spec.models.get(model) or run.spec.models.get("*") or model
    return named if upstream is None else upstream.model_for(named)


def _count(dialect: str, tokens: int) -> bytes:
    name = "totalTokens" if dialect == "gemini" else "input_tokens"
    return orjson.dumps({name: tokens})


def _model_row(name: str, gemini: bool) -> dict[str, Any]:
    if gemini:
        methods = ["generateContent", "streamGenerateContent", "countTokens"]
        return {"name": f"models/{name}", "displayName": name, "supportedGenerationMethods": methods}
    return {"id": name, "object": "model", "type": "model", "created": 0, "owned_by": "rock", "display_name": name}


