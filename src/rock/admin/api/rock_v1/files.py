"""Files in the ROCK dialect, over the data plane."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import IO, Any

from rock.admin.api.rock_v1.envelope import AboutSandbox, DataPlane, Malformed, Row, body_of, enveloped
from rock.errors import InvalidConfig, NotFound
from rock.http.asgi import Request
from rock.http.multipart import Form, boundary_of
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
