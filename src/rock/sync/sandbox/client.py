# GENERATED from src/rock/sdk/sandbox/client.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""The names that ROCK's users import: `from rock.sync.sandbox.client import Sandbox`."""

from rock.protocol.action import (
    Action,
    BashAction,
    CloseSessionRequest,
    Command,
    CommandResponse,
    CreateBashSessionRequest,
    Observation,
    ReadFileRequest,
    ReadFileResponse,
    RunMode,
    RunModeType,
    UploadMode,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)
from rock.protocol.sandbox import SandboxConfig, SandboxGroupConfig
from rock.sync.sandbox.group import SandboxGroup
from rock.sync.sandbox.sandbox import Sandbox

__all__ = [
    "Action",
    "BashAction",
    "CloseSessionRequest",
    "Command",
    "CommandResponse",
    "CreateBashSessionRequest",
    "Observation",
    "ReadFileRequest",
    "ReadFileResponse",
    "RunMode",
    "RunModeType",
    "Sandbox",
    "SandboxConfig",
    "SandboxGroup",
    "SandboxGroupConfig",
    "UploadMode",
    "UploadRequest",
    "UploadResponse",
    "WriteFileRequest",
    "WriteFileResponse",
]
