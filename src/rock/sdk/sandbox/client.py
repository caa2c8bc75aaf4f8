"""The names that ROCK's users import: `from rock.sdk.sandbox.client import Sandbox`."""

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
from rock.sdk.sandbox.group import SandboxGroup
from rock.sdk.sandbox.sandbox import Sandbox

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
