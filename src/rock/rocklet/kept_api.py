"""Files of sandboxes at rest, between this worker and the admin's archive: frames both ways, see protocol/routes.py."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import orjson

from rock.errors import InvalidConfig, RockError
from rock.protocol.node import NodeFiles
from rock.protocol.routes import ROUTES, STREAM_TYPE, Frame, FrameParser, pack_frame
from rock.rocklet.node import Node
from rock.wire.asgi import Answer, Request, Router, answer_model, dumps, validate


def add_routes(router: Router, node: Node) -> None:
    async def pack(request: Request) -> Answer:
        limit = request.integer("limit", 1 << 40)
        return Answer(stream=_framed(node, request.path["sandbox_id"], limit), content_type=STREAM_TYPE.encode())

    async def unpack(request: Request) -> Answer:
        frames = frames_of(request)
        async with contextlib.aclosing(frames):
            kind, payload = await first_of(frames)
            if kind is not Frame.RESULT:
                raise InvalidConfig("the first frame has to tell what comes")
            try:
                wanted = validate(NodeFiles, orjson.loads(payload))
            except orjson.JSONDecodeError as error:
                raise InvalidConfig(f"the first frame is not JSON: {error}") from None
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
    """The frames of a body. InvalidConfig for what is none."""
    parser = FrameParser()
    async for chunk in request.chunks():
        try:
            for frame in parser.feed(chunk):
                yield frame
        except ValueError as error:
            raise InvalidConfig(f"this is no frame: {error}") from None


async def first_of(frames: AsyncGenerator[tuple[Frame, bytes]]) -> tuple[Frame, bytes]:
    """The first frame, an empty error where there is none. `anext` with a default ends with a SystemError in Python
    3.11 when an outer generator has ended."""
    try:
        return await anext(frames)
    except StopAsyncIteration:
        return Frame.ERROR, b""


async def payloads_of(frames: AsyncGenerator[tuple[Frame, bytes]]) -> AsyncIterator[bytes]:
    """What STDOUT frames carry. InvalidConfig for others."""
    async for kind, payload in frames:
        if kind is not Frame.STDOUT:
            raise InvalidConfig(f"a frame of kind {kind.name} has no place here")
        yield payload
