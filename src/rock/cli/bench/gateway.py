"""The measurements of the model gateway for `rock bench`: calls through it next to calls to the same upstream.

The upstream is a separate process, `python -m rock.cli.bench.gateway FOLDER`: uvicorn over an application that responds
at once. Calls go over kept-alive connections, as those of agents do.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from rock.cli.bench.floors import serving
from rock.cli.bench.measuring import used_memory
from rock.cli.serve.serve import http_over, listen
from rock.cli.serve.serve import run as run_loop
from rock.host import atomic_file
from rock.http.asgi import Answer, Receive, Request, Scope, Send
from rock.http.client import Pool
from rock.sdk.client import Client
from rock.sdk.sandbox.runs import Run

_REPLY = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "done"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20_000, "completion_tokens": 50, "total_tokens": 20_050},
}  # fmt: skip
_PATH = "/v1/chat/completions"
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": "y" * 1500}}}
_TOOLS = [
    {"type": "function", "function": {"name": f"tool_{n}", "description": "x" * 1500, "parameters": _SCHEMA}}
    for n in range(24)
]


def _body(content: str, turns: int = 0, stream: bool = False, tools: bool = True) -> bytes:
    """A request as agents send it: 80 kB with tools, and two messages for each earlier turn."""
    messages = [{"role": "system", "content": "s" * 4000}, {"role": "user", "content": content}]
    for number in range(turns):
        messages.append({"role": "assistant", "content": f"step {number}"})
        messages.append({"role": "user", "content": f"result {number}"})
    more: dict[str, Any] = {"tools": _TOOLS} if tools else {}
    return orjson.dumps({"model": "m", "stream": stream, "messages": messages, **more})


@contextlib.contextmanager
def fake_upstream() -> Iterator[str]:
    """The URL of such an upstream."""
    with (
        tempfile.TemporaryDirectory(prefix="rock-bench-") as folder,
        serving(folder, "-m", "rock.cli.bench.gateway", folder) as (url, _),
    ):
        yield url


class Caller:
    """Calls of an agent to one address."""

    def __init__(self, url: str, key: str = "none", limit: int = 512) -> None:
        self._pool = Pool(url, limit=limit)
        self._path = urlsplit(url).path + _PATH
        self._headers = [(b"authorization", b"Bearer " + key.encode()), (b"content-type", b"application/json")]

    async def call(self, body: bytes) -> tuple[float, float]:
        """Milliseconds to the first byte of the response's body, and to its end."""
        began = time.perf_counter()
        first = 0.0
        async with await self._pool.send("POST", self._path, self._headers, body, timeout=120) as response:
            async for _ in response.pieces():
                first = first or time.perf_counter() - began
        assert response.status == 200, response.status
        return 1000 * first, 1000 * (time.perf_counter() - began)

    async def close(self) -> None:
        await self._pool.close()


async def overhead(
    server: str, upstream: str, count: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of a call through the gateway and of the same call to the upstream, by kind, in turn."""
    client = Client(server)
    await client.upstreams.put("bench", upstream)
    run = await client.runs.create(upstream="bench")
    through, direct = Caller(run.base_url, run.api_key or ""), Caller(upstream)
    found: dict[str, tuple[list[float], list[float]]] = {"call": ([], []), "first byte": ([], [])}
    try:
        for number in range(count + 3):
            for place, caller in enumerate((through, direct)):
                _, whole = await caller.call(_body(f"call {number}"))
                first, _ = await caller.call(_body(f"stream {number}", stream=True))
                if number >= 3:
                    found["call"][place].append(whole)
                    found["first byte"][place].append(first)
    finally:
        await through.close()
        await direct.close()
        await run.delete(force=True)
    return found


async def pulled(server: str, count: int) -> list[float]:
    """Milliseconds of a call in pull mode: from the agent's request over the trainer's answer to the response."""
    run = await Client(server).runs.create(pull=True)
    agent = Caller(run.base_url, run.api_key or "")
    model = asyncio.create_task(_answer_all(run))
    try:
        values = [(await agent.call(_body(f"call {number}")))[1] for number in range(count + 1)]
    finally:
        model.cancel()
        await asyncio.gather(model, return_exceptions=True)
        await agent.close()
        await run.delete(force=True)
    return values[1:]


async def _answer_all(run: Run) -> None:
    after = 0
    while True:
        call = (await run.next(after, wait=30)).call
        if call is not None:
            after = call.number
            await run.answer(after, _REPLY)


async def many_agents(server: str, upstream: str, agents: int, calls: int) -> list[float]:
    """Calls per second of that many agents at once, each with a run of its own."""
    client = Client(server)
    await client.upstreams.put("bench", upstream)
    runs = [await client.runs.create(upstream="bench") for _ in range(agents)]
    callers = [Caller(one.base_url, one.api_key or "", 1) for one in runs]

    async def agent(caller: Caller) -> None:
        for number in range(calls):
            await caller.call(_body(f"call {number}", tools=False))

    began = time.perf_counter()
    await asyncio.gather(*map(agent, callers))
    rate = agents * calls / (time.perf_counter() - began)
    for caller in callers:
        await caller.close()
    for one in runs:
        await one.delete(force=True)
    return [rate]


async def memory_of_calls(server: str, pid: int, upstream: str, count: int) -> list[float]:
    """Kilobytes that each call adds to the server, of a run of `count` calls of 80 kB."""
    client = Client(server)
    await client.upstreams.put("bench", upstream)
    run = await client.runs.create(upstream="bench")
    caller = Caller(run.base_url, run.api_key or "")
    await caller.call(_body("warm"))
    before = used_memory(pid)
    for number in range(count):
        await caller.call(_body("task", turns=number % 100))
    grown = (used_memory(pid) - before) / count / 1e3
    await caller.close()
    await run.delete(force=True)
    return [max(0.0, grown)]


# ---- upstream ----


async def _upstream(scope: Scope, receive: Receive, send: Send) -> None:
    body = orjson.loads(await Request(scope, receive, {}).body())
    if not body.get("stream"):
        await Answer(orjson.dumps(_REPLY)).send(send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    for delta, finish in (({"role": "assistant", "content": "do"}, None), ({"content": "ne"}, None), ({}, "stop")):
        event = {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        data = b"data: " + orjson.dumps(event) + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def serve(folder: Path) -> None:
    """Serve until SIGTERM."""
    listener = listen("127.0.0.1", 0)
    http = http_over(_upstream)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(http, "should_exit", True))
    atomic_file.replace(folder / "server.json", orjson.dumps({"port": listener.getsockname()[1]}).decode())
    await http.serve(sockets=[listener])


if __name__ == "__main__":
    run_loop(serve(Path(sys.argv[1])))
