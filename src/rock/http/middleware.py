"""Middleware of a server: request ids, spans and metrics, rejection of requests during shutdown, injected faults."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol

from rock import faults
from rock.errors import Unavailable
from rock.http.asgi import Answer, App, Receive, Request, Router, Scope, Send, deny, failure, fit
from rock.protocol.keys import caller_of
from rock.protocol.routes import OUTAGE, ROUTES, name_of
from rock.telemetry import process, tracing
from rock.telemetry.context import CURRENT, REQUEST_ID, TRACEPARENT, Context, new_id, sane_id, sane_traceparent
from rock.telemetry.metrics import CONTENT_TYPE, REGISTRY, Distribution, Family, Number, gauge_of, merged, render

_ID = REQUEST_ID.encode()
_EAGLE_EYE = b"eagleeye-traceid"  # the trace id header of ROCK's own clients
_PARENT = TRACEPARENT.encode()
_KNOWN = frozenset({_ID, _EAGLE_EYE, _PARENT})
_SANDBOXES = "/v1/sandboxes/"
_METRICS = ROUTES["metrics"]
_EVENTS = ROUTES["node_events"].path
_STREAMS = ("port", "port_socket")  # their statuses are those of programs inside

REQUESTS = REGISTRY.counter("rock_http_requests_total", "Requests answered, by name of their row", "route", "status")
TIMES = REGISTRY.histogram("rock_http_request_seconds", "From a request's head to the end of its answer", "route")
log = logging.getLogger("rock.requests")

Families = Iterable[Family[Number] | Family[Distribution]]


class Exporter(tracing.Tracer, Protocol):
    """Exporter of spans and metrics."""

    def send_metrics(self, families: Families) -> bool: ...

    def close(self) -> None: ...


class Observability:
    """Traces and metrics of one server. `over` wraps its application; `measured` is placed behind authentication.

    extra: gauges that are read at each export of the metrics. export: the exporter, from the caller with the settings.
    every: seconds between two exports of the metrics. processes: the metrics of rocklet processes as text, by worker.
    """

    def __init__(
        self,
        extra: Callable[[], Awaitable[Families]] | None = None,
        export: Exporter | None = None,
        every: float = 30.0,
    ) -> None:
        self.processes: Callable[[], Awaitable[Mapping[str, bytes]]] | None = None
        self._extra = extra
        self._export = export
        self._every = every
        self._lag = process.LoopLag()
        self._series: dict[tuple[str, int], tuple[Number, Distribution]] = {}
        self._sending: asyncio.Task[None] | None = None
        self.under_way = 0
        self._stopping = False
        self._drained = asyncio.Event()

    # ---- start and stop ----

    def open(self) -> None:
        self._lag.open()
        if self._export is not None:
            tracing.use(self._export)
            self._sending = asyncio.create_task(self._send_metrics(self._export), name="export of metrics")

    async def close(self) -> None:
        await self._lag.close()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
            self._sending = None
        if self._export is not None:
            tracing.drop(self._export)
            export, self._export = self._export, None
            await asyncio.to_thread(export.close)

    async def drain(self, seconds: float) -> int:
        """Reject new requests and wait for those in progress up to a time limit; returns the number of remaining
        requests."""
        self._stopping = True
        if self.under_way:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._drained.wait()
        return self.under_way

    # ---- requests ----

    def over(self, app: App) -> App:
        """Wrap `app`: its requests are counted, timed and get an id."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._request(app, scope, receive, send)
            elif scope["type"] == "websocket":
                await self._socket(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return observed

    async def _request(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        context = _context_of(scope)
        token = CURRENT.set(context)
        said = context.request_id.encode()
        status = 0

        async def tell(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ())]
                for name, _ in headers:
                    if name == _ID:
                        break
                else:
                    headers.append((_ID, said))
                if self._stopping:
                    headers.append((b"connection", b"close"))
                message = {"type": "http.response.start", "status": status, "headers": headers}
            await send(message)

        span = _begin(context, scope)
        counted = scope["path"] != _EVENTS  # a long poll that is always open
        self.under_way += counted
        try:
            if self._stopping:
                await failure(_stopping()).send(tell)
            else:
                await app(scope, receive, tell)
        finally:
            self.under_way -= counted
            if self._stopping and not self.under_way:
                self._drained.set()
            took = time.perf_counter() - began
            self._count(context, scope["method"], scope["path"], status, took)
            if span is not None:
                span.tell("http.response.status_code", status)
                span.tell("rock.route", context.route)
                span.end(f"status {status}" if status >= 500 or not status else "")
            CURRENT.reset(token)

    def _count(self, context: Context, method: str, path: str, status: int, took: float) -> None:
        route = context.route
        if not route:
            route = context.route = name_of(method, path) or "none"
        series = self._series.get((route, status))
        if series is None:
            outcome = f"{status // 100}xx" if route in _STREAMS else str(status or "cut")
            series = (REQUESTS.of(route, outcome), TIMES.of(route))
            if len(self._series) < 10_000:
                self._series[route, status] = series
        series[0].value += 1
        series[1].observe(took)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s: %d in %.1f ms", method, path, status, took * 1000)

    async def _socket(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket is not counted as a request in progress, because it may be open for days."""
        if self._stopping:
            await deny(scope, send, _stopping())
            return
        context = _context_of(scope)
        token = CURRENT.set(context)
        span = _begin(context, scope)
        try:
            await app(scope, receive, send)
        finally:
            REQUESTS.of(context.route or name_of("WEBSOCKET", scope["path"]) or "none", "socket").add()
            if span is not None:
                span.end()
            CURRENT.reset(token)

    # ---- metrics ----

    def measured(self, app: App) -> App:
        """Wrap `app`: adds the metrics at their path for authorized callers."""
        router = Router("metrics")
        router.add(_METRICS, self._metrics)
        path = _METRICS.path

        async def behind(scope: Scope, receive: Receive, send: Send) -> None:
            mine = scope["path"] == path and scope["type"] == "http" and scope["method"] == _METRICS.method
            await (router if mine else app)(scope, receive, send)

        return behind

    async def _metrics(self, request: Request) -> Answer:
        caller_of(request.scope).require(_METRICS.access)
        text = render(await self._families())
        if self.processes is not None:
            text = merged(text, await self.processes())
        return Answer(text, content_type=CONTENT_TYPE)

    async def _families(self) -> list[Family[Number] | Family[Distribution]]:
        own: list[Family[Number] | Family[Distribution]] = [
            gauge_of("rock_http_requests_under_way", "Requests that are being served", (), {(): self.under_way}),
            gauge_of("rock_event_loop_lag_worst_seconds", "Worst since the last report", (), {(): self._lag.worst()}),
            *process.gauges(),
        ]
        return [*REGISTRY.families.values(), *own, *(await self._extra() if self._extra is not None else ())]

    async def _send_metrics(self, export: Exporter) -> None:
        while True:
            await asyncio.sleep(self._every)
            try:
                sent = await asyncio.to_thread(export.send_metrics, await self._families())
            except Exception as error:
                log.warning("metrics could not be exported: %s", error)
            else:
                if not sent:
                    log.warning("the receiver of metrics did not take them")


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping", hint="retry when it is back", details={"retry_after": 2, **OUTAGE})


def _context_of(scope: Scope) -> Context:
    """The request id and trace context. Valid values of the caller are used; others are replaced."""
    request_id = traceparent = None
    headers, given, known = scope["headers"], b"", False
    for name, value in headers:
        if name in _KNOWN:
            known = True
            if name == _PARENT:
                traceparent = sane_traceparent(value.decode("latin-1"))
            elif name == _ID or request_id is None:
                request_id = sane_id(value) or request_id
                given = value if name == _ID else given
    context = Context(request_id or new_id(), traceparent)
    encoded = context.request_id.encode()
    if encoded != given:  # forwarded requests use the same id
        others = [header for header in headers if header[0] != _ID] if known else headers
        scope["headers"] = [*others, (_ID, encoded)]
    path: str = scope["path"]
    if path.startswith(_SANDBOXES):
        context.sandbox_id = path[len(_SANDBOXES) :].partition("/")[0][:128]
    return context


def _begin(context: Context, scope: Scope) -> tracing.Span | None:
    """Begin the span of a request, which becomes the parent of all requests made on its behalf."""
    tracer = tracing.tracer()
    if tracer is None:
        return None
    method = scope.get("method", "WEBSOCKET")
    name = name_of(method, scope["path"]) or method
    said = {"http.request.method": method, "url.path": scope["path"][:1024], "rock.request_id": context.request_id}
    if context.sandbox_id:
        said["rock.sandbox_id"] = context.sandbox_id
    span = tracer.start(name, "server", context.traceparent, said)
    context.traceparent = span.traceparent
    headers = [header for header in scope["headers"] if header[0] != _PARENT]
    scope["headers"] = [*headers, (_PARENT, span.traceparent.encode())]
    return span


# ---- injected faults ----
#
# A fault plan can drop responses: the connection is closed without a response, as by a failing network.

def dropped_route(method: str, path: str) -> str:
    """The route of a request, for `reply.ROUTE`; "other" for a path outside the route table."""
    given = path.split("/")
    for name, route in ROUTES.items():
        if route.method == method and fit(tuple(route.path.split("/")), given) is not None:
            return name
    return "other"


def dropping(app: App) -> App:
    """Wrap the application with the faults of its responses; it has to be the outermost wrapper."""

    async def over(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        dropped = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal dropped
            if message["type"] == "http.response.start":
                dropped = await faults.reply(dropped_route(scope["method"], scope["path"]))
                if dropped:
                    _cut(send)
                    await asyncio.sleep(0)
            if not dropped:
                await send(message)

        await app(scope, receive, sent)

    return over


def _cut(send: Send) -> None:
    """Close the connection behind a `send` of uvicorn, which has no message for that."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
