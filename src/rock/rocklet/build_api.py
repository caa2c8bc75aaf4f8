"""The route that builds images: a BuildRequest and the tar of a context come in frames, output and an image go out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import orjson

from rock.errors import Forbidden, InvalidConfig
from rock.protocol.images import BuildRequest, BuiltImage
from rock.protocol.keys import Access, caller_of
from rock.protocol.routes import ROUTES, Frame
from rock.rocklet.buildrun import Flow
from rock.rocklet.commits import scratch_of
from rock.rocklet.kept_api import first_of, frames_of, payloads_of
from rock.rocklet.node import Node
from rock.rocklet.stream import Streaming
from rock.runtime.image.locks import storing
from rock.runtime.image.steps import MOST_BYTES
from rock.wire.asgi import Answer, Request, Router, validate

_LARGEST_TAR = MOST_BYTES + (1 << 30)  # with its headers


def add_routes(router: Router, node: Node) -> None:
    async def build(request: Request) -> Answer:
        async with contextlib.AsyncExitStack() as stack:
            frames = await stack.enter_async_context(contextlib.aclosing(frames_of(request)))
            wish = await _wish(frames)
            if Access.ADMIN not in caller_of(request.scope).scopes:
                if wish.network == "host":
                    raise Forbidden("this key may not use the server's own network", hint='network="none" or "nat"')
                wish = wish.model_copy(update={"public_registries": True})
            scratch = contextlib.AsyncExitStack()
            folder = await scratch.enter_async_context(scratch_of(node.images.store))
            tar = folder / "context.tar"
            try:
                await _receive(frames, tar)
            except BaseException:
                await scratch.aclose()
                raise
        flow = Flow()
        streaming = Streaming(flow.pause, flow.resume)

        async def work() -> BuiltImage:
            async with scratch:
                return await node.builds.build(wish, tar, folder, lambda data: streaming.put(False, data), flow,
                                               caller_of(request.scope).owner)

        return streaming.answer(work(), request)

    router.add(ROUTES["build_image"], build)


async def _wish(frames: AsyncGenerator[tuple[Frame, bytes]]) -> BuildRequest:
    kind, payload = await first_of(frames)
    if kind is not Frame.RESULT:
        raise InvalidConfig("the first frame has to tell what is to be built")
    try:
        return validate(BuildRequest, orjson.loads(payload))
    except orjson.JSONDecodeError as error:
        raise InvalidConfig(f"the first frame is not JSON: {error}") from None


async def _receive(frames: AsyncGenerator[tuple[Frame, bytes]], tar: Path) -> None:
    size = 0
    with storing("taking in a context"), open(tar, "wb") as file:
        async for part in payloads_of(frames):
            size += len(part)
            if size > _LARGEST_TAR:
                raise InvalidConfig(f"the context is larger than {MOST_BYTES >> 30} GiB",
                                    hint="leave out what is not needed with .dockerignore")  # fmt: skip
            await asyncio.to_thread(file.write, part)
