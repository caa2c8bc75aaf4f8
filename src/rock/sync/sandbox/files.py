# GENERATED from src/rock/sdk/sandbox/files.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's calls for files, over `sandbox.fs`."""

from __future__ import annotations

from pathlib import Path

from rock import errors
from rock.protocol.action import (
    ReadFileRequest,
    ReadFileResponse,
    UploadMode,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)
from rock.protocol.sandbox import SandboxConfig
from rock.sync.sandbox.filesystem import FileSystem
from rock.sync.sandbox.link import Link


class Files(Link):
    """Text files, and uploads by path. `fs` has all the rest."""

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self.fs = FileSystem(self)

    def read_file(self, request: ReadFileRequest | str) -> ReadFileResponse:
        """A text file, whole. NotFound; InvalidConfig when it is not text in that encoding (UTF-8 by default)."""
        wish = request if isinstance(request, ReadFileRequest) else ReadFileRequest(path=request)
        data = self.fs.read(wish.path)
        try:
            return ReadFileResponse(content=data.decode(wish.encoding or "utf-8", wish.errors or "strict"))
        except (UnicodeDecodeError, LookupError) as error:
            raise errors.InvalidConfig(
                f"{wish.path} cannot be read as text: {error}", hint="sandbox.fs.read gives bytes"
            ) from None

    def write_file(self, request: WriteFileRequest) -> WriteFileResponse:
        """Write a text file; missing parent folders are made."""
        info = self.fs.write(request.path, request.content)
        return WriteFileResponse(message=f"{info.size} bytes written to {info.path}")

    def write_file_by_path(self, content: str, path: str) -> WriteFileResponse:
        """`write_file` without a request."""
        return self.write_file(WriteFileRequest(content=content, path=path))

    def upload(self, request: UploadRequest) -> UploadResponse:
        """Copy a local file or folder in. A missing local file is told (`success` is False), as ROCK does."""
        source = Path(request.source_path)
        if request.upload_mode is UploadMode.OSS:
            message = 'object storage is not used here: upload_mode is "auto" or "direct"'
            return UploadResponse(success=False, message=message)
        if source.is_dir():
            self.fs.upload_dir(source, request.target_path)
        elif source.is_file():
            self.fs.upload_file(source, request.target_path)
        else:
            return UploadResponse(success=False, message=f"File not found: {request.source_path}")
        return UploadResponse(message=f"uploaded to {request.target_path}", file_name=source.name)

    def upload_by_path(
        self, file_path: str, target_path: str, upload_mode: UploadMode | str = UploadMode.AUTO
    ) -> UploadResponse:
        """`upload` without a request."""
        mode = UploadMode(upload_mode)
        return self.upload(UploadRequest(source_path=file_path, target_path=target_path, upload_mode=mode))
