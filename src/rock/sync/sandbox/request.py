# GENERATED from src/rock/sdk/sandbox/request.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
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
