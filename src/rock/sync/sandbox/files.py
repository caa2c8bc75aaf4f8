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

PORTION = 1 << 20  # bytes of one read


class Files(Link):
    """Text files, and uploads by path. `fs` has all the rest."""

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self.fs = FileSystem(self)

    def read_file(self, request: ReadFileRequest | str) -> ReadFileResponse:
        """A text file, whole. NotFound; InvalidConfig when it is not text in that encoding (UTF-8 by default)."""
        spec = request if isinstance(request, ReadFileRequest) else ReadFileRequest(path=request)
        data = self.fs.read(spec.path)
        try:
            return ReadFileResponse(content=data.decode(spec.encoding or "utf-8", spec.errors or "strict"))
        except (UnicodeDecodeError, LookupError) as error:
            raise errors.InvalidConfig(
                f"{spec.path} cannot be read as text: {error}", hint="sandbox.fs.read gives bytes"
            ) from None

    def read_file_by_line_range(
        self,
        file_path: str,
        start_line: int | None = None,
        end_line: int | None = None,
        lines_per_request: int = 1000,
        session: str | None = None,
    ) -> ReadFileResponse:
        """Lines of a text file, counted from 1, both ends included; None is the first, or the last of the file.

        `lines_per_request` and `session` are of no effect: the file is read once, as far as it is asked for.
        """
        first = 1 if start_line is None else start_line
        if first < 1:
            raise errors.InvalidConfig(f"start_line({first}) must be positive")
        if end_line is not None and end_line < first:
            raise errors.InvalidConfig(f"end_line({end_line}) must be greater than start_line({first})")
        if not 1 <= lines_per_request <= 10_000:
            raise errors.InvalidConfig(f"lines_per_request({lines_per_request}) must be between 1 and 10000")
        kept: list[bytes] = []
        offset = before = 0  # bytes that were read, and line ends among them
        while end_line is None or before < end_line:
            part = self.fs.read(file_path, offset, PORTION)
            if not part:
                break
            lines = part.split(b"\n")
            skip = max(0, first - 1 - before)
            wanted = lines[skip : None if end_line is None else end_line - before]
            if wanted:  # each has its line end, but the last of the part
                kept.append(b"\n".join(wanted) + (b"\n" if skip + len(wanted) < len(lines) else b""))
            before += len(lines) - 1
            offset += len(part)
        return ReadFileResponse(content=b"".join(kept).decode("utf-8", "replace"))

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
            self.fs.upload_dir(source, request.target_path, merge=True, check="raise")
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
