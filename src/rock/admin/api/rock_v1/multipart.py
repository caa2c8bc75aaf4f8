"""Forms with files (`multipart/form-data`), read as they come: a file is never whole in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser

from rock.errors import InvalidConfig

_HEAD = 64 << 10  # most bytes of a part's head, and of a field's value


def boundary_of(content_type: str | None) -> bytes:
    """What separates the parts; InvalidConfig when the body is no form."""
    head = Message()
    head["content-type"] = content_type or ""
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise InvalidConfig("the body is not multipart/form-data with a boundary")
    return boundary.encode("latin-1", "replace")


@dataclass
class Part:
    """One field: `filename` is None when it is no file. Its data has to be read before the next part comes."""

    name: str
    filename: str | None
    data: AsyncGenerator[bytes]

    async def text(self) -> str:
        """The whole value of a field that is no file."""
        value = bytearray()
        async for piece in self.data:
            value += piece
            if len(value) > _HEAD:
                raise InvalidConfig(f"the form field {self.name!r} is over {_HEAD} bytes")
        return value.decode(errors="replace")


class Form:
    """The parts of a body, in their order."""

    def __init__(self, chunks: AsyncIterator[bytes], boundary: bytes) -> None:
        self._chunks = chunks
        self._buffer = bytearray(b"\r\n")  # the first separator has no line end before it
        self._separator = b"\r\n--" + boundary

    async def parts(self) -> AsyncGenerator[Part]:
        """Each part; what was not read of one is passed over. InvalidConfig for a body that is cut off."""
        await self._skip(self._data())
        while await self._exactly(2) != b"--":
            head = BytesHeaderParser().parsebytes(await self._head())
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
        raise InvalidConfig("the form is cut off")

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        return bytes(self._buffer[:size])

    async def _head(self) -> bytes:
        """From the separator's line to the empty line."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _HEAD:
                raise InvalidConfig("the head of a form's part is too long")
            await self._more()
        head = bytes(self._buffer[:end]).partition(b"\r\n")[2]
        del self._buffer[: end + 4]
        if not head:
            raise InvalidConfig("a form's part has no head")
        return head

    async def _data(self) -> AsyncGenerator[bytes]:
        """Bytes up to the next separator, which is taken out."""
        size = len(self._separator)
        while (at := self._buffer.find(self._separator)) < 0:
            safe = len(self._buffer) - size + 1  # behind it a separator may have begun
            if safe > 0:
                piece = bytes(self._buffer[:safe])
                del self._buffer[:safe]
                yield piece
            await self._more()
        piece = bytes(self._buffer[:at])
        del self._buffer[: at + size]
        if piece:
            yield piece
