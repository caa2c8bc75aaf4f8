"""Pull mode: the client that owns the run is the model. It reads calls by long polling, and answers them in any order.

A call waits in the recording, so it survives a crash of the server: it is answered by number, and the agent's retry
joins it. A call whose agent has disconnected is dropped after a grace period, unless the agent retries it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson

from rock.errors import Conflict, InvalidConfig
from rock.gateway.call import Message, ModelResponse, Text, Usage
from rock.gateway.dialects import DIALECTS, DialectError, Truncated
from rock.gateway.exchange import MAX_RESPONSE, Exchange
from rock.gateway.live import SSE_TYPE
from rock.gateway.runs import Call, Run
from rock.gateway.sse import SSEEvent
from rock.protocol.runs import AnswerCall, CallInfo, NextCall

_MOST_LINES = 1_000_000


async def wait_for_answer(exchange: Exchange) -> None:
    """Keep a call waiting until it is answered, or its time is over."""
    timeout = exchange.run.spec.pull_timeout - (time.time() - exchange.call.started)
    try:
        async with asyncio.timeout(max(0.0, timeout)):
            await exchange.live.ended()
    except TimeoutError:
        exchange.fail("timeout", f"the call was not answered within {exchange.run.spec.pull_timeout:g} s")


async def next_call(run: Run, after: int, wait: float) -> NextCall:
    """The first call above `after` that waits for an answer; waits up to `wait` seconds for one, or the end."""
    deadline = time.monotonic() + wait
    while True:
        waiting = [call for call in run.calls if call.state == "waiting"]
        found = next((call for call in waiting if call.number > after), None)
        remaining = deadline - time.monotonic()
        if found is not None or run.state == "ended" or run.closing or remaining <= 0:
            info = None if found is None else run.describe(found, bodies=True)
            return NextCall.made(state=run.state, call=info, waiting=len(waiting))
        changed = run.changed
        try:
            async with asyncio.timeout(remaining):
                await changed.wait()
        except TimeoutError:
            pass


def _open(run: Run, call: Call) -> bool:
    """Whether the call can be answered; False when it was answered already. Conflict."""
    if not run.spec.pull:
        raise Conflict(f"run {run.id} is not in pull mode", hint="its calls are answered by its upstream")
    if call.state == "done":
        return False
    if call.state != "waiting":
        raise Conflict(f"call {call.number} does not wait for an answer: it is {call.state}",
                       hint=call.error or "an agent that still needs the response repeats the call")
    return True


async def answer(run: Run, exchange: Exchange | None, call: Call, spec: AnswerCall) -> CallInfo:
    """Answer a call; an answered one stays unchanged. InvalidConfig, Conflict."""
    if not _open(run, call) or exchange is None:
        return run.describe(call)
    if spec.error is not None:
        exchange.fail(spec.error.kind, spec.error.message, status=spec.error.status)
        return run.describe(call)
    dialect = spec.dialect or call.dialect
    if spec.text is not None:
        parsed, body = _message(call, spec.text), None
    else:
        assert spec.response is not None
        try:
            parsed = DIALECTS[dialect].parse_response(spec.response)
        except DialectError as error:
            raise InvalidConfig(f"the response is not one of dialect {dialect}: {error}",
                                hint="answer with a response body of that dialect, or with text") from None
        body = None
        if dialect == call.dialect:
            body = DIALECTS[dialect].strip_token_fields(spec.response, exchange.request)
    try:
        await exchange.respond(_with_tokens(parsed, spec, run), body)
    except DialectError as error:
        raise InvalidConfig(f"the response cannot be sent in dialect {call.dialect}: {error}",
                            hint="answer with parts that the agent's dialect has") from None
    return run.describe(call)


def _message(call: Call, text: str) -> ModelResponse:
    return ModelResponse(id=f"rock-{call.number}", model=call.model, message=Message("assistant", (Text(text),)),
                         finish_reason="stop", usage=Usage())  # fmt: skip


def _with_tokens(parsed: ModelResponse, spec: AnswerCall, run: Run) -> ModelResponse:
    changes: dict[str, Any] = {"weight_version": spec.weight_version or parsed.weight_version or run.weight_version}
    if spec.prompt_token_ids is not None:
        changes["prompt_token_ids"] = spec.prompt_token_ids
    if spec.token_ids is not None:
        changes["token_ids"] = spec.token_ids
        changes["logprobs"] = spec.logprobs
    found = replace(parsed, **changes)
    if not (found.usage.prompt or found.usage.completion) and (found.prompt_token_ids or found.token_ids):
        usage = replace(found.usage, prompt=len(found.prompt_token_ids or ()), completion=len(found.token_ids or ()))
        found = replace(found, usage=usage)
    return found


async def answer_stream(
    run: Run, exchange: Exchange | None, call: Call, dialect: str, lines: AsyncIterator[bytes]
) -> CallInfo:
    """Answer with a stream: each line is an event of `dialect`. The agent receives the parts as they arrive. A body
    that ends early, or has an invalid line, breaks the response. InvalidConfig, Conflict."""
    if not _open(run, call) or exchange is None:
        return run.describe(call)
    parser = DIALECTS[dialect].stream_parser()
    renderer = exchange.renderer
    try:
        async for line in lines:
            event = _event(line)
            if event is None:
                continue
            exchange.first_byte()
            deltas = parser.feed(event)
            if call.stream:
                if not exchange.live.status:
                    exchange.live.start(200, SSE_TYPE)
                    exchange.live.send(renderer.begin())
                for delta in deltas:
                    exchange.live.send(renderer.feed(delta))
        whole = parser.finish()
        whole = replace(whole, weight_version=whole.weight_version or run.weight_version)
    except (Truncated, DialectError, InvalidConfig) as error:
        exchange.fail("upstream", f"the answer broke: {error}")
        raise InvalidConfig(f"the streamed answer is invalid: {error}",
                            hint="send one JSON event per line, and the end event of the dialect") from None
    except BaseException:
        exchange.fail("upstream", "the client that answered has disconnected")
        raise
    if not call.stream:
        await exchange.respond(whole)
    elif await exchange.record(whole, exchange.dialect.render_response(whole, exchange.request)):
        exchange.live.send(renderer.end(whole))
        exchange.live.end()
    return run.describe(call)


def _event(line: bytes) -> SSEEvent | None:
    text = line.strip()
    if not text:
        return None
    if text == b"[DONE]":
        return SSEEvent("", "[DONE]")
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidConfig(f"a line is not JSON: {error}", hint="one JSON event per line") from None
    kind = found.get("type", "") if isinstance(found, dict) else ""
    return SSEEvent(kind if isinstance(kind, str) else "", text.decode("utf-8", "replace"))


async def lines_of(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body as they arrive. InvalidConfig above the limits."""
    rest, size, count = b"", 0, 0
    async for piece in body:
        size += len(piece)
        if size > MAX_RESPONSE:
            raise InvalidConfig(f"the answer is over {MAX_RESPONSE} bytes", hint="send a shorter response")
        *complete, rest = (rest + piece).split(b"\n")
        count += len(complete)
        if count > _MOST_LINES:
            raise InvalidConfig(f"the answer has over {_MOST_LINES} lines", hint="send fewer events")
        for line in complete:
            yield line
    if rest:
        yield rest
