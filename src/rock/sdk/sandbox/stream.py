"""The output of a command while it runs: `async for chunk in sandbox.stream("make")`."""

from __future__ import annotations

from codecs import getincrementaldecoder
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from rock import errors
from rock.protocol.action import BashObservation, CommandResponse
from rock.protocol.routes import Frame, FrameParser
from rock.sdk.http import decode
from rock.sdk.sandbox.link import SLACK, Link, parse
from rock.sdk.transport import Download


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output. data: the exact bytes. text: the same decoded as UTF-8 with replacement; a character that is
    split between two chunks is whole in the later one."""

    kind: Literal["stdout", "stderr"]
    data: bytes
    text: str


_decoder = getincrementaldecoder("utf-8")


class Decoding:
    """Chunks of one output, with whole characters."""

    def __init__(self) -> None:
        self._decoders = {"stdout": _decoder("replace"), "stderr": _decoder("replace")}

    def chunk(self, kind: Literal["stdout", "stderr"], data: bytes) -> Chunk:
        return Chunk(kind, data, self._decoders[kind].decode(data))

    def end(self) -> list[Chunk]:
        """The replacement characters of what ended within a character."""
        kinds: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")
        left = [Chunk(kind, b"", self._decoders[kind].decode(b"", True)) for kind in kinds]
        return [chunk for chunk in left if chunk.text]


class OutputStream:
    """The output of one command, which starts with the first step of the iteration.

    `result`: the result after the end of the iteration, with the exit code and without the output. `aclose`, or the end
    of an `async with`, before the end of the output kills the command.
    """

    result: CommandResponse | BashObservation | None

    def __init__(
        self, link: Link, target: str, body: dict[str, Any], answer: type[CommandResponse] | type[BashObservation]
    ) -> None:
        self.result = None
        self._link = link
        self._target = target
        self._body = body
        self._answer = answer
        self._parser = FrameParser()
        self._chunks: list[Chunk] = []
        self._decoding = Decoding()
        self._download: Download | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self.result is not None:
                raise StopAsyncIteration
            await self._more()
        return self._chunks.pop(0)

    async def wait(self) -> CommandResponse | BashObservation:
        """Skip the rest of the output and return the result."""
        async for _ in self:
            pass
        assert self.result is not None
        return self.result

    async def aclose(self) -> None:
        if self._download is not None:
            self._download.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _more(self) -> None:
        if self._download is None:
            limit = self._body.get("timeout")
            timeout = None if limit is None else limit + SLACK
            self._download = await self._link._transport.open(
                "POST", self._target, orjson.dumps(self._body), timeout=timeout
            )
        part = await self._download.next()
        if not part:
            raise errors.ServerError("the stream ended without a result")
        try:
            frames = list(self._parser.feed(part))
        except ValueError as error:
            await self.aclose()
            raise errors.ServerError(f"malformed stream: {error}") from None
        for kind, payload in frames:
            if kind is Frame.STDOUT:
                self._chunks.append(self._decoding.chunk("stdout", payload))
            elif kind is Frame.STDERR:
                self._chunks.append(self._decoding.chunk("stderr", payload))
            elif kind is Frame.RESULT:
                self.result = parse(self._answer, decode(payload))
                self._chunks += self._decoding.end()
            else:
                await self.aclose()
                raise errors.from_wire(decode(payload))
        if self.result is not None:
            await self._download.read()  # to the end of the body, so that the connection is reusable
