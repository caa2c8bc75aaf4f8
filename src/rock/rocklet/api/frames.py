"""Routes with frames in both directions: batches of creates, image builds, and transfers of retained files.

A batch creates many sandboxes with one request; each response is sent as soon as its sandbox exists. See
admin/workers/batching.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import orjson

from rock.errors import Forbidden, InvalidConfig, RockError, unexpected
from rock.http.asgi import Answer, Configs, Request, Router, answer_model, dumps, validate
from rock.images.derive import MOST_BYTES
from rock.images.records import storing
from rock.protocol.images import BuildRequest, BuiltImage
from rock.protocol.keys import Access, caller_of
from rock.protocol.node import NodeCreates, NodeFiles
from rock.protocol.routes import ROUTES, STREAM_TYPE, Frame, FrameParser, pack_frame
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.commands.output import Streaming
from rock.rocklet.images.build import BuildOutput
from rock.rocklet.images.commits import scratch_of
from rock.rocklet.node import Node

log = logging.getLogger("rock.node")

FRAMES = "use a client of the server's release; the frames of its protocol differ"  # hint of errors


def add_bulk_routes(router: Router, node: Node) -> None:
    known = Configs()

    async def create_many(request: Request) -> Answer:
        spec = await request.model(NodeCreates)
        configs = [known.read(orjson.dumps(config)) for config in spec.configs]
        made = _made(node, [(sandbox_id, configs[place]) for sandbox_id, place in spec.sandboxes])
        return Answer(stream=made, content_type=STREAM_TYPE.encode())

    router.add(ROUTES["node_create_many"], create_many)


async def _made(node: Node, wanted: list[tuple[str, SandboxConfig]]) -> AsyncGenerator[bytes]:
    """Response frames, combined when several are ready at once. Creation continues when the client disconnects."""
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
        told = unexpected(error)
    return pack_frame(Frame.ERROR, orjson.dumps({**told.to_wire(), "sandbox_id": sandbox_id}, default=repr))


# ---- image builds ----
#
# The request is a BuildRequest and the tar of a context in frames. The response is the output and an image.

_LARGEST_TAR = MOST_BYTES + (1 << 30)  # including tar headers


def add_build_routes(router: Router, node: Node) -> None:
    async def build(request: Request) -> Answer:
        async with contextlib.AsyncExitStack() as stack:
            frames = await stack.enter_async_context(contextlib.aclosing(frames_of(request)))
            spec = await _spec(frames)
            if Access.ADMIN not in caller_of(request.scope).scopes:
                if spec.network == "host":
                    raise Forbidden("this key may not use the server's own network", hint='network="none" or "nat"')
                spec = spec.model_copy(update={"public_registries": True})
            scratch = contextlib.AsyncExitStack()
            folder = await scratch.enter_async_context(scratch_of(node.images.store))
            tar = folder / "context.tar"
            try:
                await _receive(frames, tar)
            except BaseException:
                await scratch.aclose()
                raise
        flow = BuildOutput()
        streaming = Streaming(flow.pause, flow.resume)

        async def work() -> BuiltImage:
            async with scratch:
                return await node.builds.build(spec, tar, folder, lambda data: streaming.put(False, data), flow,
                                               caller_of(request.scope).owner)

        return streaming.answer(work(), request)

    router.add(ROUTES["build_image"], build)


async def _spec(frames: AsyncGenerator[tuple[Frame, bytes]]) -> BuildRequest:
    kind, payload = await first_of(frames)
    if kind is not Frame.RESULT:
        raise InvalidConfig("the first frame does not describe the build", hint=FRAMES)
    try:
        return validate(BuildRequest, orjson.loads(payload))
    except orjson.JSONDecodeError as error:
        raise InvalidConfig(f"the first frame is not JSON: {error}", hint=FRAMES) from None


async def _receive(frames: AsyncGenerator[tuple[Frame, bytes]], tar: Path) -> None:
    size = 0
    with storing("taking in a context"), open(tar, "wb") as file:
        async for part in payloads_of(frames):
            size += len(part)
            if size > _LARGEST_TAR:
                raise InvalidConfig(f"the context is larger than {MOST_BYTES >> 30} GiB",
                                    hint="leave out what is not needed with .dockerignore")  # fmt: skip
            await asyncio.to_thread(file.write, part)


# ---- retained files ----
#
# Transfers between this worker and the archive of the admin: frames both ways, see protocol/routes.py.

def add_retained_routes(router: Router, node: Node) -> None:
    async def pack(request: Request) -> Answer:
        limit = request.integer("limit", 1 << 40)
        return Answer(stream=_framed(node, request.path["sandbox_id"], limit), content_type=STREAM_TYPE.encode())

    async def unpack(request: Request) -> Answer:
        frames = frames_of(request)
        async with contextlib.aclosing(frames):
            kind, payload = await first_of(frames)
            if kind is not Frame.RESULT:
                raise InvalidConfig("the first frame does not describe the files", hint=FRAMES)
            try:
                wanted = validate(NodeFiles, orjson.loads(payload))
            except orjson.JSONDecodeError as error:
                raise InvalidConfig(f"the first frame is not JSON: {error}", hint=FRAMES) from None
            made = await node.unpack(request.path["sandbox_id"], wanted.config, wanted.files, payloads_of(frames))
        return answer_model(made, 201)

    router.add(ROUTES["node_pack"], pack)
    router.add(ROUTES["node_unpack"], unpack)


async def _framed(node: Node, sandbox_id: str, limit: int) -> AsyncGenerator[bytes]:
    try:
        async with contextlib.aclosing(node.kept.pack(sandbox_id, limit)) as stream:
            async for part in stream:
                if isinstance(part, bytes):
                    yield pack_frame(Frame.STDOUT, part)
                else:
                    yield pack_frame(Frame.RESULT, dumps(part))
    except RockError as error:
        yield pack_frame(Frame.ERROR, orjson.dumps(error.to_wire(), default=repr))


async def frames_of(request: Request) -> AsyncGenerator[tuple[Frame, bytes]]:
    """The frames of a body. InvalidConfig for invalid frames."""
    parser = FrameParser()
    async for chunk in request.chunks():
        try:
            for frame in parser.feed(chunk):
                yield frame
        except ValueError as error:
            raise InvalidConfig(f"the body has an invalid frame: {error}", hint=FRAMES) from None


async def first_of(frames: AsyncGenerator[tuple[Frame, bytes]]) -> tuple[Frame, bytes]:
    """The first frame, or an empty error when there is none. `anext` with a default raises SystemError in Python 3.11
    when an outer generator has ended."""
    try:
        return await anext(frames)
    except StopAsyncIteration:
        return Frame.ERROR, b""


async def payloads_of(frames: AsyncGenerator[tuple[Frame, bytes]]) -> AsyncIterator[bytes]:
    """The payloads of STDOUT frames. InvalidConfig for other frames."""
    async for kind, payload in frames:
        if kind is not Frame.STDOUT:
            raise InvalidConfig(f"a frame of kind {kind.name} is not expected here", hint=FRAMES)
        yield payload
