"""A snapshot as a tar: `manifest.json`, and the layers above its image, the oldest first (decision 60).

    manifest.json      Manifest
    layers/0.tar ...   one layer each, as images/layers/tar_writer.py writes it

What arrives is hostile. The manifest is limited and validated before any layer is read; each layer has the announced
size, and the packer process compares its digest and confines its paths.
"""

from __future__ import annotations

import base64
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson
from pydantic import Field, ValidationError

from rock.errors import InvalidConfig
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.sandbox import ArchivedFiles
from rock.protocol.wire import Wire

FORMAT = "rock-snapshot-1"
MOST_LAYERS = 64
_LARGEST_MANIFEST = 16 << 20
_LARGEST_STATE = 1 << 20  # of one session, encoded
_BLOCK = tarfile.BLOCKSIZE
_HINT = "export the snapshot again with `rock snapshot export`"


class ArchivedSession(Wire):
    """A session: its request, and the state of its shell in base64."""

    spec: CreateBashSessionRequest
    state: str | None = Field(default=None, max_length=_LARGEST_STATE)


class Manifest(Wire):
    """What a snapshot is. sandbox_id: of which it was taken. layers: oldest first. memory: "session" with the state of
    shells, else "files"."""

    format: str = FORMAT
    sandbox_id: str = Field(default="", max_length=128)
    image: str = Field(min_length=1, max_length=512)
    image_digest: str = Field(max_length=200)
    memory: str = Field(default="files", pattern="^(files|session)$")
    layers: list[ArchivedFiles] = Field(min_length=1, max_length=MOST_LAYERS)
    sessions: list[ArchivedSession] = Field(default_factory=list, max_length=100)
    env: dict[str, str] = Field(default_factory=dict, max_length=1000)
    left_out: list[str] = Field(default_factory=list, max_length=1000)


def header(name: str, size: int) -> bytes:
    """The head of an entry."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What follows the content of an entry."""
    return bytes(-size % _BLOCK)


END = bytes(2 * _BLOCK)


class Reader:
    """Reads such a tar from a stream."""

    def __init__(self, data: AsyncIterator[bytes]) -> None:
        self._data = data
        self._buffer = b""

    async def manifest(self) -> Manifest:
        """The first entry. InvalidConfig."""
        size = await self._entry("manifest.json", _LARGEST_MANIFEST)
        raw = b"".join([part async for part in self._content(size)])
        try:
            found = Manifest.model_validate(orjson.loads(raw))
            for one in found.sessions:
                base64.b64decode(one.state or "", validate=True)
        except (ValidationError, ValueError) as error:
            text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
            raise InvalidConfig(f"the manifest of the snapshot is not valid: {text[:300]}", hint=_HINT) from None
        if found.format != FORMAT:
            raise InvalidConfig(f"the format of the snapshot is {found.format[:50]!r} and not {FORMAT!r}",
                                hint="use a server of the version that exported it")  # fmt: skip
        return found

    async def layer(self, number: int, files: ArchivedFiles) -> AsyncGenerator[bytes]:
        """The content of a layer, which has the announced size. InvalidConfig."""
        size = await self._entry(f"layers/{number}.tar", files.size)
        if size != files.size:
            raise InvalidConfig(f"layer {number} of the snapshot has {size} bytes, and {files.size} are announced",
                                hint=_HINT)  # fmt: skip
        async for part in self._content(size):
            yield part

    async def _entry(self, name: str, most: int) -> int:
        """The size of the next entry, which has to be a file of this name."""
        head = await self._exactly(_BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise InvalidConfig(f"the snapshot is not a tar: {error}", hint=_HINT) from None
        if info.name != name or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise InvalidConfig(f"the snapshot has {info.name[:100]!r} where {name} is expected", hint=_HINT)
        if not 0 <= info.size <= most:
            raise InvalidConfig(f"{name} of the snapshot has {info.size} bytes, more than {most}", hint=_HINT)
        return info.size

    async def _content(self, size: int) -> AsyncGenerator[bytes]:
        left = size
        while left:
            part = await self._some(left)
            left -= len(part)
            yield part
        await self._exactly(-size % _BLOCK)

    async def _some(self, most: int) -> bytes:
        while not self._buffer:
            found: Any = await anext(self._data, None)
            if found is None:
                raise InvalidConfig("the snapshot ends in the middle", hint=_HINT)
            self._buffer = found
        part, self._buffer = self._buffer[:most], self._buffer[most:]
        return part

    async def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            found += await self._some(count - len(found))
        return found
