"""A worker's heartbeat waits behind no burst that comes by the same address: its lease would be over."""

from __future__ import annotations

import asyncio
from typing import Any

from rock.admin.auth import Authenticated
from rock.http.asgi import Receive, Scope, Send, call

KEY = "the-owner's-key"
MANY = 300


def test_a_heartbeat_goes_past_a_burst_of_its_own_address() -> None:
    begun: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    door = Authenticated(app, KEY)

    def ask(path: str) -> Any:
        nobody: Any = None  # the door finds out by itself
        return call(door, "POST", path, headers={"authorization": f"Bearer {KEY}"}, caller=nobody)

    async def work() -> None:
        burst = [asyncio.create_task(ask("/v1/sandboxes")) for _ in range(MANY)]
        await asyncio.sleep(0)
        await ask("/v1/workers/one/beat")
        assert begun.count("/v1/sandboxes") < MANY / 2
        await asyncio.gather(*burst)
        assert len(begun) == MANY + 1

    asyncio.run(asyncio.wait_for(work(), 60))
