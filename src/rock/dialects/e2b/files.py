"""HTTP routes of a sandbox: files as streams, health, measurements and variables."""

from __future__ import annotations

import mimetypes
import posixpath
import zlib
from collections.abc import AsyncIterator
from typing import Any

from rock.dialects.e2b.call import Call
from rock.dialects.e2b.connect import content_type
from rock.dialects.e2b.filesystem import make_dirs
from rock.errors import InvalidConfig, Unsupported
from rock.http.asgi import Answer, answer
from rock.http.multipart import Form, boundary_of
from rock.protocol.keys import Access

_METADATA = b"x-metadata-"
_CHUNK = 1 << 20


async def read(call: Call) -> Answer:
    """GET /files: a file as a stream."""
    call.require(Access.READ)
    path = await call.path(call.request.query.get("path", ""))
    found = await call.sandbox.json("stat_file", query={"path": path, "follow": 1})
    if found["kind"] == "directory":
        raise InvalidConfig(f"path '{path}' is a directory", hint="list it, or read one of its files")
    account = await call.account()
    query = {"path": path} if account.native is None else {"path": path, "user": account.native}
    reply = await call.sandbox.open("read_file", query=query)
    length = reply.header("content-length")
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    name = posixpath.basename(path).encode("ascii", "replace").decode().translate({34: "_", 92: "_", 13: "_", 10: "_"})
    return Answer(stream=reply.chunks(), length=int(length) if length.isdigit() else None, content_type=kind.encode(),
                  headers=[(b"content-disposition", f'inline; filename="{name}"'.encode())])  # fmt: skip


async def write(call: Call) -> Answer:
    """POST /files: one file as the body, or several as parts of a form whose file names are the paths."""
    call.require(Access.RUN)
    request = call.request
    if any(name.startswith(_METADATA) for name, _ in request.headers):
        raise Unsupported("metadata of files (X-Metadata-...) is not supported",
                          hint="write the file without metadata, and store the data in another file")  # fmt: skip
    raw = request.chunks()
    encoding = (request.header(b"content-encoding") or "identity").lower()
    try:
        return answer(await _write_all(call, _decoded(raw, encoding)))
    finally:
        async for _ in raw:  # a client that is still sending does not read the response
            pass


async def _write_all(call: Call, chunks: AsyncIterator[bytes]) -> list[dict[str, Any]]:
    request = call.request
    given = request.query.get("path", "")
    if content_type(request) == "application/octet-stream":
        if not given:
            raise InvalidConfig("the query parameter 'path' is missing", hint="add path=PATH to the URL")
        return [await _write_one(call, given, chunks)]
    written: list[dict[str, Any]] = []
    async for part in Form(chunks, boundary_of(request.header(b"content-type"))).parts():
        if part.name != "file":
            continue
        if given and written:
            raise InvalidConfig("the query parameter 'path' is for one file, and the form has more",
                                hint="name each file by the file name of its part")
        name = given or _file_name(part.filename)
        if not name:
            raise InvalidConfig("a part of the form has no file name", hint="use the path as file name")
        written.append(await _write_one(call, name, part.data))
    if not written:
        raise InvalidConfig("the form has no part with the name 'file'", hint="send each file as a part 'file'")
    return written


def _file_name(name: str | None) -> str:
    """The file name of a part: clients send it as raw UTF-8, and escape quotation marks and line ends."""
    if not name:
        return ""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    for escaped, plain in (("%22", '"'), ("%0D", "\r"), ("%0A", "\n")):
        text = text.replace(escaped, plain)
    return text


async def _write_one(call: Call, name: str, chunks: AsyncIterator[bytes]) -> dict[str, Any]:
    path = await call.path(name)
    await make_dirs(call, posixpath.dirname(path) or "/")
    account = await call.account()
    query = {"path": path} if account.native is None else {"path": path, "user": account.native}
    await call.sandbox.read("write_file", chunks, query)
    return {"name": posixpath.basename(path), "type": "file", "path": path}


def _decoded(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    if encoding == "identity":
        return chunks
    if encoding != "gzip":
        raise Unsupported(f"content-encoding {encoding[:40]!r} is not supported", hint="use gzip, or none")
    return _gunzip(chunks)


async def _gunzip(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The uncompressed bytes, in portions of limited size. The limit of all is that of the sandbox's disk."""
    inflate = zlib.decompressobj(wbits=31)
    async for chunk in chunks:
        while chunk:
            try:
                part = inflate.decompress(chunk, _CHUNK)
            except zlib.error as error:
                raise InvalidConfig(f"the body is not gzip: {error}", hint="send it uncompressed") from None
            if part:
                yield part
            if inflate.eof:
                break
            chunk = inflate.unconsumed_tail
    if not inflate.eof:
        raise InvalidConfig("the compressed body is incomplete", hint="send it again")
