"""One model call in progress: from its recorded request to its recorded response.

An `Exchange` has the request, and produces the response for its clients (live.py). The sources of responses are an
upstream (here), the trainer (pull.py), and recorded calls (replay.py).

A response is recorded before its last byte is sent: before the event that ends a stream, or before the body. A response
that cannot be recorded is an error for the agent, and no recorded response.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from rock import faults
from rock.errors import RockError
from rock.gateway.call import ModelRequest, ModelResponse
from rock.gateway.dialects import DIALECTS, Dialect, DialectError, ErrorKind, StreamRenderer, Truncated
from rock.gateway.dialects.chat_stream import ChatParser
from rock.gateway.live import SSE_TYPE, Live
from rock.gateway.runs import Call, Run
from rock.gateway.sse import SSEError, SSEEvent, SSEParser
from rock.gateway.upstreams import Attempts, Upstream, UpstreamFailed
from rock.http.client import Headers, Interrupted, Response
from rock.protocol.runs import Price
from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.gateway")

CALLS = REGISTRY.counter(
    "rock_gateway_calls_total", "Model calls that ended, by dialect and outcome", "dialect", "outcome")
SECONDS = REGISTRY.histogram("rock_gateway_call_seconds", "From the request of a model call to its end", "source")
MAX_RESPONSE = 64 << 20  # bytes
_NO_RETRY: Headers = [(b"x-should-retry", b"false")]
_FINAL_KINDS = frozenset({"budget", "ended", "bad_request", "unauthorized", "unsupported"})


class Exchange:
    """A call in progress. raw: the request's body in the agent's dialect."""

    def __init__(self, run: Run, call: Call, request: ModelRequest, raw: dict[str, Any], prices: Any = None) -> None:
        self.run = run
        self.call = call
        self.request = request
        self.raw = raw
        self.dialect: Dialect = DIALECTS[call.dialect]
        self.live = call.live = Live()
        self._price: Price | None = prices
        self._renderer: StreamRenderer | None = None

    @property
    def renderer(self) -> StreamRenderer:
        """Renders the response as a stream of the agent's dialect."""
        if self._renderer is None:
            self._renderer = self.dialect.stream_renderer(self.request)
        return self._renderer

    # ---- results ----

    def first_byte(self) -> None:
        if self.call.first_byte is None:
            self.call.first_byte = time.time()

    async def respond(
        self, response: ModelResponse, body: dict[str, Any] | None = None, wire: bytes | None = None
    ) -> None:
        """Record a complete response and send it, as a stream if the agent requested one. body: it in the agent's
        dialect; wire: its bytes. A response that cannot be rendered is not recorded: the call still waits."""
        self.first_byte()
        rendered = self.dialect.render_response(response, self.request) if body is None else body
        stream = self._whole_stream(response) if self.call.stream else b""
        if not await self.record(response, rendered):
            return
        if self.call.stream:
            if not self.live.status:
                self.live.start(200, SSE_TYPE)
            self.live.send(stream)
            self.live.end()
        else:
            self.live.whole(200, orjson.dumps(rendered) if wire is None else wire)

    def _whole_stream(self, response: ModelResponse) -> bytes:
        try:
            return self.renderer.begin() + self.renderer.end(response)
        except BaseException:
            self._renderer = None
            raise

    async def record(self, response: ModelResponse, body: dict[str, Any]) -> bool:
        """Record the response; False when that failed, and the agent got an error."""
        await faults.point("gateway.call.answered")
        if not self.call.pending:
            return False
        try:
            self.run.finish(self.call, response, body, self._price)
        except RockError as error:
            self.fail("overloaded", f"the response could not be recorded: {error.message}")
            self.run.incomplete = True
            return False
        self._observe("done")
        await faults.point("gateway.call.recorded")
        return True

    def fail(
        self, kind: ErrorKind, message: str, *, status: int | None = None, body: bytes | None = None,
        headers: Headers | None = None, cancelled: bool = False,
    ) -> None:  # fmt: skip
        """End the call without a response: an error in the dialect of the agent. body: the error as it is sent."""
        if self.call.pending:
            self.run.fail(self.call, kind, message, state="cancelled" if cancelled else "failed")
            self._observe("cancelled" if cancelled else "failed")
        live = self.live
        if live.complete:
            return
        if live.status:
            try:
                live.send(self.renderer.error(kind, message))
            finally:
                live.abort()  # a stream without its end: the agent sees a broken response, never a complete one
            return
        code, error = self.dialect.render_error(kind, message)
        more = [*(headers or []), *(_NO_RETRY if kind in _FINAL_KINDS else [])]
        live.whole(status or code, orjson.dumps(error) if body is None else body, headers=more)

    def _observe(self, outcome: str) -> None:
        CALLS.of(self.call.dialect, outcome).add()
        SECONDS.of(self.run.source).observe(max(0.0, time.time() - self.call.started))


