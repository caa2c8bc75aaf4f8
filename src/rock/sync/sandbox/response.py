# GENERATED from src/rock/sdk/sandbox/response.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""The answers; the same classes as in `rock.actions`."""

from rock.protocol.action import (
    BashObservation,
    ChmodResponse,
    ChownResponse,
    CloseBashSessionResponse,
    CloseResponse,
    CloseSessionResponse,
    CommandResponse,
    CreateBashSessionResponse,
    DownloadFileResponse,
    ExecuteBashSessionResponse,
    FileInfo,
    IsAliveResponse,
    Observation,
    OssSetupResponse,
    ProcessInfo,
    ReadFileResponse,
    SandboxResponse,
    SandboxStatusResponse,
    SessionInfo,
    UploadResponse,
    WriteFileResponse,
)
from rock.protocol.sandbox import State

__all__ = [
    "BashObservation",
    "ChmodResponse",
    "ChownResponse",
    "CloseBashSessionResponse",
    "CloseResponse",
    "CloseSessionResponse",
    "CommandResponse",
    "CreateBashSessionResponse",
    "DownloadFileResponse",
    "ExecuteBashSessionResponse",
    "FileInfo",
    "IsAliveResponse",
    "Observation",
    "OssSetupResponse",
    "ProcessInfo",
    "ReadFileResponse",
    "SandboxResponse",
    "SandboxStatusResponse",
    "SessionInfo",
    "State",
    "UploadResponse",
    "WriteFileResponse",
]
