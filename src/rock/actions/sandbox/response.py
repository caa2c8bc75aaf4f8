"""The answers, under ROCK's path; documented in `rock.protocol.action`."""

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
    StateTransitionRecord,
    UploadResponse,
    WriteFileResponse,
)
from rock.protocol.sandbox import CommitError as CommitErrorCode
from rock.protocol.sandbox import CommitPhase, State
from rock.protocol.sandbox import CommitStatus as CommitStatusResponse

CreateSessionResponse = CreateBashSessionResponse  # ROCK has one kind of session
FileUploadResponse = UploadResponse

__all__ = [
    "BashObservation",
    "ChmodResponse",
    "ChownResponse",
    "CloseBashSessionResponse",
    "CloseResponse",
    "CloseSessionResponse",
    "CommandResponse",
    "CommitErrorCode",
    "CommitPhase",
    "CommitStatusResponse",
    "CreateBashSessionResponse",
    "CreateSessionResponse",
    "DownloadFileResponse",
    "ExecuteBashSessionResponse",
    "FileInfo",
    "FileUploadResponse",
    "IsAliveResponse",
    "Observation",
    "OssSetupResponse",
    "ProcessInfo",
    "ReadFileResponse",
    "SandboxResponse",
    "SandboxStatusResponse",
    "SessionInfo",
    "State",
    "StateTransitionRecord",
    "UploadResponse",
    "WriteFileResponse",
]