# ---- upstream ----


async def from_upstream(exchange: Exchange, upstream: Upstream, original: bytes, headers: Headers) -> None:
    """The response of an upstream. original: the bytes of the agent's request. Same-dialect responses pass unchanged
    except for token fields; others are converted."""
    attempts = Attempts()
    same = upstream.dialect is exchange.dialect
    token_fields = upstream.spec.token_fields != "none"
    try:
        body = _upstream_body(exchange, upstream, original, same, token_fields)
    except DialectError as error:
        exchange.fail("bad_request", str(error))
        return
    path = upstream.dialect.upstream_path(exchange.call.upstream_model or exchange.call.model, exchange.call.stream)
    try:
        await faults.point("gateway.call.sending")
        async with upstream.call(exchange.run.id, path, body, headers, attempts) as response:
            exchange.call.attempts = attempts.count
            if exchange.call.stream and (response.header(b"content-type") or "").startswith("text/event-stream"):
                await _relay(exchange, upstream, response, same, token_fields)
            else:
                await _whole(exchange, upstream, response, same, token_fields)
    except UpstreamFailed as error:
        exchange.call.attempts = max(1, attempts.count)
        pause: Headers = [(b"retry-after", b"%d" % max(1, error.retry_after))] if error.retry_after else []
        exchange.fail(error.kind, error.message, status=error.status or None, headers=pause,
                  body=_passed(error) if same else None)  # fmt: skip
    except Interrupted as error:
        kind: ErrorKind = "timeout" if error.timed_out else "upstream"
        exchange.fail(kind, f"the response of upstream {upstream.name} broke: {error}")
    except (Truncated, DialectError, SSEError) as error:
        exchange.fail("upstream", f"upstream {upstream.name} sent an invalid response: {error}")
    finally:
        exchange.call.attempts = max(1, attempts.count)


def _adds_usage(exchange: Exchange, same: bool) -> bool:
    """Whether the gateway requests the usage at the end of a stream, which the agent did not request."""
    options = exchange.raw.get("stream_options")
    wanted = isinstance(options, dict) and bool(options.get("include_usage"))
    return same and exchange.call.stream and exchange.call.dialect == "openai-chat" and not wanted


def _passed(error: UpstreamFailed) -> bytes | None:
    """The body of an upstream's error, if it is a JSON object."""
    try:
        return error.body if isinstance(orjson.loads(error.body), dict) else None
    except orjson.JSONDecodeError:
        return None


def _upstream_body(exchange: Exchange, upstream: Upstream, original: bytes, same: bool, token_fields: bool) -> bytes:
    model = exchange.call.upstream_model or exchange.call.model
    request = exchange.request
    unchanged = same and not token_fields and model == request.model and not exchange.run.spec.sampling
    if unchanged and not _adds_usage(exchange, same):
        return original
    request = replace(request, model=model, sampling=overridden(request.sampling, exchange.run.spec.sampling))
    stream = exchange.call.stream
    return orjson.dumps(upstream.dialect.render_request(request, stream=stream, token_fields=token_fields))


