"""Files in the ROCK dialect, over the data plane, and the parser of multipart forms."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from typing import IO, Any

from rock.admin.api.rock_v1.envelope import AboutSandbox, DataPlane, Malformed, Row, body_of, enveloped
from rock.errors import InvalidConfig, NotFound
from rock.http.asgi import Request
from rock.protocol.keys import Access

_CHUNK = 1 << 20


class ReadFile(AboutSandbox):
    path: str
    encoding: str | None = None
    errors: str | None = None


class WriteFile(AboutSandbox):
    path: str
    content: str


class Files:
    """Handlers of files, by method and path."""

    def __init__(self, data: DataPlane) -> None:
        self._data = data

    def routes(self) -> list[Row]:
        return [
            ("POST", "/read_file", enveloped(self.read_file, "read file failed"), Access.READ),
            ("POST", "/write_file", enveloped(self.write_file, "write file failed"), Access.RUN),
            ("POST", "/upload", enveloped(self.upload, "upload file failed"), Access.RUN),
        ]

    async def read_file(self, request: Request) -> dict[str, Any]:
        """Read a text file. A missing file has an empty text, as in ROCK, whose clients do not check the envelope here;
        the result reports it in another field."""
        spec = await body_of(request, ReadFile)
        try:
            data = await self._data.bytes(request, "read_file", spec.sandbox_id, query={"path": spec.path})
        except NotFound as error:
            return {"content": "", "failure_reason": str(error)}
        try:
            content = data.decode(spec.encoding or "utf-8", spec.errors or "backslashreplace")
        except (LookupError, UnicodeError) as error:
            raise InvalidConfig(f"{spec.path} cannot be read as {spec.encoding or 'utf-8'}: {error}",
                                hint="set encoding=None for UTF-8, or download the file as bytes") from None
        return {"content": content}

    async def write_file(self, request: Request) -> dict[str, Any]:
        spec = await body_of(request, WriteFile)
        data = spec.content.encode("utf-8", "surrogatepass")
        await self._data.bytes(request, "write_file", spec.sandbox_id, data, {"path": spec.path})
        return {"success": True, "message": f"{len(data)} bytes written to {spec.path}"}

    async def upload(self, request: Request) -> dict[str, Any]:
        """A form with `sandbox_id`, `target_path` and the file, which is streamed when it is the last field."""
        chunks = request.chunks()
        try:
            return await self._upload(request, Form(chunks, boundary_of(request.header(b"content-type"))))
        finally:
            async for _ in chunks:  # a client that is still sending does not read the response
                pass

    async def _upload(self, request: Request, form: Form) -> dict[str, Any]:
        fields = {"sandbox_id": request.path["sandbox_id"]} if "sandbox_id" in request.path else {}
        name: str | None = None
        with tempfile.TemporaryFile() as kept:
            sent = False
            async with aclosing(form.parts()) as parts:
                async for part in parts:
                    if part.name != "file":
                        fields[part.name] = (await part.text()).strip()
                    elif name is None:
                        name = part.filename or "file"
                        sent = bool(fields.get("sandbox_id") and fields.get("target_path"))
                        if sent:
                            await self._send(request, fields, part.data)
                        else:
                            async for piece in part.data:
                                await asyncio.to_thread(kept.write, piece)
            missing = [field for field in ("sandbox_id", "target_path") if not fields.get(field)]
            missing += ["file"] * (name is None)
            if missing:
                raise Malformed("; ".join(f"body.{field}: Field required" for field in missing))
            if not sent:
                kept.seek(0)
                await self._send(request, fields, _pieces(kept))
        return {"success": True, "message": f"uploaded to {fields['target_path']}", "file_name": name}

    async def _send(self, request: Request, fields: dict[str, str], data: AsyncIterator[bytes]) -> None:
        query = {"path": fields["target_path"]}
        await self._data.bytes(request, "write_file", fields["sandbox_id"], data, query)


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _CHUNK):
        yield piece


# ---- multipart forms ----
#
# `multipart/form-data` is parsed as a stream: a file is never held in memory completely.

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
