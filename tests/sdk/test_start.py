"""Starts that go wrong, against a server that answers as the test says: what was begun is undone."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import orjson
import pytest
from wire_server import Request, Wire, answer, serve

from rock import errors
from rock.protocol.sandbox import SandboxInfo, State
from rock.sdk.sandbox.client import Sandbox
from rock.sync import Sandbox as Blocking


def info(name: str, state: State, **more: Any) -> bytes:
    made = SandboxInfo(sandbox_id=name, state=state, image="x", is_alive=state is State.RUNNING, **more)
    return answer(orjson.dumps(made.model_dump(mode="json")))


def stopped(wire: Wire) -> list[str]:
    lines = [re.search(r"POST /v1/sandboxes/([^/]+)/stop ", request.line) for request in wire.requests]
    return [found[1] for found in lines if found]


async def always_pending(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
    name = orjson.loads(wire.requests[0].body)["sandbox_id"]
    if request.line.startswith("GET"):
        await asyncio.sleep(0.05)
    writer.write(info(name, State.STOPPED if "/stop" in request.line else State.PENDING))


async def first_answer_is_lost(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
    if len(wire.requests) == 1:
        await asyncio.sleep(30)
    name = orjson.loads(wire.requests[0].body)["sandbox_id"]
    writer.write(info(name, State.STOPPED if "/stop" in request.line else State.PENDING))


def test_a_start_that_takes_too_long_is_stopped() -> None:
    with serve(always_pending) as wire:
        sandbox = Blocking(base_url=wire.url, image="x", startup_timeout=0.3)
        with pytest.raises(errors.StartFailed, match=r"startup_timeout=0\.3"):
            sandbox.start()
        assert stopped(wire) == [sandbox.sandbox_id]


def test_a_cancelled_start_is_stopped() -> None:
    async def main(url: str) -> str | None:
        sandbox = Sandbox(base_url=url, image="x")
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sandbox.start()
        assert time.monotonic() - began < 5
        return sandbox.sandbox_id

    for reply in (always_pending, first_answer_is_lost):
        with serve(reply) as wire:
            name = asyncio.run(main(wire.url))
            assert stopped(wire) == [name]
            keys = {request.headers["idempotency-key"] for request in wire.requests if "sandboxes?" in request.line}
            assert len(keys) == 1


def test_a_refused_start_stops_nothing() -> None:
    async def taken(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        writer.write(answer(orjson.dumps(errors.Conflict("it exists").to_wire()), "409 Conflict"))

    with serve(taken) as wire:
        sandbox = Blocking(base_url=wire.url, image="x", sandbox_id="somebody-elses")
        with pytest.raises(errors.Conflict):
            sandbox.start()
        sandbox.stop()
        assert len(wire.requests) == 1 and sandbox.sandbox_id is None


def test_a_create_whose_answer_was_lost_is_asked_again_with_its_key() -> None:
    async def breaks_once(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> bool:
        if len(wire.requests) > 1:
            writer.write(info(orjson.loads(request.body)["sandbox_id"], State.RUNNING, host_name="h"))
        return len(wire.requests) == 1

    with serve(breaks_once) as wire:
        sandbox = Blocking(base_url=wire.url, image="x")
        sandbox.start()
        first, second = wire.requests
        assert first.headers["idempotency-key"] == second.headers["idempotency-key"] and first.body == second.body
        assert sandbox.host_name == "h"


def test_a_start_that_failed_says_why() -> None:
    async def failed(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        if request.line.startswith("POST /v1/sandboxes?"):
            writer.write(info("x", State.PENDING))
            return
        error = errors.ImageError("no such layer", sandbox_id="x", hint="import it").to_wire()
        writer.write(info("x", State.STOPPED, cause="start_failed", reason="no such layer", error=error))

    with serve(failed) as wire:
        with pytest.raises(errors.ImageError, match="no such layer"):
            Blocking(base_url=wire.url, image="x").start()


def test_only_what_was_set_travels() -> None:
    async def running(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        writer.write(info("x", State.RUNNING))

    with serve(running) as wire:
        Blocking(base_url=wire.url, api_key="k", image="x", memory="1g", extra_headers={"x-team": "a"}).start()
    (request,) = wire.requests
    assert set(orjson.loads(request.body)) == {"image", "memory", "sandbox_id"}
    assert request.headers["authorization"] == "Bearer k" and request.headers["x-team"] == "a"


def test_answers_of_a_newer_server_are_read() -> None:
    async def newer(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        body = SandboxInfo(sandbox_id="x", state=State.RUNNING, image="x", is_alive=True).model_dump(mode="json")
        writer.write(answer(orjson.dumps({**body, "from_the_future": 1})))

    with serve(newer) as wire:
        assert Blocking(base_url=wire.url).attach("x").is_alive()