def overridden(sampling: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters with those of the run; None removes one."""
    merged = {**sampling, **overrides}
    return {name: value for name, value in merged.items() if value is not None}


async def _whole(exchange: Exchange, upstream: Upstream, response: Response, same: bool, token_fields: bool) -> None:
    data = upstream.hidden(await response.body(MAX_RESPONSE))
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DialectError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DialectError("it is not a JSON object")
    parsed = _versioned(exchange, upstream, upstream.dialect.parse_response(found))
    if not same:
        await exchange.respond(parsed)
        return
    if token_fields:
        found = upstream.dialect.strip_token_fields(found, exchange.request)
        data = orjson.dumps(found)
    await exchange.respond(parsed, found, data)


def _versioned(exchange: Exchange, upstream: Upstream, response: ModelResponse) -> ModelResponse:
    version = response.weight_version or exchange.run.weight_version or upstream.spec.weight_version
    return replace(response, weight_version=version)


async def _relay(exchange: Exchange, upstream: Upstream, response: Response, same: bool, token_fields: bool) -> None:
    """A stream: each piece is sent as it arrives, but the event that ends the response only after it was recorded."""
    parser, sse = upstream.dialect.stream_parser(), SSEParser(MAX_RESPONSE)
    renderer = None if same else exchange.renderer
    hides_usage = _adds_usage(exchange, same)
    live, size, finished = exchange.live, 0, False
    held: list[bytes] = []
    async with aclosing(response.pieces()) as pieces:
        async for piece in pieces:
            piece = upstream.hidden(piece)
            size += len(piece)
            if size > MAX_RESPONSE:
                raise DialectError(f"the stream is over {MAX_RESPONSE} bytes")
            exchange.first_byte()
            if not live.status:
                live.start(200, SSE_TYPE)
                if renderer is not None:
                    live.send(renderer.begin())
            events = list(sse.feed(piece))
            deltas = [delta for event in events for delta in parser.feed(event)]
            finished = finished or any(ends_stream(event) for event in events)
            if renderer is not None:
                parts = [renderer.feed(delta) for delta in deltas]
            elif token_fields or hides_usage:
                parts = list(_stripped(upstream.dialect, events, exchange, token_fields, hides_usage))
            else:
                parts = [piece]
            if finished:
                held += parts
            else:
                for part in parts:
                    live.send(part)
    whole = _versioned(exchange, upstream, parser.finish())
    if isinstance(parser, ChatParser) and not parser.ended:  # each stream of this dialect requests the usage
        raise Truncated("the stream ended before the usage")
    if not await exchange.record(whole, exchange.dialect.render_response(whole, exchange.request)):
        return
    for part in held:
        live.send(part)
    if renderer is not None:
        live.send(renderer.end(whole))
    live.end()


_LAST_EVENTS = frozenset({"message_stop", "response.completed", "response.failed", "response.incomplete"})


def ends_stream(event: SSEEvent) -> bool:
    """Whether it is the last event of a stream, in any dialect but Gemini, whose streams end with the body."""
    return event.data == "[DONE]" or event.event in _LAST_EVENTS or '"finishReason"' in event.data


def _stripped(
    dialect: Dialect, events: list[SSEEvent], exchange: Exchange, token_fields: bool, hides_usage: bool
) -> Iterator[bytes]:
    """The events without what the gateway requested and the agent did not."""
    for event in events:
        data = orjson.loads(event.data) if event.data != "[DONE]" else None
        if not isinstance(data, dict):
            yield event.render()
        elif hides_usage and data.get("choices") == [] and data.get("usage") is not None:
            continue
        elif token_fields:
            text = orjson.dumps(dialect.strip_token_fields(data, exchange.request)).decode()
            yield replace(event, data=text).render()
        else:
            yield event.render()


