"""The requests under the path of ROCK's documentation; the same classes as in `rock.actions`."""

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

__all__ = [
    "Action",
    "BashAction",
    "ChmodRequest",
    "ChownRequest",
    "CloseBashSessionRequest",
    "CloseSessionRequest",
    "Command",
    "CreateBashSessionRequest",
    "ReadFileRequest",
    "UploadMode",
    "UploadRequest",
    "WriteFileRequest",
]
