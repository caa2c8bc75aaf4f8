"""A parser of `multipart/form-data` that works on a stream: a file is never held in memory completely."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

from rock.errors import InvalidConfig

_HEAD = 64 << 10  # maximum bytes of a part's head, and of a field's value
FORM = "send a form with the content type multipart/form-data; boundary=..., as `curl -F` does"


def boundary_of(content_type: str | None) -> bytes:
    """The separator of the parts; InvalidConfig when the body is not a form."""
    head = Message()
    head["content-type"] = content_type or ""
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise InvalidConfig("the body is not a multipart/form-data form, or has no boundary", hint=FORM)
    return boundary.encode("latin-1", "replace")


@dataclass
class Part:
    """One field: `filename` is None when it is not a file. Its data has to be read before the next part is
    requested."""

    name: str
    filename: str | None
    data: AsyncGenerator[bytes]

    async def text(self) -> str:
        """The complete value of a field that is not a file."""
        value = bytearray()
        async for piece in self.data:
            value += piece
            if len(value) > _HEAD:
                raise InvalidConfig(f"the form field {self.name!r} has more than {_HEAD} bytes",
                                    hint="send large content as a file of the form")
        return value.decode(errors="replace")


class Form:
    """The parts of a body, in their order."""

    def __init__(self, chunks: AsyncIterator[bytes], boundary: bytes) -> None:
        self._chunks = chunks
        self._buffer = bytearray(b"\r\n")  # there is no line end before the first separator
        self._separator = b"\r\n--" + boundary

    async def parts(self) -> AsyncGenerator[Part]:
        """Each part; unread data of a part is skipped. InvalidConfig for an incomplete body."""
        await self._skip(self._data())
        while await self._exactly(2) != b"--":
            # File names are raw UTF-8, as browsers send them.
            head = HeaderParser().parsestr((await self._head()).decode("utf-8", "surrogateescape"))
            name = head.get_param("name", header="content-disposition")
            part = Part(name if isinstance(name, str) else "", head.get_filename(), self._data())
            yield part
            await self._skip(part.data)

    async def _skip(self, data: AsyncGenerator[bytes]) -> None:
        async for _ in data:
            pass

    async def _more(self) -> None:
        async for chunk in self._chunks:
            self._buffer += chunk
            return
        raise InvalidConfig("the body ends before the last part of the form", hint="send the whole form again")

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        return bytes(self._buffer[:size])

    async def _head(self) -> bytes:
        """Parse from the separator's line to the empty line."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _HEAD:
                raise InvalidConfig(f"the head of a part of the form has more than {_HEAD} bytes",
                                    hint="use a shorter file name and fewer headers of the part")
            await self._more()
        head = bytes(self._buffer[:end]).partition(b"\r\n")[2]
        del self._buffer[: end + 4]
        if not head:
            raise InvalidConfig("a part of the form has no headers", hint=FORM)
        return head

    async def _data(self) -> AsyncGenerator[bytes]:
        """The bytes up to the next separator, which is consumed."""
        size = len(self._separator)
        while (at := self._buffer.find(self._separator)) < 0:
            safe = len(self._buffer) - size + 1  # a separator may have begun after this position
            if safe > 0:
                piece = bytes(self._buffer[:safe])
                del self._buffer[:safe]
                yield piece
            await self._more()
        piece = bytes(self._buffer[:at])
        del self._buffer[: at + size]
        if piece:
            yield piece
