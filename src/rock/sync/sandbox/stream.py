# GENERATED from src/rock/sdk/sandbox/stream.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Output while it comes: `for chunk in sandbox.stream("make")`."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from rock import errors
from rock.protocol.action import BashObservation, CommandResponse
from rock.protocol.routes import Frame, FrameParser
from rock.sync.sandbox.link import SLACK, Link, parse
from rock.sync.transport import Download, decode


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output: the exact bytes, as they came."""

    kind: Literal["stdout", "stderr"]
    data: bytes

    @property
    def text(self) -> str:
        """The bytes as UTF-8; what is none is replaced (a character may be cut at the end of a piece)."""
        return self.data.decode("utf-8", "replace")


class OutputStream:
    """The output of one command. It starts with the first step of the iteration.

    `result`: the outcome, once the iteration has ended; it has the exit status, and not the output that was streamed.
    Leaving early (`close`, or the end of an `with`) ends the command as well.
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
        self._download: Download | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks:
            if self.result is not None:
                raise StopIteration
            self._more()
        return self._chunks.pop(0)

    def wait(self) -> CommandResponse | BashObservation:
        """Pass over the rest of the output, and give the outcome."""
        for _ in self:
            pass
        assert self.result is not None
        return self.result

    def close(self) -> None:
        if self._download is not None:
            self._download.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _more(self) -> None:
        if self._download is None:
            limit = self._body.get("timeout")
            timeout = None if limit is None else limit + SLACK
            self._download = self._link._transport.open(
                "POST", self._target, orjson.dumps(self._body), timeout=timeout
            )
        part = self._download.next()
        if not part:
            raise errors.ServerError("the stream ended without a result")
        try:
            frames = list(self._parser.feed(part))
        except ValueError as error:
            self.close()
            raise errors.ServerError(f"malformed stream: {error}") from None
        for kind, payload in frames:
            if kind is Frame.STDOUT:
                self._chunks.append(Chunk("stdout", payload))
            elif kind is Frame.STDERR:
                self._chunks.append(Chunk("stderr", payload))
            elif kind is Frame.RESULT:
                self.result = parse(self._answer, decode(payload))
            else:
                self.close()
                raise errors.from_wire(decode(payload))
        if self.result is not None:
            self._download.read()  # the end of the body: the connection can be used again
