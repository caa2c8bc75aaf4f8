"""The shape of a sandbox in ROCK: what its users annotate with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from rock.protocol.action import (
    BashAction,
    BashObservation,
    CloseBashSessionRequest,
    CloseBashSessionResponse,
    CloseResponse,
    Command,
    CommandResponse,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    IsAliveResponse,
    ReadFileRequest,
    ReadFileResponse,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)


@runtime_checkable
class AbstractSandbox(Protocol):
    """Every asynchronous `Sandbox` fits it; `isinstance` asks for the names of these methods."""

    async def is_alive(self) -> IsAliveResponse: ...
    async def create_session(self, request: CreateBashSessionRequest, /) -> CreateBashSessionResponse: ...
    async def run_in_session(self, action: BashAction, /) -> BashObservation: ...
    async def close_session(self, request: CloseBashSessionRequest, /) -> CloseBashSessionResponse: ...
    async def execute(self, command: Command, /) -> CommandResponse: ...
    async def read_file(self, request: ReadFileRequest, /) -> ReadFileResponse: ...
    async def write_file(self, request: WriteFileRequest, /) -> WriteFileResponse: ...
    async def upload(self, request: UploadRequest, /) -> UploadResponse: ...
    async def close(self) -> CloseResponse: ...
