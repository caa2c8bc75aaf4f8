"""Many sandboxes by one request, each answered as soon as it is made: see admin/bulk.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import orjson

from rock.errors import InternalServerRockError, RockError
from rock.protocol.node import NodeCreates
from rock.protocol.routes import ROUTES, STREAM_TYPE, Frame, pack_frame
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.node import Node
from rock.wire.asgi import Answer, Request, Router
from rock.wire.configs import Configs

log = logging.getLogger("rock.node")


def add_routes(router: Router, node: Node) -> None:
    known = Configs()

    async def create_many(request: Request) -> Answer:
        wish = await request.model(NodeCreates)
        configs = [known.read(orjson.dumps(config)) for config in wish.configs]
        made = _made(node, [(sandbox_id, configs[place]) for sandbox_id, place in wish.sandboxes])
        return Answer(stream=made, content_type=STREAM_TYPE.encode())

    router.add(ROUTES["node_create_many"], create_many)


async def _made(node: Node, wanted: list[tuple[str, SandboxConfig]]) -> AsyncGenerator[bytes]:
    """Frames, together those that are there at the same time. Whoever asked and left has them made all the same."""
    frames, news = list[bytes](), asyncio.Event()

    async def make(sandbox_id: str, config: SandboxConfig) -> None:
        frames.append(await _one(node, sandbox_id, config))
        news.set()

    tasks = [asyncio.create_task(make(*each)) for each in wanted]
    try:
        left = len(tasks)
        while left:
            await news.wait()
            news.clear()
            ready, left = b"".join(frames), left - len(frames)
            frames.clear()
            yield ready
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(node: Node, sandbox_id: str, config: SandboxConfig) -> bytes:
    try:
        return pack_frame(Frame.RESULT, (await node.create(sandbox_id, config)).model_dump_json().encode())
    except RockError as error:
        told = error
    except Exception as error:
        log.exception("create of %s", sandbox_id)
        told = InternalServerRockError(f"{type(error).__name__}: {error}")
    return pack_frame(Frame.ERROR, orjson.dumps({**told.to_wire(), "sandbox_id": sandbox_id}, default=repr))
