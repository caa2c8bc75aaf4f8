"""The requests, under ROCK's path; documented in `rock.protocol.action`."""

from rock.protocol.action import (
    Action,
    BashAction,
    ChmodRequest,
    ChownRequest,
    CloseBashSessionRequest,
    CloseSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadMode,
    UploadRequest,
    WriteFileRequest,
)

CreateSessionRequest = CreateBashSessionRequest  # ROCK has one kind of session

__all__ = [
    "Action",
    "BashAction",
    "ChmodRequest",
    "ChownRequest",
    "CloseBashSessionRequest",
    "CloseSessionRequest",
    "Command",
    "CreateBashSessionRequest",
    "CreateSessionRequest",
    "ReadFileRequest",
    "UploadMode",
    "UploadRequest",
    "WriteFileRequest",
]
